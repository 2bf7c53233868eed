-- Schedules at their ends and before each other, clipped gradients, and what is said of wrong arguments. The values in between
-- are compared with PyTorch's in training_spec.lua.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, optim = orepa.nn, orepa.optim

describe("schedules", function()
  it("stay at the end", function()
    assert.near(0.25, optim.cosine { lr = 1, steps = 10, lowest = 0.25 } (99), 1e-12)
    assert.near(0.25, optim.polynomial { lr = 1, steps = 10, lowest = 0.25 } (99), 1e-12)
    local cycle = optim.one_cycle { lr = 1, steps = 10 }
    assert.equal(cycle(10), cycle(99))
    assert.near(1 / 25 / 1e4, cycle(10), 1e-12)
  end)

  it("of few steps have a peak and no step without a rate", function()
    for steps = 1, 4 do
      for _, pct_start in ipairs { 0, 0.3, 0.5, 1 } do
        local rate = optim.one_cycle { lr = 1, steps = steps, pct_start = pct_start }
        for k = 1, steps do assert.is_true(rate(k) > 0 and rate(k) <= 1) end
      end
    end
    assert.equal(1, optim.one_cycle { lr = 1, steps = 4, pct_start = 0.5 } (2))
  end)

  it("warm up from 0 to where they start", function()
    local observe
    local list = { optim.cosine { lr = 0.8, steps = 10 }, optim.polynomial { lr = 0.8, steps = 10 },
      optim.step_decay { lr = 0.8, milestones = { 1 } } }
    list[4], observe = optim.plateau { lr = 0.8, patience = 0 }
    for _, schedule in ipairs(list) do
      local warm = optim.warmup(schedule, 4)
      for k = 1, 4 do assert.near(0.2 * k, warm(k), 1e-12) end
      assert.equal(schedule(1), warm(5))
      assert.equal(schedule(6), warm(10))
    end
    observe(1)
    observe(1)
    assert.near(0.08, optim.warmup(list[4], 4)(9), 1e-12)
    assert.equal(list[1](3), optim.warmup(list[1], 0)(3))
  end)

  it("take a metric that is not a number as no better", function()
    local schedule, observe = optim.plateau { lr = 1, patience = 1 }
    for _, metric in ipairs { 1, 0 / 0, 0 / 0 } do observe(metric) end
    assert.near(0.1, schedule(), 1e-12)
    fails("plateau: the metric is a nil, a number expected", observe)
  end)

  it("name what is wrong with their options", function()
    for name, o in pairs { cosine = { steps = 5 }, polynomial = { steps = 5 }, one_cycle = { steps = 5 }, plateau = {},
      step_decay = { milestones = { 5 } } } do
      fails(name .. ": option 'lr' is missing", optim[name], o)
      o.lr = "x"
      fails(name .. ": lr is x, a number of at least 0 expected", optim[name], o)
      o.lr, o.pace = 1, 1
      fails(name .. ": unknown option 'pace'", optim[name], o)
    end
    fails("step_decay: milestones is 5, a list of steps expected", optim.step_decay, { lr = 1, milestones = 5 })
    fails("step_decay: milestone 2 is x, a number expected", optim.step_decay, { lr = 1, milestones = { 1, "x" } })
    fails('one_cycle: anneal_strategy is x, "cos" or "linear"', optim.one_cycle, { lr = 1, steps = 5, anneal_strategy = "x" })
    fails("one_cycle: pct_start is 2, at most 1", optim.one_cycle, { lr = 1, steps = 5, pct_start = 2 })
    fails("one_cycle: div_factor is 0", optim.one_cycle, { lr = 1, steps = 5, div_factor = 0 })
    fails('plateau: mode is x, "min" or "max"', optim.plateau, { lr = 1, mode = "x" })
    fails('plateau: threshold_mode is x, "rel" or "abs"', optim.plateau, { lr = 1, threshold_mode = "x" })
    fails("plateau: factor is 1, less than 1", optim.plateau, { lr = 1, factor = 1 })
    fails("warmup: a schedule, a function of the step, expected, got number", optim.warmup, 5, 5)
    fails("warmup: steps is nil, a number of at least 0", optim.warmup, print)
  end)
end)

