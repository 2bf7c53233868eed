-- Wrong arguments of every kind to every documented function: always a Lua error or a valid result, never a crash. The calls are
-- made in child processes (wrong_arguments.lua), so that a crash is a failure that names the call.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"

local PARTS = 4

describe("wrong arguments", function()
  for part = 1, PARTS do
    it(("never end the process (part %d of %d)"):format(part, PARTS), function()
      local folder = process.folder()
      local text, code = process.run({ process.root .. "/tests/spec/wrong_arguments.lua", part, PARTS }, folder)
      local last = process.read(folder .. "/last"):match "^[^\n]*"
      process.remove(folder)
      assert(code == 0, ("exit code %d after: %s\n%s"):format(code, last, text))
      local calls, errors = text:match "(%d+) calls, (%d+) errors"
      assert.is_true(tonumber(calls) > 10000 and tonumber(errors) > 1000)
    end)
  end
end)

-- What was once a crash, or a loop without end.
describe("numbers that are too large", function()
  local nn, F, L, tree = orepa.nn, orepa.F, orepa.reparam, orepa.tree
  local HUGE = math.maxinteger

  it("in a nested table that names one list many times", function()
    local list = {}
    for k = 1, 2048 do list[k] = k end
    for _ = 1, 5 do
      local outer = {}
      for k = 1, 2048 do outer[k] = list end
      list = outer
    end
    fails("too many elements", orepa.tensor, list)
  end)

  it("in a table that holds itself", function()
    local list = {}
    list[1] = list
    fails("nested deeper than 6", orepa.tensor, list)
  end)

  it("as shapes", function()
    fails("too large to address", orepa.zeros, 1 << 32, 1 << 32)
    fails("too large to address", orepa.zeros, 0, 1 << 32, 1 << 32)
    fails("out of memory", orepa.zeros, 1 << 50)
    fails("out of memory", orepa.arange, 1e14)
    fails("no finite list", orepa.arange, 0 / 0)
    fails("no finite list", orepa.arange, 1, 2, 0 / 0)
    fails("at most 6 dimensions", orepa.zeros, 1, 1, 1, 1, 1, 1, 1)
    local one = orepa.ones({ 1, 1 }, { dtype = "float64", device = "ref" })
    fails("too large to address", one.expand, one, 1 << 40, 1 << 40)
  end)

  it("as steps of a slice", function()
    assert.same({ 1 }, orepa.arange(3):slice(1, 1, 3, HUGE):tolist())
  end)

  it("as options of a convolution or a pool", function()
    local x, w = orepa.ones(1, 1, 5, 5), orepa.ones(1, 1, 5, 5)
    for _, name in ipairs { "stride", "padding", "dilation" } do
      for _, value in ipairs { HUGE, 1 << 62, 1 << 31, -1, math.mininteger } do
        fails("conv2d: stride", F.conv2d, x, w, { [name] = value })
        fails("max_pool2d: kernel", F.max_pool2d, x, { kernel_size = 3, [name] = value })
      end
    end
  end)

  it("as kernels of a block", function()
    local k = (1 << 31) - 1
    fails("too large to address", nn.ReparamBlock, { in_channels = 4, out_channels = 4, kernel_size = k,
      branches = { { L.conv { 1 }, L.prior { k } } } })
    fails("odd number of at least 5", nn.OREPALargeConv, { in_channels = 3, out_channels = 4, kernel_size = HUGE })
    fails("too large to address", tree.prior, 1 << 61, { 1, 1 })
  end)

  it("as threads", function()
    fails("set_threads", orepa.set_threads, (1 << 32) + 1)
    fails("set_threads", orepa.set_threads, 0)
  end)
end)

describe("inner functions", function()
  it("check what they get", function()
    local leaf = orepa.tree.leaf { slot = 1, input = 1, output = 1 }
    assert.has_error(function() orepa.tree.leaf { kind = {} } end)
    assert.has_error(function() orepa.tree.leaf { kind = "leaf", slot = 1, input = 1, output = 1 } end)
    assert.has_error(function() orepa.tree.leaf { slot = (1 << 32) + 1, input = 1, output = 1 } end)
    assert.has_error(function() orepa.tree.chain({ leaf }, 0, false) end)
    getmetatable(leaf).__gc(leaf)
    assert.has_error(function() orepa.tree.chain({ leaf }, 1, false) end)
  end)

  it("take no tensors of two devices", function()
    local here, there = orepa.ones(2), orepa.ones({ 2 }, { device = "ref" })
    here:requires_grad_():sum():backward()
    there:requires_grad_():sum():backward()
    for _, pair in ipairs { { here, there }, { there, here } } do
      local ok, message = pcall(orepa.sgd_step, pair, {}, { 1, 1 }, { 0, 0 }, { lr = 1 })
      assert.is_false(ok)
      assert.matches("on 'cpu'", message)
      ok, message = pcall(orepa.square_sums, pair)
      assert.is_false(ok)
      assert.matches("on 'ref'", message)
    end
  end)
end)
