-- samples: batches of a dataset in Lua, on the main thread or in a worker: which samples are in one, what they draw, and what
-- becomes of them. Errors are messages without a place.

local core = require "orepa.core"
local collate = require "orepa.collate"
local loading = core.loading

local samples = {}

-- ---- what a name stands for ----

local function is_dataset(value)
  return type(value) == "table" and type(value.get) == "function"
end
samples.is_dataset = is_dataset

local function check(dataset, name)
  if not is_dataset(dataset) then
    error(("the module '%s' gives a %s, not a dataset {size = n, get = function(self, i) ... end}"):format(name,
      type(dataset)), 0)
  end
  return dataset
end

-- A dataset by its module, which gives it, or a function that makes it of options.
local function load_dataset(name, given)
  local found = require(name)
  if type(found) == "function" then return check(found(given), name) end
  if given ~= nil then
    error(("dataset_options: the module '%s' gives a %s, not a function that takes options"):format(name, type(found)), 0)
  end
  return check(found, name)
end

local function load_collate(name)
  local found = require(name)
  if type(found) ~= "function" then
    error(("collate: the module '%s' gives a %s, not a function"):format(name, type(found)), 0)
  end
  return found
end

-- ---- batches ----

local Batches = {}
Batches.__index = Batches

-- {dataset=, dataset_options=, batch_size=, shuffle=, seed=, collate=}: dataset and collate by name or themselves; collate may be
-- `true`, for a batch that is one value: the list of its samples.
function samples.open(o)
  local dataset = type(o.dataset) == "string" and load_dataset(o.dataset, o.dataset_options) or o.dataset
  local size = dataset.size
  if math.type(size) ~= "integer" or size < 0 then
    error(("dataset: its size is %s, an integer from 0 expected"):format(tostring(size)), 0)
  end
  return setmetatable({ dataset = dataset, size = size, batch_size = o.batch_size, seed = o.seed, shuffle = o.shuffle,
    collate = type(o.collate) == "string" and load_collate(o.collate) or o.collate }, Batches)
end

-- The positions of batch `number`, counted from 0.
function Batches:positions(epoch, number)
  local first, list = number * self.batch_size, {}
  local last = math.min(first + self.batch_size, self.size)
  if not self.shuffle then
    for position = first + 1, last do list[#list + 1] = position end
    return list
  end
  if self.ordered ~= epoch then
    self.order, self.ordered = core.data.permutation(self.size, self.seed, epoch), epoch
  end
  for k, index in ipairs(self.order:slice(1, first + 1, last):tolist()) do list[k] = index + 1 end
  return list
end

-- What f gives; with random numbers of this sample alone.
local function seeded(seed, epoch, sample, what, f, ...)
  local results = table.pack(loading.seeded(seed, epoch, sample, f, ...))
  if not results[1] then error(what .. tostring(results[2]), 0) end
  return table.pack(table.unpack(results, 2, results.n))
end

function Batches:sample(epoch, position)
  local what = ("sample %d: "):format(position)
  local values = seeded(self.seed, epoch, position, what, self.dataset.get, self.dataset, position)
  if values[1] == nil then error(what .. "get gave nil", 0) end
  return values
end

-- What a collate function makes of a batch's samples.
function samples.put_together(seed, epoch, number, f, list)
  local what = ("batch %d: "):format(number + 1)
  local values = seeded(seed, epoch, -1 - number, what, f, list)
  if values[1] == nil then error(what .. "collate gave nil", 0) end
  return values
end

local function check_crossing(list, positions)
  for k, sample in ipairs(list) do
    local crosses, why = loading.crosses(table.unpack(sample, 1, sample.n))
    if not crosses then error(("sample %d: %s"):format(positions[k], why), 0) end
  end
end

-- Whether nobody else has the tensors of the batch, and its values.
function Batches:make(epoch, number)
  local positions, list = self:positions(epoch, number), {}
  for k, position in ipairs(positions) do list[k] = self:sample(epoch, position) end
  if not self.collate then return true, core.no_grad(function() return collate(list, positions) end) end
  if self.collate == true then
    check_crossing(list, positions)
    return false, list
  end
  local values = samples.put_together(self.seed, epoch, number, self.collate, list)
  return false, table.unpack(values, 1, values.n)
end

return samples
