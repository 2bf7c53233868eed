-- Times steps of a network: training, evaluation, or the deployed network; how much memory they take, and how the operations
-- a second compare with what the processor can do, measured in the same run: float32 FMAs, and a matrix product in the type that
-- convolutions compute in.
--
--     build/orepa scripts/bench/step.lua --model resnet18 --batch-size 16
--     build/orepa scripts/bench/step.lua --python /path/to/python --peers eager,channels-last,compiled
--
-- With --python (an interpreter that has PyTorch) the same network of PyTorch takes turns with ours, each in a process of its own
-- that waits while another computes. A peer is a variant of PyTorch's (peers/pytorch_step.py --help lists them), `onnxruntime`
-- (evaluation and deployed only), or `ours`; `none:`, `dbb:` or another of --reparam's kinds before it asks for that network
-- instead.

local argparse = require "argparse"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"
local workload = require "workload"
local orepa = require "orepa"

local PAUSE = 0.3 -- seconds between turns: threads of the last one may still be waiting for work at full speed

local parser = argparse("step.lua", "Times steps of a network.")
workload.add_options(parser)
parser:option("--mode", "train, eval, or deploy", "train"):choices(workload.modes)
parser:option("--steps", "steps timed in a round", 10):convert(measure.at_least(1))
parser:option("--warm-up", "steps before them", 3):convert(measure.at_least(0))
parser:option("--matmul-size", "size of the matrix product to compare with", 2048):convert(measure.at_least(1))
parser:option("--python", "interpreter with PyTorch, for the peers")
parser:option("--peers", "who takes turns with ours, a list; dbb:ours is ours with --reparam dbb"):convert(measure.list)
parser:option("--isa", "limit ours and the peers to an instruction set: avx2"):choices { "avx2" }
parser:flag("--serve", "answer lines of two numbers, steps to warm up and to time")
local args = parser:parse()

-- ---- an instruction set holds from the start of a process ----

local limits = {
  avx2 = { OREPA_ISA = "avx2", ATEN_CPU_CAPABILITY = "avx2", ONEDNN_MAX_CPU_ISA = "AVX2", MKL_ENABLE_INSTRUCTIONS = "AVX2" },
}

local function again_limited()
  local words = { measure.program(), arg[0], table.unpack(arg) }
  local _, _, code = os.execute("exec " .. measure.command(words, limits[args.isa]))
  os.exit(code)
end

if args.isa and os.getenv "OREPA_ISA" ~= args.isa then again_limited() end

-- ---- who takes turns: {name=, ask=function(warm_up, steps)} that gives {seconds=, peak_memory=} ----

local function ours()
  local work = workload.create(args)
  return { name = "ours", work = work, ask = function(warm_up, steps)
    local answer = workload.time_steps(work, warm_up, steps)
    answer.peak_memory, answer.peak_tensors = measure.peak_memory(), orepa.memory().peak
    return answer
  end }
end

local common = { "model", "batch_size", "size", "width", "classes", "threads", "mode" } -- options of all that take turns

local function peer_words(variant)
  local peers = measure.folder() .. "/peers/"
  if variant == "ours" then return { measure.program(), arg[0], "--serve", "--precision", args.precision } end
  if not args.python then parser:error(("the peer '%s' needs --python"):format(variant)) end
  if variant == "onnxruntime" then return { args.python, peers .. "onnxruntime_step.py" } end
  return { args.python, peers .. "pytorch_step.py", "--variant", variant }
end

local function peer(name)
  local reparam, variant = name:match "^(.-):(.*)$"
  if not reparam then reparam, variant = args.reparam, name end
  if variant == "onnxruntime" and args.isa then parser:error "onnxruntime can't be limited to an instruction set" end
  local words = measure.append(peer_words(variant), { "--reparam", reparam, table.unpack(measure.words(args, common)) })
  local process = measure.start(name, measure.command(words, limits[args.isa]))
  return { name = name, ready = process.ready, process = process, ask = function(...) return process:ask(...) end }
end

-- ---- rounds ----

local function pause(contestants)
  if #contestants > 1 then os.execute("sleep " .. PAUSE) end
end

-- One turn of each; whoever is first in one round is last in the next.
local function run_round(contestants, round)
  local count = #contestants
  for k = 1, count do
    local c = contestants[(k + round - 2) % count + 1]
    local answer = c.ask(args.warm_up, args.steps)
    pause(contestants)
    c.medians[round], c.peak_memory = measure.median(answer.seconds), c.peak_memory or answer.peak_memory
    c.peak_tensors = c.peak_tensors or answer.peak_tensors
    measure.append(c.seconds, answer.seconds)
    c.collections = c.collections + (answer.collections or 0)
    c.collection_seconds = c.collection_seconds + (answer.collection_seconds or 0)
  end
