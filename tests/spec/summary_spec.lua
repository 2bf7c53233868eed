-- nn.summary: known networks' numbers, what counts, what deploying leaves, and that nothing of the network changes.

local orepa = require "orepa"
local models = require "orepa.models"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function row_at(s, path)
  for _, row in ipairs(s.rows) do
    if row.path == path then return row end
  end
  error("no row for " .. path)
end

-- The numbers that torchvision and fvcore tell.
describe("a summary of", function()
  it("ResNet-18 has 11,689,512 parameters and 1.814 G multiply-adds", function()
    local s = nn.summary(models.create("resnet18", { reparam = "none" }), { 1, 3, 224, 224 })
    assert.equal(11689512, s.totals.parameters)
    assert.equal(11689512, s.totals.trained)
    assert.equal(1814073344, s.totals.macs)
    assert.equal(0, s.totals.squeeze)
    assert.same({ 1, 3, 224, 224 }, s.inputs[1])
    assert.same({ 1, 64, 112, 112 }, row_at(s, "stage0.conv1").shape)
    assert.equal(64 * 147 * 112 * 112, row_at(s, "stage0.conv1").macs)
    assert.equal(4 * 64 * 112 * 112, row_at(s, "stage0.conv1").bytes)
    assert.same({ 1, 512, 7, 7 }, row_at(s, "stage4").shape)
    assert.equal(513000, row_at(s, "linear").parameters)
    assert.equal(512000, row_at(s, "linear").macs)
  end)

  it("ResNet-50 has 25,557,032 parameters and 4.089 G multiply-adds", function()
    local s = nn.summary(models.create("resnet50", { reparam = "none" }), { 1, 3, 224, 224 })
    assert.equal(25557032, s.totals.parameters)
    assert.equal(4089184256, s.totals.macs)
  end)

  it("a batch multiplies what runs on maps, and not squeezing", function()
    local net = nn.OREPA { in_channels = 4, out_channels = 8, kernel_size = 3 }
    local one, three = nn.summary(net, { 1, 4, 5, 6 }), nn.summary(net, { 3, 4, 5, 6 })
    assert.equal(5 * 6 * 8 * 4 * 9, one.totals.macs)
    assert.equal(3 * one.totals.macs, three.totals.macs)
    assert.is_true(one.totals.squeeze > 0)
    assert.equal(one.totals.squeeze, three.totals.squeeze)
  end)
end)

describe("multiply-adds", function()
  it("are those of shapes, groups, strides and functions that no layer is", function()
    local Net = nn.Module:extend("Net")
    function Net:init()
      self.conv = nn.Conv2d { in_channels = 4, out_channels = 6, kernel_size = { 3, 1 }, stride = 2, groups = 2 }
      self.weight = nn.Parameter(orepa.ones(5, 6, 1, 1))
      self.linear = nn.Linear { in_features = 5, out_features = 7 }
    end
    function Net:forward(x)
      local y = F.conv2d(F.relu(self.conv(x)), self.weight)
      local z = self.linear(F.adaptive_avg_pool2d(y):flatten(2))
      return z:transpose(1, 2):matmul(z)
    end
    local s = nn.summary(Net(), { 2, 4, 9, 9 })
    local conv, point, linear = 2 * 6 * 4 * 5 * 2 * 3, 2 * 5 * 4 * 5 * 6, 2 * 5 * 7
    assert.equal(conv, row_at(s, "conv").macs)
    assert.equal(linear, row_at(s, "linear").macs)
    assert.equal(conv + point + linear + 7 * 2 * 7, s.totals.macs)
    assert.same({ 7, 7 }, s.rows[1].shape)
    assert.equal(4 * 49, s.rows[1].bytes)
  end)

  it("of a block are those of what it runs in its mode", function()
    local L, pixels = orepa.reparam, 6 * 7
    local branches = { { L.conv { 3 } }, { L.conv { 1, out = 5 }, L.conv { 3 } }, { L.conv { 1 } } }
    local function block(mode)
      local all = { in_channels = 4, out_channels = 8, kernel_size = 3, mode = mode, branches = branches }
      return nn.summary(nn.ReparamBlock(all), { 1, 4, 6, 7 }).totals
    end
    local online, offline = block "online", block "offline"
    assert.equal(pixels * 8 * 4 * 9, online.macs)
    assert.equal(8 * 5 * 9 * 4, online.squeeze) -- the one product of kernels
    assert.equal(0, offline.squeeze)
    assert.equal(pixels * 8 * (4 * 9 + 5 * 9 + 4) + pixels * 5 * 4, offline.macs)
    assert.same(online.deployed, offline.deployed)
    assert.same({ parameters = 8 * (4 * 9 + 1), macs = online.macs }, online.deployed)
  end)
end)

