-- What tensors have beside the engine's own ops: statistics, norms, matrices, rearrangements, all made of those ops.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"

local t = core.methods
local tensor_of, float_of, wide = checks.tensor, checks.floats, checks.wide

local function whole(where, what, value)
  local n = type(value) == "number" and math.tointeger(value)
  if not n then core.fail(("%s: %s is %s, a whole number expected"):format(where, what, tostring(value))) end
  return n
end

-- A dimension counted from 1, of a tensor of `rank`.
local function dimension(where, dim, rank)
  local d = whole(where, "the dimension", dim)
  if d == 0 or d > rank or d < -rank then
    core.fail(("%s: there is no dimension %d in a tensor of %d (they count from 1, -1 is the last)"):format(where, d, rank))
  end
  return d > 0 and d or d + rank + 1
end

local function kind_of(x)
  return { dtype = x.dtype, device = x.device }
end

-- ---- numbers in dimensions: f(x, dim or {dims} or nil, {keepdim=, ...}) ----

-- The list of dimensions (nil: all) and the options of a method's arguments.
local function reduction_arguments(where, x, dims, given, known)
  if given == nil and type(dims) == "table" and #dims == 0 then dims, given = nil, dims end
  known.keepdim = false
  local o = options(where, given, known)
  if type(o.keepdim) ~= "boolean" then core.fail(("%s: keepdim is true or false"):format(where)) end
  if type(dims) ~= "table" then dims = dims ~= nil and { dims } or nil end
  local list, count = {}, dims and 1 or x:count()
  for n, dim in ipairs(dims or {}) do
    list[n] = dimension(where, dim, #x.shape)
    count = count * x.shape[list[n]]
  end
  return dims and list, o, count
end

local function reduce(method, x, dims, keepdim)
  if dims then return method(x, dims, { keepdim = keepdim }) end
  return method(x, { keepdim = keepdim })
end

-- The mean of squared distances from the mean: two passes, so that a large mean costs no accuracy.
local function variance(where, x, dims, given)
  float_of(where, x)
  local list, o, count = reduction_arguments(where, x, dims, given, { correction = 1 })
  local correction = type(o.correction) == "number" and o.correction
  if not correction then core.fail(("%s: correction is %s, a number expected"):format(where, tostring(o.correction))) end
  local values = wide(x)
  local distance = values - reduce(t.mean, values, list, true)
  local sum = reduce(t.sum, distance * distance, list, o.keepdim)
  return sum / math.max(count - correction, 0)
end

function t.var(x, dims, given)
  return variance("var", x, dims, given):to(x.dtype)
end

function t.std(x, dims, given)
  return variance("std", x, dims, given):sqrt():to(x.dtype)
end

-- The root of a sum, with gradient 0 and not NaN where the sum is 0.
local function root(sum)
  local zero = sum:detach():eq(0):to(sum.dtype)
  return (sum + zero):sqrt() - zero
end

function t.norm(x, p, dims, given)
  float_of("norm", x)
  if type(p) == "table" then p, dims, given = nil, p, dims end
  if p == nil then p = 2 end
  if type(p) ~= "number" or p ~= p then core.fail(("norm: p is %s, a number expected"):format(tostring(p))) end
  local list, o = reduction_arguments("norm", x, dims, given, {})
  local values = wide(x)
  local y
  if p == 2 then
    y = root(reduce(t.sum, values * values, list, o.keepdim))
  elseif p == math.huge or p == -math.huge then
    y = reduce(p > 0 and t.max or t.min, values:abs(), list, o.keepdim)
  elseif p == 1 then
    y = reduce(t.sum, values:abs(), list, o.keepdim)
  elseif p == 0 then
    y = reduce(t.sum, values:ne(0):to(values.dtype), list, o.keepdim)
  else
    y = reduce(t.sum, values:abs() ^ p, list, o.keepdim) ^ (1 / p)
  end
  return y:to(x.dtype)
end

function t.logsumexp(x, dims, given)
  float_of("logsumexp", x)
  local list, o = reduction_arguments("logsumexp", x, dims, given, {})
  local values = wide(x)
  local highest = reduce(t.max, values:detach(), list, true)
  highest = highest:isfinite():where(highest, 0)
  local sum = reduce(t.sum, (values - highest):exp(), list, true):log() + highest
  return reduce(t.sum, sum, list, o.keepdim):to(x.dtype)
end

-- What is put in order, along a dimension, all of it if none is named: x, the dimension, its size.
local function line_of(where, x, dim)
  if dim == nil then x, dim = x:reshape(-1), 1 end
  local d = dimension(where, dim, #x.shape)
  if x.shape[d] == 0 then core.fail(("%s: dimension %d has no elements"):format(where, d)) end
  return x, d, x.shape[d]
end

-- The lower one of two in the middle. NaN sorts last: where there is one it is the median.
function t.median(x, dim, given)
  tensor_of("median", x)
  local o = options("median", given, { keepdim = false })
  local line, d, size = line_of("median", x, dim)
  local values, positions = line:sort(d)
  local function at(sorted, position) return sorted:slice(d, position, position) end
  local middle = (size + 1) // 2
  local value, position = at(values, middle), at(positions, middle)
  if x.dtype:find "float" then
    local last = at(values, size)
    local nan = last:isnan()
    value, position = nan:where(last, value), nan:where(at(positions, size), position)
  end
  if not o.keepdim then value, position = value:squeeze(d), position:squeeze(d) end
  if dim == nil then return value end
  return value, position
end

-- Between two neighbours in the order of the elements the share of each is where q lies between them. NaN wins.
function t.quantile(x, q, dim, given)
  float_of("quantile", x)
  if given == nil and type(dim) == "table" then dim, given = nil, dim end
  local o = options("quantile", given, { keepdim = false })
  local line, d, size = line_of("quantile", x, dim)
  local sorted, kept, parts = (wide(line):sort(d)), {}, {}
  for k, length in ipairs(x.shape) do kept[k] = (dim == nil or k == d) and 1 or length end
  local function at(position) return sorted:slice(d, position, position) end
  local last = at(size)
  local nan = last:isnan()
  for k, share in ipairs(type(q) == "table" and q or { q }) do
    if type(share) ~= "number" or not (share >= 0 and share <= 1) then
      core.fail(("quantile: %s is no share from 0 to 1"):format(tostring(share)))
    end
    local place = share * (size - 1)
    local low, between = math.floor(place), place % 1
    local value = at(low + 1)
    if between > 0 then value = value * (1 - between) + at(low + 2) * between end
    value = nan:where(last, value):to(x.dtype)
    parts[k] = o.keepdim and value:reshape(kept) or value:squeeze(d)
  end
  if #parts == 0 then core.fail("quantile: a number from 0 to 1 expected, or a list of them") end
  return type(q) == "table" and core.stack(parts) or parts[1]
end

-- ---- elements ----

-- How many elements are in each of `bins` equal parts of lowest ... highest, which is in the last; the others are left out.
function t.histc(x, bins, lowest, highest)
  local values = tensor_of("histc", x):detach():reshape(-1):to "float64"
  bins = whole("histc", "the number of bins", bins or 100)
  if bins < 1 then core.fail(("histc: %d bins"):format(bins)) end
  local some = values:count() > 0
  lowest = lowest or some and values:min():item() or 0
  highest = highest or some and values:max():item() or 0
  if type(lowest) ~= "number" or type(highest) ~= "number" or not (highest - lowest >= 0 and highest - lowest < math.huge) then
    core.fail(("histc: there are no bins from %s to %s"):format(lowest, highest))
  end
  if lowest == highest then lowest, highest = lowest - 1, highest + 1 end
  values = values[values:ge(lowest):logical_and(values:le(highest))]
  local place = ((values - lowest) * (bins / (highest - lowest))):floor():clamp(0, bins - 1):to "int64"
  return core.zeros({ bins }, { dtype = "int64", device = x.device }):scatter_add(1, place, core.ones_like(place))
end

-- Sorted, each once; beside it where each element of x is among them, and how often each is there.
function t.unique(x)
  local list = tensor_of("unique", x):detach():reshape(-1)
  if #list == 0 then
    local none = core.zeros({ 0 }, { dtype = "int64", device = x.device })
    return list:clone(), none:reshape(x.shape), none:clone()
  end
  local sorted, positions = list:sort()
  local new = core.cat { core.ones({ 1 }, { dtype = "bool", device = x.device }),
    sorted:slice(1, 2, -1):ne(sorted:slice(1, 1, #list - 1)) }
  local values, number = sorted[new], new:cumsum() - 1
  local inverse = core.zeros({ #list }, { dtype = "int64", device = x.device }):scatter_(1, positions, number)
  local counts = core.zeros({ #values }, { dtype = "int64", device = x.device })
    :scatter_add(1, number, core.ones({ #list }, { dtype = "int64", device = x.device }))
  return values, inverse:reshape(x.shape), counts
end

function t.nonzero(x)
  local flat, columns, step = tensor_of("nonzero", x):flat_nonzero(), {}, 1
  for d = #x.shape, 1, -1 do
    columns[d] = (flat // step) % x.shape[d]
    step = step * x.shape[d]
  end
  if #columns == 0 then return flat:reshape(#flat, 1):slice(2, 1, 0) end
  return core.stack(columns, 2)
end

-- ---- matrices ----

local function matrix_of(where, x)
  if #tensor_of(where, x).shape < 2 then
    core.fail(("%s: a matrix expected, got a tensor of %d dimensions"):format(where, #x.shape))
  end
  return x
end

function core.eye(rows, columns, given)
  if type(columns) == "table" then columns, given = nil, columns end
  rows = whole("eye", "the number of rows", rows)
  columns = columns == nil and rows or whole("eye", "the number of columns", columns)
  if rows < 0 or columns < 0 then core.fail(("eye: %d rows of %d"):format(rows, columns)) end
  local flat = core.zeros({ rows * columns }, given or {})
  if flat:count() > 0 then
    flat:slice(1, 1, math.min(rows, columns) * (columns + 1) - columns, columns + 1):fill_(1)
  end
  return flat:reshape(rows, columns)
end

-- Row and column of each element of x's last two dimensions: integers that broadcast.
local function places(x)
  local rows, columns = x.shape[#x.shape - 1], x.shape[#x.shape]
  local o = { dtype = "int64", device = x.device }
  return core.arange(0, rows - 1, o):reshape(rows, 1), core.arange(0, columns - 1, o)
end

for name, is_kept in pairs { tril = t.le, triu = t.ge } do
  t[name] = function(x, diagonal)
    diagonal = whole(name, "the diagonal", diagonal or 0)
    local rows, columns = places(matrix_of(name, x))
    return is_kept(columns - rows, diagonal):where(x, 0)
  end
end

-- Of a matrix its diagonal, of a list the matrix that has it as its diagonal.
function t.diag(x)
  if #tensor_of("diag", x).shape == 1 then
    local rows, columns = places(x:reshape(1, -1):expand(#x, #x))
    return rows:eq(columns):where(x, 0)
  end
  if #x.shape ~= 2 then
    core.fail(("diag: a list or a matrix expected, got a tensor of %d dimensions"):format(#x.shape))
  end
  local rows, columns = x.shape[1], x.shape[2]
  local count = math.min(rows, columns)
  if count == 0 then return x:reshape(0) end
  return x:reshape(-1):slice(1, 1, count * (columns + 1) - columns, columns + 1)
end

function t.trace(x)
  if #tensor_of("trace", x).shape ~= 2 then
    core.fail(("trace: a matrix expected, got a tensor of %d dimensions"):format(#x.shape))
  end
  return x:diag():sum()
end

local function list_of(where, x)
  if #tensor_of(where, x).shape ~= 1 then
    core.fail(("%s: a tensor of 1 dimension expected, got one of %d"):format(where, #x.shape))
  end
  return x
end

function t.dot(a, b)
  if #list_of("dot", a) ~= #list_of("dot", b) then core.fail(("dot: %d and %d elements"):format(#a, #b)) end
  return a:matmul(b)
end

function t.outer(a, b)
  return list_of("outer", a):reshape(-1, 1) * list_of("outer", b)
end

-- ---- rearrangements ----

function t.flip(x, ...)
  local dims = { ... }
  if type(dims[1]) == "table" then dims = dims[1] end
  tensor_of("flip", x)
  if #dims == 0 then core.fail "flip: a dimension expected" end
  for _, dim in ipairs(dims) do
    local d = dimension("flip", dim, #x.shape)
    x = x:index_select(d, core.arange(x.shape[d] - 1, 0, -1, { dtype = "int64", device = x.device }))
  end
  return x
end

function t.roll(x, shift, dim)
  shift = whole("roll", "the shift", shift)
  local d = dimension("roll", dim or 1, #tensor_of("roll", x).shape)
  local size = x.shape[d]
  local moved = size > 0 and shift % size or 0
  if moved == 0 then return x:clone() end
  return core.cat({ x:slice(d, size - moved + 1, size), x:slice(d, 1, size - moved) }, d)
end

function t.chunk(x, count, dim)
  count = whole("chunk", "the number of chunks", count)
  local d = dimension("chunk", dim or 1, #tensor_of("chunk", x).shape)
  if count < 1 then core.fail(("chunk: %d chunks"):format(count)) end
  return x:split(math.max(1, (x.shape[d] + count - 1) // count), d)
end

-- ---- makers ----

for name, make in pairs { zeros_like = core.zeros, ones_like = core.ones, rand_like = core.rand, randn_like = core.randn } do
  core[name] = function(x) return make(tensor_of(name, x).shape, kind_of(x)) end
end

function core.linspace(first, last, count, given)
  count = whole("linspace", "the number of elements", count)
  for n, value in pairs { first = first, last = last } do
    if type(value) ~= "number" then core.fail(("linspace: %s is a %s, a number expected"):format(n, type(value))) end
  end
  if count < 0 then core.fail(("linspace: %d elements"):format(count)) end
  local o = options("linspace", given, { dtype = "float32", device = "cpu" })
  if count < 2 then return core.full({ count }, first, o) end
  if first == last then return core.full({ count }, first, o) end
  return core.arange(first, last, (last - first) / (count - 1), o)
end

function core.randint(low, high, shape, given)
  low, high = whole("randint", "the lowest", low), whole("randint", "the highest", high)
  if low > high then core.fail(("randint: from %d to %d there is no integer"):format(low, high)) end
  if high - low + 1 > 1 << 24 or high - low < 0 then
    core.fail(("randint: %d to %d are more than 2^24 integers"):format(low, high))
  end
  local o = options("randint", given, { dtype = "int64", device = "cpu" })
  local uniform = core.rand(shape, { device = o.device }) * (high - low + 1)
  return (uniform:to "int64":minimum(high - low) + low):to(o.dtype)
end

function core.randperm(count, given)
  count = whole("randperm", "how many", count)
  local o = options("randperm", given, { device = "cpu" })
  return core.rand({ count }, { dtype = "float64", device = o.device }):argsort()
end

-- ---- documentation ----

document("t:var", [[
  t:var(dims, {correction=, keepdim=}) -> tensor
  The variance over a dimension, a list of them, or all: the sum of squared distances from the mean divided by the number of
  elements less the correction (1).
  > orepa.randn(3, 4):var(2)
  > orepa.randn(3, 4):var({correction = 0})]])
document("t:std", [[
  t:std(dims, {correction=, keepdim=}) -> tensor
  The standard deviation: the root of t:var.
  > orepa.randn(3, 4):std({1, 2}, {keepdim = true})]])
document("t:norm", [[
  t:norm(p, dims, {keepdim=}) -> tensor
  The p-norm (2) over a dimension, a list of them, or all: the sum of |x|^p to the power 1/p, the largest |x| for math.huge,
  the smallest for -math.huge, the number of elements that are not 0 for 0.
  > orepa.tensor({3, 4}):norm()
  > orepa.randn(3, 4):norm(1, 2)]])
document("t:logsumexp", [[
  t:logsumexp(dims, {keepdim=}) -> tensor
  The logarithm of the sum of exponentials, which doesn't overflow.
  > orepa.tensor({1000, 1000}):logsumexp(1)]])
document("t:median", [[
  t:median(dim, {keepdim=}) -> tensor, int64 tensor
  The element in the middle, the lower one of two, along a dimension and where it is, counted from 0; or of all elements, and
  then it alone. NaN wins.
  > orepa.tensor({3, 1, 2}):median()
  > orepa.randn(3, 5):median(2)]])
document("t:quantile", [[
  t:quantile(q, dim, {keepdim=}) -> tensor
  What the share q, from 0 to 1, of the elements along a dimension, or of all, is at most: one of them, or between two
  neighbours in proportion. With a list of shares the results are stacked. NaN wins.
  > orepa.tensor({1, 2, 3, 5}):quantile(0.5)
  > orepa.randn(3, 50):quantile({0.05, 0.95}, 2)]])
document("t:histc", [[
  t:histc(bins, lowest, highest) -> int64 tensor
  How many elements are in each of so many (100) equal parts of lowest ... highest, of the elements' own range if not given.
  The highest is in the last; what is outside, NaN too, is not counted.
  > orepa.tensor({1, 2, 2, 5}):histc(4)
  > orepa.randn(1000):histc(10, -3, 3)]])
document("t:unique", [[
  t:unique() -> tensor, int64 tensor, int64 tensor
  The elements in order, each once; where among those each element of t is, counted from 0; and how often each is there.
  > orepa.tensor({2, 1, 2}):unique()]])
document("t:nonzero", [[
  t:nonzero() -> int64 tensor
  Where the elements are that are not 0: a row for each, with its position in every dimension, counted from 0.
  > orepa.tensor({{0, 3}, {5, 0}}):nonzero()]])
document("orepa.eye", [[
  eye(rows, columns, {dtype=, device=}) -> tensor
  A matrix with ones on its diagonal and zeros elsewhere; square if the columns are left out.
  > orepa.eye(3)
  > orepa.eye(2, 3, {dtype = "int64"})]])
document("t:tril", [[
  t:tril(diagonal) -> tensor
  The matrices of the last two dimensions with zeros above a diagonal: 0 (the main one), 1 the next above, -1 below.
  > orepa.ones(3, 3):tril()]])
document("t:triu", [[
  t:triu(diagonal) -> tensor
  The matrices of the last two dimensions with zeros below a diagonal: 0 (the main one), 1 the next above, -1 below.
  > orepa.ones(3, 3):triu(1)]])
document("t:diag", [[
  t:diag() -> tensor
  Of a matrix its diagonal; of a list the matrix that has it as its diagonal.
  > orepa.arange(3):diag()
  > orepa.ones(2, 3):diag()]])
document("t:trace", [[
  t:trace() -> tensor
  The sum of a matrix's diagonal.
  > orepa.eye(3):trace()]])
document("t:dot", [[
  t:dot(other) -> tensor
  The sum of products of two lists of one length.
  > orepa.arange(3):dot(orepa.ones(3))]])
document("t:outer", [[
  t:outer(other) -> tensor
  The products of each element of one list with each of another: a matrix.
  > orepa.arange(3):outer(orepa.arange(2))]])
document("t:flip", [[
  t:flip(dims...) -> tensor
  The elements along some dimensions in the reverse order.
  > orepa.arange(4):flip(1)]])
document("t:roll", [[
  t:roll(shift, dim) -> tensor
  The elements moved on by `shift` positions along a dimension (the first); what leaves at the end comes back at the beginning.
  > orepa.arange(5):roll(2)]])
document("t:chunk", [[
  t:chunk(count, dim) -> {tensors}
  Views of equal parts, at most so many, along a dimension (the first); the last may be shorter.
  > orepa.arange(7):chunk(3)]])
for name, what in pairs { zeros_like = "Zeros", ones_like = "Ones", rand_like = "Uniform numbers in [0, 1)",
    randn_like = "Normal numbers" } do
  document("orepa." .. name, ("%s(t) -> tensor\n%s in the shape and type of a tensor, and on its device.\n"
    .. "> orepa.%s(orepa.ones(2, 3))"):format(name, what, name))
end
document("orepa.linspace", [[
  linspace(first, last, count, {dtype=, device=}) -> tensor
  So many numbers at equal distances, from the first to the last.
  > orepa.linspace(0, 1, 5)]])
document("orepa.randint", [[
  randint(low, high, {sizes}, {dtype=, device=}) -> int64 tensor
  Random integers from low to high, which are included; at most 2^24 different ones.
  > orepa.randint(1, 6, {10})]])
document("orepa.randperm", [[
  randperm(count, {device=}) -> int64 tensor
  The integers 0 to count - 1 in a random order.
  > orepa.randperm(5)]])
