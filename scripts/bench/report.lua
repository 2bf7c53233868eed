-- Measures what docs/performance.md shows, and makes that page. Each measurement is a command of its own; its text is kept with
-- what it gave, one JSON object a line, in <out>/results.jsonl. Charts lie beside it, the page is <out>.md.
--
--     build/orepa scripts/bench/report.lua --python /path/to/python --out docs/performance
--     build/orepa scripts/bench/report.lua --python /path/to/python --only squeeze,conv     (these parts again)
--     build/orepa scripts/bench/report.lua --draw                                           (charts and page alone)
--
-- Without --python nothing but ours is measured.

local argparse = require "argparse"
local cjson = require "cjson"
local lfs = require "lfs"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"
local page = require "page"
local orepa = require "orepa"

local parser = argparse("report.lua", "Measures what docs/performance.md shows, and makes it.")
parser:option("--out", "folder of results and charts; the page lies beside it", "docs/performance")
parser:option("--python", "interpreter with PyTorch and onnxruntime, for the peers")
parser:flag("--quick", "sizes that take no time, to try this script")
parser:mutex(parser:option("--only", "parts to measure, a list"):convert(measure.list),
  parser:flag("--draw", "measure nothing, make charts and the page from the results that there are"))
local args = parser:parse()

-- ---- what is measured: parts of the page, each with its commands ----

local ALL = "eager,channels-last,compiled-channels-last"
local SHORT = " --rounds 3 --steps 6" -- of steps that take long

