-- Layers without parameters: a function of F or of tensors each.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local module = require "orepa.nn.module"
local dropout_options = require("orepa.functional").dropout_options
local F = core.F

local functions = {}

local layer = module.internal.lister(functions)

-- ---- functions of one tensor ----

for name, f in pairs { ReLU = "relu", Sigmoid = "sigmoid", Tanh = "tanh", SiLU = "silu", GELU = "gelu",
  Hardswish = "hardswish" } do
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
  if math.type(dim) ~= "integer" or dim == 0 then
    core.fail(("%s: dim is %s; dimensions count from 1, -1 is the last"):format(where, tostring(dim)))
  end
  return dim
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
  self.dim = dimension("Flatten", options("Flatten", o, { dim = 2 }).dim)
end

function Flatten:forward(x)
  return x:flatten(self.dim)
end

function Flatten:extra()
  return ("from dim %d"):format(self.dim)
end

local Dropout = layer "Dropout"

function Dropout:init(o)
  if type(o) == "number" then o = { p = o } end
  self.p = dropout_options("Dropout", options("Dropout", o, { p = 0.5 })).p
end

function Dropout:forward(x)
  return F.dropout(x, { p = self.p, training = self.training })
end

function Dropout:extra()
  return ("p %g"):format(self.p)
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
  nn.Flatten{dim=} -> module
  Dimensions from `dim` on become one; from the second on if none is named, so that (N, C, H, W) becomes (N, C*H*W).
  > nn.Flatten()(orepa.ones(2, 3, 4, 4))]])
document("nn.Dropout", [[
  nn.Dropout{p=} -> module
  F.dropout while training, nothing in evaluation; nn.Dropout(0.1) names the probability alone, which is 0.5 if not given.
  > nn.Dropout(0.1)(orepa.ones(8))]])

return functions
