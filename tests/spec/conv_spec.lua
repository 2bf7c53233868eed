-- F.conv2d with what follows it, and kernels that are kept ready while nothing changes them.

local orepa = require "orepa"
local models = require "orepa.models"
local with = require("orepa.options").with
local fails = require "tests.spec.fails"
local F = orepa.F

local function difference(a, b)
  return (a - b):abs():max():item() / b:abs():max():item()
end

local function same(a, b)
  return a:eq(b):all():item()
end

local function twice(f, ...)
  f(...)
  return f(...)
end

-- Shapes that go by different ways: Winograd's, strided, 1x1, on a small map, grouped.
local geometries = {
  { { 4, 32, 20, 20 }, { 48, 32, 3, 3 }, { padding = 1 } },
  { { 2, 32, 20, 20 }, { 48, 32, 3, 3 }, { padding = 1, stride = 2 } },
  { { 2, 32, 9, 8 }, { 40, 32, 1, 1 }, {} },
  { { 2, 24, 9, 8 }, { 40, 24, 1, 1 }, { stride = 2 } },
  { { 3, 64, 2, 2 }, { 64, 64, 3, 3 }, { padding = 1 } },
  { { 2, 32, 12, 12 }, { 32, 8, 3, 3 }, { padding = 1, groups = 4 } },
}

describe("conv2d with add and act", function()
  it("is the sum and the ReLU of the convolution, with gradients and without", function()
    orepa.manual_seed(1)
    for _, g in ipairs(geometries) do
      local x, w, b = orepa.randn(g[1]), orepa.randn(g[2]), orepa.randn(g[2][1])
      local y = F.conv2d(x, w, b, g[3])
      local r = orepa.randn(y.shape)
      for _, o in ipairs { { add = r }, { act = "relu" }, { add = r, act = "relu" }, { act = "none" } } do
        local wanted = o.add and y + r or y
        if o.act == "relu" then wanted = F.relu(wanted) end
        local options = with(g[3], o)
        assert.is_true(difference(F.conv2d(x, w, b, options), wanted) < 1e-5)
        orepa.no_grad(function()
          for _ = 1, 3 do assert.is_true(difference(F.conv2d(x, w, b, options), wanted) < 1e-5) end
        end)
        local parameter = w:clone():requires_grad_()
        local recorded = F.conv2d(x, parameter, b, options)
        assert.is_true(difference(recorded:detach(), wanted) < 1e-5)
        recorded:sum():backward()
        assert.same(w.shape, parameter.grad.shape)
      end
    end
  end)

  it("broadcasts what is added and refuses what does not fit", function()
    local x, w = orepa.randn(1, 4, 5, 5), orepa.randn(4, 4, 3, 3)
    local y = F.conv2d(x, w, { padding = 1 })
    local column = orepa.randn(1, 4, 1, 1)
    assert.is_true(difference(F.conv2d(x, w, { padding = 1, add = column }), y + column) < 1e-6)
    fails("1x4x4x4", F.conv2d, x, w, { padding = 1, add = orepa.ones(1, 4, 4, 4) })
    fails("option 'add': a tensor expected, got number", F.conv2d, x, w, { add = 1 })
    fails("option 'act' is", F.conv2d, x, w, { act = "tanh" })
    fails("option 'act' is", F.conv2d, x, w, { act = true })
    fails("kernel has 3 input channels", F.conv2d, x, orepa.randn(4, 3, 3, 3), { add = y, act = "relu" })
  end)

  it("adds itself", function()
    local x, w = orepa.randn(2, 32, 12, 12), orepa.randn(32, 32, 3, 3)
    local wanted = F.relu(F.conv2d(x, w, { padding = 1 }) + x)
    orepa.no_grad(function()
      for _ = 1, 3 do assert.is_true(difference(F.conv2d(x, w, { padding = 1, add = x, act = "relu" }), wanted) < 1e-6) end
    end)
  end)
end)

