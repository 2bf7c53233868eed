-- Blocks that become others: linearize (offline to online) and expand (plain to re-parameterized). In evaluation they compute
-- what they did before, and they train on.

local orepa = require "orepa"
local models = require "orepa.models"
local descend = require "tests.spec.descend"
local descriptions = require "tests.spec.descriptions"
local nn, L, optim, reparam = orepa.nn, orepa.reparam, orepa.optim, orepa.reparam

local CLOSE, WIDE = 1e-5, 1e-10 -- relative errors allowed in float32 and float64

local function same(name, got, wanted, limit)
  assert.same(wanted.shape, got.shape)
  local a, b = got:detach():to("cpu"):to("float64"), wanted:detach():to("cpu"):to("float64")
  local error, scale = (a - b):abs():max():item(), math.max(b:abs():max():item(), 0.1)
  assert(error <= limit * scale, ("%s is off by %.3g of %.3g"):format(name, error, scale))
end

local function wide(t) return t:to("ref"):to("float64") end

-- The call fails, and the message has all words.
local function fails(words, f)
  local done, message = pcall(f)
  assert(not done, "it was accepted")
  for _, word in ipairs(words) do
    assert(message:find(word, 1, true), ("'%s' is not in: %s"):format(word, message))
  end
end

local function trains(net, x)
  local first, last = descend(net, function()
    local y = net(x)
    return (y * y):mean()
  end)
  assert(last < first, ("the loss went from %g to %g"):format(first, last))
end

-- ---- linearize ----

describe("linearize", function()
  local places = 0
  for seed = 1, 150 do
    it(("keeps what offline description %d computes, or says why not"):format(seed), function()
      local d = descriptions.random_offline(seed)
      orepa.manual_seed(seed)
      local block, size = wide(descriptions.fill(descriptions.build(d))):eval(), descriptions.map_size(d)
      local x = wide(orepa.randn(2, d.in_channels, size[1], size[2]))
      local y = block(x)
      for _, scaling in ipairs { "vector", "scalar", "none" } do
        for _, post_bn in ipairs { true, false } do
          local done, made = pcall(reparam.linearize, block, { scaling = scaling, post_bn = post_bn })
          if done then
            assert.equal("online", made.mode)
            same(scaling, made(x), y, WIDE)
            places = places + 1
          else
            assert(made:find("parameter", 1, true), made)
          end
        end
      end
    end)
  end

  it("was possible in most of them", function() assert(places > 450, places) end)

  it("starts the scalings where the norms' scales were, and has one norm", function()
    orepa.manual_seed(3)
    local block = descriptions.fill(nn.RepVGGBlock { in_channels = 4, out_channels = 4, kernel_size = 3 })
    local made = reparam.linearize(block)
    for k, name in ipairs { "rbr_identity", "rbr_dense.bn", "rbr_1x1.bn" } do
      same(name, made.vector[k], (block[name]:fold()), CLOSE)
    end
    local count = 0
    for _, part in made:named_modules() do count = count + (part.running_var and 1 or 0) end
    assert.equal(1, count)
    assert.equal("online", made.mode)
    assert.same(block["rbr_dense.conv.weight"]:tolist(), made["rbr_dense.conv.weight"]:tolist())
  end)

  it("leaves nothing that an old optimizer could step, which says so", function()
    local block = nn.DBB { in_channels = 4, out_channels = 4, kernel_size = 3 }
    local opt = optim.SGD(optim.param_groups(block), { lr = 0.1 })
    block(orepa.randn(2, 4, 5, 5)):sum():backward()
    reparam.linearize(block)
    fails({ "linearized", "new optimizer" }, function() opt:step() end)
  end)

  for _, name in ipairs { "resnet18", "repvgg_a0" } do
    it("changes all blocks of a " .. name .. ", which trains on and goes to a file and back", function()
      orepa.manual_seed(1)
      local kind = name == "resnet18" and "dbb" or "orepa_vgg"
      local net = descriptions.fill(models.create(name, { reparam = kind, width = 0.125, classes = 5 })):eval()
      local x, path = orepa.randn(2, 3, 33, 32), os.tmpname()
      local y = net(x)
      assert.equal(net, reparam.linearize(net))
      for _, part in net:named_modules() do assert.not_equal("offline", part.mode) end
      same("y", net(x), y, 1e-4)
      models.save(net, path)
      same("loaded", models.load(path):eval()(x), net(x), 0)
      os.remove(path)
      trains(net, x)
    end)
  end

  it("refuses what has nothing to linearize", function()
    fails({ "linearize", "no offline block" }, function() reparam.linearize(nn.ReLU()) end)
    fails({ "linearize", "module" }, function() reparam.linearize(3) end)
    fails({ "linearize", "unknown option" }, function()
      reparam.linearize(nn.DBB { in_channels = 4, out_channels = 4, kernel_size = 3 }, { scale = 1 })
    end)
  end)
end)

-- ---- expand ----