describe("what deploying leaves", function()
  local cases = {
    { "resnet18", { reparam = "orepa", classes = 10, width = 0.125 }, { 2, 3, 64, 64 } },
    { "resnet18", { reparam = "dbb", classes = 10, width = 0.125, stem = "small" }, { 2, 3, 16, 16 } },
    { "resnext50", { reparam = "orepa", classes = 10, width = 0.25 }, { 2, 3, 64, 64 } },
    { "repvgg_a0", { reparam = "repvgg", classes = 10, width = 0.25 }, { 2, 3, 32, 32 } },
    { "mobileone", { width = { 0.25, 0.25, 0.25, 0.25 }, num_blocks = { 1, 1, 2, 2 }, excite = true, branches = 2, classes = 10 },
      { 2, 3, 32, 32 } },
  }
  for _, case in ipairs(cases) do
    it(("of %s (%s) is what the deployed network has"):format(case[1], case[2].reparam or "excited"), function()
      local net = models.create(case[1], case[2])
      local before, after = nn.summary(net, case[3]), nn.summary(net:clone():deploy(), case[3])
      assert.same({ parameters = after.totals.parameters, macs = after.totals.macs }, before.totals.deployed)
      assert.same(after.totals.deployed, before.totals.deployed)
      assert.is_true(before.totals.parameters > before.totals.deployed.parameters)
      assert.equal(0, after.totals.squeeze)
      for _, row in ipairs(after.rows) do
        local same = row_at(before, row.path)
        assert.same({ row.path, row.macs, row.parameters, row.shape },
          { row.path, same.deployed.macs, same.deployed.parameters, same.shape })
      end
    end)
  end
end)

describe("inputs and outputs", function()
  local Pair = nn.Module:extend("Pair")
  function Pair:init() self.table = nn.Embedding { num_embeddings = 4, embedding_dim = 3 } end
  function Pair:forward(names, x)
    local y = self.table(names) + x
    return { maps = { y, y:sum(1) }, last = y:sum() }, y
  end

  it("are several shapes, tensors, and tables of tables", function()
    local names = orepa.tensor({ 0, 3 }, { dtype = "int64" })
    local s = nn.summary(Pair(), { names, { 2, 3 } })
    assert.same({ { 2 }, { 2, 3 } }, s.inputs)
    assert.same({ {}, { 2, 3 }, { 3 }, { 2, 3 } }, s.rows[1].shapes)
    assert.same({}, s.rows[1].shape)
    assert.equal(4 * (1 + 6 + 3 + 6), s.rows[1].bytes)
    assert(tostring(s):find("number, 2x3, 3, 2x3", 1, true))
  end)

  it("are a tensor alone, and of a type", function()
    local seen
    local Look = nn.Module:extend "Look"
    function Look.forward(_, x) seen = x; return x * 2 end
    local x = orepa.rand(2, 3)
    assert.same({ { 2, 3 } }, nn.summary(Look(), x).inputs)
    assert.equal(x, seen)
    assert.equal(8 * 6, nn.summary(Look(), { 2, 3 }, { dtype = "float64" }).rows[1].bytes)
    assert.equal("float64", seen.dtype)
    local net = nn.Sequential(nn.Linear { in_features = 3, out_features = 2 }, Look()):to "float64":to "ref"
    nn.summary(net, { 1, 3 })
    assert.same({ "float64", "ref" }, { seen.dtype, seen.device })
  end)

  it("are checked", function()
    local net = nn.ReLU()
    fails("a shape like .* expected", nn.summary, net)
    fails("a shape like .* expected", nn.summary, net, {})
    fails("a shape like .* expected", nn.summary, net, "1x3")
    fails("input 2 is boolean", nn.summary, net, { { 1, 2 }, true })
    fails("input 1 is a table that is no list of sizes", nn.summary, net, { { 1, 2.5 } })
    fails("unknown option 'kind'", nn.summary, net, { 1 }, { kind = 1 })
    fails("depth is %-1", nn.summary, net, { 1 }, { depth = -1 })
    fails("no type is called 'float'", nn.summary, net, { 1 }, { dtype = "float" })
    fails("summary: a module expected, got number", nn.summary, 1, { 1 })
    fails("fails.lua:%d+: conv2d: kernel has 3 input channels", nn.summary,
      nn.Conv2d { in_channels = 3, out_channels = 2, kernel_size = 1 }, { 1, 4, 2, 2 })
  end)
end)

