-- What outlives a call: whether gradients are recorded, lives of handles, memory and its limit, threads.

local orepa = require "orepa"
local process = require "tests.spec.process"
local fails = require "tests.spec.fails"

describe("no_grad", function()
  local x = orepa.ones(2):requires_grad_()

  it("gives back what the function returns, and records nothing", function()
    local y, n, none = orepa.no_grad(function() return x * 2, 7, nil end)
    assert.is_false(y.requires_grad)
    assert.equal(7, n)
    assert.is_nil(none)
    assert.is_true((x * 2).requires_grad)
  end)

  it("ends with an error of the function, which passes through unchanged", function()
    local thrown = {}
    local ok, caught = pcall(orepa.no_grad, function() error(thrown) end)
    assert.is_false(ok)
    assert.equal(thrown, caught)
    assert.is_true(orepa.is_grad_enabled())
  end)

  it("as a guard ends with its scope, by an error too", function()
    do
      local _ <close> = orepa.no_grad()
      assert.is_false(orepa.is_grad_enabled())
    end
    assert.is_true(orepa.is_grad_enabled())
    pcall(function()
      local _ <close> = orepa.no_grad()
      error "out"
    end)
    assert.is_true(orepa.is_grad_enabled())
  end)

  it("nests", function()
    orepa.no_grad(function()
      orepa.no_grad(function() end)
      pcall(orepa.no_grad, error)
      assert.is_false(orepa.is_grad_enabled())
    end)
    assert.is_true(orepa.is_grad_enabled())
  end)

  it("takes a function or nothing", function()
    fails("function expected", orepa.no_grad, 1)
    assert.is_true(orepa.is_grad_enabled())
  end)

  it("may yield", function()
    local steps = coroutine.wrap(function()
      return orepa.no_grad(function()
        coroutine.yield "between"
        return orepa.is_grad_enabled()
      end)
    end)
    assert.equal("between", steps())
    assert.is_false(steps())
    assert.is_true(orepa.is_grad_enabled())
  end)
end)

describe("gradients", function()
  it("add up in leaves until they are set to nil", function()
    local x = orepa.tensor({ 2, 3 }):requires_grad_();
    (x * x):sum():backward();
    (x * x):sum():backward()
    assert.same({ 8, 12 }, x.grad:tolist())
    x.grad = nil
    assert.is_nil(x.grad)
    x.grad = orepa.ones(2)
    assert.same({ 1, 1 }, x.grad:tolist())
    fails("3", function() x.grad = orepa.ones(3) end)
    fails("a tensor expected, got number", function() x.grad = 1 end)
  end)

  it("of more than one number need dy; a graph is used once unless retained", function()
    local x = orepa.ones(2):requires_grad_()
    local y = x * x
    assert.has_error(function() y:backward() end)
    y:backward(orepa.ones(2), { retain_graph = true })
    y:backward(orepa.tensor { 1, 2 })
    assert.same({ 4, 6 }, x.grad:tolist())
    assert.has_error(function() y:backward(orepa.ones(2)) end)
    fails("unknown option 'retain'", y.backward, y, { retain = true })
  end)

  it("are asked of floating leaves alone", function()
    fails("int64", function() orepa.ones({ 1 }, { dtype = "int64" }):requires_grad_() end)
    local x = orepa.ones(1):requires_grad_()
    assert.is_true(x.is_leaf)
    assert.is_false((x * 2).is_leaf)
    assert.is_false((x * 2):detach().requires_grad)
  end)

  it("forbid writing to a leaf outside no_grad", function()
    local x = orepa.ones(2):requires_grad_()
    assert.has_error(function() x:add_(1) end)
    assert.has_error(function() x[1] = 5 end)
    orepa.no_grad(function() x:add_(1) end)
    assert.same({ 2, 2 }, x:tolist())
  end)

  it("of a tensor that was written since name the op", function()
    local x = orepa.ones(2):requires_grad_()
    local y = x * 1
    local z = y * y
    orepa.no_grad(function() y:detach():add_(1) end)
    fails("mul", function() z:sum():backward() end)
  end)
end)

describe("handles", function()
  it("are closed by <close>; views and graphs keep what they need", function()
    local view, kept
    do
      local t <close> = orepa.arange(4)
      view, kept = t:slice(1, 2, 3), t
    end
    assert.equal("tensor (released)", tostring(kept))
    assert.same({ 2, 3 }, view:tolist())
    local x = orepa.ones(2):requires_grad_()
    local y
    do
      local middle <close> = x * 3
      y = (middle * middle):sum()
    end
    y:backward()
    assert.same({ 18, 18 }, x.grad:tolist())
  end)

  it("that die give their memory back without any help", function()
    -- In a process of its own: what a collection left before decides when the next one is due.
    local text = process.run_text [[
local orepa = require "orepa"
for _ = 1, 300 do local _ = orepa.zeros(1 << 20) end -- 4 MiB each
print(orepa.memory().peak)]]
    assert(tonumber(text) < 200 << 20, text)
  end)
end)

