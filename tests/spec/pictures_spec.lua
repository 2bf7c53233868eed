-- What is done with pictures: other sizes, several as one, the kernels of a layer.

local cjson = require "cjson"
local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"

local image, nn = orepa.image, orepa.nn

local function near(wanted, t, tolerance)
  local list = t:reshape(-1):tolist()
  assert.equal(#wanted, #list)
  for k, v in ipairs(wanted) do
    assert(math.abs(v - list[k]) <= (tolerance or 1e-6), ("element %d is %.9g, not %.9g"):format(k, list[k], v))
  end
end

local function flat(rows)
  local list = {}
  for _, row in ipairs(rows) do table.move(row, 1, #row, #list + 1, list) end
  return list
end

describe("image.resize", function()
  local golden = cjson.decode(process.read "tests/golden/images/resized.json")

  it("is bilinear as Pillow's", function()
    local source = orepa.tensor(golden.source)
    for k, size in ipairs(golden.sizes) do near(flat(golden.results[k]), image.resize(source, size), 2e-6) end
  end)

  -- The mean over a new pixel's area, pixel by pixel.
  local function area_means(rows, height, width)
    local result, h, w = {}, #rows / height, #rows[1] / width
    local function part(k, from, to) return math.max(0, math.min(k, to) - math.max(k - 1, from)) end
    for y = 1, height do
      for x = 1, width do
        local sum = 0
        for j, row in ipairs(rows) do
          for i, v in ipairs(row) do sum = sum + v * part(j, (y - 1) * h, y * h) * part(i, (x - 1) * w, x * w) end
        end
        result[#result + 1] = sum / (h * w)
      end
    end
    return result
  end

  it("takes means of areas as a box", function()
    local source = orepa.tensor(golden.source)
    for _, size in ipairs { { 7, 5 }, { 3, 2 }, { 14, 10 }, { 1, 1 }, { 9, 3 }, { 2, 11 } } do
      near(area_means(golden.source, size[1], size[2]), image.resize(source, size, { method = "box" }), 2e-6)
    end
  end)

  it("takes the pixel under the centre as nearest", function()
    local t = orepa.tensor({ { 1, 2, 3, 4, 5 } }, { dtype = "int64" })
    assert.same({ { 3 } }, image.resize(t, { 1, 1 }, { method = "nearest" }):tolist())
    assert.same({ { 2, 4 }, { 2, 4 } }, image.resize(t, { 2, 2 }, { method = "nearest" }):tolist())
    for _, size in ipairs { { 60, 26 }, { 60, 55 }, { 7, 20 }, { 13, 4 } } do -- some centres lie between two pixels
      local from, to, wanted = size[1], size[2], {}
      for k = 1, to do wanted[k] = (2 * k - 1) * from // (2 * to) end
      local row = orepa.arange(0, from - 1):reshape(1, from)
      assert.same({ wanted }, image.resize(row, { 1, to }, { method = "nearest" }):tolist())
    end
    assert.same({ { 1, 1, 2, 2, 3, 3, 4, 4, 5, 5 } }, image.resize(t, { 1, 10 }, { method = "nearest" }):tolist())
  end)

  it("rounds bytes, keeps types, takes batches", function()
    local bytes = orepa.tensor({ { 0, 255, 254 } }, { dtype = "uint8" })
    assert.same({ { 170 } }, image.resize(bytes, { 1, 1 }, { method = "box" }):tolist())
    assert.equal("uint8", image.resize(bytes, { 1, 1 }).dtype)
    local batch = orepa.rand(2, 3, 8, 6)
    for _, dtype in ipairs { "bfloat16", "float16", "float32" } do
      local y = image.resize(batch:to(dtype), { 4, 3 }, { method = "box" })
      assert.same({ dtype, { 2, 3, 4, 3 } }, { y.dtype, y.shape })
    end
    near(image.resize(batch[2][3], { 5, 5 }):reshape(-1):tolist(), image.resize(batch, { 5, 5 })[2][3])
    local wide = image.resize(batch:to { dtype = "float64", device = "ref" }, { 4, 3 })
    assert.same({ "float64", "ref" }, { wide.dtype, wide.device })
  end)

  it("has gradients", function()
    for _, method in ipairs { "box", "bilinear", "nearest" } do
      local x = orepa.rand({ 1, 4, 6 }, { dtype = "float32" }):requires_grad_()
      image.resize(x, { 2, 3 }, { method = method }):sum():backward()
      near({ 6 }, x.grad:sum():reshape(1), 1e-5)
    end
  end)

  it("is refused in words", function()
    local t = orepa.ones(3, 4, 4)
    fails("image.resize: a picture expected, got float32 5", image.resize, orepa.ones(5), { 1, 1 })
    fails("image.resize: a picture expected, got float32 0x5", image.resize, orepa.ones(0, 5), { 1, 1 })
    fails("{height, width} expected", image.resize, t, 4)
    fails("height is 0, an integer of at least 1", image.resize, t, { 0, 4 })
    for _, method in ipairs { "box", "bilinear", "nearest" } do
      fails("out of memory", image.resize, t, { 1, 1 << 40 }, { method = method })
    end
    fails("width is 2.5", image.resize, t, { 1, 2.5 })
    fails("method is cubic; there are bilinear, box, nearest", image.resize, t, { 1, 1 }, { method = "cubic" })
    fails("int64 2x2: uint8 or floats", image.resize, orepa.zeros({ 2, 2 }, { dtype = "int64" }), { 1, 1 })
    fails("unknown option 'mode'", image.resize, t, { 1, 1 }, { mode = "box" })
  end)
end)

describe("image.grid", function()
  it("puts the pictures of a batch side by side", function()
    local batch = orepa.arange(3):reshape(3, 1, 1, 1):expand(3, 1, 1, 2)
    assert.same({ { { 9, 9, 9, 9, 9, 9, 9 }, { 9, 1, 1, 9, 2, 2, 9 }, { 9, 9, 9, 9, 9, 9, 9 }, { 9, 3, 3, 9, 9, 9, 9 },
      { 9, 9, 9, 9, 9, 9, 9 } } }, image.grid(batch, { padding = 1, value = 9 }):tolist())
    assert.same({ { { 1, 1, 2, 2, 3, 3 } } }, image.grid(batch, { padding = 0, columns = 7 }):tolist())
    assert.same({ { { 1, 1 }, { 2, 2 }, { 3, 3 } } }, image.grid(batch, { padding = 0, columns = 1 }):tolist())
  end)

  it("takes a list of several sizes, gray beside colour", function()
    local colours = orepa.tensor { { { 1 }, { 2 } }, { { 3 }, { 4 } }, { { 5 }, { 6 } } }
    local whole = image.grid({ orepa.tensor { { 7, 8 } }, colours }, { padding = 0 })
    assert.same({ { { 7, 8, 1, 0 }, { 0, 0, 2, 0 } }, { { 7, 8, 3, 0 }, { 0, 0, 4, 0 } }, { { 7, 8, 5, 0 }, { 0, 0, 6, 0 } } },
      whole:tolist())
  end)

  it("keeps the type, and no history", function()
    assert.equal("uint8", image.grid(orepa.zeros({ 2, 1, 2, 2 }, { dtype = "uint8" }), { value = 255 }).dtype)
    local whole = image.grid(orepa.rand(2, 1, 2, 2):requires_grad_())
    assert.is_false(whole.requires_grad)
  end)

  it("stretches values", function()
    local list = { orepa.tensor { { 2, 4 } }, orepa.tensor { { 4, 10 } }, orepa.tensor { { 6, 6 } } }
    near({ 0, 0.25, 0.25, 1, 0.5, 0.5 }, image.grid(list, { padding = 0, columns = 3, normalize = true }))
    near({ 0, 1, 0, 1, 0, 0 }, image.grid(list, { padding = 0, columns = 3, normalize = "each" }))
  end)

  it("is refused in words", function()
    fails("image.grid: a picture expected, got float32 2x2", image.grid, orepa.ones(2, 2))
    fails("a tensor %(N, C, H, W%) or a list of pictures expected, got table", image.grid, {})
    fails("pictures are float32 and uint8", image.grid, { orepa.ones(2, 2), orepa.ones({ 2, 2 }, { dtype = "uint8" }) })
    fails("pictures have 3 and 2 channels", image.grid, { orepa.ones(3, 2, 2), orepa.ones(2, 2, 2) })
    fails("normalize is 1; there are false, true, each", image.grid, orepa.ones(1, 1, 2, 2), { normalize = 1 })
    fails("padding is %-1, an integer of at least 0", image.grid, orepa.ones(1, 1, 2, 2), { padding = -1 })
    fails("columns is 0", image.grid, orepa.ones(1, 1, 2, 2), { columns = 0 })
  end)
end)

describe("image.kernels", function()
  it("shows a row for each output and a column for each input", function()
    local conv = nn.Conv2d { in_channels = 2, out_channels = 3, kernel_size = { 1, 2 }, bias = false }
    orepa.no_grad(function()
      conv.weight:copy_(orepa.tensor({ { 1, -1, 2, 0 }, { -2, 0, 0, 0 }, { 0.5, 0, 0, 2 } }):reshape(3, 2, 1, 2))
    end)
    local picture, names = image.kernels(conv, { scale = 1, padding = 0 })
    assert.same({ "weight" }, names)
    near({ 0.75, 0.25, 1, 0.5, 0, 0.5, 0.5, 0.5, 0.625, 0.5, 0.5, 1 }, picture)
    picture = image.kernels(conv, { scale = 1, padding = 0, normalize = "tile", outputs = 1 })
    near({ 1, 0, 1, 0.5 }, picture)
    picture = image.kernels(conv, { scale = 2, padding = 1, outputs = 1, inputs = 1, value = 0 })
    assert.same({ 1, 4, 6 }, picture.shape)
    near({ 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0 }, picture)
  end)

  it("shows three inputs in colour", function()
    local conv = nn.Conv2d { in_channels = 3, out_channels = 5, kernel_size = 3 }
    local picture = image.kernels(conv, { scale = 1, padding = 1 })
    assert.same({ 3, 9, 13 }, picture.shape)
    local largest = conv.weight:abs():max():item()
    for c = 1, 3 do near({ conv.weight[4][c][2][3]:item() / (2 * largest) + 0.5 }, picture[c][7][4]:reshape(1), 1e-5) end
    assert.same({ 3, 5, 21 }, image.kernels(conv, { scale = 1, columns = 5 }).shape)
    assert.same({ 1, 21, 13 }, image.kernels(conv, { scale = 1, colour = false }).shape)
  end)

  it("shows the branches of a block in their order, and what they squeeze to", function()
    for _, mode in ipairs { "online", "offline" } do
      local block = nn.ReparamBlock { in_channels = 2, out_channels = 2, kernel_size = 3, mode = mode, branches = {
        { name = "second", orepa.reparam.conv { 3 } }, { name = "first", orepa.reparam.conv { 1 } } } }
      local picture, names = image.kernels(block, { scale = 1, padding = 0, normalize = "all" })
      assert.same({ "second", "first", "squeezed" }, names)
      assert.same({ 1, 8, 22 }, picture.shape) -- 6 x 6 each, a pixel around
      local branches, most, panels = block:branch_weights(), 0, {}
      panels[1], panels[2], panels[3] = branches.second, branches.first, block:squeezed_weight()
      for _, w in ipairs(panels) do most = math.max(most, w:abs():max():item()) end
      for k, w in ipairs(panels) do
        local left = 2 + (k - 1) * 7
        near({ w[2][1][1][3]:item() / (2 * most) + 0.5 }, picture[1][5][left + 2]:reshape(1), 1e-5)
      end
    end
  end)

  it("shows each kernel by its own largest number unless told otherwise", function()
    local block = nn.OREPA { in_channels = 4, out_channels = 8, kernel_size = 3 }
    local picture, names = image.kernels(block, { scale = 1, padding = 0 })
    assert.same({ "origin", "avg", "pfir", "1x1_kxk", "1x1", "dw_pw", "squeezed" }, names)
    for k = 1, #names do
      local panel = picture[1]:slice(2, 2 + (k - 1) * 13, 13 + (k - 1) * 13):slice(1, 2, 25)
      local distance = (panel - 0.5):abs():max():item()
      assert(names[k] == "pfir" and distance == 0 or math.abs(distance - 0.5) < 1e-6, names[k]) -- that one begins at zero
    end
  end)

  it("shows what a deployed block is, zeros, and tensors", function()
    local block = nn.OREPA { in_channels = 4, out_channels = 8, kernel_size = 3 }:eval():deploy()
    local picture, names = image.kernels(block)
    assert.same({ "weight" }, names)
    assert.is_true(picture:max():item() <= 1 and picture.shape[2] <= 1024)
    near({ 0.5 }, (image.kernels(orepa.zeros(1, 1, 1, 1), { scale = 1, padding = 0 })))
    assert.is_true(image.kernels(orepa.rand(300, 300, 3, 3)).shape[2] == 1201)
  end)

  it("is refused in words", function()
    fails("image.kernels: a layer with kernels %(O, I, H, W%) expected, got Linear", image.kernels,
      nn.Linear { in_features = 2, out_features = 2 })
    fails("expected, got ReLU", image.kernels, nn.ReLU())
    fails("expected, got number", image.kernels, 3)
    fails("expected, got float32 2x2", image.kernels, orepa.ones(2, 2))
    local conv = nn.Conv2d { in_channels = 2, out_channels = 3, kernel_size = 1 }
    fails("kernels of 2 inputs have no colours", image.kernels, conv, { colour = true })
    fails("columns are chosen for colour", image.kernels, conv, { columns = 2 })
    fails("normalize is max; there are kernel, tile, all", image.kernels, conv, { normalize = "max" })
    fails("outputs is 0", image.kernels, conv, { outputs = 0 })
    fails("scale is 0.5", image.kernels, conv, { scale = 0.5 })
  end)
end)