end

-- Memory is that of the first round: measuring the rates takes some too.
local function run(contestants)
  local rates = { fma = {}, matmul = {} }
  for _, c in ipairs(contestants) do
    c.seconds, c.medians, c.collections, c.collection_seconds = {}, {}, 0, 0
  end
  for round = 1, args.rounds do
    run_round(contestants, round)
    rates.fma[round] = orepa.fma_rate(100)
    rates.matmul[round] = measure.matmul_rate(args.matmul_size, contestants[1].work.dtype)
    pause(contestants)
  end
  return { fma = measure.median(rates.fma), matmul = measure.median(rates.matmul) }
end

-- A contestant's time over ours, round by round.
local function ratio(c, own)
  local ratios = {}
  for round, seconds in ipairs(c.medians) do ratios[round] = seconds / own.medians[round] end
  return measure.summary(ratios)
end

-- ---- results ----

local function result_of(contestants, rates)
  local own = contestants[1]
  local step = measure.summary(own.seconds)
  local rate = own.work.operations / step.median
  local result = { rounds = args.rounds, dtype = own.work.dtype, step_ms = measure.scaled(step, 1e3),
    images_per_second = args.batch_size / step.median, gflop = own.work.operations / 1e9, gflops = rate / 1e9,
    fma_gflops = rates.fma / 1e9, matmul_gflops = rates.matmul / 1e9,
    share_of_fma = rate / rates.fma, share_of_matmul = rate / rates.matmul, peak_memory_mib = measure.mib(own.peak_memory),
    peak_tensors_mib = measure.mib(own.peak_tensors), collections_per_step = own.collections / #own.seconds,
    collections_share = own.collection_seconds / (step.median * #own.seconds) }
  for k = 2, #contestants do
    local c = contestants[k]
    result.peers = result.peers or {}
    result.peers[k - 1] = { name = c.name, about = c.ready, step_ms = measure.scaled(measure.summary(c.seconds), 1e3),
      times_ours = ratio(c, own), peak_memory_mib = measure.mib(c.peak_memory) }
  end
  return result
end

local function spread(format, s)
  return (format .. " (" .. format .. " ... " .. format .. ")"):format(s.median, s.lower, s.upper)
end

local function show(r)
  local machine = measure.machine()
  print(("%s, %s\n%s, %d threads"):format(machine.cpu, machine.features, machine.libraries:match "^[^,]*", args.threads))
  print(("%s: %d rounds of %d steps"):format(workload.title(args), args.rounds, args.steps))
  print(("step        %s ms, %.1f images/s"):format(spread("%.2f", r.step_ms), r.images_per_second))
  print(("operations  %.4g GFLOP a step, %.4g GFLOP/s: %.2f of the FMA rate (%.0f), %.2f of a matrix product (%.0f)"):format(
    r.gflop, r.gflops, r.share_of_fma, r.fma_gflops, r.share_of_matmul, r.matmul_gflops))
  print(("memory      %.0f MiB of the process, %.0f MiB of tensors at the most"):format(r.peak_memory_mib, r.peak_tensors_mib))
  print(("collections %.2f a step, %.2f %% of the time"):format(r.collections_per_step, 100 * r.collections_share))
  if not r.peers then return end
  print()
  local rows = { { "", "ms", "quartiles", "times ours", "quartiles", "MiB" } }
  local function add(name, step, times, memory)
    rows[#rows + 1] = { name, ("%.2f"):format(step.median), ("%.2f ... %.2f"):format(step.lower, step.upper),
      ("%.2f"):format(times.median), ("%.2f ... %.2f"):format(times.lower, times.upper), ("%.0f"):format(memory) }
  end
  add("ours", r.step_ms, { median = 1, lower = 1, upper = 1 }, r.peak_memory_mib)
  for _, p in ipairs(r.peers) do add(p.name, p.step_ms, p.times_ours, p.peak_memory_mib) end
  measure.print_table(rows)
end

local own = ours()
if args.serve then
  measure.serve({ peer = "ours", version = orepa.version, threads = orepa.threads(), operations = own.work.operations }, own.ask)
  return
end
local contestants = { own }
for k, name in ipairs(args.peers or {}) do contestants[k + 1] = peer(name) end
local result = result_of(contestants, run(contestants))
for _, c in ipairs(contestants) do
  if c.process then c.process:close() end
end
if args.json then measure.print_json("step", args, result) else show(result) end
