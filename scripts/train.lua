-- Trains a network on a dataset, evaluates it, and writes weights and metrics to a folder. --help lists the options.

local argparse = require "argparse"
local cjson = require "cjson"
local lfs = require "lfs"
local orepa = require "orepa"
local models = require "orepa.models"
local datasets = require "orepa.datasets"
local data, optim, train = orepa.data, orepa.optim, orepa.train

local parser = argparse("train.lua", "Trains a network and evaluates it.")
parser:option("--model", "name of the network", "resnet18")
parser:option("--reparam", "blocks of the network: none, dbb, orepa, repvgg, orepa_vgg", "orepa")
parser:option("--dataset", "name of the dataset", "fashion-mnist")
parser:option("--data", "folder of the dataset, if not where its package installs it")
parser:option("--width", "width multiplier", 1.0):convert(tonumber)
parser:option("--stem", "imagenet (7x7, stride 2, pool) or small (3x3)", "imagenet")
parser:option("--epochs", "passes over the training images", 10):convert(math.tointeger)
parser:option("--batch-size", "images in a step", 128):convert(math.tointeger)
parser:option("--lr", "highest learning rate", 0.1):convert(tonumber)
parser:option("--momentum", "momentum of SGD", 0.9):convert(tonumber)
parser:option("--weight-decay", "weight decay", 5e-4):convert(tonumber)
parser:option("--warmup", "epochs of linear warm-up", 1):convert(tonumber)
parser:option("--label-smoothing", "label smoothing", 0):convert(tonumber)
parser:option("--padding", "random crops of images padded by this many pixels", 0):convert(math.tointeger)
parser:option("--held-out", "training images held out for validation", 5000):convert(math.tointeger)
parser:option("--seed", "seed of weights and order", 1):convert(math.tointeger)
parser:option("--threads", "threads of the kernels"):convert(math.tointeger)
parser:option("--workers", "threads that prepare batches ahead", 1):convert(math.tointeger)
parser:option("--precision", "what convolutions compute in: float32, or bf16 where the device gains by it", "float32")
  :choices { "float32", "bf16" }
parser:option("--device", "where it runs", "cpu")
parser:option("--out", "folder for weights and metrics")
parser:flag("--no-test", "don't evaluate on the test images")
local args = parser:parse()

local function say(...) print(string.format(...)) end

orepa.manual_seed(args.seed)
if args.threads then orepa.set_threads(args.threads) end

local set = datasets.load(args.dataset, { folder = args.data, held_out = args.held_out })
local net = models.create(args.model, { reparam = args.reparam, classes = set.classes, in_channels = set.channels,
  width = args.width, stem = args.stem })
net:to(args.device)

local function loader(dataset, o)
  o.dataset, o.mean, o.deviation, o.device, o.workers = dataset, set.mean, set.deviation, args.device, args.workers
  return data.loader(o)
end
local batches = loader(set.train, { batch_size = args.batch_size, shuffle = true, seed = args.seed, augment = true, flip = true,
  padding = args.padding, crop = args.padding > 0 and { set.train.images.shape[2], set.train.images.shape[3] } or nil })
local valid = set.valid and loader(set.valid, { batch_size = 500 })

local count = 0
for _, p in ipairs(net:parameters()) do count = count + p:count() end
say("%s, reparam %s, width %g: %d parameters; %d training images, %d held out, %d threads", args.model, args.reparam,
  args.width, count, set.train.size, set.valid and set.valid.size or 0, orepa.threads())

local function write_file(path, text)
  local file <close> = assert(io.open(path .. ".new", "w"))
  assert(file:write(text))
  assert(file:flush())
  assert(os.rename(path .. ".new", path))
end

local function make_folder(path)
  if lfs.attributes(path, "mode") == "directory" then return end
  local made, message = lfs.mkdir(path)
  if not made then orepa.fail(("train.lua: --out %s: %s"):format(path, message)) end
end

local metrics = { options = {}, epochs = {} }
for name, value in pairs(args) do metrics.options[name] = value end
local function save_metrics()
  if args.out then write_file(args.out .. "/metrics.json", cjson.encode(metrics) .. "\n") end
end
if args.out then make_folder(args.out) end

local _ <close> = orepa.autocast(args.precision == "bf16" and "bfloat16" or "float32") -- for all that follows

local history = train.fit {
  net = net, loader = batches, valid = valid, epochs = args.epochs,
  optimizer = optim.SGD(optim.param_groups(net), { lr = args.lr, momentum = args.momentum, weight_decay = args.weight_decay }),
  schedule = optim.warmup_cosine { lr = args.lr, steps = args.epochs * batches.batches,
    warmup = math.floor(args.warmup * batches.batches) },
  loss = function(logits, labels)
    return orepa.F.cross_entropy(logits, labels, { label_smoothing = args.label_smoothing })
  end,
  on_epoch = function(result)
    metrics.epochs[#metrics.epochs + 1] = result
    save_metrics()
  end,
}

if args.out then
  models.save(net, args.out .. "/model.safetensors", { dataset = args.dataset, mean = cjson.encode(set.mean),
    deviation = cjson.encode(set.deviation), seed = tostring(args.seed) })
  say("weights and metrics are in %s", args.out)
end
if set.valid and #history > 0 then say("held-out accuracy %.2f %%", 100 * history[#history].valid.accuracy) end
if not args.no_test then
  metrics.test = train.evaluate(net, loader(set.test, { batch_size = 500 }))
  save_metrics()
  say("test accuracy %.2f %%", 100 * metrics.test.accuracy)
end