describe("clip_grad_norm_", function()
  local function two(first, second)
    local a, b = nn.Parameter(orepa.zeros(2)), nn.Parameter(orepa.zeros(1, 1))
    a.grad, b.grad = orepa.tensor(first), orepa.tensor(second)
    return { a, b }
  end

  it("leaves a norm that is small enough, and what has no gradient", function()
    local list = two({ 2, 3 }, { { 6 } })
    list[3] = nn.Parameter(orepa.ones(5))
    assert.near(7, optim.clip_grad_norm_(list, 7.1), 1e-12)
    assert.same({ 2, 3 }, list[1].grad:tolist())
    assert.near(7, optim.clip_grad_norm_(list, math.huge), 1e-12)
    assert.near(7, optim.clip_grad_norm_(list, 0), 1e-12)
    assert.same({ 0, 0 }, list[1].grad:tolist())
    assert.is_nil(list[3].grad)
    assert.equal(0, optim.clip_grad_norm_({ list[3] }, 1))
    assert.equal(0, optim.clip_grad_norm_({}, 1))
  end)

  it("does not overflow, in no norm", function()
    for _, kind in ipairs { 1, 2, 3, 10, math.huge } do
      local list = two({ 3e30, -4e30 }, { { 0 } })
      local wanted = kind == math.huge and 4 or (3 ^ kind + 4 ^ kind) ^ (1 / kind)
      local norm = optim.clip_grad_norm_(list, 1, { norm_type = kind })
      assert.near(wanted, norm / 1e30, 1e-5)
      assert.near(3 / wanted, list[1].grad[1]:item(), 1e-5)
      assert.near(-4 / wanted, list[1].grad[2]:item(), 1e-5)
    end
    local wide = nn.Parameter(orepa.zeros({ 2 }, { dtype = "float64", device = "ref" }))
    wide.grad = orepa.tensor({ 3e200, 4e200 }, { dtype = "float64", device = "ref" })
    assert.near(5, optim.clip_grad_norm_({ wide }, 1) / 1e200, 1e-9)
  end)

  it("says whose gradient is not finite", function()
    local net = nn.Sequential(nn.Linear { in_features = 2, out_features = 1 })
    local opt = optim.SGD(optim.param_groups(net), { lr = 1 })
    for _, bad in ipairs { 0 / 0, 1 / 0, -1 / 0 } do
      for _, kind in ipairs { 1, 2, math.huge } do
        net[1].weight.grad, net[1].bias.grad = orepa.ones(1, 2), orepa.tensor { bad }
        fails("the norm of all gradients is .*; look at that of '0.bias'", optim.clip_grad_norm_, opt, 1, { norm_type = kind })
        fails("look at that of 'parameter 2'", optim.clip_grad_norm_, net:parameters(), 1, { norm_type = kind })
        assert.same({ { 1, 1 } }, net[1].weight.grad:tolist())
      end
    end
  end)

  it("names what is wrong", function()
    local list = two({ 2, 3 }, { { 6 } })
    fails("clip_grad_norm_: a list of parameters or an optimizer expected, got number", optim.clip_grad_norm_, 1, 1)
    fails("clip_grad_norm_: parameter 1 is a number", optim.clip_grad_norm_, { 1 }, 1)
    for _, wrong in ipairs { "1", -1, 0 / 0 } do
      fails("clip_grad_norm_: the norm allowed is .*, a number of at least 0 expected", optim.clip_grad_norm_, list, wrong)
    end
    fails("clip_grad_norm_: norm_type is 0, a number above 0 expected", optim.clip_grad_norm_, list, 1, { norm_type = 0 })
    fails('clip_grad_norm_: non_finite is x, "error" or "skip" expected', optim.clip_grad_norm_, list, 1, { non_finite = "x" })
  end)
end)
