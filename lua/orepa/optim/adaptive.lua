-- AdamW and RMSprop: steps divided by the root of a running mean of squared gradients. Both are ops on one parameter after
-- another; what they need in between goes at once.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local optimizer = require "orepa.optim.optimizer"

-- A factor of a running mean.
local function check_decay(where, name, value)
  if type(value) ~= "number" or not (value >= 0 and value < 1) then
    core.fail(("%s: %s is %s, a number of at least 0 and less than 1 expected"):format(where, name, tostring(value)))
  end
end

-- mean = decay * mean + (1 - decay) * x; x is written over.
local function follow(mean, decay, x)
  mean:multiply_add_(decay, x:mul_(1 - decay))
end

-- Memory for the largest parameter's step, given back to the allocator, which will have it: no step is left half done.
local function reserve(parameters, tensors)
  local largest = parameters[1]
  for _, p in ipairs(parameters) do
    if p:count() > largest:count() then largest = p end
  end
  local held = {}
  for k = 1, tensors do held[k] = core.zeros(largest.shape, { dtype = largest.dtype, device = largest.device }) end
  for _, t in ipairs(held) do t:release() end
end

-- Calls change(self, k, p, g, rate, decay) for each parameter that has a gradient, when all that is kept is there.
local function step(self, tensors, change)
  if not optimizer.begin(self) then return end
  core.no_grad(function()
    for k, p in ipairs(self.parameters) do
      local g <close> = p.grad
      if g then optimizer.keep(self, k) end
    end
    reserve(self.parameters, tensors)
    for k, p in ipairs(self.parameters) do
      local g <close> = p.grad
      if g then change(self, k, p, g, self.lr * self.rate_factors[k], self.weight_decay * self.decay_factors[k]) end
    end
  end)
end

-- ---- AdamW ----

local AdamW = optimizer.class "AdamW"

local function make_adamw(given, o)
  o = options("AdamW", o, { lr = options.required, betas = { 0.9, 0.999 }, eps = 1e-8, weight_decay = 0.01 })
  optimizer.check_numbers("AdamW", o, { "lr", "eps", "weight_decay" })
  if type(o.betas) ~= "table" or #o.betas ~= 2 then core.fail "AdamW: betas: a list of two numbers expected" end
  for k, beta in ipairs(o.betas) do check_decay("AdamW", ("betas[%d]"):format(k), beta) end
  local self = optimizer.make(AdamW, given, o, { "mean", "square" })
  self.steps = {}
  for k in ipairs(self.parameters) do self.steps[k] = 0 end
  return self
end

local function adamw(self, k, p, g, rate, decay)
  local mean, square, beta, beta2 = self.kept.mean[k], self.kept.square[k], self.betas[1], self.betas[2]
  local n = self.steps[k] + 1
  do
    local first <close> = g:clone()
    local second <close> = g * g
    follow(mean, beta, first)
    follow(square, beta2, second)
  end
  local root <close> = square:sqrt():multiply_add_(1 / math.sqrt(1 - beta2 ^ n), self.eps)
  local change <close> = mean / root
  if decay ~= 0 then p:mul_(1 - rate * decay) end
  p:add_(change:mul_(-rate / (1 - beta ^ n)))
  self.steps[k] = n
end

function AdamW:step()
  step(self, 2, adamw)
end

-- ---- RMSprop ----

local RMSprop = optimizer.class "RMSprop"

local function make_rmsprop(given, o)
  o = options("RMSprop", o, { lr = options.required, alpha = 0.99, eps = 1e-8, weight_decay = 0, momentum = 0,
    centered = false })
  optimizer.check_numbers("RMSprop", o, { "lr", "eps", "weight_decay", "momentum" })
  check_decay("RMSprop", "alpha", o.alpha)
  if type(o.centered) ~= "boolean" then
    core.fail(("RMSprop: centered is %s, true or false expected"):format(tostring(o.centered)))
  end
  local kinds = { "square" }
  if o.centered then kinds[#kinds + 1] = "mean" end
  if o.momentum ~= 0 then kinds[#kinds + 1] = "velocity" end
  return optimizer.make(RMSprop, given, o, kinds)
end

-- The root of the mean square, or of the variance, which rounding must not make negative.
local function spread(self, k, g)
  local square, mean = self.kept.square[k], self.kept.mean and self.kept.mean[k]
  local part <close> = g * g
  follow(square, self.alpha, part)
  if not mean then return square:sqrt():add_(self.eps) end
  follow(mean, self.alpha, part:copy_(g))
  part:copy_(mean):mul_(mean)
  return (square - part):relu_():sqrt_():add_(self.eps)
end

local function rmsprop(self, k, p, g, rate, decay)
  local whole <close> = decay ~= 0 and p:multiply_add(decay, g) or g:clone()
  local root <close> = spread(self, k, whole)
  local change, velocity = whole:div_(root), self.kept.velocity and self.kept.velocity[k]
  if velocity then change:copy_(velocity:multiply_add_(self.momentum, change)) end
  p:add_(change:mul_(-rate))
end

function RMSprop:step()
  step(self, 3, rmsprop)
end

document("optim.AdamW", [[
  optim.AdamW(groups, {lr=, betas=, eps=, weight_decay=}) -> optimizer
  Adam with decay apart from the gradient (Loshchilov, Hutter, 2019): p -= lr*weight_decay*p, then p -= lr*m/(sqrt(v) + eps),
  where m and v are running means of the gradient and its square with factors betas ({0.9, 0.999}), corrected for having started
  at zero. eps is 1e-8, weight_decay 0.01. Groups, steps and state are as for optim.SGD.
  > local p = nn.Parameter(orepa.ones(2)); local opt = optim.AdamW({p}, {lr = 0.001}); (p * p):sum():backward(); opt:step()]])
document("optim.RMSprop", [[
  optim.RMSprop(groups, {lr=, alpha=, eps=, weight_decay=, momentum=, centered=}) -> optimizer
  g = grad + weight_decay*p; v = alpha*v + (1 - alpha)*g^2; p -= lr*g/(sqrt(v) + eps), with momentum through a velocity;
  centered takes the variance of g in place of v. alpha is 0.99, eps 1e-8. Groups, steps and state are as for optim.SGD.
  > local p = nn.Parameter(orepa.ones(2)); local opt = optim.RMSprop({p}, {lr = 0.01}); (p * p):sum():backward(); opt:step()]])

return { AdamW = make_adamw, RMSprop = make_rmsprop }
