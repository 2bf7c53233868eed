-- collate: puts the samples of a batch together, place by place: tensors are stacked, numbers become a tensor, strings a list,
-- and tables a table of such.

local core = require "orepa.core"
local text_of = require("orepa.checks").text_of

local KINDS = { number = true, string = true, boolean = true, table = true }

local function kind_of(value)
  if core.is_tensor(value) then return "tensor" end
  return type(value)
end

local function fail(position, format, ...)
  error(("sample %d: " .. format):format(position, ...), 0)
end

local join

local function stack(values, positions, place)
  local first = text_of(values[1])
  for k, t in ipairs(values) do
    if text_of(t) ~= first then
      fail(positions[k], "%s is %s, but %s in sample %d (a collate function may put such together)", place, text_of(t), first,
        positions[1])
    end
  end
  return core.stack(values)
end

local function numbers(values)
  for _, x in ipairs(values) do
    if math.type(x) == "float" then return core.tensor(values) end
  end
  return core.tensor(values, { dtype = "int64" })
end

local function count(t)
  local n = 0
  for _ in pairs(t) do n = n + 1 end
  return n
end

local function tables(values, positions, place)
  local result, entries = {}, count(values[1])
  for k, t in ipairs(values) do
    if count(t) ~= entries then
      fail(positions[k], "%s has %d entries, but %d in sample %d (a collate function may put such together)", place, count(t),
        entries, positions[1])
    end
  end
  for key in pairs(values[1]) do
    local column = {}
    for k, t in ipairs(values) do column[k] = t[key] end
    result[key] = join(column, positions, ("%s[%s]"):format(place, type(key) == "string" and ("%q"):format(key) or key))
  end
  return result
end

-- One place of all samples; what a sample lacks there is nil.
function join(values, positions, place)
  local kind = kind_of(values[1])
  for k, position in ipairs(positions) do
    local own = kind_of(values[k])
    if own ~= kind then fail(position, "%s is a %s, but a %s in sample %d", place, own, kind, positions[1]) end
    if kind ~= "tensor" and not KINDS[kind] then
      fail(position, "%s is a %s; samples are made of tensors, numbers, strings, booleans and tables of these", place, own)
    end
  end
  if kind == "tensor" then return stack(values, positions, place) end
  if kind == "number" then return numbers(values) end
  if kind == "boolean" then return core.tensor(values, { dtype = "bool" }) end
  return kind == "table" and tables(values, positions, place) or values
end

-- The values of the batch, as many as a sample has. samples[k] is what `get` gave for positions[k], with its count n.
return function(samples, positions)
  local n, batch = samples[1].n, {}
  for k, sample in ipairs(samples) do
    if sample.n ~= n then fail(positions[k], "%d values, but %d in sample %d", sample.n, n, positions[1]) end
  end
  for place = 1, n do
    local column = {}
    for k, sample in ipairs(samples) do column[k] = sample[place] end
    batch[place] = join(column, positions, "value " .. place)
  end
  return table.unpack(batch, 1, n)
end
