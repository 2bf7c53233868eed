-- orepa.F's ops that change the size of a map: interpolation, and borders.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"
local F = core.F

-- A number, or a list of two: two numbers that `accepts` takes, as `expected` says.
local function pair(where, name, value, accepts, expected)
  local two = type(value) == "table" and value or { value, value }
  if #two ~= 2 or not accepts(two[1]) or not accepts(two[2]) then
    local text = type(value) == "table" and ("{%s, %s}"):format(value[1], value[2]) or tostring(value)
    core.fail(("%s: %s is %s; %s, or two of them, expected"):format(where, name, text, expected))
  end
  return two
end

-- ---- interpolation ----

local function is_size(value)
  return type(value) == "number" and math.tointeger(value) and value >= 1
end

local function is_scale(value)
  return type(value) == "number" and value > 0 and value < math.huge
end

-- The options of an interpolation, checked.
local function interpolate_options(where, given)
  local o = options(where, given, { size = options.optional, scale_factor = options.optional, mode = "nearest",
    align_corners = false })
  if (o.size == nil) == (o.scale_factor == nil) then
    core.fail(("%s: one of the options size and scale_factor expected, got %s"):format(where, o.size and "both" or "neither"))
  end
  if o.size ~= nil then o.size = pair(where, "size", o.size, is_size, "a whole number of at least 1") end
  if o.scale_factor ~= nil then
    o.scale_factor = pair(where, "scale_factor", o.scale_factor, is_scale, "a number above 0")
  end
  if o.mode ~= "nearest" and o.mode ~= "bilinear" then
    core.fail(('%s: mode is %s, "nearest" or "bilinear" expected'):format(where, tostring(o.mode)))
  end
  if type(o.align_corners) ~= "boolean" then
    core.fail(("%s: align_corners is %s, true or false expected"):format(where, tostring(o.align_corners)))
  end
  if o.align_corners and o.mode == "nearest" then
    core.fail(('%s: align_corners goes with mode = "bilinear"'):format(where))
  end
  return o
end

local interpolate = F.interpolate

-- A size times a scale, rounded down.
local function scaled(x, dim, scale)
  local size = math.floor(x.shape[dim] * scale)
  if size < 1 or math.type(size) ~= "integer" then
    core.fail(("interpolate: a size of %d times %g is %s; at least 1 expected"):format(x.shape[dim], scale, tostring(size)))
  end
  return size
end

local function interpolated(x, o)
  checks.tensor("interpolate", x)
  local bilinear, scale = o.mode == "bilinear", o.scale_factor
  if not scale then return interpolate(x, o.size[1], o.size[2], bilinear, o.align_corners) end
  if #x.shape ~= 4 then core.fail(("interpolate: 4 dimensions expected, got %d"):format(#x.shape)) end
  return interpolate(x, scaled(x, 3, scale[1]), scaled(x, 4, scale[2]), bilinear, o.align_corners, scale[1], scale[2])
end

function F.interpolate(x, given)
  return interpolated(x, interpolate_options("interpolate", given))
end

-- ---- borders ----

-- What stands before and after x along a dimension.
local borders = {
  replicate = function(x, dim, before, after)
    local shape = x.shape
    local function repeated(edge, width)
      shape[dim] = width
      return x:slice(dim, edge, edge):expand(shape)
    end
    return repeated(1, before), repeated(-1, after)
  end,
  circular = function(x, dim, before, after)
    local size = x.shape[dim]
    return x:slice(dim, size - before + 1, size), x:slice(dim, 1, after)
  end,
  reflect = function(x, dim, before, after)
    local size = x.shape[dim]
    local function mirrored(first, width)
      local list = {}
      for k = 1, width do list[k] = first - k end
      return x:index_select(dim, core.tensor(list, { dtype = "int64", device = x.device }))
    end
    return mirrored(before + 1, before), mirrored(size - 1, after)
  end,
}

