-- Diagnostics: against what can be told by hand.

local orepa = require "orepa"
local descriptions = require "tests.spec.descriptions"
local nn, L, optim, diagnose = orepa.nn, orepa.reparam, orepa.optim, orepa.diagnose

local function block(o)
  local all = { in_channels = 2, out_channels = 2, kernel_size = 3, scaling = "none", branches = {
    { name = "a", L.conv { 3 } }, { name = "b", L.conv { 3 } }, { name = "c", L.conv { 1 } } } }
  for key, value in pairs(o or {}) do all[key] = value end
  return nn.ReparamBlock(all)
end

local function set(t, value)
  orepa.no_grad(function() t:copy_(value) end)
end

local function fails(words, f)
  local done, message = pcall(f)
  assert(not done, "it was accepted")
  for _, word in ipairs(words) do assert(message:find(word, 1, true), message) end
end

describe("similarity", function()
  it("is the cosine of each two kernels", function()
    orepa.manual_seed(1)
    local b = block()
    set(b["b.conv.weight"], b["a.conv.weight"] * -2)
    set(b["c.conv.weight"], orepa.zeros(2, 2, 1, 1))
    local found = diagnose.similarity(nn.Sequential(b, nn.ReLU()))
    assert.equal(1, #found)
    assert.equal("0", found[1].path)
    assert.same({ "a", "b", "c" }, found[1].branches)
    local m = found[1].matrix
    assert.near(1, m[1][1], 1e-12)
    assert.near(-1, m[1][2], 1e-12)
    assert.near(-1, m[2][1], 1e-12)
    assert.equal(0, m[1][3])
    assert.equal(0, m[3][3])
    set(b["a.conv.weight"], orepa.zeros(2, 2, 3, 3))
    orepa.no_grad(function()
      b["a.conv.weight"][1][1][2][2] = 3
      b["c.conv.weight"][1][1][1][1] = 4
      b["c.conv.weight"][2][1][1][1] = 3
    end)
    assert.near(0.8, diagnose.similarity(b)[1].matrix[1][3], 1e-12)
  end)

  it("counts the scalings, and offline the norms", function()
    local b = block { scaling = "vector" }
    orepa.no_grad(function() b.vector[1] = 0 end)
    assert.equal(0, diagnose.similarity(b)[1].matrix[1][1])
    b = block { mode = "offline" }
    set(b["a.bn"].weight, orepa.zeros(2))
    assert.equal(0, diagnose.similarity(b)[1].matrix[1][1])
    assert.near(1, diagnose.similarity(b)[1].matrix[2][2], 1e-12)
  end)

  it("sees every block of a network, and none that is deployed", function()
    local net = nn.Sequential(nn.OREPA { in_channels = 2, out_channels = 2, kernel_size = 3 }, nn.DBB { in_channels = 2,
      out_channels = 2, kernel_size = 3 }, nn.ConvBN { in_channels = 2, out_channels = 2, kernel_size = 3 })
    assert.equal(3, #diagnose.similarity(net))
    net[1]:deploy()
    assert.equal(2, #diagnose.similarity(net))
    fails({ "similarity", "no block with branches" }, function() diagnose.similarity(net:deploy()) end)
    fails({ "similarity", "module" }, function() diagnose.similarity(3) end)
  end)
end)

describe("gradients", function()
  it("are the length of all that a branch has", function()
    orepa.manual_seed(1)
    local b = descriptions.fill(block { scaling = "vector", branches = { { name = "a", L.conv { 1 }, L.conv { 3 } },
      { name = "nest", L.nest { 3, branches = { { L.conv { 3 } } } } }, { name = "fixed", scale = false, L.average { 3 } } } })
    assert.same({ false, false, false }, diagnose.gradients(b)[1].norms)
    b(orepa.randn(2, 2, 5, 5)):sum():backward(nil)
    local function length(...)
      local sum = 0
      for _, t in ipairs { ... } do sum = sum + (t * t):sum():item() end
      return math.sqrt(sum)
    end
    local norms = diagnose.gradients(b)[1].norms
    assert.near(length(b["a.conv1.weight"].grad, b["a.conv2.weight"].grad, b.vector.grad[1]), norms[1], 1e-6 * norms[1])
    assert.near(length(b["nest.conv.branch0.conv.weight"].grad, b.vector.grad[2]), norms[2], 1e-6 * norms[2])
    assert.is_false(norms[3])
  end)
end)

describe("the conditions", function()
  local function train(net, watch, steps)
    local opt = optim.SGD(optim.param_groups(net), { lr = 0.1 })
    for _ = 1, steps do
      local y = net(orepa.randn(2, 2, 5, 5))
      opt:zero_grad()
      y:backward(orepa.randn(y.shape))
      opt:step()
    end
    return watch:check()[1]
  end

  it("hold for branches that move and started apart", function()
    orepa.manual_seed(1)
    local b = nn.OREPA { in_channels = 2, out_channels = 2, kernel_size = 3 }
    local watch = diagnose.watch(b)
    local still = watch:check()[1]
    assert.equal(0, still.active)
    assert.is_false(still.condition1)
    assert.is_false(still.condition2)
    local found = train(b, watch, 3)
    assert(found.active >= 5 and found.condition1 and found.condition2 and found.apart > 0.01)
    assert.same(b.plan.branches, found.branches)
  end)

  it("fail for equal branches, and for a single one that moves", function()
    orepa.manual_seed(1)
    local b = block { branches = { { L.conv { 3 } }, { L.conv { 3 } } } }
    set(b["branch1.conv.weight"], b["branch0.conv.weight"])
    local found = train(b, diagnose.watch(b), 3)
    assert.equal(2, found.active)
    assert.is_true(found.condition1)
    assert.is_false(found.condition2)
    b["branch1.conv.weight"]:requires_grad_(false)
    found = train(b, diagnose.watch(b), 3)
    assert.equal(1, found.active)
    assert.is_false(found.condition1)
  end)

  it("can't be asked of a deployed block, and refuse what they don't know", function()
    local b = block()
    local watch = diagnose.watch(b)
    fails({ "watch:check", "unknown option" }, function() watch:check { least = 1 } end)
    b:deploy()
    fails({ "deployed" }, function() watch:check() end)
  end)
end)

describe("the deployment's error", function()
  it("is rounding, for every block in its place", function()
    orepa.manual_seed(1)
    local net = require("orepa.models").create("resnet18", { reparam = "orepa", width = 0.125, classes = 5 })
    net(orepa.randn(2, 3, 33, 32))
    local x = orepa.randn(2, 3, 33, 32)
    fails({ "training mode" }, function() diagnose.deployment(net, x) end)
    net:eval()
    local found = diagnose.deployment(net, x)
    assert.equal(20, #found)
    assert.equal("stage0.conv1", found[1].path)
    for _, entry in ipairs(found) do
      assert(entry.error > 0 and entry.error < 1e-5, entry.error)
      assert(entry.largest > 0)
    end
    assert.equal("OREPALargeConv", found[1].kind)
  end)
end)
