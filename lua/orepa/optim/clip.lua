-- Clipping: all gradients together are scaled down to a norm.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"

local function parameters_of(given)
  local list = type(given) == "table" and given.parameters or given
  if type(list) ~= "table" then
    core.fail(("clip_grad_norm_: a list of parameters or an optimizer expected, got %s"):format(type(given)))
  end
  for k, p in ipairs(list) do
    if not core.is_tensor(p) then core.fail(("clip_grad_norm_: parameter %d is a %s"):format(k, type(p))) end
  end
  return list, list ~= given and given.names or {}
end

local function is_finite(x)
  return x - x == 0
end

-- f(g, k) for each gradient that has elements.
local function each_gradient(parameters, f)
  for k, p in ipairs(parameters) do
    local g <close> = p.grad
    if g and g:count() > 0 then f(g, k) end
  end
end

-- The largest magnitude, and which parameter's it is; NaN or infinity is the largest of all.
local function largest(parameters)
  local most, place = 0, nil
  each_gradient(parameters, function(g, k)
    local magnitudes <close> = g:abs()
    local value = magnitudes:max():item()
    if is_finite(most) and (value > most or value ~= value) then most, place = value, k end
  end)
  return most, place
end

-- (sum of |g|^kind)^(1/kind), of numbers divided by the largest, so that no power overflows.
local function norm_by(parameters, kind)
  local most, place = largest(parameters)
  if kind == math.huge or most == 0 or not is_finite(most) then return most, place end
  local total = 0
  each_gradient(parameters, function(g)
    local powers <close> = (g / most):abs_():pow_(kind)
    total = total + powers:sum():item()
  end)
  return most * total ^ (1 / kind)
end

-- The norm, and, if it is not finite, which parameter's gradient is not.
local function norm_of(parameters, kind)
  if kind ~= 2 then return norm_by(parameters, kind) end
  local total = 0
  for _, sum in ipairs(core.gradient_square_sums(parameters)) do total = total + sum end
  if not is_finite(total) then return norm_by(parameters, kind) end
  return math.sqrt(total)
end

local function clip_grad_norm_(given, most, o)
  local parameters, names = parameters_of(given)
  if type(most) ~= "number" or most ~= most or most < 0 then
    core.fail(("clip_grad_norm_: the norm allowed is %s, a number of at least 0 expected"):format(tostring(most)))
  end
  o = options("clip_grad_norm_", o, { norm_type = 2, non_finite = "error" })
  if type(o.norm_type) ~= "number" or o.norm_type ~= o.norm_type or o.norm_type <= 0 then
    core.fail(("clip_grad_norm_: norm_type is %s, a number above 0 expected"):format(tostring(o.norm_type)))
  end
  if o.non_finite ~= "error" and o.non_finite ~= "skip" then
    core.fail(('clip_grad_norm_: non_finite is %s, "error" or "skip" expected'):format(tostring(o.non_finite)))
  end
  return core.no_grad(function()
    local norm, place = norm_of(parameters, o.norm_type)
    if not is_finite(norm) then
      if o.non_finite == "error" then
        core.fail(("clip_grad_norm_: the norm of all gradients is %s; look at that of '%s'"):format(norm,
          names[place] or ("parameter %d"):format(place)))
      end
      for _, p in ipairs(parameters) do p.grad = nil end
    elseif norm + 1e-6 > most then
      each_gradient(parameters, function(g) g:div_((norm + 1e-6) / most) end)
    end
    return norm
  end)
end

document("optim.clip_grad_norm_", [[
  optim.clip_grad_norm_(parameters, most, {norm_type=, non_finite=}) -> number
  Scales all gradients so that their norm together is at most `most`, and gives what it was. `parameters` is a list, or an
  optimizer, whose names then stand in errors. norm_type is 2 if not given; math.huge takes the largest magnitude. A norm that
  is not finite is an error; with non_finite = "skip" all gradients are taken away instead, so that the opt:step() that follows
  changes nothing and is counted in opt.skipped.
  > local p = nn.Parameter(orepa.ones(2)); local opt = optim.SGD({p}, {lr = 0.1}); (p / 0):sum():backward()
  > optim.clip_grad_norm_(opt, 1, {non_finite = "skip"}); opt:step(); assert(opt.skipped == 1)]])

return { clip_grad_norm_ = clip_grad_norm_ }
