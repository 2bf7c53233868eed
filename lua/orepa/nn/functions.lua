-- Layers without parameters: a function of F or of tensors each.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local module = require "orepa.nn.module"
local functional, resize = require "orepa.functional", require "orepa.resize"
local F = core.F

local functions = {}

local layer = module.internal.lister(functions)

-- ---- functions of one tensor ----

for name, f in pairs { ReLU = "relu", Sigmoid = "sigmoid", Tanh = "tanh", SiLU = "silu", Hardswish = "hardswish" } do
  local class, apply = layer(name), F[f]
  function class.forward(_, x) return apply(x) end
  document("nn." .. name, ("nn.%s() -> module\nF.%s as a layer.\n> nn.%s()(orepa.tensor({-1, 1}))"):format(name, f, name))
end

local Identity = layer "Identity"

function Identity.forward(_, x)
  return x
end

-- ---- functions with an option, which may be given alone ----

-- A whole number other than 0, of a dimension.
local function dimension(where, dim)
  local whole = type(dim) == "number" and math.tointeger(dim)
  if not whole or whole == 0 then
    core.fail(("%s: dim is %s; dimensions count from 1, -1 is the last"):format(where, tostring(dim)))
  end
  return whole
end

local LeakyReLU = layer "LeakyReLU"

function LeakyReLU:init(o)
  if type(o) == "number" then o = { negative_slope = o } end
  o = options("LeakyReLU", o, { negative_slope = 0.01 })
  if type(o.negative_slope) ~= "number" then
    core.fail(("LeakyReLU: negative_slope is %s, a number expected"):format(tostring(o.negative_slope)))
  end
  self.negative_slope = o.negative_slope
end

function LeakyReLU:forward(x)
  return F.leaky_relu(x, self.negative_slope)
end

function LeakyReLU:extra()
  return ("slope %g"):format(self.negative_slope)
end

local GELU = layer "GELU"

function GELU:init(o)
  self.options = functional.gelu_options("GELU", o)
end

function GELU:forward(x)
  return F.gelu(x, self.options)
end

function GELU:extra()
  return self.options.approximate == "none" and "" or "by " .. self.options.approximate
end

local Softmax = layer "Softmax"

function Softmax:init(o)
  if type(o) == "number" then o = { dim = o } end
  self.dim = dimension("Softmax", options("Softmax", o, { dim = options.required }).dim)
end

function Softmax:forward(x)
  return F.softmax(x, self.dim)
end

function Softmax:extra()
  return ("dim %d"):format(self.dim)
end

local Flatten = layer "Flatten"

function Flatten:init(o)
  if type(o) == "number" then o = { dim = o } end
  o = options("Flatten", o, { dim = 2, end_dim = -1 })
  self.dim, self.end_dim = dimension("Flatten", o.dim), dimension("Flatten", o.end_dim)
end

function Flatten:forward(x)
  if self.end_dim == -1 then return x:flatten(self.dim) end
  local rank = #x.shape
  local function counted(dim) return dim < 0 and dim + rank + 1 or dim end
  local first, last = counted(self.dim), counted(self.end_dim)
  if first < 1 or last > rank or first > last then
    core.fail(("Flatten: dimensions %d to %d of an input that has %d"):format(self.dim, self.end_dim, rank))
  end
  local shape, one = {}, 1
  for d, size in ipairs(x.shape) do
    if d >= first and d <= last then one = one * size end
    if d < first or d > last then shape[#shape + 1] = size end
    if d == last then shape[#shape + 1] = one end
  end
  return x:reshape(shape)
end

function Flatten:extra()
  return ("from dim %d"):format(self.dim) .. (self.end_dim == -1 and "" or (" to %d"):format(self.end_dim))
end

for name, f in pairs { Dropout = "dropout", Dropout2d = "dropout2d" } do
  local class, drop = layer(name), F[f]
  function class:init(o)
    if type(o) == "number" then o = { p = o } end
    self.p = functional.dropout_options(name, options(name, o, { p = 0.5 })).p
  end
  function class:forward(x)
    return drop(x, { p = self.p, training = self.training })
  end
  function class:extra()
    return ("p %g"):format(self.p)
  end
end

local Upsample = layer "Upsample"

function Upsample:init(o)
  if type(o) == "number" then o = { scale_factor = o } end
  self.options = resize.interpolate_options("Upsample", o)
end

function Upsample:forward(x)
  return resize.interpolated(x, self.options)
end

function Upsample:extra()
  local o = self.options
  local two = o.size or o.scale_factor
  return ("%s %gx%g, %s"):format(o.size and "to" or "by", two[1], two[2], o.mode)
end

document("nn.Identity", [[
  nn.Identity() -> module
  Gives what it gets: a place to put something else.
  > nn.Identity()(orepa.ones(2))]])
document("nn.LeakyReLU", [[
  nn.LeakyReLU{negative_slope=} -> module
  F.leaky_relu as a layer; nn.LeakyReLU(0.1) names the slope alone, which is 0.01 if not given.
  > nn.LeakyReLU(0.1)(orepa.tensor({-1, 1}))]])
document("nn.Softmax", [[
  nn.Softmax{dim=} -> module
  F.softmax as a layer; nn.Softmax(2) names the dimension alone.
  > nn.Softmax(2)(orepa.ones(2, 4))]])
document("nn.Flatten", [[
  nn.Flatten{dim=, end_dim=} -> module
  Dimensions from `dim` on, up to `end_dim` (the last), become one; from the second on if none is named, so that (N, C, H, W)
  becomes (N, C*H*W). nn.Flatten(1) names the first one alone.
  > nn.Flatten()(orepa.ones(2, 3, 4, 4))]])
document("nn.Dropout", [[
  nn.Dropout{p=} -> module
  F.dropout while training, nothing in evaluation; nn.Dropout(0.1) names the probability alone, which is 0.5 if not given.
  > nn.Dropout(0.1)(orepa.ones(8))]])
document("nn.GELU", [[
  nn.GELU{approximate=} -> module
  F.gelu as a layer.
  > nn.GELU()(orepa.tensor({-1, 1}))]])
document("nn.Dropout2d", [[
  nn.Dropout2d{p=} -> module
  F.dropout2d while training, nothing in evaluation; nn.Dropout2d(0.1) names the probability alone.
  > nn.Dropout2d(0.1)(orepa.ones(1, 8, 2, 2))]])
document("nn.Upsample", [[
  nn.Upsample{size=, scale_factor=, mode=, align_corners=} -> module
  F.interpolate as a layer; nn.Upsample(2) names the scale factor alone.
  > nn.Upsample{scale_factor = 2, mode = "bilinear"}(orepa.ones(1, 3, 4, 4))]])

return functions