local plain = {
  ["a plain block"] = function(k)
    return nn.ConvBN { in_channels = 4, out_channels = 6, kernel_size = k, stride = 2, act = "relu" }
  end,
  ["a plain block of two groups"] = function(k)
    return nn.ConvBN { in_channels = 4, out_channels = 6, kernel_size = k, groups = 2 }
  end,
  ["a deployed block"] = function(k) return nn.OREPA { in_channels = 4, out_channels = 6, kernel_size = k }:deploy() end,
  ["a convolution"] = function(k) return nn.Conv2d { in_channels = 4, out_channels = 6, kernel_size = k, padding = k // 2 } end,
  ["a convolution without bias"] = function(k)
    return nn.Conv2d { in_channels = 4, out_channels = 6, kernel_size = k, padding = 1, dilation = 2, bias = false }
  end,
}

describe("expand", function()
  for what, make in pairs(plain) do
    for _, kind in ipairs { "orepa", "dbb", "repvgg", "orepa_vgg" } do
      for _, k in ipairs { 3, 5 } do
        it(("%s of %dx%d to %s computes the same and trains on"):format(what, k, k, kind), function()
          orepa.manual_seed(k)
          local part, x = descriptions.fill(make(k)):eval(), orepa.randn(2, 4, 11, 12)
          local y = part(x)
          local made = reparam.expand(part, kind)
          assert(not made.plan.plain and made.mode ~= "deploy")
          same("y", made(x), y, CLOSE)
          for _, p in ipairs(made:parameters()) do assert(p:isfinite():all():item()) end
          trains(made, x)
          made:eval()
          y = made(x)
          same("deployed", made:deploy()(x), y, CLOSE)
        end)
      end
    end
  end

  it("counts a channel that its norm had switched off, which can come back", function()
    local part = descriptions.fill(nn.ConvBN { in_channels = 4, out_channels = 6, kernel_size = 3 }):eval()
    local x = orepa.randn(2, 4, 5, 5)
    orepa.no_grad(function() part.bn.weight[2] = 0 end)
    local y = part(x)
    for _, kind in ipairs { "orepa", "dbb" } do
      local source = nn.ConvBN { in_channels = 4, out_channels = 6, kernel_size = 3 }
      source:load_state_dict(part:state_dict())
      local made = reparam.expand(source:eval(), kind)
      same("y", made(x), y, CLOSE)
      trains(made, x)
    end
  end)

  it("takes a function that makes the block", function()
    orepa.manual_seed(1)
    local part = descriptions.fill(nn.ConvBN { in_channels = 4, out_channels = 6, kernel_size = 3 }):eval()
    local x = orepa.randn(2, 4, 5, 5)
    local y = part(x)
    local made = reparam.expand(part, function(o)
      return nn.ReparamBlock(o, { branches = { { L.conv { 3 } }, { L.conv { 1 }, L.average { 3 } } } })
    end)
    same("y", made(x), y, CLOSE)
  end)

  for _, case in ipairs { { "resnet18", "orepa" }, { "resnet18", "dbb" }, { "resnet50", "orepa" }, { "repvgg_a0", "repvgg" },
    { "repvgg_a0", "orepa_vgg" } } do
    for _, deployed in ipairs { false, true } do
      local name, kind = table.unpack(case)
      it(("a %s%s to %s gives the same logits, trains on and goes to a file and back"):format(deployed and "deployed " or "",
        name, kind), function()
        orepa.manual_seed(2)
        local short = os.getenv "OREPA_STRESS" == "gc" and { 1, 1, 1, 1 } or nil -- each op takes milliseconds then
        local net = models.create(name, { reparam = "none", width = 0.125, classes = 5, num_blocks = short })
        for _ = 1, 4 do net(orepa.randn(4, 3, 33, 32)) end -- statistics
        local x, path = orepa.randn(2, 3, 33, 32), os.tmpname()
        net:eval()
        if deployed then net:deploy() end
        local y, stem = net(x), name:find "resnet" and net:get "stage0.conv1"
        assert.equal(net, reparam.expand(net, kind))
        same("logits", net(x), y, CLOSE)
        if stem then assert.equal(stem, net:get "stage0.conv1") end -- 7x7 stays
        local expanded = 0
        for _, part in net:named_modules() do
          if part.plan and not part.plan.plain and part.mode ~= "deploy" then expanded = expanded + 1 end
        end
        assert(expanded >= (short and 4 or 8), expanded)
        models.save(net, path)
        same("loaded", models.load(path):eval()(x), net(x), 0)
        trains(net, x)
        net:eval():deploy()
        y = net(x)
        models.save(net, path)
        same("deployed and loaded", models.load(path)(x), y, 0)
        os.remove(path)
      end)
    end
  end

  it("refuses what it can't expand", function()
    local function block(k) return nn.ConvBN { in_channels = 4, out_channels = 4, kernel_size = k } end
    fails({ "expand", "no plain convolution" }, function() reparam.expand(nn.ReLU(), "orepa") end)
    fails({ "expand", "no plain convolution" }, function() reparam.expand(block(1), "dbb") end)
    fails({ "expand", "no plain convolution" }, function() reparam.expand(block { 3, 1 }, "orepa") end)
    fails({ "expand", "no plain convolution" }, function() reparam.expand(block(7), "orepa") end)
    fails({ "no kind of block", "'orpa'", "orepa" }, function() reparam.expand(block(3), "orpa") end)
    fails({ "expand", "module" }, function() reparam.expand(nil, "orepa") end)
    fails({ "expand", "unknown option" }, function() reparam.expand(block(3), "orepa", { bn = true }) end)
  end)
end)
