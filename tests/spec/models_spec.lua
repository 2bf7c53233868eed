-- Networks by name: sizes as published, every kind of block, and deploying at any time.

local orepa = require "orepa"
local models = require "orepa.models"
local descend = require "tests.spec.descend"
local descriptions = require "tests.spec.descriptions"
local nn, F, optim = orepa.nn, orepa.F, orepa.optim

local function same(name, got, wanted, limit)
  assert.same(wanted.shape, got.shape)
  local a, b = got:detach():to("float64"), wanted:detach():to("float64")
  local error, scale = (a - b):abs():max():item(), math.max(b:abs():max():item(), 1e-3)
  assert(error <= limit * scale, ("%s is off by %.3g of %.3g"):format(name, error, scale))
end

-- ---- sizes ----

-- Parameters of the deployed network in millions, as its authors print them (ResNets: of the plain one, whose norms are in here
-- as biases).
local published = {
  resnet18 = { 11.69, "plain" }, resnet50 = { 25.56, "plain" }, resnext50 = { 25.03, "plain" },
  repvgg_a0 = { 8.30 }, repvgg_a1 = { 12.78 }, repvgg_a2 = { 25.49 }, repvgg_b0 = { 14.33 }, repvgg_b1g4 = { 36.12 },
  mobileone_s0 = { 2.1 }, mobileone_s1 = { 4.8 }, mobileone_s2 = { 7.8 }, mobileone_s3 = { 10.1 }, mobileone_s4 = { 14.8 },
}

describe("a network has as many parameters as published:", function()
  for name, entry in pairs(os.getenv "OREPA_AGAIN" and {} or published) do
    it(name, function()
      local net, count = models.create(name, entry[2] and { reparam = "none" } or { deploy = true }), 0
      for _, p in ipairs(net:parameters()) do count = count + p:count() end
      local digits = name:find "mobileone" and 0.05 or 0.0101 -- RepVGG's are cut off, not rounded
      assert(math.abs(count / 1e6 - entry[1]) < digits, count)
    end)
  end
end)

-- ---- every kind ----

