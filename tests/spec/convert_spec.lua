-- scripts/convert.lua, run as a user runs it.

local orepa = require "orepa"
local models = require "orepa.models"
local process = require "tests.spec.process"
local write_checkpoint = require "tests.spec.write_checkpoint"

local folder, net, x

local function convert(...)
  return process.run({ process.root .. "/scripts/convert.lua", ... }, folder)
end

local function has(text, wanted)
  assert(text:find(wanted, 1, true), ("'%s' is not in:\n%s"):format(wanted, text))
end

local function converts(...)
  local text, code = convert(...)
  assert(code == 0, text)
  return text
end

local function refuses(wanted, ...)
  local text, code = convert(...)
  has(text, wanted)
  assert.equal(1, code)
end

local function largest_difference(a, b)
  return (a - b):abs():max():item() / b:abs():max():item()
end

describe("convert.lua", function()
  local network = { "--model", "resnet18", "--reparam", "orepa", "--width", "0.0625", "--in-channels", "1" }

  local function with_network(...)
    local arguments = { ... }
    table.move(network, 1, #network, #arguments + 1, arguments)
    return table.unpack(arguments)
  end

  setup(function()
    folder = process.folder()
    orepa.manual_seed(8)
    net = models.create("resnet18", { reparam = "orepa", width = 0.0625, in_channels = 1, classes = 4 })
    x = orepa.randn(2, 1, 16, 16)
    net(x)
    write_checkpoint(folder .. "/training.pth", "state_dict", net:state_dict { constants = true }, "module.")
    net:eval()
  end)
  teardown(function() process.remove(folder) end)

  it("writes the weights of a checkpoint, and says what it keeps out", function()
    local text = converts("training.pth", "weights.safetensors")
    has(text, "args: argparse.Namespace")
    local tensors, meta = orepa.load(folder .. "/weights.safetensors")
    local wanted = net:state_dict { constants = true }
    local count = 0
    for name, t in pairs(wanted) do
      assert.same(t:tolist(), tensors[name]:tolist())
      count = count + 1
    end
    has(text, ("weights.safetensors holds %d tensors\n"):format(count))
    assert.same({ epoch = "3" }, meta)
  end)

  it("writes everything with --all, under its path", function()
    converts("training.pth", "all.safetensors", "--all")
    local tensors, meta = orepa.load(folder .. "/all.safetensors")
    assert(tensors["state_dict.module.linear.weight"])
    assert.same({ epoch = "3" }, meta)
  end)

  it("loads weights into a network, and writes what models.load reads", function()
    converts(with_network("training.pth", "network.safetensors"))
    local loaded, meta = models.load(folder .. "/network.safetensors")
    assert.same(net(x):tolist(), loaded:eval()(x):tolist())
    assert.equal("3", meta.epoch)
  end)

  it("deploys, also what is deployed already", function()
    local text = converts(with_network("training.pth", "deployed.safetensors", "--deploy"))
    has(text, "deployed.safetensors holds 42 tensors, deployed")
    local deployed = models.load(folder .. "/deployed.safetensors"):eval()
    assert(largest_difference(deployed(x), net(x)) < 1e-4)
    local state = deployed:state_dict()
    state["stage1.0.conv1.weight_orepa_avg_avg"] = orepa.ones(3, 3) -- the reference implementation leaves some behind
    write_checkpoint(folder .. "/deployed.pth", "model", state, "")
    converts(with_network("deployed.pth", "again.safetensors", "--deploy"))
    local again = models.load(folder .. "/again.safetensors"):eval()
    assert.same(deployed(x):tolist(), again(x):tolist())
    refuses("make it with deploy = true", with_network("deployed.pth", "never.safetensors"))
    assert.is_nil(io.open(folder .. "/never.safetensors"))
  end)

  it("expands, and deploys what it expanded", function()
    write_checkpoint(folder .. "/plain.pth", "state_dict", models.load(folder .. "/deployed.safetensors"):state_dict(), "")
    local text = converts(with_network("plain.pth", "expanded.safetensors", "--expand", "dbb"))
    has(text, "expanded to dbb")
    local expanded = models.load(folder .. "/expanded.safetensors"):eval()
    assert(largest_difference(expanded(x), net(x)) < 1e-4)
    assert.equal("offline", expanded:get("stage1.0.conv1").mode)
    converts(with_network("plain.pth", "back.safetensors", "--expand", "dbb", "--deploy"))
    local back = models.load(folder .. "/back.safetensors")
    assert.equal("deploy", back:get("stage1.0.conv1").mode)
    assert(largest_difference(back(x), net(x)) < 1e-4)
    refuses("no kind of block is called 'bdd'", with_network("plain.pth", "out.safetensors", "--expand", "bdd"))
    refuses("--expand needs to know the network", "plain.pth", "out.safetensors", "--expand", "dbb")
  end)

  it("takes safetensors files too", function()
    models.save(net, folder .. "/own.safetensors", { note = "mine" })
    converts("own.safetensors", "copy.safetensors")
    local copy, meta = models.load(folder .. "/copy.safetensors")
    assert.equal("mine", meta.note)
    assert.same(net(x):tolist(), copy:eval()(x):tolist())
  end)

  it("refuses what doesn't fit, with names", function()
    refuses("missing argument 'output'", "training.pth")
    refuses("nowhere.pth: cannot be opened", "nowhere.pth", "out.safetensors")
    refuses("/nowhere/out.safetensors", "training.pth", "/nowhere/out.safetensors")
    refuses("--deploy needs to know the network", "training.pth", "out.safetensors", "--deploy")
    refuses("it doesn't go with --model", "training.pth", "out.safetensors", "--all", "--model", "resnet18")
    refuses("no network is called 'resnet17'", "training.pth", "out.safetensors", "--model", "resnet17")
    refuses("linear.weight is 5x32, the file has 4x32", with_network("training.pth", "out.safetensors", "--classes", "5"))
    refuses("malformed argument 'many'", "training.pth", "out.safetensors", "--classes", "many")
    process.write(folder .. "/page.pth", "<html>")
    refuses("is neither a safetensors file nor a checkpoint of PyTorch's but an HTML or XML page", "page.pth", "out.safetensors")
    write_checkpoint(folder .. "/empty.pth", "state_dict", {}, "")
    refuses("empty.pth holds no tensor", "empty.pth", "out.safetensors")
    assert.is_nil(io.open(folder .. "/out.safetensors"))
  end)
end)
