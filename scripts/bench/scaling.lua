-- How the time of a step grows with batch size, image size, width, depth and threads: every combination of the lists given, each
-- in a process of its own, all of them once in every round.
--
--     build/orepa scripts/bench/scaling.lua --batch-size 1,2,4,8,16,32,64 --reparam none,orepa
--     build/orepa scripts/bench/scaling.lua --model resnet18,resnet34,resnet50 --width 0.25,0.5,1 --threads 1..4
--
-- A list is words with commas between them; 1..4 is 1,2,3,4.

local argparse = require "argparse"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"
local workload = require "workload"
local orepa = require "orepa"

local parser = argparse("scaling.lua", "Times steps of a network over lists of sizes.")
parser:option("--model", "names of networks", "resnet18"):convert(measure.list)
parser:option("--reparam", "blocks of the network: none, dbb, orepa, repvgg, orepa_vgg", "orepa"):convert(measure.list)
parser:option("--width", "width multipliers", "1"):convert(measure.numbers)
parser:option("--batch-size", "images in a step", "1,4,16"):convert(measure.integers)
parser:option("--size", "heights and widths of the images", "224"):convert(measure.integers)
parser:option("--threads", "threads of the kernels", "1.." .. orepa.threads()):convert(measure.integers)
parser:option("--classes", "classes of the network", 1000):convert(measure.at_least(1))
parser:option("--precision", "what convolutions compute in", "fp32"):choices(workload.precision_names())
parser:option("--mode", "train, eval, or deploy", "train"):choices(workload.modes)
parser:option("--rounds", "how often everything is run", 3):convert(measure.at_least(1))
parser:option("--steps", "steps timed in a round", 5):convert(measure.at_least(1))
parser:option("--warm-up", "steps before them", 2):convert(measure.at_least(0))
parser:flag("--json", "one JSON object for each combination instead of text")
local args = parser:parse()

local axes = { "model", "reparam", "width", "size", "batch_size", "threads" } -- the last changes first

-- ---- combinations ----

local function combinations()
  local points = { {} }
  for _, axis in ipairs(axes) do
    local longer = {}
    for _, point in ipairs(points) do
      for _, value in ipairs(args[axis]) do
        local next_point = { [axis] = value }
        for _, earlier in ipairs(axes) do next_point[earlier] = next_point[earlier] or point[earlier] end
        longer[#longer + 1] = next_point
      end
    end
    points = longer
  end
  return points
end

local function run_once(point)
  local words = measure.append({ measure.program(), measure.folder() .. "/step.lua", "--serve" },
    measure.words(args, { "mode", "classes", "precision" }))
  measure.append(words, measure.words(point, axes))
  local process = measure.start("step.lua", measure.command(words))
  local answer = process:ask(args.warm_up, args.steps)
  process:close()
  return answer, process.ready.operations
end

local function run_all(points)
  for _ = 1, args.rounds do
    for _, point in ipairs(points) do
      local answer, operations = run_once(point)
      point.seconds = measure.append(point.seconds or {}, answer.seconds)
      point.memory, point.operations = point.memory or answer.peak_memory, operations
    end
  end
end

-- ---- output ----

local function result_of(point)
  local step = measure.summary(point.seconds)
  return { point = point, step_ms = measure.scaled(step, 1e3), images_per_second = point.batch_size / step.median,
    gflops = point.operations / step.median / 1e9, peak_memory_mib = measure.mib(point.memory) }
end

-- The options that a step.lua run of this point would have.
local function options_of(point)
  local options = {}
  for _, name in ipairs { "classes", "precision", "mode", "rounds", "steps", "warm_up" } do options[name] = args[name] end
  for _, axis in ipairs(axes) do options[axis] = point[axis] end
  return options
end

local function show(results)
  local lines = { { "network", "reparam", "width", "px", "batch", "threads", "ms", "quartiles", "images/s", "GFLOP/s", "MiB" } }
  for _, r in ipairs(results) do
    local p = r.point
    lines[#lines + 1] = { p.model, p.reparam, ("%g"):format(p.width), ("%d"):format(p.size), ("%d"):format(p.batch_size),
      ("%d"):format(p.threads), ("%.2f"):format(r.step_ms.median), ("%.2f ... %.2f"):format(r.step_ms.lower, r.step_ms.upper),
      ("%.4g"):format(r.images_per_second), ("%.4g"):format(r.gflops), ("%.0f"):format(r.peak_memory_mib) }
  end
  measure.print_table(lines)
end

local points = combinations()
run_all(points)
local results = {}
for k, point in ipairs(points) do
  local r = result_of(point)
  results[k] = r
  if args.json then
    measure.print_json("scaling", options_of(point), { step_ms = r.step_ms, images_per_second = r.images_per_second,
      gflops = r.gflops, peak_memory_mib = r.peak_memory_mib })
  end
end
if not args.json then show(results) end
