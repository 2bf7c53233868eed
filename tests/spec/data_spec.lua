-- Data: idx files, datasets, and loaders, whose epochs depend on their seed alone.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"
local data = orepa.data

local function int64(values) return orepa.tensor(values, { dtype = "int64" }) end

describe("idx files", function()
  local folder
  setup(function() folder = process.folder() end)
  teardown(function() process.remove(folder) end)

  local function load(bytes)
    process.write(folder .. "/x.idx", bytes)
    return data.load_idx(folder .. "/x.idx")
  end
  local good = string.pack(">BBBBI4I4", 0, 0, 8, 2, 2, 3) .. "\0\1\2\3\4\255"

  it("give tensors of their shape and type", function()
    local t = load(good)
    assert.equal("uint8", t.dtype)
    assert.same({ { 0, 1, 2 }, { 3, 4, 255 } }, t:tolist())
    assert.same({ -2, 70000 }, load(string.pack(">BBBBI4i4i4", 0, 0, 12, 1, 2, -2, 70000)):tolist())
    assert.same({ 0.5 }, load(string.pack(">BBBBI4f", 0, 0, 13, 1, 1, 0.5)):tolist())
  end)

  it("may be compressed by gzip", function()
    load(good)
    os.execute(("gzip -k '%s/x.idx'"):format(folder))
    assert.same({ { 0, 1, 2 }, { 3, 4, 255 } }, data.load_idx(folder .. "/x.idx.gz"):tolist())
    process.write(folder .. "/cut.gz", process.read(folder .. "/x.idx.gz"):sub(1, -9))
    fails("cut.gz", data.load_idx, folder .. "/cut.gz")
  end)

  it("that are damaged are errors with the file's name", function()
    for name, bytes in pairs { empty = "", magic = "GIF89a..............", short = good:sub(1, -2), long = good .. "x",
      header = good:sub(1, 7), type = "\0\0\7" .. good:sub(4), rank = string.pack(">BBBBI4", 0, 0, 8, 9, 1),
      claim = string.pack(">BBBBI4I4I4I4", 0, 0, 8, 4, 4e9, 4e9, 4e9, 4e9) .. "x" } do
      local ok, message = pcall(load, bytes)
      assert(not ok, name)
      assert.matches("x.idx", message, 1, true)
    end
    fails("/nowhere.idx", data.load_idx, "/nowhere.idx")
    fails(folder:gsub("%W", "%%%0"), data.load_idx, folder)
  end)
end)

-- Ten images of 6x5, each of one value a pixel; the label is the position, counted from 0.
local COUNT = 10
local function dataset()
  return data.images { images = orepa.arange(COUNT * 30):to("int64"):to("uint8"):reshape(COUNT, 6, 5),
    labels = orepa.arange(0, COUNT - 1, { dtype = "int64" }), classes = COUNT }
end