describe("memory", function()
  after_each(function() orepa.set_memory_limit(nil) end)

  it("that runs out is a Lua error with numbers, and the session goes on", function()
    collectgarbage()
    orepa.empty_cache()
    orepa.set_memory_limit(orepa.memory().live + (32 << 20))
    fails("out of memory: %d+ bytes wanted on 'cpu', where %d+ are in use", orepa.zeros, 64 << 20)
    local x = orepa.ones(1000, 1000):requires_grad_()
    fails("out of memory", function()
      local sum = x
      for _ = 1, 100 do sum = sum * x end -- each is kept by the graph
    end)
    assert.equal(1e6, x:sum():item())
    collectgarbage()
    local y = (x * x):sum()
    y:backward()
    assert.equal(2, x.grad[1][1]:item())
  end)

  it("of dead handles is collected before an op gives up", function()
    collectgarbage()
    orepa.empty_cache()
    orepa.set_memory_limit(orepa.memory().live + (24 << 20))
    collectgarbage "stop"
    local ok, message = pcall(function()
      for _ = 1, 20 do local _ = orepa.zeros(2 << 20) end -- 8 MiB each
    end)
    collectgarbage "restart"
    assert(ok, message)
  end)

  it("is counted", function()
    collectgarbage() -- what earlier tests left may not go while this one counts
    collectgarbage() -- nor what their finalizers let go
    local before = orepa.memory()
    local t = orepa.zeros(1 << 20)
    local after = orepa.memory()
    assert.is_true(after.live >= before.live + (4 << 20))
    t:release()
    assert.equal(before.live, orepa.memory().live)
    assert.is_true(orepa.memory().cached > 0)
    orepa.empty_cache()
    assert.equal(0, orepa.memory().cached)
    fails("set_memory_limit: %-1 bytes", orepa.set_memory_limit, -1)
    fails("no device", orepa.memory, "abacus")
  end)
end)

describe("threads", function()
  local count = orepa.threads()
  after_each(function() orepa.set_threads(count) end)

  it("can be set, and change no bit of an own kernel's result", function()
    orepa.manual_seed(1)
    local x, sums = orepa.randn(300, 1000), {}
    for _, n in ipairs { 1, 2, 3 } do
      orepa.set_threads(n)
      assert.equal(n, orepa.threads())
      sums[n] = (x:exp():sum(1)):tolist()
    end
    assert.same(sums[1], sums[2])
    assert.same(sums[1], sums[3])
  end)

  it("are at least one", function()
    for _, n in ipairs { 0, -1, 1e6 } do fails("set_threads", orepa.set_threads, n) end
    fails("an integer expected, got no value", orepa.set_threads)
    assert.equal(count, orepa.threads())
  end)
end)

describe("saving", function()
  it("and loading keeps names, types, shapes, order and metadata", function()
    local path = os.tmpname()
    local tensors = { b = orepa.arange(24):reshape(1, 2, 3, 4), a = orepa.tensor({ 1, 2 }, { dtype = "int64" }),
      c = orepa.tensor({ 0.5 }, { dtype = "bfloat16" }), scalar = orepa.tensor(3) }
    orepa.save(path, tensors, { origin = "spec" }, { "b", "scalar", "a", "c" })
    local back, meta, names = orepa.load(path)
    os.remove(path)
    assert.same({ "b", "scalar", "a", "c" }, names)
    assert.same({ origin = "spec" }, meta)
    for name, t in pairs(tensors) do
      assert.same({ t.dtype, t.shape, t:tolist() }, { back[name].dtype, back[name].shape, back[name]:tolist() })
    end
  end)

  it("of what is no tensor, or to nowhere, is an error with the name", function()
    local path = os.tmpname()
    fails("'x' is a number, not a tensor", orepa.save, path, { x = 1 })
    fails("metadata 'k' is a number", orepa.save, path, { x = orepa.ones(1) }, { k = 1 })
    fails("named by strings", orepa.save, path, { orepa.ones(1) })
    os.remove(path)
    fails("/nowhere/x.safetensors", orepa.save, "/nowhere/x.safetensors", { x = orepa.ones(1) })
    fails("/nowhere/x.safetensors", orepa.load, "/nowhere/x.safetensors")
  end)
end)
