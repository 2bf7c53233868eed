-- What all optimizers are: a list of parameters with a factor for the rate and one for the decay of each, and what is kept of
-- the steps so far, a tensor for each parameter and kind ("velocity").

local core = require "orepa.core"
local document = require "orepa.document"
local gone = require("orepa.nn.module").internal.gone

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

-- ---- making one ----

local Optimizer = {}

local function class(name)
  local new = setmetatable({ class_name = name }, { __index = Optimizer })
  new.__index = new
  return new
end

-- `fields` are the options, which become fields; of `kinds` it keeps a tensor for each parameter.
local function make(kind, given, fields, kinds)
  local self = setmetatable(fields, kind)
  self.parameters, self.names, self.rate_factors, self.decay_factors = {}, {}, {}, {}
  self.kinds, self.kept, self.skipped = kinds, {}, 0
  for _, name in ipairs(kinds) do self.kept[name] = {} end
  for _, group in ipairs(as_groups(kind.class_name, given)) do
    for k, p in ipairs(group.parameters) do
      local n = #self.parameters + 1
      self.parameters[n] = p
      self.names[n] = #group.parameters > 1 and ("%s[%d]"):format(group.name or "group", k) or group.name or "parameter"
      self.rate_factors[n], self.decay_factors[n] = group.rate_factor or 1, group.decay_factor or 1
    end
  end
  return self
end

-- ---- steps ----

local function zeros_like(p)
  return core.zeros(p.shape, { dtype = p.dtype, device = p.device })
end

-- What is kept of a parameter, made if it isn't there.
local function keep(self, k)
  for _, name in ipairs(self.kinds) do
    local list = self.kept[name]
    list[k] = list[k] or zeros_like(self.parameters[k])
  end
end

-- What will be kept is made now, so that the first step takes as much memory as all others.
function Optimizer:zero_grad()
  for k, p in ipairs(self.parameters) do
    p.grad = nil
    if p.requires_grad then keep(self, k) end
  end
end

local function check_gone(self)
  for k, p in ipairs(self.parameters) do
    if gone[p] then
      core.fail(("%s: '%s' went when its block was %s; make a new optimizer for the network as it is now"):format(
        self.class_name, self.names[k], gone[p]))
    end
  end
end

-- Whether a step has something to do; one that has not is counted.
local function begin(self)
  check_gone(self)
  for _, p in ipairs(self.parameters) do
    local g <close> = p.grad
    if g then return true end
  end
  self.skipped = self.skipped + 1
  return false
end

-- The norm of all gradients together, and the name of the first parameter whose gradient is not finite. One copy from the
-- device.
function Optimizer:gradient_norm()
  local total = 0
  for k, sum in ipairs(core.gradient_square_sums(self.parameters)) do
    if sum ~= sum or sum == math.huge then return sum, self.names[k] end
    total = total + sum
  end
  return math.sqrt(total)
end

-- ---- state: tensors by kind and number, as parameters may have no names ----

function Optimizer:state_dict()
  local tensors = {}
  for _, name in ipairs(self.kinds) do
    for k in ipairs(self.parameters) do tensors[("%s.%d"):format(name, k)] = self.kept[name][k] end
  end
  if self.steps then tensors.steps = core.tensor(self.steps, { dtype = "int64" }) end
  return tensors
end

local function sizes(t)
  return table.concat(t.shape, "x")
end

-- The steps of each parameter, from a tensor.
local function steps_of(self, t)
  if not core.is_tensor(t) or #t.shape ~= 1 or t.shape[1] ~= #self.parameters or t.dtype ~= "int64" then
    core.fail(("%s: 'steps' is %s; an int64 for each of %d parameters expected"):format(self.class_name,
      core.is_tensor(t) and ("%s %s"):format(t.dtype, sizes(t)) or type(t), #self.parameters))
  end
  return t:tolist()
end

-- A tensor of the state under its kind and number.
local function take(self, kept, key, t)
  local name, number = tostring(key):match "^(.*)%.(%d+)$"
  local k = math.tointeger(tonumber(number or ""))
  local p = self.parameters[k]
  if not p or not kept[name] then
    core.fail(("%s: the state has '%s', which this optimizer of %d parameters doesn't keep"):format(self.class_name,
      tostring(key), #self.parameters))
  end
  if not core.is_tensor(t) or sizes(t) ~= sizes(p) then
    core.fail(("%s: '%s' is %s, the parameter '%s' %s"):format(self.class_name, key,
      core.is_tensor(t) and sizes(t) or type(t), self.names[k], sizes(p)))
  end
  kept[name][k] = zeros_like(p):copy_(t)
end

function Optimizer:load_state_dict(tensors)
  if type(tensors) ~= "table" then
    core.fail(("%s: a table of tensors expected, got %s"):format(self.class_name, type(tensors)))
  end
  local kept, steps = {}, self.steps and steps_of(self, tensors.steps)
  for _, name in ipairs(self.kinds) do kept[name] = {} end
  for key, t in pairs(tensors) do
    if key ~= "steps" or not steps then take(self, kept, key, t) end
  end
  self.kept, self.steps = kept, steps
end

document("opt:step", [[
  opt:step()
  Changes all parameters that have a gradient. If none has one, the step is counted in opt.skipped.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1}):step()]])
document("opt:zero_grad", [[
  opt:zero_grad()
  Takes all gradients away: best before the forward pass, which can use their memory then. What the optimizer will keep of
  its steps is made.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1}):zero_grad()]])
document("opt:gradient_norm", [[
  opt:gradient_norm() -> number, name
  The norm of all gradients together; if it is not finite, the name of the first parameter whose gradient is not.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1}):gradient_norm()]])
document("opt:state_dict", [[
  opt:state_dict() -> tensors
  What the optimizer keeps of its steps, its own tensors, by kind and number of the parameter ("velocity.1"); orepa.save writes
  it. Rates and other options are not in it.
  > optim.SGD({nn.Parameter(orepa.ones(2))}, {lr = 0.1, momentum = 0.9}):state_dict()]])
document("opt:load_state_dict", [[
  opt:load_state_dict(tensors)
  Goes on where an optimizer of the same parameters, in the same order, was when its state was saved. A name or a shape that
  doesn't fit is an error, and nothing is changed.
  > local p = nn.Parameter(orepa.ones(2)); local o = {lr = 0.1, momentum = 0.9}
  > optim.SGD({p}, o):load_state_dict(optim.SGD({p}, o):state_dict())]])

return { Optimizer = Optimizer, class = class, make = make, keep = keep, begin = begin, check_numbers = check_numbers }
