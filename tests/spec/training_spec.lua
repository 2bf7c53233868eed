-- Activations, losses, optimizers, schedules, clipping, the sizes of initial values, functions and layers against PyTorch's
-- numbers (tests/golden/training): in float64 on the reference device, in float32 on the cpu.

local cjson = require "cjson"
local orepa = require "orepa"
local nn, F, optim = orepa.nn, orepa.F, orepa.optim

local file <close> = assert(io.open "tests/golden/training/expected.json")
local expected = cjson.decode(file:read "a")

local kinds = {
  { name = "float64", limit = 1e-12, options = { dtype = "float64", device = "ref" } },
  { name = "float32", limit = 2e-6, options = { dtype = "float32", device = "cpu" } },
}

-- The largest difference relative to the largest magnitude, or to 1 if that is more.
local function check(what, got, wanted, limit)
  local a, b = got:detach():to("cpu"):to("float64"), orepa.tensor(wanted, { dtype = "float64" })
  assert.same(b.shape, a.shape)
  local scale = math.max(1, b:abs():max():item())
  local difference = (a - b):abs():max():item() / scale
  assert(difference <= limit, ("%s is off by %.3g, at most %.3g allowed"):format(what, difference, limit))
end

local function tensor(values, kind)
  return orepa.tensor(values, kind.options)
end

-- ---- activations ----

for _, kind in ipairs(kinds) do
  describe("activations of " .. kind.name, function()
    local given = expected.activations
    for name, wanted in pairs(given.functions) do
      it(name .. ": values and gradient", function()
        local x = tensor(given.x, kind):requires_grad_()
        local y = name == "leaky_relu" and F.leaky_relu(x, 0.2) or F[name](x)
        y:backward(tensor(given.dy, kind))
        check("y", y, wanted.y, kind.limit)
        check("dx", x.grad, wanted.dx, kind.limit)
      end)
    end
  end)
end

it("a far tail keeps its digits", function()
  local x = orepa.tensor({ -6, -12 }, kinds[1].options)
  for name, wanted in pairs { gelu = { -5.919525870226207e-09, -2.1317785344932424e-32 },
    silu = { -0.014835738939808647, -7.373009522657661e-05 }, softplus = { 0.0024756851377304495, 6.144193477732806e-06 } } do
    for k, y in ipairs(F[name](x):tolist()) do assert.near(1, y / wanted[k], 1e-13) end
  end
end)

-- ---- losses ----

local function options_of(given, kind)
  local o = {}
  for name, value in pairs(given) do o[name] = type(value) == "table" and tensor(value, kind) or value end
  return o
end

local function check_loss(case, kind)
  local x, classes = tensor(case.x, kind):requires_grad_(), case.dtarget == cjson.null
  local target = classes and orepa.tensor(case.target, { dtype = "int64", device = kind.options.device })
    or tensor(case.target, kind):requires_grad_()
  local y = F[case.name](x, target, options_of(case.options, kind))
  y:backward(tensor(case.dy, kind))
  check("the loss", y, case.y, kind.limit)
  check("dx", x.grad, case.dx, kind.limit)
  if not classes then check("the target's gradient", target.grad, case.dtarget, kind.limit) end
end

