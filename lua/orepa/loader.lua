-- loader: what hands out the batches of a dataset. Images in memory are prepared by threads of the engine, datasets in Lua by
-- workers, each with a Lua state of its own, or on the main thread; which of them changes no batch.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local samples = require "orepa.samples"
local engine, loading = core.data, core.loading

local IMAGE_WORKERS = 1 -- threads for images, unless told otherwise
local PATIENCE = 0.05 -- seconds of waiting after which Lua may be interrupted

local of_images = { augment = false, padding = 0, crop = options.optional, flip = false, mean = options.optional,
  deviation = options.optional }
local of_lua = { collate = options.optional, dataset_options = options.optional }

local Loader = {}
Loader.__index = Loader

function Loader:__len() return self.batches end

local function fail(format, ...)
  core.fail(("data.loader: " .. format):format(...))
end

-- ---- options ----

local function check_count(o, name, least)
  if math.type(o[name]) ~= "integer" or o[name] < least then
    fail("%s is %s, an integer of at least %d expected", name, tostring(o[name]), least)
  end
end

local function refuse(given, known, why)
  for _, name in ipairs(options.names(known)) do
    if given[name] ~= nil then fail("option '%s' is for %s", name, why) end
  end
end

local function is_images(dataset)
  return type(dataset) == "table" and core.is_tensor(dataset.images)
end

local function check_options(given)
  local known = options.with(of_lua, of_images)
  known = options.with(known, { dataset = options.required, batch_size = options.required, shuffle = false, seed = 0,
    device = "cpu", drop_last = false, workers = options.optional, prefetch = options.optional })
  local o = options("data.loader", given, known)
  local images, named = is_images(o.dataset), type(o.dataset) == "string"
  if images then
    refuse(given, of_lua, "datasets in Lua, and this one is of images")
  elseif named or samples.is_dataset(o.dataset) then
    refuse(given, of_images, "images in memory (data.images), and this dataset is in Lua")
  else
    fail("dataset: what data.images gives expected, got %s; or a dataset in Lua, {size = n, get = function(self, i) ... end}, "
      .. "or the name of a module that gives one", type(o.dataset))
  end
  check_count(o, "batch_size", 1)
  o.workers = o.workers or (images and IMAGE_WORKERS or named and 1 or 0)
  check_count(o, "workers", 0)
  if o.workers > 0 and not images and not named then
    fail("a dataset in a table runs on the main thread: workers need the name of a module that gives it")
  end
  if o.workers == 0 and o.prefetch then fail("prefetch is what workers make ahead, and there are none") end
  o.prefetch = o.prefetch or math.max(1, 2 * o.workers)
  check_count(o, "prefetch", 1)
  if o.dataset_options ~= nil and not named then fail("dataset_options are for a dataset that is named by its module") end
  local crosses, why = loading.crosses(o.dataset_options)
  if not crosses then fail("dataset_options: %s", why) end
  if o.collate ~= nil and type(o.collate) ~= "function" and type(o.collate) ~= "string" then
    fail("collate: a function or the name of a module that gives one expected, got %s", type(o.collate))
  end
  return o
end

-- ---- waiting ----

-- A wait in slices, between which Ctrl-C is heard, until a method of a handle gives something.
local function wait(handle, method)
  local got
  repeat got = table.pack(handle[method](handle, PATIENCE)) until got[1] ~= false
  return table.unpack(got, 1, got.n)
end

-- ---- ways to make batches: begin(self, epoch) gives take(number), and what ends it ----

local inline_images, threaded_images, inline_lua, workers = {}, {}, {}, {}

local function transform_of(o, epoch)
  return { padding = o.padding, crop = o.crop, flip = o.flip, augment = o.augment, mean = o.mean, deviation = o.deviation,
    seed = o.seed, epoch = epoch }
end