-- Label -> image of an epoch, the order of labels, and the sizes of batches.
local function visit(loader, epoch)
  local images, order, sizes = {}, {}, {}
  for x, labels in loader:epoch(epoch) do
    sizes[#sizes + 1] = labels.shape[1]
    assert.equal("float32", x.dtype)
    assert.equal("int64", labels.dtype)
    assert.equal(labels.shape[1], x.shape[1])
    for k, label in ipairs(labels:tolist()) do
      order[#order + 1] = label
      images[label] = x[k]:tolist()
    end
  end
  return images, order, sizes
end

describe("datasets", function()
  it("know their size and channels; parts are views, both ends included", function()
    local d = dataset()
    assert.same({ COUNT, 1, COUNT }, { d.size, d.channels, d.classes })
    local part = data.part(d, 3, 5)
    assert.equal(3, part.size)
    assert.same({ 2, 3, 4 }, part.labels:tolist())
    assert.equal(3, data.images({ images = orepa.zeros(2, 3, 4, 4), labels = int64 { 0, 1 }, classes = 2 }).channels)
  end)

  it("that don't fit are errors", function()
    fails("2 images and 3 labels", data.images, { images = orepa.zeros(2, 4, 4), labels = int64 { 0, 1, 2 }, classes = 3 })
    fails("option 'classes' is missing", data.images, { images = orepa.zeros(2, 4, 4), labels = int64 { 0, 1 } })
    fails("images: a tensor expected, got table", data.images, { images = {}, labels = int64 {}, classes = 1 })
    fails("positions 5 to 11", data.part, dataset(), 5, 11)
  end)
end)

describe("loaders", function()
  it("visit every sample once, in order unless they shuffle, the last batch being smaller", function()
    local _, order, sizes = visit(data.loader { dataset = dataset(), batch_size = 4 }, 1)
    assert.same({ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 }, order)
    assert.same({ 4, 4, 2 }, sizes)
    assert.equal(3, data.loader({ dataset = dataset(), batch_size = 4 }).batches)
    local loader = data.loader { dataset = dataset(), batch_size = 4, drop_last = true }
    _, order, sizes = visit(loader, 1)
    assert.same({ 4, 4 }, sizes)
    assert.equal(8, #order)
    assert.equal(2, loader.batches)
    assert.same({}, (select(2, visit(data.loader { dataset = data.part(dataset(), 1, 0), batch_size = 4 }, 1))))
  end)

  it("shuffle by seed and epoch alone", function()
    local function order(seed, epoch, batch_size)
      local loader = data.loader { dataset = dataset(), batch_size = batch_size or 4, shuffle = true, seed = seed }
      return (select(2, visit(loader, epoch)))
    end
    local first = order(1, 1)
    assert.same(first, order(1, 1, 7))
    assert.not_same(first, order(1, 2))
    assert.not_same(first, order(2, 1))
    table.sort(first)
    assert.same({ 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 }, first)
    orepa.manual_seed(5)
    local state = orepa.rng_state()
    order(1, 1)
    assert.same(state, orepa.rng_state())
  end)

  it("augment by (seed, epoch, position) alone, whatever batch size and order", function()
    local function images(seed, epoch, o)
      o.dataset, o.seed, o.augment, o.flip, o.padding, o.crop = dataset(), seed, true, true, 2, { 6, 5 }
      return (visit(data.loader(o), epoch))
    end
    local wanted = images(3, 2, { batch_size = 4 })
    for _, batch_size in ipairs { 1, 3, 10 } do
      for _, shuffle in ipairs { false, true } do
        assert.same(wanted, images(3, 2, { batch_size = batch_size, shuffle = shuffle }))
      end
    end
    assert.not_same(wanted, images(3, 1, { batch_size = 4 }))
    assert.not_same(wanted, images(4, 2, { batch_size = 4 }))
  end)

  it("crop, pad and mirror, and do neither without augment", function()
    local d = data.images { images = orepa.arange(4):reshape(1, 2, 2), labels = int64 { 0 }, classes = 1 }
    local seen = {}
    for epoch = 1, 200 do
      local x = visit(data.loader { dataset = d, batch_size = 1, augment = true, flip = true, padding = 1, crop = 2 }, epoch)
      seen[table.concat({ table.unpack(x[0][1][1]) }, " ") .. " " .. table.concat(x[0][1][2], " ")] = true
    end
    assert.is_true(seen["1.0 2.0 3.0 4.0"] and seen["2.0 1.0 4.0 3.0"] and seen["0.0 0.0 0.0 1.0"] and seen["4.0 0.0 0.0 0.0"])
    local count = 0
    for _ in pairs(seen) do count = count + 1 end
    assert.equal(18, count) -- nine places, each mirrored or not: all values differ but where one pixel is left
    local x = visit(data.loader { dataset = d, batch_size = 1, flip = true, padding = 1, crop = 2 }, 1)
    assert.same({ { { 1, 2 }, { 3, 4 } } }, x[0])
  end)

  it("normalise: bytes count as x/255, floats as they are", function()
    local d = data.images { images = orepa.tensor({ { { 0, 51 } } }, { dtype = "uint8" }), labels = int64 { 0 }, classes = 1 }
    local x = visit(data.loader { dataset = d, batch_size = 1, mean = { 0.5 }, deviation = { 0.25 } }, 1)
    assert.near(-2, x[0][1][1][1], 1e-6)
    assert.near((0.2 - 0.5) / 0.25, x[0][1][1][2], 1e-6)
    d = data.images { images = orepa.tensor { { { { 1 } }, { { 2 } } } }, labels = int64 { 0 }, classes = 1 }
    x = visit(data.loader { dataset = d, batch_size = 1, mean = { 1, 0 }, deviation = { 1, 4 } }, 1)
    assert.same({ { { 0 } }, { { 0.5 } } }, x[0])
    local mean, deviation = data.image_statistics(orepa.tensor({ { { 0, 255 } } }, { dtype = "uint8" }))
    assert.near(0.5, mean[1], 1e-12)
    assert.near(0.5, deviation[1], 1e-12)
  end)

  it("hand out tensors of the device they name", function()
    for images, labels in data.loader({ dataset = dataset(), batch_size = 10, device = "ref" }):epoch(1) do
      assert.same({ "ref", "ref" }, { images.device, labels.device })
    end
  end)

  it("check their options", function()
    for _, wrong in ipairs { 0, -1, 1.5, "x" } do
      fails("data.loader: batch_size is ", data.loader, { dataset = dataset(), batch_size = wrong })
    end
    fails("option 'dataset' is missing", data.loader, { batch_size = 1 })
    fails("dataset: what data.images gives expected, got number", data.loader, { dataset = 5, batch_size = 1 })
    fails("unknown option 'batchsize'", data.loader, { dataset = dataset(), batchsize = 1 })
    local function first(o)
      o.dataset, o.batch_size = dataset(), 2
      return data.loader(o):epoch(1)()
    end
    fails("mean and deviation of 2 channels for images of 1", first, { mean = { 0, 0 } })
    fails("1 means and 2 deviations", first, { mean = { 0 }, deviation = { 1, 1 } })
    fails("deviation of channel 1 of 1 is 0", first, { deviation = { 0 } })
    fails("a crop of 9x9 from images of 6x5", first, { crop = 9 })
    fails("true or false expected", first, { augment = 1 })
  end)

  it("find positions that are out of range", function()
    fails("index 10 .* range of 10 images", data.image_batch, dataset().images, int64 { 0, 10 })
    fails("index %-1 .* range of 10 labels", data.label_batch, dataset().labels, int64 { -1 })
    fails("permutation", data.permutation, -1, 1, 1)
  end)
end)

describe("datasets by name", function()
  local datasets = require "orepa.datasets"

  it("that nobody knows are errors that list the known", function()
    fails("no dataset is called 'mnist' %(there are fashion%-mnist%)", datasets.load, "mnist")
    fails("/nowhere/train%-images", datasets.load, "fashion-mnist", { folder = "/nowhere" })
  end)
end)