-- The widest border that a dimension of a size has elements for.
local widest = {
  reflect = function(size) return size - 1 end,
  replicate = function(size) return size > 0 and math.maxinteger or 0 end,
  circular = function(size) return size end,
}

local function bordered(x, dim, before, after, mode)
  local size, parts = x.shape[dim], { x }
  if math.max(before, after) > widest[mode](size) then
    core.fail(('pad: %d before and %d after are too many for mode = "%s" and a size of %d'):format(before, after, mode, size))
  end
  local first, last = borders[mode](x, dim, before, after)
  if before > 0 then table.insert(parts, 1, first) end
  if after > 0 then parts[#parts + 1] = last end
  return core.cat(parts, dim)
end

-- The widths before and after each dimension, from the last one on, as whole numbers.
local function check_widths(x, widths)
  if type(widths) ~= "table" or #widths % 2 ~= 0 or #widths > 2 * #x.shape then
    core.fail(("pad: a list of widths expected, before and after for each dimension from the last on (the input has %d)"):format(
      #x.shape))
  end
  local whole = {}
  for k, width in ipairs(widths) do
    whole[k] = type(width) == "number" and math.tointeger(width)
    if not whole[k] then core.fail(("pad: width %d is %s, a whole number expected"):format(k, tostring(width))) end
  end
  return whole
end

local function check_borders(x, o)
  if o.mode ~= "constant" and not borders[o.mode] then
    core.fail(('pad: mode is %s; "constant", "reflect", "replicate" or "circular" expected'):format(tostring(o.mode)))
  end
  if type(o.value) ~= "number" then core.fail(("pad: value is %s, a number expected"):format(tostring(o.value))) end
  checks.tensor("pad", x)
end

function F.pad(x, widths, given)
  local o = options("pad", given, { mode = "constant", value = 0 })
  check_borders(x, o)
  widths = check_widths(x, widths)
  local rank, all, cut, cuts = #x.shape, {}, {}, false
  for dim = 1, rank do
    for side = 1, 2 do
      local k, width = 2 * (dim - 1) + side, widths[2 * (rank - dim) + side] or 0
      all[k], cut[k] = width, math.min(0, width)
      cuts = cuts or width < 0
    end
  end
  if o.mode == "constant" then return core.pad(x, all, o.value) end
  local y = cuts and core.pad(x, cut) or x
  for dim = 1, rank do
    local before, after = math.max(0, all[2 * dim - 1]), math.max(0, all[2 * dim])
    if before + after > 0 then y = bordered(y, dim, before, after, o.mode) end
  end
  return y
end

document("F.interpolate", [[
  F.interpolate(x, {size=, scale_factor=, mode=, align_corners=}) -> tensor
  Maps (N, C, H, W) in another size, larger or smaller: `size`, or theirs times `scale_factor`, rounded down; each is a number or
  {height, width}. mode is "nearest" (each element is the nearest one of x) or "bilinear" (a blend of its four neighbours, whose
  corners, with align_corners = true, stay where they are). Rules and rounding are PyTorch's.
  > F.interpolate(orepa.ones(1, 3, 4, 4), {scale_factor = 2})
  > F.interpolate(orepa.rand(1, 3, 4, 6), {size = {8, 9}, mode = "bilinear", align_corners = true})]])
document("F.pad", [[
  F.pad(x, {left, right, top, bottom, ...}, {mode=, value=}) -> tensor
  Puts borders around dimensions, from the last one on; negative widths crop. mode is "constant" (elements of one value, 0 if not
  given), "reflect" (mirrored, without the edge), "replicate" (the edge repeated) or "circular" (from the other side).
  > F.pad(orepa.ones(1, 1, 2, 2), {1, 1, 0, 2}, {value = -1})
  > F.pad(orepa.arange(4), {2, 1}, {mode = "reflect"})]])

return { interpolate_options = interpolate_options, interpolated = interpolated }
