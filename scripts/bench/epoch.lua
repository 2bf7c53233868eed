-- Times whole training epochs of ResNet-18 (width 0.25) on Fashion-MNIST side by side: our OREPA and plain networks, and, with
-- --python, PyTorch's OREPA in eager and in channels-last mode. Every round runs each of them once, each in its own process; what
-- is printed are medians over the rounds and their ratios.
--
--     build/orepa scripts/bench/epoch.lua --rounds 3 --python /path/to/python   (one that can import torch)

local argparse = require "argparse"
local cjson = require "cjson"

local parser = argparse("epoch.lua", "Times training epochs side by side.")
parser:option("--rounds", "how often each is run", 3):convert(math.tointeger)
parser:option("--width", "width multiplier", 0.25):convert(tonumber)
parser:option("--threads", "threads of each", 2):convert(math.tointeger)
parser:option("--python", "interpreter with PyTorch, for the peer")
local args = parser:parse()

local function quoted(text)
  return "'" .. text:gsub("'", "'\\''") .. "'"
end

local function output_of(command)
  local pipe <close> = assert(io.popen(command))
  local text = pipe:read "a"
  assert(pipe:close(), "failed: " .. command)
  return text
end

local stat <close> = assert(io.open "/proc/self/stat") -- begins with the process's number
local program = output_of(("readlink /proc/%d/exe"):format(stat:read "n")):match "[^\n]+"

local function ours(reparam)
  return function()
    local folder = os.tmpname()
    os.remove(folder)
    output_of(("%s scripts/train.lua --model resnet18 --reparam %s --width %g --epochs 1 --threads %d --no-test --out %s"):format(
      quoted(program), reparam, args.width, args.threads, quoted(folder)))
    local file <close> = assert(io.open(folder .. "/metrics.json"))
    local seconds = cjson.decode(file:read "a").epochs[1].seconds
    os.execute("rm -r " .. quoted(folder))
    return seconds
  end
end

local function peer(mode)
  return function()
    local options = ("--reparam orepa --width %g --epochs 1 --threads %d --mode %s --json"):format(args.width, args.threads, mode)
    local text = output_of(("%s scripts/bench/peers/pytorch_orepa.py %s"):format(quoted(args.python), options))
    return cjson.decode(text).seconds
  end
end

local runs = { { name = "OREPA", run = ours "orepa" }, { name = "plain", run = ours "none" } }
if args.python then
  runs[3] = { name = "PyTorch OREPA, eager", run = peer "eager" }
  runs[4] = { name = "PyTorch OREPA, channels-last", run = peer "channels-last" }
end

local function median(values)
  local sorted = table.move(values, 1, #values, 1, {})
  table.sort(sorted)
  local middle = (#sorted + 1) // 2
  return #sorted % 2 == 1 and sorted[middle] or (sorted[middle] + sorted[middle + 1]) / 2
end

for round = 1, args.rounds do
  for _, r in ipairs(runs) do
    r.seconds = r.seconds or {}
    r.seconds[round] = r.run()
    print(("round %d  %-28s  %6.2f s"):format(round, r.name, r.seconds[round]))
    io.stdout:flush()
  end
end

for _, r in ipairs(runs) do r.median = median(r.seconds) end
print()
for _, r in ipairs(runs) do print(("%-28s  %6.2f s an epoch"):format(r.name, r.median)) end
print(("OREPA costs %.2f times our plain network"):format(runs[1].median / runs[2].median))
if args.python then
  print(("OREPA is %.2f times as fast as the faster of PyTorch's"):format(
    math.min(runs[3].median, runs[4].median) / runs[1].median))
end