local parts = {
  { name = "plain", title = "A training step of the plain network", about = [[
A training step (forward, loss, backward, SGD with momentum) of plain ResNet-18 on 16 images of 224x224, beside PyTorch's.]],
    "step.lua --reparam none --batch-size 16 --peers " .. ALL .. SHORT },
  { name = "orepa", title = "A training step of the OREPA network", about = [[
The same step of OREPA-ResNet-18, beside PyTorch's with the same blocks; `none:` is PyTorch's step of the plain network.]],
    "step.lua --reparam orepa --batch-size 16 --peers " .. ALL .. ",none:channels-last,none:compiled-channels-last"
      .. SHORT },
  { name = "overhead", title = "What OREPA costs beside the plain network", about = [[
A training step of OREPA-ResNet-18 beside our own step of plain ResNet-18 (`none:ours`), at three batch sizes.]],
    "step.lua --reparam orepa --batch-size 16 --peers none:ours" .. SHORT,
    "step.lua --reparam orepa --batch-size 32 --peers none:ours" .. SHORT,
    "step.lua --reparam orepa --batch-size 64 --peers none:ours" .. SHORT },
  { name = "resnet50", title = "ResNet-50", about = [[
A training step of ResNet-50 on 8 images, plain and with OREPA blocks.]],
    "step.lua --model resnet50 --reparam none --batch-size 8 --peers " .. ALL .. SHORT,
    "step.lua --model resnet50 --reparam orepa --batch-size 8 --peers none:ours," .. ALL .. SHORT },
  { name = "branches", title = "Blocks that run their branches on the map", about = [[
A training step of DBB-ResNet-18 on 16 images and of OREPA-VGG-A0 (identity, squeezed 3x3 and 1x1, each with a norm) on 8.]],
    "step.lua --reparam dbb --batch-size 16 --peers channels-last,compiled-channels-last" .. SHORT,
    "step.lua --model repvgg_a0 --reparam orepa_vgg --batch-size 8 --peers channels-last,compiled-channels-last" .. SHORT },
  { name = "bfloat16", title = "bfloat16", about = [[
A training step of ResNet-18 with convolutions and the maps between them in bfloat16, beside PyTorch's autocast.]],
    "step.lua --precision bf16 --reparam none --batch-size 16 --peers bfloat16,compiled-bfloat16" .. SHORT,
    "step.lua --precision bf16 --reparam orepa --batch-size 16 --peers none:ours,bfloat16,compiled-bfloat16,none:bfloat16,"
      .. "none:compiled-bfloat16" .. SHORT },
  { name = "deployed", title = "The deployed network", about = [[
A forward pass of the deployed ResNet-18 (convolutions with bias, ReLUs) on 1 image and on 32, beside onnxruntime and PyTorch.]],
    "step.lua --mode deploy --batch-size 1 --peers onnxruntime,channels-last --steps 50",
    "step.lua --mode deploy --batch-size 32 --peers onnxruntime,channels-last" .. SHORT },
  { name = "avx2", title = "With AVX2 alone", needs = "avx2", about = [[
A training step of ResNet-18 where all are kept to AVX2.]],
    "step.lua --isa avx2 --reparam none --batch-size 16 --peers eager,channels-last" .. SHORT,
    "step.lua --isa avx2 --reparam orepa --batch-size 16 --peers eager,channels-last" .. SHORT },
  { name = "breakdown", title = "The parts of a step", about = [[
Where the time of our training steps of ResNet-18 goes, in milliseconds, by entry of the device's table, convolutions by kernel.
What takes less than half a percent is left out.]],
    "breakdown.lua --reparam none --batch-size 16",
    "breakdown.lua --reparam orepa --batch-size 16" },
  { name = "squeeze", title = "Squeezing alone", about = [[
Each distinct block of OREPA-ResNet-18 by itself: squeezing its branches to one kernel, beside the convolution with that kernel,
forward and backward, in milliseconds.]],
    "squeeze.lua --batch-size 16" },
  { name = "conv", title = "3x3 convolutions alone", about = [[
ResNet-18's 3x3 convolutions with stride 1 by Winograd's way and directly: milliseconds, and the error against float64, relative
to the largest magnitude.]],
    "conv.lua --batch-size 16 --ways direct,winograd" },
  { name = "scaling", title = "Batch size and threads", about = [[
Our training steps of ResNet-18 over batch sizes and threads.]],
    "scaling.lua --reparam none,orepa --batch-size 1,2,4,8,16,32,64 --threads 1,2" },
}

-- ---- measuring ----

local tiny = " --threads 1 --size 32 --width 0.1 --classes 10 --rounds 1 --steps 1"
local tiny_of = { ["step.lua"] = " --matmul-size 256 --warm-up 0", ["conv.lua"] = " --evict 0 --error-macs 1" }

-- The command with this script's options; the interpreter is called python3 in it. Only `none:ours` needs none.
local function command_of(text)
  local has_peers = text:find("--peers", 1, true)
  if not args.python then
    text = text:gsub(" %-%-peers (%S+)", function(peers) return peers:find "none:ours" and " --peers none:ours" or "" end)
  end
  if args.quick then
    text = text:gsub("(%-%-batch%-size) (%S+)", function(option, list) return option .. (list:find "," and " 2,4" or " 2") end)
    for _, option in ipairs { "threads", "rounds", "steps" } do text = text:gsub(" %-%-" .. option .. " %S+", "") end
    text = text .. tiny .. (tiny_of[text:match "%S+"] or "")
  end
  return text .. (args.python and has_peers and " --python python3" or "") .. " --json"
end

local function measured(part)
  local records = {}
  for k, text in ipairs(part) do
    local command, words, results = command_of(text), { measure.program() }, {}
    print(command)
    io.stdout:flush()
    for word in command:gmatch "%S+" do measure.append(words, { word == "python3" and args.python or word }) end
    words[2] = measure.folder() .. "/" .. words[2]
    for line in measure.output_of(measure.command(words)):gmatch "[^\n]+" do
      local result = cjson.decode(line)
      result.options.python = nil
      results[#results + 1] = result
    end
    records[k] = { part = part.name, command = "build/orepa scripts/bench/" .. command, results = results }
  end
  return records
end

-- ---- results ----

local function read_results(path)
  local records = {}
  local file <close> = io.open(path)
  if not file then return records end
  for line in file:lines() do records[#records + 1] = cjson.decode(line) end
  return records
end

-- Puts the records of a part in place of those that there were.
local function replace(path, part, records)
  local lines = {}
  for _, record in ipairs(read_results(path)) do
    if record.part ~= part.name then lines[#lines + 1] = cjson.encode(record) .. "\n" end
  end
  for _, record in ipairs(records) do lines[#lines + 1] = cjson.encode(record) .. "\n" end
  measure.write_file(path, table.concat(lines))
end

local function chosen_parts()
  if not args.only then return parts end
  local by_name, chosen = {}, {}
  for _, part in ipairs(parts) do by_name[part.name] = part end
  for k, name in ipairs(args.only) do
    chosen[k] = by_name[name] or parser:error(("there is no part '%s'"):format(name))
  end
  return chosen
end

local function measure_parts(chosen, path)
  for _, part in ipairs(chosen) do
    if part.needs and not orepa.build_info():find(part.needs, 1, true) then
      print(("%s: left out, this processor has no %s"):format(part.name, part.needs))
    else
      replace(path, part, measured(part))
    end
  end
end

local path, chosen = args.out .. "/results.jsonl", chosen_parts()
if not args.draw then
  if lfs.attributes(args.out, "mode") ~= "directory" then assert(lfs.mkdir(args.out)) end
  measure_parts(chosen, path)
end
local records = read_results(path)
if #records == 0 then orepa.fail("report.lua: there are no results in " .. path) end
measure.write_file(args.out .. ".md", page.text(parts, records, args.out))
