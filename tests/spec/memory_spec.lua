-- What orepa.memory() says of training: what is counted, and that steps after the first need nothing new.

local process = require "tests.spec.process"

-- The numbers that a text printed in a process of its own.
local function numbers_of(text)
  local list = {}
  for number in process.run_text(text):gmatch "%S+" do list[#list + 1] = assert(tonumber(number), number) end
  return list
end

describe("memory()", function()
  -- The system counter at each step of two epochs.
  it("asks the system for nothing after the first training step", function()
    local asked = numbers_of [[
local orepa = require "orepa"
local net = require "orepa.models".create("resnet18", { reparam = "orepa", width = 0.25, classes = 10, stem = "small" })
local dataset = orepa.data.images { images = (orepa.rand(96, 3, 40, 40) * 255):to "uint8",
  labels = orepa.zeros({ 96 }, { dtype = "int64" }), classes = 10 }
local loader = orepa.data.loader { dataset = dataset, batch_size = 32, shuffle = true, augment = true, padding = 4, crop = 32,
  flip = true, mean = { 0.5, 0.5, 0.5 }, deviation = { 0.2, 0.2, 0.2 } }
local nowhere <close> = assert(io.open("/dev/null", "w"))
orepa.train.fit { net = net, loader = loader, epochs = 3, log = nowhere,
  optimizer = orepa.optim.SGD(orepa.optim.param_groups(net), { lr = 0.01, momentum = 0.9 }),
  loss = function(logits, labels)
    print(orepa.memory().system)
    return orepa.F.cross_entropy(logits, labels)
  end }
print(orepa.memory().system)
]]
    assert.equal(10, #asked)
    assert.is_true(asked[1] > 100 and asked[2] > asked[1]) -- the first backward pass asks, too
    -- A block or two don't fit what was freed: with the base kernels, or where no collection came between two steps.
    assert.is_true(asked[4] <= asked[2] + 2, asked[4])
    for k = 5, 10 do assert.equal(asked[4], asked[k], ("step %d"):format(k - 1)) end
  end)

  it("counts what kernels use beside their arguments, and tensors to the byte", function()
    local scratch, one, two, peak, cached, limit, live = table.unpack(numbers_of [[
local orepa = require "orepa"
local x, w = orepa.ones(2, 16, 20, 20), orepa.ones(16, 16, 3, 3)
local before = orepa.memory().live
orepa.no_grad(function() orepa.F.conv2d(x, w):release() end)
print(orepa.memory().live - before)
local start = orepa.memory().live
local a <close> = orepa.zeros(1 << 20)
print(orepa.memory().live - start)
do local b <close> = orepa.zeros(3 << 20) end
local now = orepa.memory()
print(now.live - start, now.peak - start, now.cached, now.limit, now.live)
]])
    assert.is_true(scratch > 0)
    assert.equal(4 << 20, one)
    assert.equal(4 << 20, two)
    assert.equal(16 << 20, peak)
    assert.is_true(cached >= 12 << 20)
    assert.is_true(limit >= live + cached)
  end)
end)
