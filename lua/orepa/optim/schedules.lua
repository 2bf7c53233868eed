-- Schedules: functions from a step, counted from 1, to the rate. A schedule's rate at 0 is that from which it starts, up to
-- which a warm-up before it goes.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local check_numbers = require("orepa.optim.optimizer").check_numbers

local schedules = {}

-- Numbers, and a length of at least one step.
local function check_length(where, o, names)
  check_numbers(where, o, names)
  if o.steps < 1 then core.fail(("%s: steps is %s, at least 1 expected"):format(where, tostring(o.steps))) end
end

-- ---- those of a known length ----

-- Half a cosine: 1 at progress 0, 0 at 1.
local function half_cosine(progress)
  return 0.5 * (1 + math.cos(math.pi * progress))
end

local function progress_of(step, steps)
  return math.min(1, step / steps)
end

function schedules.cosine(o)
  o = options("cosine", o, { lr = options.required, steps = options.required, lowest = 0 })
  check_length("cosine", o, { "lr", "steps", "lowest" })
  return function(step)
    return o.lowest + (o.lr - o.lowest) * half_cosine(progress_of(step, o.steps))
  end
end

function schedules.polynomial(o)
  o = options("polynomial", o, { lr = options.required, steps = options.required, power = 1, lowest = 0 })
  check_length("polynomial", o, { "lr", "steps", "power", "lowest" })
  return function(step)
    return o.lowest + (o.lr - o.lowest) * (1 - progress_of(step, o.steps)) ^ o.power
  end
end

function schedules.step_decay(o)
  o = options("step_decay", o, { lr = options.required, milestones = options.required, gamma = 0.1 })
  check_numbers("step_decay", o, { "lr", "gamma" })
  if type(o.milestones) ~= "table" then
    core.fail(("step_decay: milestones is %s, a list of steps expected"):format(tostring(o.milestones)))
  end
  for k, milestone in ipairs(o.milestones) do
    if type(milestone) ~= "number" or milestone ~= milestone then
      core.fail(("step_decay: milestone %d is %s, a number expected"):format(k, tostring(milestone)))
    end
  end
  return function(step)
    local passed = 0
    for _, milestone in ipairs(o.milestones) do passed = passed + (step > milestone and 1 or 0) end
    return o.lr * o.gamma ^ passed
  end
end

local anneal = {
  cos = function(from, to, progress) return to + (from - to) * half_cosine(progress) end,
  linear = function(from, to, progress) return from + (to - from) * progress end,
}

-- Both ends are reached: the first step has the first rate, the last step the last.
function schedules.one_cycle(o)
  o = options("one_cycle", o, { lr = options.required, steps = options.required, pct_start = 0.3, div_factor = 25,
    final_div_factor = 1e4, anneal_strategy = "cos" })
  check_length("one_cycle", o, { "lr", "steps", "pct_start", "div_factor", "final_div_factor" })
  if o.pct_start > 1 then core.fail(("one_cycle: pct_start is %g, at most 1 expected"):format(o.pct_start)) end
  for _, name in ipairs { "div_factor", "final_div_factor" } do
    if o[name] == 0 then core.fail(("one_cycle: %s is 0"):format(name)) end
  end
  local between = anneal[o.anneal_strategy]
  if not between then
    core.fail(('one_cycle: anneal_strategy is %s, "cos" or "linear" expected'):format(tostring(o.anneal_strategy)))
  end
  local first, top, last = o.lr / o.div_factor, o.pct_start * o.steps - 1, o.steps - 1
  return function(step)
    local k = math.max(0, math.min(last, step - 1))
    if k < top then return between(first, o.lr, k / top) end
    return between(o.lr, first / o.final_div_factor, last > top and (k - top) / (last - top) or 0)
  end
end

-- ---- plateau: by a number that is measured ----

