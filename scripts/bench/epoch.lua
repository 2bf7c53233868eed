-- Times whole training epochs of ResNet-18 (width 0.25) on Fashion-MNIST side by side: our OREPA and plain networks, and, with
-- --python, PyTorch's OREPA in several modes; of those that compile it is the second epoch. Every round runs each of them once,
-- each in its own process; what is printed are medians over the rounds and their ratios.
--
--     build/orepa scripts/bench/epoch.lua --rounds 3 --python /path/to/python   (one that can import torch)

local argparse = require "argparse"
local cjson = require "cjson"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"

local parser = argparse("epoch.lua", "Times training epochs side by side.")
parser:option("--rounds", "how often each is run", 3):convert(measure.at_least(1))
parser:option("--width", "width multiplier", 0.25):convert(tonumber)
parser:option("--threads", "threads of each", 2):convert(measure.at_least(1))
parser:option("--python", "interpreter with PyTorch, for the peers")
parser:option("--peers", "modes of PyTorch, a list (peers/pytorch_orepa.py --help)", "eager,channels-last"):convert(measure.list)
local args = parser:parse()

local function common(reparam, epochs)
  return "--reparam", reparam, "--epochs", epochs or 1, table.unpack(measure.words(args, { "width", "threads" }))
end

local function ours(reparam)
  return function()
    local folder = os.tmpname()
    os.remove(folder)
    measure.output_of(measure.command { measure.program(), measure.folder() .. "/../train.lua", "--model", "resnet18",
      "--no-test", "--out", folder, common(reparam) })
    local file <close> = assert(io.open(folder .. "/metrics.json"))
    local seconds = cjson.decode(file:read "a").epochs[1].seconds
    measure.output_of(measure.command { "rm", "-r", folder })
    return seconds
  end
end

local function peer(variant)
  return function()
    local text = measure.output_of(measure.command { args.python, measure.folder() .. "/peers/pytorch_orepa.py", "--variant",
      variant, "--json", common("orepa", variant:find "^compiled" and 2 or 1) })
    return cjson.decode(text:match "([^\n]+)\n*$").seconds
  end
end

local runs = { { name = "OREPA", run = ours "orepa" }, { name = "plain", run = ours "none" } }
for _, variant in ipairs(args.python and args.peers or {}) do
  runs[#runs + 1] = { name = "PyTorch OREPA, " .. variant, run = peer(variant) }
end

for round = 1, args.rounds do
  for _, r in ipairs(runs) do
    r.seconds = r.seconds or {}
    r.seconds[round] = r.run()
    print(("round %d  %-28s  %6.2f s"):format(round, r.name, r.seconds[round]))
    io.stdout:flush()
  end
end

for _, r in ipairs(runs) do r.median = measure.median(r.seconds) end
print()
for _, r in ipairs(runs) do print(("%-28s  %6.2f s an epoch"):format(r.name, r.median)) end
print(("OREPA costs %.2f times our plain network"):format(runs[1].median / runs[2].median))
if args.python then
  local best = math.huge
  for k = 3, #runs do best = math.min(best, runs[k].median) end
  print(("OREPA is %.2f times as fast as the fastest of PyTorch's"):format(best / runs[1].median))
end
