-- data: datasets, and loaders that hand out batches. A loader's epochs depend on its seed alone.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local samples = require "orepa.samples"

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

local function part_in_lua(dataset, first, last)
  if math.type(first) ~= "integer" or math.type(last) ~= "integer" or first < 1 or last < first - 1 or last > dataset.size then
    core.fail(("data.part: samples %s to %s of %s"):format(first, last, dataset.size))
  end
  return { size = last - first + 1, get = function(_, i) return dataset:get(first + i - 1) end }
end

-- Samples first to last of a dataset, counted from 1, both included.
function data.part(dataset, first, last)
  if samples.is_dataset(dataset) then return part_in_lua(dataset, first, last) end
  return data.images { images = dataset.images:slice(1, first, last), labels = dataset.labels:slice(1, first, last),
    classes = dataset.classes }
end

data.loader = require "orepa.loader"

document("data.images", [[
  data.images{images=, labels=, classes=} -> dataset
  A dataset of images in memory: uint8 or float32 (N, H, W) or (N, C, H, W), integer labels (N) that count from 0.
  > local labels = orepa.zeros({4}, {dtype = "int64"})
  > return data.images{images = orepa.zeros({4, 8, 8}, {dtype = "uint8"}), labels = labels, classes = 2}.size]])
document("data.part", [[
  data.part(dataset, first, last) -> dataset
  Samples first to last, counted from 1, both included: views, not copies. Of images, or of a dataset in Lua.
  > local d = data.images{images = orepa.zeros(4, 8, 8), labels = orepa.zeros({4}, {dtype = "int64"}), classes = 2}
  > return data.part(d, 2, 3).size]])

return data
