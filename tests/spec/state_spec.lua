-- Weights of other tools' checkpoints in networks: names out of a checkpoint, and the errors of those that don't fit.

local orepa = require "orepa"
local models = require "orepa.models"
local fails = require "tests.spec.fails"
local nn = orepa.nn

local function names_of(...)
  return select(2, orepa.state_dict(...))
end

-- A table of tensors with these names.
local function tensors_of(...)
  local tensors = {}
  for _, name in ipairs { ... } do tensors[name] = orepa.ones(1) end
  return tensors
end

local function with_prefix(prefix, tensors)
  local result = {}
  for name, t in pairs(tensors) do result[prefix .. name] = t end
  return result
end

local function orepa_net(options)
  return models.create("resnet18", { reparam = "orepa", classes = 3, width = 0.0625, deploy = options and options.deploy })
end

describe("orepa.state_dict", function()
  it("takes the weights out of a checkpoint", function()
    for _, case in ipairs {
      { { "a", "b" }, "state_dict.a", "state_dict.b", "optimizer.state.0.momentum_buffer", "best_acc1" },
      { { "a.b", "c" }, "state_dict.module.a.b", "state_dict.module.c" },
      { { "a", "module.b" }, "state_dict.a", "state_dict.module.b" },
      { { "a" }, "model_state_dict._orig_mod.a", "epoch" },
      { { "a" }, "model.a", "optimizer.state.0.exp_avg", "lr_scheduler.x", "model_ema.a", "best_acc" },
      { { "a.b", "head.c" }, "module.a.b", "module.head.c" },
      { { "head.c", "model.a" }, "model.a", "head.c" }, -- a network with a child of that name
      { { "a.b", "c" }, "a.b", "c" },
      { {} },
    } do
      assert.same(case[1], names_of(tensors_of(table.unpack(case, 2))))
    end
  end)

  it("stops where the names are the network's", function()
    local net = nn.Sequential(nn.Linear { in_features = 1, out_features = 1 })
    local wrapped = nn.ModuleDict { model = net }
    local state = with_prefix("model.", net:state_dict())
    assert.same({ "model.0.bias", "model.0.weight" }, names_of(state, wrapped))
    assert.same({ "0.bias", "0.weight" }, names_of(state, net))
    wrapped:load_state_dict(orepa.state_dict(with_prefix("module.", state), wrapped))
  end)

  it("leaves out constants that the network doesn't hold", function()
    local net = orepa_net { deploy = true }
    local state = net:state_dict()
    for _, name in ipairs { "weight_orepa_avg_avg", "weight_orepa_prior", "id_tensor" } do
      state["stage1.0.conv1." .. name] = orepa.ones(1)
    end
    state["stage1.0.conv1.bn.num_batches_tracked"] = orepa.ones(1)
    fails("unexpected: stage1.0.conv1.bn.num_batches_tracked, stage1.0.conv1.id_tensor", net.load_state_dict, net, state)
    net:load_state_dict(orepa.state_dict(state, net))
    state["stage1.0.conv1.weight_orepa_origin"] = orepa.ones(1)
    fails("unexpected: stage1.0.conv1.weight_orepa_origin$", net.load_state_dict, net, (orepa.state_dict(state, net)))
    local training = orepa_net()
    local all = training:state_dict { constants = true }
    assert.same(all, (orepa.state_dict(with_prefix("state_dict.module.", all), training)))
  end)

  it("wants a table of named tensors", function()
    fails("a table of tensors expected, got nil", orepa.state_dict)
    fails("named by strings, not by a number", orepa.state_dict, { orepa.ones(1) })
  end)
end)

describe("weights that don't fit", function()
  local net = nn.Sequential(nn.Linear { in_features = 2, out_features = 3 })

  it("at all are an error, even if strict is off, with names of both", function()
    for _, strict in ipairs { true, false } do
      fails("none of the 4 tensors has a name of Sequential's\n  missing: 0.weight, 0.bias\n  unexpected: a, b, c, d",
        net.load_state_dict, net, tensors_of("d", "c", "b", "a"), { strict = strict })
    end
    fails("none of the 0 tensors", net.load_state_dict, net, {})
    nn.ReLU():load_state_dict {}
  end)

  it("because they are in a checkpoint are told how to be taken out", function()
    local state = with_prefix("state_dict.module.", net:state_dict())
    fails("orepa.state_dict%(tensors, net%) takes the network's weights out of it", net.load_state_dict, net, state)
    net:load_state_dict(orepa.state_dict(state, net))
  end)

  it("because one is deployed and the other is not are told what to do", function()
    local training, deployed = orepa_net(), orepa_net { deploy = true }
    local message = fails("these are weights of the training form, and the network is deployed", deployed.load_state_dict,
      deployed, (training:state_dict()))
    assert.matches("missing: stage0", message)
    message = fails("these are weights of the deployed form, and the network is of the training form: make it with deploy = true",
      training.load_state_dict, training, (deployed:state_dict()))
    assert.matches("unexpected: stage0", message)
    local plain = nn.ConvBN { in_channels = 1, out_channels = 1, kernel_size = 1 }
    local other = nn.ConvBN { in_channels = 1, out_channels = 1, kernel_size = 1 }:deploy()
    fails("weights of the deployed form", plain.load_state_dict, plain, (other:state_dict()))
    fails("weights of the training form", other.load_state_dict, other, (plain:state_dict()))
  end)

  it("but lack counts of batches alone are old, and load", function()
    local norm = nn.BatchNorm2d(2)
    local state = norm:state_dict()
    state.num_batches_tracked = nil
    state.running_mean = orepa.ones(2)
    assert.same({}, (norm:load_state_dict(state)))
    assert.same({ 1, 1 }, norm.running_mean:tolist())
    local two = nn.Sequential(nn.BatchNorm2d(1), nn.BatchNorm2d(1))
    state = two:state_dict()
    state["0.num_batches_tracked"] = nil
    fails("missing: 0.num_batches_tracked", two.load_state_dict, two, state)
  end)

  it("are named by strings", function()
    fails("named by strings, not by a number", net.load_state_dict, net, { orepa.ones(1) })
  end)
end)

describe("a checkpoint that PyTorch wrote", function()
  local Net = nn.Module:extend("Net")
  function Net:init()
    self.conv1 = nn.Conv2d { in_channels = 2, out_channels = 3, kernel_size = 3, bias = false }
    self.bn1 = nn.BatchNorm2d(3)
    self.linear = nn.Linear { in_features = 3, out_features = 2 }
  end

  it("loads into the same network", function()
    for _, file in ipairs { "checkpoint", "state_dict", "module", "checkpoint.old", "state_dict.old", "module.old" } do
      local net = Net()
      local tensors = orepa.load(("tests/golden/pytorch/%s.pth"):format(file))
      net:load_state_dict(orepa.state_dict(tensors, net))
      local wanted = tensors["conv1.weight"] or tensors["state_dict.module.conv1.weight"]
      assert.same(wanted:tolist(), net.conv1.weight:tolist())
      assert.equal(1, net.bn1.num_batches_tracked:item())
    end
  end)
end)
