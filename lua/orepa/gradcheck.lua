-- gradcheck(f, inputs, options): what backward gives, beside central differences. Each result of f is weighed and summed to one
-- number, by weights that no symmetry of f shares; so one backward pass and two calls for each number of the inputs are enough.

local core = require "orepa.core"
local text_of = require("orepa.checks").text_of
local document = require "orepa.document"
local options = require "orepa.options"

-- Steps and tolerances: the step's own error against rounding, divided by the step.
local STEPS = { float64 = { eps = 1e-6, tolerance = 1e-6 }, float32 = { eps = 4e-3, tolerance = 4e-3 } }

local function values_of(t)
  return t:detach():to("float64"):reshape(-1):tolist()
end

-- ---- what is checked ----

-- `put` lets f see other values: arguments are exchanged, parameters are written.
local function argument(arguments, k)
  local x = arguments[k]:detach():requires_grad_()
  return { name = "input " .. k, tensor = x, values = values_of(x), put = function(t) arguments[k] = t end }
end

local function parameter(p, k)
  return { name = "parameter " .. k, tensor = p, values = values_of(p), put = function(t)
    core.no_grad(function() p:copy_(t) end)
  end }
end

local function variables_of(arguments, parameters)
  local list = {}
  for k = 1, arguments.n do
    if core.is_tensor(arguments[k]) and arguments[k].requires_grad then
      list[#list + 1] = argument(arguments, k)
      arguments[k] = list[#list].tensor
    end
  end
  for k, p in ipairs(parameters) do
    if not core.is_tensor(p) then core.fail(("gradcheck: parameter %d is a %s, not a tensor"):format(k, type(p))) end
    if p.requires_grad then list[#list + 1] = parameter(p, k) end
  end
  if #list == 0 then core.fail "gradcheck: none of the inputs requires a gradient" end
  for _, v in ipairs(list) do
    if not STEPS[v.tensor.dtype] then
      core.fail(("gradcheck: %s is %s; differences need float32 or float64"):format(v.name, text_of(v.tensor)))
    end
  end
  return list
end

-- Lets f see these values, or those that were there at first.
local function put_values(v, values)
  local x = v.tensor
  v.put(core.tensor(values or v.values, { dtype = x.dtype, device = x.device }):reshape(x.shape))
end

-- ---- results ----

-- Calls f with the same random numbers each time; gives the results that are tensors of floats.
local function results_of(f, arguments, rng)
  core.set_rng_state(rng)
  local all, ys = table.pack(f(table.unpack(arguments, 1, arguments.n))), {}
  for k = 1, all.n do
    if core.is_tensor(all[k]) and all[k].dtype:find "^b?float" then ys[#ys + 1] = all[k] end
  end
  return ys
end

-- Between 0.5 and 1.5, of both signs.
local function weight(k)
  return (0.5 + k * 0.6180339887498949 % 1) * (k % 3 == 0 and -1 or 1)
end

local function weights_like(y)
  local list = {}
  for k = 1, y:count() do list[k] = weight(k) end
  return core.tensor(list, { dtype = y.dtype, device = y.device }):reshape(y.shape)
end

-- The gradients of result y, of each variable: a list of numbers.
local function gradients_of(y, variables)
  local xs, lists = {}, {}
  for k, v in ipairs(variables) do xs[k] = v.tensor end
  local found = y.requires_grad
    and core.grad(y, xs, { grads = weights_like(y), retain_graph = true, allow_unused = true }) or {}
  for k, v in ipairs(variables) do
    lists[k] = found[k] and values_of(found[k])
    if not found[k] then
      lists[k] = {}
      for n = 1, #v.values do lists[k][n] = 0 end
    end
  end
  return lists
end

-- ---- differences ----

local function rounded(value, dtype)
  return dtype == "float32" and string.unpack("f", string.pack("f", value)) or value
end

-- What f gives without a graph where element `at` is moved, and where to.
local function moved(call, v, at, step)
  local values = table.move(v.values, 1, #v.values, 1, {})
  values[at] = rounded(values[at] + step, v.tensor.dtype)
  put_values(v, values)
  local lists = {}
  for k, y in ipairs(core.no_grad(call)) do lists[k] = values_of(y) end
  return lists, values[at]
end

-- The derivative of each result's weighed sum.
local function differences(call, v, at, eps)
  local above, high = moved(call, v, at, eps)
  local below, low = moved(call, v, at, -eps)
  local sums = {}
  for k = 1, #above do
    local sum = 0
    for n = 1, #above[k] do sum = sum + weight(n) * (above[k][n] - below[k][n]) end
    sums[k] = sum / (high - low)
  end
  return sums
end

local function position(k, shape)
  local at = {}
  k = k - 1
  for d = #shape, 1, -1 do
    at[d] = k % shape[d] + 1
    k = k // shape[d]
  end
  return #at == 0 and "" or (", element {%s}"):format(table.concat(at, ", "))
end

local function is_near(a, b, tolerance)
  return math.abs(a - b) <= tolerance * (1 + math.abs(b))
end

-- Nothing, or what is wrong with the gradients of one variable.
local function check_variable(call, v, gradients, o)
  local step = STEPS[v.tensor.dtype]
  local eps, tolerance = o.eps or step.eps, o.tolerance or step.tolerance
  for at = 1, #v.values do
    for k, difference in ipairs(differences(call, v, at, eps)) do
      local found = gradients[k][at]
      if not is_near(found, difference, tolerance) then
        return ("gradcheck: %s (%s)%s, result %d: backward gives %.9g, differences give %.9g"):format(v.name,
          text_of(v.tensor), position(at, v.tensor.shape), k, found, difference)
      end
    end
  end
end

-- Nothing, or how a second call, with plain copies of the inputs, differs from the first.
local function check_repetition(call, ys, variables, o)
  local tolerance = 0
  for _, v in ipairs(variables) do
    put_values(v)
    tolerance = math.max(tolerance, o.tolerance or STEPS[v.tensor.dtype].tolerance)
  end
  local again = core.no_grad(call)
  for k, y in ipairs(ys) do
    local a, b = values_of(y), again[k] and values_of(again[k]) or {}
    for n = 1, math.max(#a, #b) do
      if not (a[n] and b[n] and is_near(a[n], b[n], tolerance)) and not (a[n] ~= a[n] and b[n] ~= b[n]) then
        return ("gradcheck: result %d (%s)%s is %s, and %s when it is computed again"):format(k, text_of(y),
          position(n, y.shape), a[n], b[n])
      end
    end
  end
end

local function check(call, variables, o)
  local ys = call()
  local any = false
  for _, y in ipairs(ys) do any = any or y.requires_grad end
  if not any then core.fail "gradcheck: no result requires a gradient" end
  local by_result = {}
  for k, y in ipairs(ys) do by_result[k] = gradients_of(y, variables) end
  local wrong = check_repetition(call, ys, variables, o)
  for n, v in ipairs(variables) do
    local gradients = {}
    for k = 1, #ys do gradients[k] = by_result[k][n] end
    wrong = wrong or check_variable(call, v, gradients, o)
    put_values(v)
  end
  return wrong
end

local known = { eps = options.optional, tolerance = options.optional, parameters = options.optional }

local function read_options(f, given)
  local o = options("gradcheck", given, known)
  for _, name in ipairs { "eps", "tolerance" } do
    local value = o[name]
    if value ~= nil and not (type(value) == "number" and value > 0) then
      core.fail(("gradcheck: option '%s': a positive number expected, got %s"):format(name, tostring(value)))
    end
  end
  if o.parameters == nil then o.parameters = type(f) == "table" and f.parameters and f:parameters() or {} end
  if type(o.parameters) ~= "table" then
    core.fail(("gradcheck: option 'parameters': a list of tensors expected, got %s"):format(type(o.parameters)))
  end
  return o
end

local function gradcheck(f, inputs, given)
  if type(f) ~= "function" and not (getmetatable(f) or {}).__call then
    core.fail(("gradcheck: a function expected, got %s"):format(type(f)))
  end
  local o = read_options(f, given)
  if core.is_tensor(inputs) then inputs = { inputs } end
  if type(inputs) ~= "table" then core.fail(("gradcheck: a list of inputs expected, got %s"):format(type(inputs))) end
  local arguments = table.move(inputs, 1, inputs.n or #inputs, 1, { n = inputs.n or #inputs })
  local variables, rng = variables_of(arguments, o.parameters), core.rng_state()
  local function call() return results_of(f, arguments, rng) end
  local ok, wrong = pcall(check, call, variables, o)
  for _, v in ipairs(variables) do put_values(v) end
  core.set_rng_state(rng)
  if not ok then error(wrong, 0) end
  return wrong == nil, wrong
end

document("orepa.gradcheck", [[
  gradcheck(f, inputs, {eps=, tolerance=, parameters=}) -> true | false, message
  Compares the gradients that backward gives for f(table.unpack(inputs)) with central differences: of the inputs that require a
  gradient, of any strides, and of parameters, tensors that f uses besides (of a module its own by default; they are moved and put
  back). Each number must agree to tolerance * (1 + the difference), where eps is the step; by default both are 1e-6 for float64,
  which only the device "ref" computes with, and 4e-3 for float32. The message names the input, the element and both numbers, so
  that assert(orepa.gradcheck(...)) says all. f may give several tensors; random numbers are the same in each call. Keep inputs
  small, and away from kinks.
  > local x = orepa.rand({2, 3}, {dtype = "float64", device = "ref"}):requires_grad_()
  > assert(orepa.gradcheck(function(t) return (t * t):exp() end, {x}))]])

return gradcheck
