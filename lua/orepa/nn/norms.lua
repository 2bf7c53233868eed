-- Norms by an image's, or a row's, own statistics: GroupNorm and LayerNorm. What they do is the same in training and evaluation.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"
local whole = require("orepa.reparam").check.whole
local module = require "orepa.nn.module"
local F, Parameter = core.F, module.internal.Parameter
local required = options.required

local norms = {}

local layer = module.internal.lister(norms)

local function check_eps(where, eps)
  if type(eps) ~= "number" or eps ~= eps or eps < 0 then
    core.fail(("%s: eps is %s, a number of at least 0 expected"):format(where, tostring(eps)))
  end
  return eps
end

-- Ones to multiply with, and zeros to add unless there is no bias.
local function add_parameters(self, shape, bias)
  self.weight = Parameter(core.ones(shape))
  if bias then self.bias = Parameter(core.zeros(shape)) end
end

-- ---- GroupNorm ----

local GroupNorm = layer "GroupNorm"

function GroupNorm:init(o)
  o = options("GroupNorm", o, { num_groups = required, num_channels = required, eps = 1e-5, affine = true })
  for _, name in ipairs { "num_groups", "num_channels" } do o[name] = whole(o[name], 1, "GroupNorm", name) end
  if o.num_channels % o.num_groups ~= 0 then
    core.fail(("GroupNorm: %d groups don't divide %d channels"):format(o.num_groups, o.num_channels))
  end
  check_eps("GroupNorm", o.eps)
  if o.affine then add_parameters(self, { o.num_channels }, true) end
  self.options = o
end

function GroupNorm:forward(x)
  local o = self.options
  checks.tensor("GroupNorm", x)
  if x.shape[2] ~= o.num_channels then
    core.fail(("GroupNorm: input %s for %d channels"):format(table.concat(x.shape, "x"), o.num_channels))
  end
  return F.group_norm(x, o.num_groups, { weight = self.weight, bias = self.bias, eps = o.eps })
end

function GroupNorm:extra()
  return ("%d channels in %d groups"):format(self.options.num_channels, self.options.num_groups)
end

-- ---- LayerNorm ----

local LayerNorm = layer "LayerNorm"

-- A number or a list of sizes.
local function check_shape(shape)
  local list = type(shape) == "table" and shape or { shape }
  if #list < 1 or #list > 6 then core.fail(("LayerNorm: normalized_shape has %d sizes, 1 to 6 expected"):format(#list)) end
  local sizes = {}
  for k, size in ipairs(list) do sizes[k] = whole(size, 1, "LayerNorm", "normalized_shape") end
  return sizes
end

function LayerNorm:init(o)
  if type(o) == "number" or (type(o) == "table" and #o > 0) then o = { normalized_shape = o } end
  o = options("LayerNorm", o, { normalized_shape = required, eps = 1e-5, elementwise_affine = true, bias = true })
  o.normalized_shape = check_shape(o.normalized_shape)
  check_eps("LayerNorm", o.eps)
  if o.elementwise_affine then add_parameters(self, o.normalized_shape, o.bias) end
  self.options = o
end

function LayerNorm:forward(x)
  local o = self.options
  return F.layer_norm(x, o.normalized_shape, { weight = self.weight, bias = self.bias, eps = o.eps })
end

function LayerNorm:extra()
  return table.concat(self.options.normalized_shape, "x")
end

document("nn.GroupNorm", [[
  nn.GroupNorm{num_groups=, num_channels=, eps=, affine=} -> module
  F.group_norm as a layer, with a weight (C), ones at first, and a bias (C), zeros, unless affine = false.
  > nn.GroupNorm{num_groups = 2, num_channels = 6}(orepa.randn(2, 6, 4, 4))]])
document("nn.LayerNorm", [[
  nn.LayerNorm{normalized_shape=, eps=, elementwise_affine=, bias=} -> module
  F.layer_norm as a layer: over the last dimensions, whose sizes are a number or a list. It has a weight of their shape, ones at
  first, and a bias, zeros, unless elementwise_affine = false; bias = false leaves out the bias. nn.LayerNorm(8) and
  nn.LayerNorm{4, 8} name the sizes alone.
  > nn.LayerNorm(8)(orepa.randn(2, 5, 8))]])

return norms
