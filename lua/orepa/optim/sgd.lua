-- Stochastic gradient descent: one pass over all parameters.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local optimizer = require "orepa.optim.optimizer"

local SGD = optimizer.class "SGD"

local function make(given, o)
  o = options("SGD", o, { lr = options.required, momentum = 0, weight_decay = 0, nesterov = false })
  optimizer.check_numbers("SGD", o, { "lr", "momentum", "weight_decay" })
  if o.nesterov and o.momentum == 0 then core.fail("SGD: nesterov needs a momentum") end
  local self = optimizer.make(SGD, given, o, o.momentum ~= 0 and { "velocity" } or {})
  self.kept.velocity = self.kept.velocity or {}
  return self
end

function SGD:step()
  if not optimizer.begin(self) then return end
  core.sgd_step(self.parameters, self.kept.velocity, self.rate_factors, self.decay_factors, { lr = self.lr,
    weight_decay = self.weight_decay, momentum = self.momentum, nesterov = self.nesterov })
end

document("optim.SGD", [[
  optim.SGD(groups, {lr=, momentum=, weight_decay=, nesterov=}) -> optimizer
  g = grad + weight_decay*p; v = momentum*v + g; p -= lr*v. `groups` is a list of parameters or what optim.param_groups gives.
  opt:step() and opt:zero_grad(); opt.lr may be assigned; opt:gradient_norm() gives the norm of all gradients, and the name of
  the first parameter whose gradient is not finite.
  > local p = nn.Parameter(orepa.ones(2)); local opt = optim.SGD({p}, {lr = 0.1}); (p * p):sum():backward(); opt:step()]])

return { SGD = make }
