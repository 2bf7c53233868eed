-- What a step of a variant costs: its time and the engine's peak memory, in a process of its own. For the other scripts here;
-- prints one line of JSON.
--
--     build/orepa scripts/paper/cost.lua --variant online-all --batch-size 32

local argparse = require "argparse"
local cjson = require "cjson"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. (arg[0]:match "^.*/" or "") .. "../bench/?.lua;" .. package.path
local measure = require "measure"
local variants = require "variants"
local orepa = require "orepa"
local models = require "orepa.models"
local F, optim = orepa.F, orepa.optim

local parser = argparse("cost.lua", "Time and memory of a training step.")
parser:option("--variant", "name of the network, as in variants.lua", "orepa")
parser:option("--batch-size", "images in a step", 32):convert(math.tointeger)
parser:option("--size", "height and width of the images", 224):convert(math.tointeger)
parser:option("--width", "width multiplier", 1.0):convert(tonumber)
parser:option("--steps", "that are timed", 3):convert(math.tointeger)
local args = parser:parse()

local variant = variants[args.variant]
if not variant then orepa.fail(("cost.lua: there is no variant '%s'"):format(args.variant)) end
orepa.manual_seed(1)
local net = models.create(variant.model, { reparam = variant.reparam, width = args.width })
local opt = optim.SGD(optim.param_groups(net), { lr = 0.01, momentum = 0.9, weight_decay = 1e-4 })
local x = orepa.randn(args.batch_size, 3, args.size, args.size)
local labels = orepa.zeros({ args.batch_size }, { dtype = "int64" })

local function step()
  local loss = F.cross_entropy(net(x), labels)
  opt:zero_grad()
  loss:backward()
  opt:step()
end

step() -- makes the optimizer's state
orepa.reset_peak()
local times = {}
for k = 1, args.steps do
  local start = orepa.clock()
  step()
  times[k] = (orepa.clock() - start) * 1e3
end
local count = 0
for _, p in ipairs(net:parameters()) do count = count + p:count() end
print(cjson.encode { variant = args.variant, batch_size = args.batch_size, size = args.size, step_ms = measure.summary(times),
  peak_bytes = orepa.memory().peak, parameters = count })
