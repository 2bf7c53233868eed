-- optim: stochastic gradient descent, its parameter groups, and the schedule of its rate.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local internal = require("orepa.nn.module").internal

local optim = {}

-- ---- groups ----

-- The reference's rule: a parameter whose name has "bias", "bn" or "prior" in it is not decayed; one with "bias" has twice the
-- rate.
local function reference_rule(name)
  local function has(word) return name:find(word, 1, true) ~= nil end
  return { rate_factor = has "bias" and 2 or 1, decay_factor = (has "bias" or has "bn" or has "prior") and 0 or 1 }
end

-- One group a parameter, with its name, so that errors can tell which it is.
function optim.param_groups(net, rule)
  rule = rule or reference_rule
  local groups = {}
  for name, p in net:named_parameters() do
    local factors = rule(name, p) or {}
    groups[#groups + 1] = { name = name, parameters = { p }, rate_factor = factors.rate_factor or 1,
      decay_factor = factors.decay_factor or 1 }
  end
  return groups
end

-- A list of tensors is one group; groups may have no names.
local function as_groups(where, given)
  if type(given) ~= "table" then core.fail(("%s: a list of parameters or groups expected"):format(where)) end
  local groups = {}
  for k, item in ipairs(given) do
    if core.is_tensor(item) then
      item = { name = ("parameter %d"):format(k), parameters = { item } }
    elseif type(item) ~= "table" or type(item.parameters) ~= "table" then
      core.fail(("%s: item %d is neither a parameter nor a group {parameters = {...}}"):format(where, k))
    end
    for n, p in ipairs(item.parameters) do
      if not core.is_tensor(p) then core.fail(("%s: parameter %d of group %d is a %s"):format(where, n, k, type(p))) end
    end
    groups[k] = item
  end
  if #groups == 0 then core.fail(("%s: there is nothing to train"):format(where)) end
  return groups
end

local function check_numbers(where, o, names)
  for _, name in ipairs(names) do
    if type(o[name]) ~= "number" or o[name] ~= o[name] or o[name] < 0 then
      core.fail(("%s: %s is %s, a number of at least 0 expected"):format(where, name, tostring(o[name])))
    end
  end
end

-- ---- SGD ----

local SGD = {}
SGD.__index = SGD

function optim.SGD(given, o)
  o = options("SGD", o, { lr = options.required, momentum = 0, weight_decay = 0, nesterov = false })
  check_numbers("SGD", o, { "lr", "momentum", "weight_decay" })
  if o.nesterov and o.momentum == 0 then core.fail("SGD: nesterov needs a momentum") end
  local self = setmetatable({ lr = o.lr, momentum = o.momentum, weight_decay = o.weight_decay, nesterov = o.nesterov,
    parameters = {}, names = {}, velocities = {}, rate_factors = {}, decay_factors = {} }, SGD)
  for _, group in ipairs(as_groups("SGD", given)) do
    for k, p in ipairs(group.parameters) do
      local n = #self.parameters + 1
      self.parameters[n] = p
      self.names[n] = #group.parameters > 1 and ("%s[%d]"):format(group.name or "group", k) or group.name or "parameter"
      self.rate_factors[n], self.decay_factors[n] = group.rate_factor or 1, group.decay_factor or 1
    end
  end
  return self
end

-- Velocities are made now if they aren't there, so that the first step takes as much memory as all others.
function SGD:zero_grad()
  for k, p in ipairs(self.parameters) do
    p.grad = nil
    if self.momentum ~= 0 and not self.velocities[k] and p.requires_grad then
      self.velocities[k] = core.zeros(p.shape, { dtype = p.dtype, device = p.device })
    end
  end
end

local function check_gone(self)
  for k, p in ipairs(self.parameters) do
    if internal.gone[p] then
      core.fail(("SGD: '%s' went when its block was %s; make a new optimizer for the network as it is now"):format(
        self.names[k], internal.gone[p]))
    end
  end
end

function SGD:step()
  check_gone(self)
  core.sgd_step(self.parameters, self.velocities, self.rate_factors, self.decay_factors, { lr = self.lr,
    weight_decay = self.weight_decay, momentum = self.momentum, nesterov = self.nesterov })
end

-- The norm of all gradients together, and the name of the first parameter whose gradient is not finite. One copy from the
-- device.
function SGD:gradient_norm()
  local total = 0
  for k, sum in ipairs(core.gradient_square_sums(self.parameters)) do
    if sum ~= sum or sum == math.huge then return sum, self.names[k] end
    total = total + sum
  end
  return math.sqrt(total)
end

-- ---- the rate ----

-- Linear from 0 over the first steps, then half a cosine down to 0. Steps count from 1.
function optim.warmup_cosine(o)
  o = options("warmup_cosine", o, { lr = options.required, steps = options.required, warmup = 0 })
  check_numbers("warmup_cosine", o, { "lr", "steps", "warmup" })
  return function(step)
    if step <= o.warmup then return o.lr * step / o.warmup end
    local progress = (step - o.warmup) / math.max(1, o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * math.min(1, progress)))
  end
end

document("optim.SGD", [[
  optim.SGD(groups, {lr=, momentum=, weight_decay=, nesterov=}) -> optimizer
  g = grad + weight_decay*p; v = momentum*v + g; p -= lr*v. `groups` is a list of parameters or what optim.param_groups gives.
  opt:step() and opt:zero_grad(); opt.lr may be assigned; opt:gradient_norm() gives the norm of all gradients, and the name of
  the first parameter whose gradient is not finite.
  > local p = nn.Parameter(orepa.ones(2)); local opt = optim.SGD({p}, {lr = 0.1}); (p * p):sum():backward(); opt:step()]])
document("opt:step", [[
  opt:step()
  Changes all parameters that have a gradient.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1}):step()]])
document("opt:zero_grad", [[
  opt:zero_grad()
  Takes all gradients away: best before the forward pass, which can use their memory then. Velocities that will be
  needed are made.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1}):zero_grad()]])
document("opt:gradient_norm", [[
  opt:gradient_norm() -> number, name
  The norm of all gradients together; if it is not finite, the name of the first parameter whose gradient is not.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1}):gradient_norm()]])
document("optim.param_groups", [[
  optim.param_groups(net, rule) -> groups
  One group for each parameter; rule(name, p) gives {rate_factor=, decay_factor=}. By default the reference's: no decay for
  names with bias, bn or prior, twice the rate for bias.
  > #optim.param_groups(nn.Linear{in_features = 2, out_features = 2})]])
document("optim.warmup_cosine", [[
  optim.warmup_cosine{lr=, steps=, warmup=} -> function(step) -> rate
  Linear warm-up, then half a cosine to 0; steps count from 1.
  > optim.warmup_cosine{lr = 0.1, steps = 100, warmup = 10}(10)]])

return optim