describe("a kept kernel", function()
  it("gives the same bits each time, and those of the new numbers once it is written", function()
    orepa.manual_seed(2)
    for _, g in ipairs(geometries) do
      local x, w = orepa.randn(g[1]), orepa.randn(g[2])
      local function run(kernel) return orepa.no_grad(function() return F.conv2d(x, kernel, g[3]) end) end
      local first = run(w)
      for _ = 1, 3 do assert.is_true(same(first, run(w))) end
      w:mul_(0.5):add_(0.25)
      local changed = run(w)
      assert.is_true(same(changed, run(w:clone())))
      assert.is_true(same(changed, twice(run, w)))
      w[1]:fill_(3) -- through a view
      assert.is_true(same(run(w), run(w:clone())))
    end
  end)

  it("serves maps of several sizes, and views of a kernel", function()
    local w = orepa.randn(64, 32, 3, 3)
    for _, size in ipairs { 20, 12, 7, 20, 12, 7 } do
      local x = orepa.randn(2, 32, size, size)
      orepa.no_grad(function()
        assert.is_true(same(F.conv2d(x, w, { padding = 1 }), F.conv2d(x, w:clone(), { padding = 1 })))
        local part = w:slice(1, 1, 32)
        assert.is_true(same(twice(F.conv2d, x, part, { padding = 1 }), F.conv2d(x, part:clone(), { padding = 1 })))
        local square = orepa.randn(32, 32, 3, 3)
        local turned = square:permute(2, 1, 3, 4)
        assert.is_true(same(twice(F.conv2d, x, square, { padding = 1 }), F.conv2d(x, square:clone(), { padding = 1 })))
        assert.is_true(same(twice(F.conv2d, x, turned, { padding = 1 }), F.conv2d(x, turned:clone(), { padding = 1 })))
      end)
    end
  end)

  it("serves one and several groups", function()
    local w = orepa.randn(64, 32, 3, 3)
    for k = 1, 6 do
      local groups = k % 2 + 1
      local x = orepa.randn(2, 32 * groups, 20, 20)
      orepa.no_grad(function()
        local function run(kernel) return F.conv2d(x, kernel, { padding = 1, groups = groups }) end
        assert.is_true(same(twice(run, w), run(w:clone())))
      end)
    end
  end)

  it("is kept from the second time on and goes with a write, or with the kernel", function()
    local x, w = orepa.randn(2, 32, 20, 20), orepa.randn(64, 32, 3, 3)
    local function live_after(f)
      orepa.no_grad(function() F.conv2d(x, w, { padding = 1 }):release() end)
      local before = orepa.memory().live
      f()
      return orepa.memory().live - before
    end
    local function run() orepa.no_grad(function() F.conv2d(x, w, { padding = 1 }):release() end) end
    w:add_(1)
    assert.is_true(live_after(run) >= 64 * 32 * 9 * 4)
    assert.equal(0, live_after(run))
    assert.is_true(live_after(function() w:add_(1) end) <= -64 * 32 * 9 * 4)
    assert.is_true(live_after(run) >= 64 * 32 * 9 * 4)
    assert.is_true(live_after(function() w:release() end) <= -2 * 64 * 32 * 9 * 4)
  end)

  it("is not kept while gradients are recorded", function()
    local x, w = orepa.randn(2, 32, 20, 20), orepa.randn(64, 32, 3, 3):requires_grad_()
    F.conv2d(x, w, { padding = 1 }):release()
    collectgarbage()
    local before = orepa.memory().live
    for _ = 1, 3 do F.conv2d(x, w, { padding = 1 }):release() end
    collectgarbage()
    assert.equal(before, orepa.memory().live)
  end)
end)

describe("a deployed network", function()
  for _, name in ipairs { "resnet18", "resnet50" } do
    it("computes what the training form does: " .. name, function()
      orepa.manual_seed(3)
      local net = models.create(name, { reparam = "orepa", width = 0.25, classes = 10 }):eval()
      local x = orepa.randn(2, 3, 64, 64)
      local recorded = net(x):detach() -- gradients are recorded: branch by branch
      local folded = orepa.no_grad(function() return twice(net, x) end)
      assert.is_true(difference(folded, recorded) < 1e-4)
      net:deploy()
      assert.is_true(difference(orepa.no_grad(function() return twice(net, x) end), recorded) < 1e-4)
      assert.is_true(difference(net(x):detach(), recorded) < 1e-4)
    end)
  end
end)