local cases = {}
for _, kind in ipairs { "none", "dbb", "orepa", "orepa_vgg" } do
  for _, name in ipairs { "resnet18", "resnet50", "resnext50" } do
    if not (name == "resnext50" and kind == "orepa_vgg") then
      cases[#cases + 1] = { name, { reparam = kind, width = name == "resnext50" and 0.25 or 0.125 } }
    end
  end
end
for _, kind in ipairs { "none", "dbb", "orepa", "repvgg", "orepa_vgg" } do
  cases[#cases + 1] = { "repvgg_a0", { reparam = kind, width = 0.125 } }
end
cases[#cases + 1] = { "repvgg_b1g4", { width = 0.0625 } }
cases[#cases + 1] = { "mobileone_s0", { width = 0.25 } }
cases[#cases + 1] = { "mobileone_s4", { width = 0.125 } }
cases[#cases + 1] = { "mobileone_s4", { width = 0.125, mode = "online" } }

local function create(case, more)
  local o = { classes = 5 }
  if os.getenv "OREPA_STRESS" == "gc" then o.num_blocks = { 1, 1, 1, 1 } end -- each op takes milliseconds then
  for key, value in pairs(case[2]) do o[key] = value end
  for key, value in pairs(more or {}) do o[key] = value end
  return models.create(case[1], o)
end

local function label(case)
  return ("%s, %s"):format(case[1], case[2].reparam or case[2].mode or "its own blocks")
end

local function step(net, opt, x, labels)
  local loss = F.cross_entropy(net(x), labels)
  opt:zero_grad()
  loss:backward()
  opt:step()
  return loss:item()
end

for _, case in ipairs(cases) do
  describe(label(case), function()
    local net, x, y
    before_each(function()
      orepa.manual_seed(6)
      net, x = create(case), orepa.randn(4, 3, 34, 32)
      for _ = 1, 3 do net(orepa.randn(4, 3, 34, 32)) end -- running statistics
      y = net:eval()(x)
      assert.same({ 4, 5 }, y.shape)
    end)

    it("trains", function()
      local labels = orepa.tensor({ 0, 1, 2, 3 }, { dtype = "int64" })
      local first, last = descend(net, function() return F.cross_entropy(net(x), labels) end)
      assert(last < first, ("from %g to %g"):format(first, last))
    end)

    it("deploys from training mode, twice, and from a file, always the same", function()
      local path = os.tmpname()
      models.save(net, path)
      same("deployed", net:train():deploy()(x), y, 2e-5)
      local bits = net(x)
      same("deployed twice", net:deploy()(x), bits, 0)
      local loaded = models.load(path)
      same("loaded and deployed", loaded:deploy()(x), bits, 0)
      models.save(net, path)
      same("deployed, saved and loaded", models.load(path)(x), bits, 0)
      same("and deployed again", models.load(path):deploy()(x), bits, 0)
      os.remove(path)
    end)

    it("deploys a copy in the middle of a training run, which goes on untouched", function()
      local labels = orepa.tensor({ 0, 1, 2, 3 }, { dtype = "int64" })
      local function run(look)
        orepa.manual_seed(8)
        local own = create(case)
        local opt, losses = optim.SGD(optim.param_groups(own), { lr = 0.01, momentum = 0.9 }), {}
        for k = 1, 4 do
          losses[k] = step(own, opt, x, labels)
          if look and k == 2 then
            local copy = own:clone()
            local before = own:clone():eval()(x)
            same("the copy", copy:deploy()(x), before, 2e-5)
            assert.is_true(own.training)
          end
        end
        return losses
      end
      assert.same(run(false), run(true))
    end)

    it("deploys with norms of another epsilon", function()
      for _, part in net:named_modules() do
        if part.running_var then part.options.eps = 0.01 end
      end
      net:train():eval() -- kept kernels go
      local other = net(x)
      assert((other - y):abs():max():item() > 1e-6)
      same("deployed", net:deploy()(x), other, 2e-5)
    end)

    it("says that a norm without running statistics can't be folded", function()
      local path
      for name, part in net:named_modules() do
        if part.running_var then path = name end
      end
      local norm = net:get(path)
      net:replace(path, nn.BatchNorm2d { num_features = norm.options.num_features, track_running_stats = false })
      local done, message = pcall(function() net:deploy() end)
      assert(not done and message:find("running statistics", 1, true), message)
    end)
  end)
end

-- ---- options ----

describe("a network's options", function()
  local function refused(word, name, o)
    local done, message = pcall(models.create, name, o)
    assert(not done and message:find(word, 1, true), message)
  end

  it("are checked", function()
    refused("there are none, dbb, orepa, orepa_vgg", "resnet18", { reparam = "repvgg" })
    refused("there are none, dbb, orepa, repvgg, orepa_vgg", "repvgg_a0", { reparam = "vgg" })
    refused("width", "repvgg_a0", { width = "wide" })
    refused("width", "repvgg", { num_blocks = { 1, 1, 1, 1 } })
    refused("width", "repvgg", { num_blocks = { 1, 1, 1, 1 }, width = 1 })
    refused("num_blocks", "repvgg", { num_blocks = 4, width = { 1, 1, 1, 1 } })
    refused("num_blocks", "mobileone_s0", { num_blocks = { 1 } })
    refused("go together", "resnet50", { cardinality = 32 })
    refused("bottleneck", "resnet18", { cardinality = 32, width_per_group = 4 })
    refused("unknown option", "mobileone_s0", { reparam = "orepa" })
    refused("no network is called", "resnet19")
  end)

  it("width: a number scales the named network, a list replaces its widths", function()
    local half = models.create("repvgg_a0", { width = 0.5, classes = 5 })
    assert.equal(24, half:get("stage1.0").options.out_channels)
    local own = models.create("repvgg_a0", { width = { 0.25, 0.25, 0.5, 0.5 }, classes = 5 })
    assert.equal(16, own:get("stage1.0").options.out_channels)
    assert.equal(256, own:get("stage4.0").options.out_channels)
  end)
end)

-- ---- copies ----

describe("clone", function()
  it("gives tensors of its own, shared where they were shared, and the same modes", function()
    local net = nn.Sequential(nn.Linear { in_features = 3, out_features = 3 }, nn.ReLU(), nn.BatchNorm2d(3))
    net[2].weight = net[1].weight
    net[1].bias:requires_grad_(false)
    net:eval()
    local copy = net:clone()
    assert.is_false(copy[3].training)
    assert.equal(copy[2].weight, copy[1].weight)
    assert.not_equal(net[1].weight, copy[1].weight)
    assert.is_false(copy[1].bias.requires_grad)
    assert.is_true(copy[1].weight.requires_grad)
    orepa.no_grad(function() copy[1].weight:fill_(5) end)
    assert.not_equal(5, net[1].weight[1][1]:item())
    assert.equal(#net:parameters(), #copy:parameters())
    copy[1]:remove "bias"
    assert(net[1].bias)
    assert.is_nil(copy:state_dict()["0.bias"])
  end)

  it("leaves hooks and gradients behind", function()
    local net, calls = descriptions.fill(nn.ConvBN { in_channels = 2, out_channels = 2, kernel_size = 1 }), 0
    local hook = net:register_forward_hook(function() calls = calls + 1 end)
    net(orepa.ones(2, 2, 2, 2)):sum():backward()
    local copy = net:clone()
    copy(orepa.ones(2, 2, 2, 2))
    hook.remove()
    assert.equal(1, calls)
    assert.is_nil(copy:parameters()[1].grad)
  end)
end)