function schedules.plateau(o)
  o = options("plateau", o, { lr = options.required, factor = 0.1, patience = 10, mode = "min", threshold = 1e-4,
    threshold_mode = "rel", cooldown = 0, lowest = 0 })
  check_numbers("plateau", o, { "lr", "factor", "patience", "threshold", "cooldown", "lowest" })
  if o.factor >= 1 then core.fail(("plateau: factor is %g, less than 1 expected"):format(o.factor)) end
  if o.mode ~= "min" and o.mode ~= "max" then
    core.fail(('plateau: mode is %s, "min" or "max" expected'):format(tostring(o.mode)))
  end
  if o.threshold_mode ~= "rel" and o.threshold_mode ~= "abs" then
    core.fail(('plateau: threshold_mode is %s, "rel" or "abs" expected'):format(tostring(o.threshold_mode)))
  end
  local rate, sign, best, bad, cooling = o.lr, o.mode == "min" and 1 or -1, nil, 0, 0
  local function is_better(metric)
    local margin = o.threshold * (o.threshold_mode == "rel" and math.abs(best or 0) or 1)
    return not best or sign * (best - metric) > margin
  end
  local function observe(metric)
    if type(metric) ~= "number" then core.fail(("plateau: the metric is a %s, a number expected"):format(type(metric))) end
    if metric == metric and is_better(metric) then
      best, bad = metric, 0
    else
      bad = bad + 1
    end
    if cooling > 0 then cooling, bad = cooling - 1, 0 end
    if bad > o.patience then
      rate, bad, cooling = math.max(o.lowest, rate * o.factor), 0, o.cooldown
    end
    return rate
  end
  return function() return rate end, observe
end

-- ---- warm-up ----

function schedules.warmup(schedule, steps)
  if type(schedule) ~= "function" then
    core.fail(("warmup: a schedule, a function of the step, expected, got %s"):format(type(schedule)))
  end
  check_numbers("warmup", { steps = steps }, { "steps" })
  return function(step)
    if step <= steps then return schedule(0) * step / steps end
    return schedule(step - steps)
  end
end

-- Linear from 0 over the first steps, then half a cosine down to 0. Steps count from 1.
function schedules.warmup_cosine(o)
  o = options("warmup_cosine", o, { lr = options.required, steps = options.required, warmup = 0 })
  check_length("warmup_cosine", o, { "lr", "steps", "warmup" })
  return schedules.warmup(schedules.cosine { lr = o.lr, steps = math.max(1, o.steps - o.warmup) }, o.warmup)
end

document("optim.warmup_cosine", [[
  optim.warmup_cosine{lr=, steps=, warmup=} -> function(step) -> rate
  Linear warm-up, then half a cosine to 0; steps count from 1.
  > optim.warmup_cosine{lr = 0.1, steps = 100, warmup = 10}(10)]])
document("optim.cosine", [[
  optim.cosine{lr=, steps=, lowest=} -> function(step) -> rate
  Half a cosine from lr down to `lowest` (0), where it stays; the step of number `steps` has the lowest rate.
  > optim.cosine{lr = 0.1, steps = 100}(50)]])
document("optim.polynomial", [[
  optim.polynomial{lr=, steps=, power=, lowest=} -> function(step) -> rate
  lowest + (lr - lowest) * (1 - step/steps)^power, and `lowest` (0) from then on; power 1, a line, if not given.
  > optim.polynomial{lr = 0.1, steps = 100, power = 2}(50)]])
document("optim.step_decay", [[
  optim.step_decay{lr=, milestones=, gamma=} -> function(step) -> rate
  The rate is multiplied by gamma (0.1) after each milestone: the step of that number is the last with the rate before.
  > optim.step_decay{lr = 0.1, milestones = {30, 60, 90}}(31)]])
document("optim.one_cycle", [[
  optim.one_cycle{lr=, steps=, pct_start=, div_factor=, final_div_factor=, anneal_strategy=} -> function(step) -> rate
  Up from lr/div_factor (25) to lr over the first part of the steps, pct_start (0.3), then down to
  lr/div_factor/final_div_factor (1e4) at the last step; along half cosines, or lines with anneal_strategy = "linear".
  > optim.one_cycle{lr = 0.1, steps = 100}(30)]])
document("optim.plateau", [[
  optim.plateau{lr=, factor=, patience=, mode=, threshold=, threshold_mode=, cooldown=, lowest=} -> schedule, observe
  A rate that falls when a measured number no longer gets better. observe(metric), called after each epoch, gives the rate from
  then on: when more than `patience` (10) numbers on end were not better than the best, it is multiplied by `factor` (0.1),
  down to `lowest` (0), and the next `cooldown` (0) numbers don't count. Better is less (mode "max": more) by a threshold of
  1e-4, relative to the best or, with threshold_mode = "abs", as it is. schedule() gives the present rate, whatever the step.
  > local schedule, observe = optim.plateau{lr = 0.1, patience = 0}; observe(2); observe(3); assert(schedule() < 0.1)]])
document("optim.warmup", [[
  optim.warmup(schedule, steps) -> function(step) -> rate
  A linear warm-up before any schedule: over `steps` steps from 0 up to the rate from which the schedule starts; then the
  schedule, whose steps begin there.
  > optim.warmup(optim.step_decay{lr = 0.1, milestones = {30, 60}}, 5)(1)]])

return schedules