for _, kind in ipairs(kinds) do
  describe("losses in " .. kind.name, function()
    for k, case in ipairs(expected.losses) do
      local names = {}
      for name, value in pairs(case.options) do
        names[#names + 1] = type(value) == "table" and name or ("%s=%s"):format(name, value)
      end
      table.sort(names)
      it(("%s %s (%d)"):format(case.name, table.concat(names, " "), k), function() check_loss(case, kind) end)
    end
  end)
end

-- ---- optimizers ----

local START = { { { 1, -2, 0.5 }, { 3, 0, -1 } }, { 0.25, -0.75 } }

local function train(case, kind, visit)
  local parameters, weights = {}, {}
  for k, values in ipairs(START) do
    parameters[k] = nn.Parameter(tensor(values, kind))
    weights[k] = orepa.arange(parameters[k]:count(), kind.options):reshape(parameters[k].shape)
  end
  local opt = optim[case.name]({ { parameters = { parameters[1] } },
    { parameters = { parameters[2] }, rate_factor = 2, decay_factor = 0 } }, case.options)
  for step = 1, #case.path do
    opt:zero_grad()
    for k, p in ipairs(parameters) do (p * p * weights[k] + p):sum():backward() end
    opt:step()
    visit(step, parameters)
  end
end

for _, kind in ipairs(kinds) do
  describe("optimizers in " .. kind.name, function()
    for k, case in ipairs(expected.optimizers) do
      it(("%s (%d) takes ten steps"):format(case.name, k), function()
        train(case, kind, function(step, parameters)
          for n, p in ipairs(parameters) do
            check(("parameter %d after step %d"):format(n, step), p, case.path[step][n], kind.limit * 5)
          end
        end)
      end)
    end
  end)
end

-- ---- schedules: PyTorch's rates are those of its optimizer before the first step of the scheduler, after one, ... ----

local function check_rates(schedule, rates, first)
  for k, rate in ipairs(rates) do assert.near(rate, schedule(first + k - 1), 1e-12) end
  assert.is_true(#rates >= 15)
end

describe("schedules", function()
  local wanted = expected.schedules

  it("cosine", function() check_rates(optim.cosine { lr = 0.5, steps = 20, lowest = 0.05 }, wanted.cosine, 0) end)
  it("polynomial", function() check_rates(optim.polynomial { lr = 0.5, steps = 20, power = 2 }, wanted.polynomial, 0) end)
  it("step_decay", function()
    check_rates(optim.step_decay { lr = 0.5, milestones = { 4, 9, 15 }, gamma = 0.2 }, wanted.step_decay, 1)
  end)
  it("one_cycle", function()
    check_rates(optim.one_cycle { lr = 0.5, steps = 20 }, wanted.one_cycle, 1)
    check_rates(optim.one_cycle { lr = 0.5, steps = 30, pct_start = 0.4, div_factor = 10, final_div_factor = 100,
      anneal_strategy = "linear" }, wanted.one_cycle_linear, 1)
  end)
  it("warmup before step_decay", function()
    check_rates(optim.warmup(optim.step_decay { lr = 0.5, milestones = { 3, 6 } }, 5), wanted.warmup, 1)
  end)
  for k, case in ipairs(wanted.plateau) do
    it(("plateau (%d)"):format(k), function()
      local o = { lr = 0.5 }
      for name, value in pairs(case.options) do o[name == "min_lr" and "lowest" or name] = value end
      local schedule, observe = optim.plateau(o)
      for n, metric in ipairs(case.metrics) do
        assert.near(case.rates[n], observe(metric), 1e-12)
        assert.near(case.rates[n], schedule(n), 1e-12)
      end
      assert.is_true(schedule() < 0.5)
    end)
  end
end)

-- ---- clipping, initial values ----

for _, kind in ipairs(kinds) do
  describe("clip_grad_norm_ in " .. kind.name, function()
    for _, case in ipairs(expected.clips.cases) do
      it(("norm %s, at most %g"):format(case.norm_type, case.most), function()
        local parameters = {}
        for k, g in ipairs(expected.clips.gradients) do
          g = tensor(g, kind)
          parameters[k] = nn.Parameter(orepa.zeros(g.shape, kind.options))
          parameters[k].grad = g
        end
        local norm = optim.clip_grad_norm_(parameters, case.most,
          { norm_type = case.norm_type == "inf" and math.huge or case.norm_type })
        assert.near(1, norm / case.norm, kind.limit)
        for k, p in ipairs(parameters) do check("gradient " .. k, p.grad, case.gradients[k], kind.limit) end
      end)
    end
  end)
end

describe("initial values", function()
  it("have PyTorch's fans and gains", function()
    for _, case in ipairs(expected.initial.fans) do
      assert.same({ case.fan_in, case.fan_out }, { nn.init.fans(orepa.zeros(case.shape)) })
    end
    for name, gain in pairs(expected.initial.gains) do assert.near(gain, nn.init.gain(name), 1e-15) end
    assert.near(expected.initial["leaky_relu 0.2"], nn.init.gain("leaky_relu", 0.2), 1e-15)
  end)
end)

-- ---- functions and layers, whose arguments are PyTorch's ----

local function case_text(case)
  return ("%s %s %s"):format(case.name, cjson.encode(case.arguments), cjson.encode(case.options))
end

for _, kind in ipairs(kinds) do
  describe("functions in " .. kind.name, function()
    for _, case in ipairs(expected.functions) do
      it(case_text(case), function()
        local x, arguments = tensor(case.x, kind):requires_grad_(), { table.unpack(case.arguments) }
        arguments[#arguments + 1] = case.options
        local y = F[case.name](x, table.unpack(arguments))
        y:backward(tensor(case.dy, kind))
        check("y", y, case.y, kind.limit)
        check("dx", x.grad, case.dx, kind.limit)
      end)
    end
  end)
end

local argument_names = {
  ConvTranspose2d = { "in_channels", "out_channels", "kernel_size" }, GroupNorm = { "num_groups", "num_channels" },
  LayerNorm = { "normalized_shape" }, Embedding = { "num_embeddings", "embedding_dim" }, Upsample = {}, GELU = {},
  Flatten = { "dim", "end_dim" },
}

local function layer_of(case, kind)
  local o = {}
  for name, value in pairs(case.options) do o[name] = value end
  for k, value in ipairs(case.arguments) do
    o[argument_names[case.name][k]] = case.name == "Flatten" and value + 1 or value -- dimensions count from 1
  end
  local module, state = nn[case.name](o), {}
  module:to(kind.options.dtype):to(kind.options.device)
  for name, values in pairs(case.state) do state[name] = tensor(values, kind) end
  module:load_state_dict(state)
  return module
end

for _, kind in ipairs(kinds) do
  describe("layers in " .. kind.name, function()
    for k, case in ipairs(expected.layers) do
      it(("%s (%d)"):format(case_text(case), k), function()
        local module, floats = layer_of(case, kind), case.dx ~= cjson.null
        local x = floats and tensor(case.x, kind):requires_grad_()
          or orepa.tensor(case.x, { dtype = "int64", device = kind.options.device })
        local y = module(x)
        y:backward(tensor(case.dy, kind))
        check("y", y, case.y, kind.limit * 10)
        if floats then check("dx", x.grad, case.dx, kind.limit * 10) end
        for name, values in pairs(case.gradients) do
          check(name .. "'s gradient", module:get(name).grad, values, kind.limit * 20)
        end
      end)
    end
  end)
end