function inline_images.begin(self, epoch)
  local o, d = self.options, self.dataset
  local order = o.shuffle and engine.permutation(self.size, o.seed, epoch) or core.arange(0, self.size - 1, { dtype = "int64" })
  local transform = transform_of(o, epoch)
  return function(number)
    local first = number * o.batch_size
    local indices <close> = order:slice(1, first + 1, math.min(first + o.batch_size, self.size))
    return engine.image_batch(d.images, indices, transform), engine.label_batch(d.labels, indices)
  end
end

-- Where memory ran out, Lua's garbage may hold some, which a thread of the engine can't collect: the batch is made here.
function threaded_images.begin(self, epoch)
  local o, d = self.options, self.dataset
  local handle = loading.open_images(d.images, d.labels, o.workers, o.prefetch,
    options.with(transform_of(o), { batch_size = o.batch_size, shuffle = o.shuffle, drop_last = o.drop_last }))
  self.running[handle] = true
  handle:start(epoch)
  return function(number)
    local taken, images, labels = wait(handle, "take")
    if taken then return images, labels end
    if not labels then core.fail(images) end
    return inline_images.begin(self, epoch)(number)
  end, function() handle:close() end
end

function inline_lua.open(self)
  local opened, batches = pcall(samples.open, self.options)
  if not opened then fail("%s", tostring(batches)) end
  self.batches_of, self.dataset = batches, batches.dataset
  return batches.size
end

function inline_lua.begin(self, epoch)
  return function(number)
    local values = table.pack(pcall(self.batches_of.make, self.batches_of, epoch, number))
    if not values[1] then fail("%s", tostring(values[2])) end
    return table.unpack(values, 3, values.n)
  end
end

-- A function can't go to the workers: with one, samples come from there, and are put together here.
local function open_workers(self)
  local o = self.options
  local handle = loading.open_workers(o.workers, o.prefetch, { dataset = o.dataset, dataset_options = o.dataset_options,
    batch_size = o.batch_size, shuffle = o.shuffle, seed = o.seed, collate = type(o.collate) == "function" or o.collate })
  self.running[handle] = true
  local size, message = wait(handle, "ready")
  if size then return handle, size end
  handle:close()
  fail("%s", message)
end

function workers.open(self)
  local size
  self.idle, size = open_workers(self)
  return size
end

-- Workers live on from one epoch to the next; those of an epoch that is not taken to its end do not.
function workers.begin(self, epoch)
  local o, handle = self.options, self.idle or open_workers(self)
  self.idle = nil
  handle:start(epoch, self.batches)
  local function take(number)
    local values = table.pack(wait(handle, "take"))
    if not values[1] then fail("%s", values[2]) end
    if type(o.collate) ~= "function" then return table.unpack(values, 2, values.n) end
    local done, batch = pcall(samples.put_together, o.seed, epoch, number, o.collate, values[2])
    if not done then fail("%s", batch) end
    return table.unpack(batch, 1, batch.n)
  end
  return take, function(all)
    if all and not self.idle and not self.closed then self.idle = handle else handle:close() end
  end
end

-- ---- loaders ----

local function way_of(o)
  if is_images(o.dataset) then return o.workers > 0 and threaded_images or inline_images end
  return o.workers > 0 and workers or inline_lua
end

local function loader(given)
  local o = check_options(given)
  local self = setmetatable({ options = o, dataset = o.dataset, way = way_of(o), running = setmetatable({}, { __mode = "k" }) },
    Loader)
  self.size = self.way.open and self.way.open(self) or o.dataset.size
  self.batches = o.drop_last and self.size // o.batch_size or (self.size + o.batch_size - 1) // o.batch_size
  return self
end

local function move(value, device)
  if core.is_tensor(value) then return value:to(device) end
  if type(value) ~= "table" then return value end
  local moved = {}
  for key, entry in pairs(value) do moved[key] = move(entry, device) end
  return moved
end

local function moved(device, ...)
  if device == "cpu" then return ... end
  local values = table.pack(...)
  for k = 1, values.n do values[k] = move(values[k], device) end
  return table.unpack(values, 1, values.n)
end

