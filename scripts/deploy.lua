-- Turns a trained network into its deployed form, every block one convolution, and shows that nothing changed: the largest
-- difference of the logits on test images, and both speeds.

local argparse = require "argparse"
local cjson = require "cjson"
local orepa = require "orepa"
local models = require "orepa.models"
local datasets = require "orepa.datasets"

local parser = argparse("deploy.lua", "Deploys a trained network and compares both forms.")
parser:argument("input", "weights that train.lua wrote (model.safetensors)")
parser:argument("output", "where the deployed weights go"):args("?")
parser:option("--data", "folder of the dataset, if not where its package installs it")
parser:option("--images", "test images to compare on", 10000):convert(math.tointeger)
parser:option("--batch-size", "images in a batch", 500):convert(math.tointeger)
parser:option("--tolerance", "largest difference allowed, relative to the largest logit", 1e-4):convert(tonumber)
local args = parser:parse()

local net, meta = models.load(args.input)
if not meta.dataset then orepa.fail(("deploy.lua: %s does not name the dataset it was trained on"):format(args.input)) end
local set = datasets.load(meta.dataset, { folder = args.data, held_out = 0 })
if args.images < 1 then orepa.fail(("deploy.lua: --images is %d, at least 1 expected"):format(args.images)) end
local count = math.min(args.images, set.test.size)
local loader = orepa.data.loader { dataset = orepa.data.part(set.test, 1, count), batch_size = args.batch_size,
  mean = cjson.decode(meta.mean), deviation = cjson.decode(meta.deviation) }

local batches, right = {}, {}
for images, labels in loader:epoch(1) do
  batches[#batches + 1], right[#right + 1] = images, labels
end

-- Logits of all batches, and images a second; the first batch warms up. In the training form every pass squeezes.
local function run(keep_graph)
  local logits, start = {}, nil
  local function pass()
    for k, images in ipairs(batches) do
      if k == 2 or #batches == 1 then start = start or orepa.clock() end
      logits[k] = net(images):detach()
    end
  end
  net:eval()
  if keep_graph then pass() else orepa.no_grad(pass) end
  local seconds = orepa.clock() - start
  return logits, (#batches > 1 and count - #batches[1] or count) / seconds
end

local before, squeezing_speed = run(true)
local _, folded_speed = run(false)
net:deploy()
local after, deployed_speed = run(false)

local difference, largest, same, correct = 0, 0, 0, 0
for k, logits in ipairs(before) do
  difference = math.max(difference, (logits - after[k]):abs():max():item())
  largest = math.max(largest, logits:abs():max():item())
  local predicted = after[k]:argmax(2)
  same = same + logits:argmax(2):eq(predicted):sum():item()
  correct = correct + predicted:eq(right[k]):sum():item()
end

if args.output then
  local extra = {}
  for key, value in pairs(meta) do
    if key ~= "model" and key ~= "model_options" then extra[key] = value end
  end
  models.save(net, args.output, extra)
end
print(("deployed on %d images: largest difference of logits %.2e of the largest (%.2f), %d of %d predictions the same"):format(
  count, difference / largest, largest, same, count))
print(("images/s: training form squeezing each pass %.0f, training form folded once %.0f, deployed %.0f"):format(
  squeezing_speed, folded_speed, deployed_speed))
local close = difference <= args.tolerance * largest -- false for a NaN
if not close or same ~= count then
  io.stderr:write("deploy.lua: the deployed network is not the same\n")
  os.exit(1)
end
print(("deployed test accuracy %.2f %%"):format(100 * correct / count))
