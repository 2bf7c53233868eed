-- What orepa.F has beside the engine's own ops: activations under PyTorch's names, dropout, and tables of vectors.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"
local F = core.F

for _, name in ipairs { "tanh", "sigmoid", "softplus", "silu", "hardswish" } do
  F[name] = core.methods[name]
  document("F." .. name, ("F.%s(x) -> tensor\nThe same as x:%s().\n> F.%s(orepa.tensor({-1, 2}))"):format(name, name, name))
end

-- The options of gelu, checked.
local function gelu_options(where, given)
  local o = options(where, given, { approximate = "none" })
  if o.approximate ~= "none" and o.approximate ~= "tanh" then
    core.fail(('%s: approximate is %s, "none" or "tanh" expected'):format(where, tostring(o.approximate)))
  end
  return o
end

-- x/2 * (1 + tanh(u)) is x * sigmoid(2*u), with u = sqrt(2/pi) * (x + 0.044715 * x^3).
function F.gelu(x, given)
  local o = gelu_options("gelu", given)
  checks.tensor("gelu", x)
  if o.approximate == "none" then return x:gelu() end
  local twice = 2 * math.sqrt(2 / math.pi)
  return x * (x * (x * x):multiply_add(twice * 0.044715, twice)):sigmoid()
end

function F.leaky_relu(x, slope)
  checks.tensor("leaky_relu", x)
  return x:leaky_relu(slope == nil and 0.01 or slope)
end

-- A row of a table, counted from 0 or, if it is negative, from the end.
local function embedding_row(where, row, rows)
  if row == nil then return nil end
  local k = type(row) == "number" and math.tointeger(row)
  if not k or k < -rows or k >= rows then
    core.fail(("%s: padding_idx is %s; a row of %d, counted from 0, expected"):format(where, tostring(row), rows))
  end
  return k % rows
end

function F.embedding(indices, weight, given)
  local o = options("embedding", given, { padding_idx = options.optional })
  for k, t in ipairs { indices, weight } do
    if not core.is_tensor(t) then core.fail(("embedding: argument %d: a tensor expected, got %s"):format(k, type(t))) end
  end
  if #weight.shape ~= 2 or indices.dtype ~= "int64" then
    core.fail(("embedding: int64 indices and a matrix expected, got %s and a weight of %d dimensions"):format(indices.dtype,
      #weight.shape))
  end
  local shape = indices.shape
  shape[#shape + 1] = weight.shape[2]
  local list, padding = indices:reshape(-1), embedding_row("embedding", o.padding_idx, weight.shape[1])
  local rows = weight:index_select(1, list)
  if padding and rows.requires_grad then rows = core.where(list:ne(padding):reshape(-1, 1), rows, rows:detach()) end
  return rows:reshape(shape)
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

-- x times 0 or 1 / (1 - p), drawn for each element of a shape that is broadcast to x's.
local function dropped(x, p, shape)
  local noise <close> = core.rand(shape, { device = x.device })
  local kept <close> = noise:ge(p)
  return x * kept:to(x.dtype):mul_(1 / (1 - p))
end

function F.dropout(x, given)
  local o = dropout_options("dropout", given)
  checks.floats("dropout", x)
  return (o.p == 0 or not o.training) and x or dropped(x, o.p, x.shape)
end

function F.dropout2d(x, given)
  local o, shape = dropout_options("dropout2d", given), {}
  checks.floats("dropout2d", x)
  if #x.shape < 2 then core.fail(("dropout2d: an input of %d dimensions has no channels (N, C, ...)"):format(#x.shape)) end
  for d, size in ipairs(x.shape) do shape[d] = d <= 2 and size or 1 end
  return (o.p == 0 or not o.training) and x or dropped(x, o.p, shape)
end

document("F.gelu", [[
  F.gelu(x, {approximate=}) -> tensor
  The same as x:gelu(), or with approximate = "tanh" the other formula: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3))).
  > F.gelu(orepa.tensor({-1, 2}))]])

document("F.leaky_relu", [[
  F.leaky_relu(x, slope) -> tensor
  Negative elements are multiplied by a slope, 0.01 if none is given.
  > F.leaky_relu(orepa.tensor({-1, 2}), 0.1)]])
document("F.embedding", [[
  F.embedding(indices, weight, {padding_idx=}) -> tensor
  For each integer of a tensor of any shape that row of the weight (V, D), counted from 0: (..., D). The row padding_idx (-1 is
  the last) gets no gradient.
  > F.embedding(orepa.tensor({{2, 0}}, {dtype = "int64"}), orepa.randn(3, 4))]])
document("F.dropout", [[
  F.dropout(x, {p=, training=}) -> tensor
  Each element becomes 0 with probability p (0.5), others are divided by 1 - p; orepa.manual_seed repeats which. With
  training = false, or p = 0, it is x itself.
  > F.dropout(orepa.ones(8), {p = 0.25})]])

document("F.dropout2d", [[
  F.dropout2d(x, {p=, training=}) -> tensor
  F.dropout of whole channels: those of x (N, C, ...) that become 0 do so everywhere.
  > F.dropout2d(orepa.ones(1, 8, 2, 2), {p = 0.25})]])

return { dropout_options = dropout_options, gelu_options = gelu_options, embedding_row = embedding_row }
