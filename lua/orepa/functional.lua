-- What orepa.F has beside the engine's own ops: activations under PyTorch's names, dropout, and tables of vectors.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local F = core.F

for _, name in ipairs { "tanh", "sigmoid", "softplus", "silu", "gelu", "hardswish" } do
  F[name] = core.methods[name]
  document("F." .. name, ("F.%s(x) -> tensor\nThe same as x:%s().\n> F.%s(orepa.tensor({-1, 2}))"):format(name, name, name))
end

function F.leaky_relu(x, slope)
  if not core.is_tensor(x) then core.fail(("leaky_relu: a tensor expected, got %s"):format(type(x))) end
  return x:leaky_relu(slope == nil and 0.01 or slope)
end

function F.embedding(indices, weight)
  for k, t in ipairs { indices, weight } do
    if not core.is_tensor(t) then core.fail(("embedding: argument %d: a tensor expected, got %s"):format(k, type(t))) end
  end
  if #weight.shape ~= 2 or indices.dtype ~= "int64" then
    core.fail(("embedding: int64 indices and a matrix expected, got %s and a weight of %d dimensions"):format(indices.dtype,
      #weight.shape))
  end
  local shape = indices.shape
  shape[#shape + 1] = weight.shape[2]
  return weight:index_select(1, indices:reshape(-1)):reshape(shape)
end

-- The options of a dropout, checked.
local function dropout_options(where, given)
  local o = options(where, given, { p = 0.5, training = true })
  if type(o.p) ~= "number" or not (o.p >= 0 and o.p < 1) then
    core.fail(("%s: p is %s, a number of at least 0 and less than 1 expected"):format(where, tostring(o.p)))
  end
  if type(o.training) ~= "boolean" then
    core.fail(("%s: training is %s, true or false expected"):format(where, tostring(o.training)))
  end
  return o
end

function F.dropout(x, given)
  local o = dropout_options("dropout", given)
  if not core.is_tensor(x) then core.fail(("dropout: a tensor expected, got %s"):format(type(x))) end
  if not x.dtype:find "float" then core.fail(("dropout: floats expected, got %s"):format(x.dtype)) end
  if o.p == 0 or not o.training then return x end
  local noise <close> = core.rand(x.shape, { device = x.device })
  local kept <close> = noise:ge(o.p)
  return x * kept:to(x.dtype):mul_(1 / (1 - o.p))
end

document("F.leaky_relu", [[
  F.leaky_relu(x, slope) -> tensor
  Negative elements are multiplied by a slope, 0.01 if none is given.
  > F.leaky_relu(orepa.tensor({-1, 2}), 0.1)]])
document("F.embedding", [[
  F.embedding(indices, weight) -> tensor
  For each integer of a tensor of any shape that row of the weight (V, D), counted from 0: (..., D).
  > F.embedding(orepa.tensor({{2, 0}}, {dtype = "int64"}), orepa.randn(3, 4))]])
document("F.dropout", [[
  F.dropout(x, {p=, training=}) -> tensor
  Each element becomes 0 with probability p (0.5), others are divided by 1 - p; orepa.manual_seed repeats which. With
  training = false, or p = 0, it is x itself.
  > F.dropout(orepa.ones(8), {p = 0.25})]])

return { dropout_options = dropout_options }
