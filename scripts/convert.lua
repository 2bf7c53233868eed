-- Converts weights to safetensors: a checkpoint of PyTorch's (.pth, .pt, .pth.tar) or another safetensors file, as it is, or by
-- way of a network that they are loaded into and that may be expanded (plain convolutions become re-parameterized blocks that
-- compute the same) and deployed.

local argparse = require "argparse"
local orepa = require "orepa"
local models = require "orepa.models"

local parser = argparse("convert.lua", "Converts weights to a safetensors file.")
parser:argument("input", "a checkpoint that torch.save wrote, or a safetensors file")
parser:argument("output", "the safetensors file to write")
parser:flag("--all", "keep everything of a checkpoint under its path, not the network's weights alone")
parser:option("--model", "load the weights into this network, and write what models.load reads")
parser:option("--reparam", "blocks of the network: none, dbb, orepa, repvgg, orepa_vgg", "none")
parser:option("--width", "width multiplier of the network", 1.0):convert(tonumber)
parser:option("--stem", "the network's stem: imagenet (7x7, stride 2, pool) or small (3x3)", "imagenet")
parser:option("--classes", "classes of the network, if not as many as the weights have"):convert(math.tointeger)
parser:option("--in-channels", "channels of the network's input", 3):convert(math.tointeger)
parser:option("--expand", "make blocks of this kind of the network's plain convolutions: dbb, orepa, repvgg, orepa_vgg")
parser:flag("--deploy", "write the network's deployed form")
local args = parser:parse()

if args.all and args.model then orepa.fail("convert.lua: --all keeps what is no network's; it doesn't go with --model") end
for _, name in ipairs { "deploy", "expand" } do
  if args[name] and not args.model then orepa.fail(("convert.lua: --%s needs to know the network: --model"):format(name)) end
end

local function say(...) print(string.format(...)) end

local loaded, meta, order = orepa.load(args.input)

-- ---- metadata: a checkpoint's own values, without those of its optimizer and the like ----

local kept_out = meta.__kept_out__
meta.__kept_out__ = nil
if not args.all then
  for key in pairs(meta) do
    if key:find(".", 1, true) then meta[key] = nil end
  end
end

-- ---- without a network ----

local function convert()
  if args.all then
    orepa.save(args.output, loaded, meta, order)
    return #order
  end
  local tensors, names = orepa.state_dict(loaded)
  if #names == 0 then orepa.fail(("convert.lua: %s holds no tensor"):format(args.input)) end
  orepa.save(args.output, tensors, meta, names)
  return #names
end

-- ---- by way of one ----

-- Whether the weights are those of deployed blocks: their convolutions have a bias.
local function is_deployed(tensors)
  for name in pairs(tensors) do
    if name:find "_reparam%.bias$" or name:find "%.conv%.bias$" then return true end
  end
  return false
end

local function convert_network()
  local tensors = orepa.state_dict(loaded)
  local last = tensors["linear.weight"]
  local options = { reparam = args.reparam, width = args.width, stem = args.stem, in_channels = args.in_channels,
    classes = args.classes or (last and last.shape[1]),
    deploy = (args.deploy or args.expand) and is_deployed(tensors) or nil }
  local net = models.create(args.model, options)
  net:load_state_dict(orepa.state_dict(loaded, net))
  if args.expand then orepa.reparam.expand(net, args.expand) end
  if args.deploy then net:deploy() end
  meta.model, meta.model_options = nil, nil
  models.save(net, args.output, meta)
  local _, names = net:state_dict()
  return #names
end

local count = args.model and convert_network() or convert()
if kept_out then say("kept out, since safetensors files hold tensors and strings alone:\n  %s", (kept_out:gsub("\n", "\n  "))) end
say("%s holds %d tensors%s%s", args.output, count, args.expand and ", expanded to " .. args.expand or "",
  args.deploy and ", deployed" or "")