-- for images, labels in loader:epoch(3) do ... end
function Loader:epoch(epoch)
  if self.closed then fail("it was closed") end
  if math.type(epoch) ~= "integer" then fail("epoch is %s, an integer expected", tostring(epoch)) end
  local take, finish = self.way.begin(self, epoch)
  local number = 0
  local function stop(all)
    number = self.batches
    if finish then finish(all) end
    finish = nil
  end
  local guard = setmetatable({}, { __close = function() stop(number == self.batches) end })
  return function()
    if self.closed then fail("it was closed") end
    if number == self.batches then return stop(true) end
    number = number + 1
    return moved(self.options.device, take(number - 1))
  end, nil, nil, guard
end

function Loader:close()
  self.closed, self.idle = true, nil
  for handle in pairs(self.running) do handle:close() end
end
Loader.__close = Loader.close

document("data.loader", [[
  data.loader{dataset=, batch_size=, shuffle=, seed=, drop_last=, device=, workers=, prefetch=, ...} -> loader
  loader:epoch(n) iterates over the batches of a dataset, in an order that seed and n decide; with drop_last no batch is smaller.
  loader.size and loader.batches (or #loader) say how many samples and batches there are. Batches depend on seed and n alone,
  never on workers, the number of threads that make at most `prefetch` batches (twice the workers) ahead.
  The dataset is what data.images gives, with the further options of data.image_batch: augment, padding, crop, flip, mean,
  deviation. A batch is images and labels. workers is 1; with 0 batches are made when they are taken.
  Or it is a table {size = n, get = function(self, i) ... end}, on the main thread. get(i), i from 1 to size, gives a sample: one
  or more tensors, numbers, strings, booleans or tables of these, in each sample alike. A batch has as many values: tensors of one
  shape are stacked along a new first dimension, integers become an int64 tensor, other numbers float32, booleans bool, strings a
  list, and a table one of what its entries become. With `collate` it is what collate(samples) gives, samples[k] being the list of
  what get gave for one. What get draws follows from seed, n and i alone, what collate draws from seed, n and the batch.
  Or it is the name of a module that gives such a table, or a function that makes it of `dataset_options`. It runs in `workers`
  threads (1) with a Lua state each; 0: on the main thread. Only tensors (the same memory), numbers, strings, booleans and tables
  of these go from state to state; collate is the name of a module that gives the function, or a function for the main thread.
  An error names the sample, and is raised where its batch is taken. docs/data.md has more.
  > local d = data.images{images = orepa.zeros(4, 8, 8), labels = orepa.zeros({4}, {dtype = "int64"}), classes = 2}
  > for images, labels in data.loader{dataset = d, batch_size = 3, shuffle = true}:epoch(1) do assert(#images == #labels) end
  > local squares = {size = 5, get = function(self, i) return orepa.full({2}, i), i * i end}
  > for x, y in data.loader{dataset = squares, batch_size = 2, shuffle = true}:epoch(1) do assert(x.shape[1] == y.shape[1]) end
  > local loader <close> = data.loader{dataset = "orepa.datasets.shapes", dataset_options = {size = 9}, batch_size = 3}
  > for images, labels in loader:epoch(1) do assert(images.shape[1] == labels.shape[1]) end]])
document("loader:epoch", [[
  loader:epoch(n) -> iterator
  The batches of epoch n, whose order and augmentation follow from the loader's seed and n.
  > local d = data.images{images = orepa.zeros(4, 8, 8), labels = orepa.zeros({4}, {dtype = "int64"}), classes = 2}
  > for images, labels in data.loader{dataset = d, batch_size = 3}:epoch(1) do assert(#images == #labels) end]])
document("loader:close", [[
  loader:close()
  Stops and joins all threads of the loader, in the middle of an epoch too; what runs in C is waited for. It has no more batches.
  > local d = {size = 3, get = function(self, i) return i end}
  > do local loader <close> = data.loader{dataset = d, batch_size = 2}; loader:epoch(1)() end]])

return loader
