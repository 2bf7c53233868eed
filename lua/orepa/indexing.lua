-- t[key] and t[key] = value where the key is a list of positions, a tensor of integers or a mask.

local core = require "orepa.core"
local text_of = require("orepa.checks").text_of

local indexing = core.indexing

-- ---- positions ----

-- A list counts from 1, as everything in Lua, and -1 is the last; the tensor of it counts from 0.
local function positions_of_list(t, list)
  local size, positions = t.shape[1], {}
  for key in pairs(list) do
    if math.type(key) ~= "integer" or key < 1 or key > #list then
      core.fail(("a list of positions expected, this table has the key %s"):format(tostring(key)))
    end
  end
  for n, given in ipairs(list) do
    local position = type(given) == "number" and math.tointeger(given)
    if not position then
      core.fail(("position %d of the list is %s; a whole number expected"):format(n, tostring(given)))
    end
    if position == 0 or position > size or position < -size then
      core.fail(("position %d of the list is %d; the dimension has size %d (positions count from 1, -1 is the last)"):format(n,
        position, size))
    end
    positions[n] = position > 0 and position - 1 or position + size
  end
  return core.tensor(positions, { dtype = "int64", device = t.device })
end

-- The first dimensions of t are the mask's.
local function check_mask(t, mask)
  local shape, fits = t.shape, #mask.shape <= #t.shape
  for d, size in ipairs(mask.shape) do fits = fits and shape[d] == size end
  if not fits then
    core.fail(("a mask of %s does not fit a tensor of %s: its dimensions are the first ones of the tensor"):format(
      table.concat(mask.shape, "x"), table.concat(shape, "x")))
  end
end

-- shape and then the dimensions of t behind the first `skipped`.
local function followed_by(shape, t, skipped)
  return table.move(t.shape, skipped + 1, #t.shape, #shape + 1, shape)
end

local function check_key(t, key)
  if #t.shape == 0 then core.fail "a scalar has no positions" end
  if core.is_tensor(key) and key.dtype ~= "int64" and key.dtype ~= "bool" then
    core.fail(("%s can't be an index; a list, an int64 tensor or a bool tensor expected"):format(text_of(key)))
  end
end

-- ---- reading ----

function indexing.get(t, key)
  check_key(t, key)
  if not core.is_tensor(key) then return t:index_select(1, positions_of_list(t, key)) end
  if key.dtype == "int64" then
    return t:index_select(1, key:reshape(-1)):reshape(followed_by(key.shape, t, 1))
  end
  check_mask(t, key)
  local rows = t:reshape(followed_by({ key:count() }, t, #key.shape))
  return rows:index_select(1, key:flat_nonzero())
end

-- ---- writing ----

-- The mask with a dimension of size 1 for each that t has behind it.
local function spread(mask, t)
  local shape = mask.shape
  for d = #shape + 1, #t.shape do shape[d] = 1 end
  return mask:reshape(shape)
end

-- For each place of the mask a row of the source: the first true place has the first, and so on.
local function rows_under(t, mask, source)
  local count = mask:sum():item()
  local rows = source:to { dtype = t.dtype, device = t.device }:expand(followed_by({ count }, t, #mask.shape))
  local number = (mask:reshape(-1):cumsum() - 1):clamp(0, math.max(count - 1, 0))
  return count > 0 and rows:index_select(1, number):reshape(t.shape)
end

local function set_under_mask(t, mask, value)
  check_mask(t, mask)
  if core.is_tensor(value) then
    value = #value.shape > 0 and rows_under(t, mask, value) or #value.shape == 0 and value:to(t.dtype)
  end
  if value then t:masked_fill_(spread(mask, t), value) end
end

function indexing.set(t, key, value)
  check_key(t, key)
  if not core.is_tensor(value) and type(value) ~= "number" then
    core.fail(("a tensor or a number can be assigned to positions, got %s"):format(type(value)))
  end
  if core.is_tensor(key) and key.dtype == "bool" then return set_under_mask(t, key, value) end
  local positions = core.is_tensor(key) and key or positions_of_list(t, key)
  if core.is_tensor(value) and #positions.shape ~= 1 then -- its first dimensions are those of the integers
    value = value:expand(followed_by(positions.shape, t, 1)):reshape(followed_by({ positions:count() }, t, 1))
  end
  t:index_copy_(1, positions:reshape(-1), value)
end

return indexing