describe("rows", function()
  it("count what is shared once, and calls as they are", function()
    local shared = nn.Linear { in_features = 3, out_features = 3 }
    local Twice = nn.Module:extend("Twice")
    function Twice:init()
      self.first = shared
      self.second = nn.Sequential(shared)
      self.never = nn.Linear { in_features = 2, out_features = 2 }
    end
    function Twice:forward(x) return self.second(self.first(x)) end
    local s = nn.summary(Twice(), { 4, 3 })
    local paths = {}
    for k, row in ipairs(s.rows) do paths[k] = row.path end
    assert.same({ "", "first", "second", "never" }, paths)
    assert.equal(2, row_at(s, "first").calls)
    assert.equal(2 * 4 * 9, row_at(s, "first").macs)
    assert.equal(2 * 4 * 9, s.totals.macs)
    assert.equal(12 + 6, s.totals.parameters)
    assert.equal(0, row_at(s, "second").parameters)
    assert.equal(0, row_at(s, "never").calls)
    assert.is_nil(row_at(s, "never").shape)
  end)

  it("are right for a module whose fields are called like a block's", function()
    local Planned = nn.Module:extend("Planned")
    function Planned:init()
      self.plan, self.mode, self.kind = { 64, 128 }, "online", 3
      self.linear = nn.Linear { in_features = 3, out_features = 2 }
    end
    function Planned:forward(x) return self.linear(x) end
    local s = nn.summary(Planned(), { 1, 3 })
    assert.same({ "Planned", 8, 8 }, { s.rows[1].type, s.totals.parameters, s.totals.deployed.parameters })
  end)

  it("tell trained parameters from others", function()
    local net = nn.Sequential(nn.Linear { in_features = 3, out_features = 2 }, nn.Linear { in_features = 2, out_features = 2 })
    for _, p in ipairs(net[1]:parameters()) do p:requires_grad_(false) end
    local t = nn.summary(net, { 1, 3 }).totals
    assert.same({ 14, 6 }, { t.parameters, t.trained })
  end)

  it("have the network's order, whatever is called first, and are shown down to a depth", function()
    local net = nn.Sequential(nn.Sequential(nn.OREPA { in_channels = 3, out_channels = 4, kernel_size = 3 }, nn.ReLU()))
    local s = nn.summary(net, { 1, 3, 4, 4 }, { depth = 2 })
    local k = 0
    for path, module in net:named_modules() do
      k = k + 1
      assert.same({ path, module.kind or module.class_name }, { s.rows[k].path, s.rows[k].type })
    end
    assert.equal(k, #s.rows)
    local text = tostring(s)
    assert(text:find "\n0%.0 +OREPA +1x4x4x4 " and not text:find "0%.0%.bn")
    assert(text:find "squeezing")
    assert(not tostring(nn.summary(nn.ReLU(), { 1 })):find "deployed *mult")
  end)
end)

describe("what is kept", function()
  it("is what a forward pass in training adds to the live bytes", function()
    local net = nn.Sequential(nn.Conv2d { in_channels = 3, out_channels = 8, kernel_size = 3, padding = 1 }, nn.Tanh(), nn.Tanh())
    local map = 4 * 2 * 8 * 64 * 64
    local s = nn.summary(net, { 2, 3, 64, 64 })
    local x = orepa.zeros(2, 3, 64, 64)
    collectgarbage()
    local before = orepa.memory().live
    local y = net(x)
    collectgarbage()
    local held = orepa.memory().live - before
    assert.equal(s.totals.kept, held)
    assert.is_true(held >= 2 * map and held < 2.1 * map) -- of each tanh its result, of the convolution nothing but the input
    assert.equal(map, s.rows[3].kept)
    y:release()
  end)

  it("is less with a checkpoint", function()
    local function net(wrap)
      return nn.Sequential(wrap(nn.Sequential(nn.Linear { in_features = 64, out_features = 512 }, nn.Tanh(), nn.Tanh(),
        nn.Linear { in_features = 512, out_features = 2 })))
    end
    local plain = nn.summary(net(function(m) return m end), { 64, 64 }).totals
    local wrapped = nn.summary(net(nn.checkpoint), { 64, 64 }).totals
    assert.is_true(wrapped.kept < plain.kept / 4)
    assert.equal(plain.parameters, wrapped.parameters)
    assert.equal(plain.macs, wrapped.macs)
  end)
end)

-- ---- nothing changes ----

local Restless = nn.Module:extend("Restless") -- a buffer that is made anew in each call, random numbers, and an error on demand
function Restless:init()
  self:register_buffer("seen", orepa.zeros(1))
  self.norm = nn.BatchNorm2d(3)
  self.block = nn.DBB { in_channels = 3, out_channels = 4, kernel_size = 3 }
end
function Restless:forward(x)
  self.seen = self.seen + 1
  local y = self.block(self.norm(x)) * orepa.rand(1)
  if self.broken then error("broken") end
  return y
end

local function state_of(net)
  local all = { rng = orepa.rng_state(), grads = {}, tensors = {}, modes = {}, same = {} }
  for path, module in net:named_modules() do all.modes[path] = module.training end
  for name, t in pairs((net:state_dict())) do all.tensors[name], all.same[name] = t:tolist(), t end
  for name, p in net:named_parameters() do all.grads[name] = p.grad and p.grad:tolist() or false end
  all.enabled = orepa.is_grad_enabled()
  return all
end

describe("a network", function()
  for _, how in ipairs { "works", "fails" } do
    it(("is as it was after a summary that %s"):format(how), function()
      local net = Restless()
      net(orepa.rand(2, 3, 4, 4)):sum():backward()
      net.block:eval()
      net.broken = how == "fails"
      local before = state_of(net)
      for _ = 1, 2 do
        local ok = pcall(nn.summary, net, { 2, 3, 5, 5 })
        assert.equal(how == "works", ok)
      end
      assert.same(before, state_of(net))
    end)
  end

  it("can't be summarized inside a profile", function()
    local ok, message = pcall(orepa.profile, function() nn.summary(nn.ReLU(), { 1 }) end)
    assert.is_false(ok)
    assert.matches("under way", message)
    assert(nn.summary(nn.ReLU(), { 1 }))
  end)

  it("leaves no memory in use", function()
    local net = Restless()
    nn.summary(net, { 2, 3, 32, 32 })
    collectgarbage()
    local live = orepa.memory().live
    for _ = 1, 3 do nn.summary(net, { 2, 3, 32, 32 }) end
    collectgarbage()
    collectgarbage()
    assert.equal(live, orepa.memory().live)
  end)
end)
