-- data: datasets of images in memory, and loaders that hand out batches. A loader's epochs depend on its seed alone.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local engine = core.data

local data = {}

-- ---- datasets ----

-- images: uint8 or float32 (N, H, W) or (N, C, H, W); labels: integers (N).
function data.images(o)
  o = options("data.images", o, { images = options.required, labels = options.required, classes = options.required })
  for _, name in ipairs { "images", "labels" } do
    if not core.is_tensor(o[name]) then core.fail(("data.images: %s: a tensor expected, got %s"):format(name, type(o[name]))) end
  end
  if o.images.shape[1] ~= o.labels.shape[1] then
    core.fail(("data.images: %s images and %s labels"):format(o.images.shape[1], o.labels.shape[1]))
  end
  return { images = o.images, labels = o.labels, classes = o.classes, size = o.images.shape[1],
    channels = #o.images.shape == 4 and o.images.shape[2] or 1 }
end

-- Samples first to last of a dataset, counted from 1, both included.
function data.part(dataset, first, last)
  return data.images { images = dataset.images:slice(1, first, last), labels = dataset.labels:slice(1, first, last),
    classes = dataset.classes }
end

-- ---- loaders ----

local Loader = {}
Loader.__index = Loader

function data.loader(o)
  o = options("data.loader", o, { dataset = options.required, batch_size = options.required, shuffle = false, seed = 0,
    augment = false, padding = 0, crop = options.optional, flip = false, mean = options.optional,
    deviation = options.optional, device = "cpu", drop_last = false })
  if type(o.dataset) ~= "table" or not core.is_tensor(o.dataset.images) then
    core.fail(("data.loader: dataset: what data.images gives expected, got %s"):format(type(o.dataset)))
  end
  if math.type(o.batch_size) ~= "integer" or o.batch_size < 1 then
    core.fail(("data.loader: batch_size is %s, an integer of at least 1 expected"):format(tostring(o.batch_size)))
  end
  local self = setmetatable({ options = o, dataset = o.dataset, size = o.dataset.size }, Loader)
  self.batches = o.drop_last and self.size // o.batch_size or (self.size + o.batch_size - 1) // o.batch_size
  return self
end

local function order_of(self, epoch)
  if self.options.shuffle then return engine.permutation(self.size, self.options.seed, epoch) end
  return core.arange(0, self.size - 1, { dtype = "int64" })
end

-- for images, labels in loader:epoch(3) do ... end
function Loader:epoch(epoch)
  local o, order, position = self.options, order_of(self, epoch), 0
  local transform = { padding = o.padding, crop = o.crop, flip = o.flip, augment = o.augment, mean = o.mean,
    deviation = o.deviation, seed = o.seed, epoch = epoch }
  return function()
    local last = math.min(position + o.batch_size, self.size)
    if last <= position or (o.drop_last and last - position < o.batch_size) then
      order:release()
      return nil
    end
    local indices <close> = order:slice(1, position + 1, last)
    position = last
    local images = engine.image_batch(self.dataset.images, indices, transform)
    local labels = engine.label_batch(self.dataset.labels, indices)
    if o.device ~= "cpu" then images, labels = images:to(o.device), labels:to(o.device) end
    return images, labels
  end
end

document("data.images", [[
  data.images{images=, labels=, classes=} -> dataset
  A dataset of images in memory: uint8 or float32 (N, H, W) or (N, C, H, W), integer labels (N) that count from 0.
  > local labels = orepa.zeros({4}, {dtype = "int64"})
  > return data.images{images = orepa.zeros({4, 8, 8}, {dtype = "uint8"}), labels = labels, classes = 2}.size]])
document("data.part", [[
  data.part(dataset, first, last) -> dataset
  Samples first to last, counted from 1, both included: views, not copies.
  > local d = data.images{images = orepa.zeros(4, 8, 8), labels = orepa.zeros({4}, {dtype = "int64"}), classes = 2}
  > return data.part(d, 2, 3).size]])
document("data.loader", [[
  data.loader{dataset=, batch_size=, shuffle=, seed=, augment=, padding=, crop=, flip=, mean=, deviation=, device=, ...} -> loader
  loader:epoch(n) iterates over (images, labels); with drop_last no batch is smaller. What a sample gets depends on seed, epoch
  and its position in the dataset.
  > local d = data.images{images = orepa.zeros(4, 8, 8), labels = orepa.zeros({4}, {dtype = "int64"}), classes = 2}
  > for images, labels in data.loader{dataset = d, batch_size = 3, shuffle = true}:epoch(1) do assert(#images == #labels) end]])

document("loader:epoch", [[
  loader:epoch(n) -> iterator
  Images and labels of each batch of epoch n, whose order and augmentation follow from the loader's seed and n.
  > local d = data.images{images = orepa.zeros(4, 8, 8), labels = orepa.zeros({4}, {dtype = "int64"}), classes = 2}
  > for images, labels in data.loader{dataset = d, batch_size = 3}:epoch(1) do assert(#images == #labels) end]])

return data
