-- Where the time of a step goes: by part of the step (forward, backward, update), by entry of the device's table, and for
-- convolutions by kernel. What is left is Lua and the engine outside the device.
--
--     build/orepa scripts/bench/breakdown.lua --model resnet18 --batch-size 16
--     build/orepa scripts/bench/breakdown.lua --each       (convolutions by channels and size too)

local argparse = require "argparse"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"
local workload = require "workload"
local orepa = require "orepa"

local parser = argparse("breakdown.lua", "Shows where the time of a step goes.")
workload.add_options(parser)
parser:option("--mode", "train, eval, or deploy", "train"):choices(workload.modes)
parser:option("--steps", "steps in a round", 3):convert(measure.at_least(1))
parser:option("--warm-up", "steps before all of them", 3):convert(measure.at_least(0))
parser:flag("--each", "a row for each geometry of a convolution instead of one for each kernel")
local args = parser:parse()

-- ---- what one round gives: seconds and calls by row and part, seconds by part ----

-- The row that a timing belongs to. Entries that many ops use are told apart by the op.
local function row_name(timing)
  if timing.detail ~= "" then
    return ("%s %s"):format(timing.entry, args.each and timing.detail or timing.detail:match "^[^,]*")
  elseif timing.entry == "elementwise" or timing.entry == "matmul" or timing.entry == "copy" then
    return ("%s (%s)"):format(timing.entry, timing.op)
  end
  return timing.entry
end

local function add_timings(round, part, timings, macs)
  for _, timing in ipairs(timings) do
    local name = row_name(timing)
    local row = round.rows[name] or { calls = 0, operations = 0, seconds = {} }
    round.rows[name] = row
    row.seconds[part] = (row.seconds[part] or 0) + timing.seconds
    row.calls = row.calls + timing.calls
    row.operations = row.operations + timing.calls * 2 * (macs[timing.detail] or 0)
    round.inside[part] = (round.inside[part] or 0) + timing.seconds
  end
end

local function run_round(work, macs)
  local round = { rows = {}, inside = {}, parts = {} }
  for _ = 1, args.steps do
    for _, part in ipairs(work.parts) do
      local name = part[1]
      orepa.timings(true)
      local start = orepa.clock()
      part[2]()
      round.parts[name] = (round.parts[name] or 0) + orepa.clock() - start
      add_timings(round, name, orepa.timings(false), macs)
    end
  end
  return round
end

-- ---- all rounds: medians, in milliseconds a step ----

local function median_of(rounds, pick)
  local values = {}
  for k, round in ipairs(rounds) do values[k] = (pick(round) or 0) / args.steps end
  return measure.median(values)
end

local function in_parts(work, rounds, pick)
  local row = { total_ms = 0, ms = {} }
  for _, part in ipairs(work.parts) do
    local name = part[1]
    row.ms[name] = 1e3 * median_of(rounds, function(round) return pick(round, name) end)
    row.total_ms = row.total_ms + row.ms[name]
  end
  return row
end

-- Every row of any round, with the most calls and operations that it had.
local function names_in(rounds)
  local found = {}
  for _, round in ipairs(rounds) do
    for name, row in pairs(round.rows) do
      local most = found[name] or { calls = 0, operations = 0 }
      found[name] = { calls = math.max(most.calls, row.calls), operations = math.max(most.operations, row.operations) }
    end
  end
  return found
end

local function collect(work, rounds)
  local rows = {}
  for name, most in pairs(names_in(rounds)) do
    local row = in_parts(work, rounds, function(round, part)
      return round.rows[name] and round.rows[name].seconds[part]
    end)
    row.name, row.calls = name, most.calls / args.steps
    if most.operations > 0 then row.gflops = most.operations / args.steps / row.total_ms / 1e6 end
    rows[#rows + 1] = row
  end
  table.sort(rows, function(a, b) return a.total_ms > b.total_ms end)
  local rest = in_parts(work, rounds, function(round, part) return round.parts[part] - (round.inside[part] or 0) end)
  rest.name = "Lua and engine"
  rows[#rows + 1] = rest
  local step = in_parts(work, rounds, function(round, part) return round.parts[part] end)
  step.name = "step"
  return rows, step
end

-- ---- output ----

local function cells_of(work, row, whole)
  local cells = { row.name }
  for _, part in ipairs(work.parts) do
    local ms = row.ms[part[1]]
    cells[#cells + 1] = ms > 0 and ("%.3f"):format(ms) or ""
  end
  cells[#cells + 1] = ("%.3f"):format(row.total_ms)
  cells[#cells + 1] = ("%.1f"):format(100 * row.total_ms / whole)
  cells[#cells + 1] = row.calls and ("%g"):format(row.calls) or ""
  cells[#cells + 1] = row.gflops and ("%.4g"):format(row.gflops) or ""
  return cells
end

local function show(work, rows, step, untimed)
  print(("%s, %d threads; milliseconds a step"):format(workload.title(args), args.threads))
  local head = { "" }
  for _, part in ipairs(work.parts) do head[#head + 1] = part[1] end
  measure.append(head, { "all", "%", "calls", "GFLOP/s" })
  local lines = { head }
  for _, row in ipairs(rows) do lines[#lines + 1] = cells_of(work, row, step.total_ms) end
  lines[#lines + 1] = cells_of(work, step, step.total_ms)
  measure.print_table(lines)
  print(("without timings %.3f ms a step"):format(untimed))
end

local work = workload.create(args)
local macs = {}
for _, layer in ipairs(work.layers) do
  if layer.kind == "conv" then macs[workload.geometry_text(layer)] = layer.macs end
end
local rounds, untimed = {}, {}
workload.time_steps(work, args.warm_up, 0)
for k = 1, args.rounds do
  rounds[k] = run_round(work, macs)
  untimed[k] = measure.median(workload.time_steps(work, 0, args.steps).seconds)
end
local rows, step = collect(work, rounds)
local untimed_ms = 1e3 * measure.median(untimed)
if args.json then
  measure.print_json("breakdown", args, { rows = rows, step = step, untimed_ms = untimed_ms })
else
  show(work, rows, step, untimed_ms)
end
