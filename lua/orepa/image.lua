-- image: what is done with pictures, (C, H, W) or (H, W): other sizes, several as one, and the kernels of a layer as a picture.
-- The engine reads and writes them (lua/bind/image.c); orepa.show puts them on the terminal.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"

local image = core.image

local function fail(...) core.fail((...):format(select(2, ...))) end

local function text_of(t) return core.is_tensor(t) and checks.text_of(t) or type(t) end

local function need_tensor(where, t, least, most)
  if not core.is_tensor(t) or #t.shape < least or #t.shape > most or t:count() == 0 then
    fail("%s: a picture expected, got %s", where, text_of(t))
  end
end

local function need_whole(where, name, value, least)
  if math.type(value) ~= "integer" and not (math.type(value) == "float" and value == value // 1 and math.abs(value) < 2^53)
    or value < least then
    fail("%s: %s is %s, an integer of at least %d expected", where, name, tostring(value), least)
  end
  return math.tointeger(value)
end

local function one_of(where, name, value, list)
  for _, known in ipairs(list) do
    if value == known then return end
  end
  for k, known in ipairs(list) do list[k] = tostring(known) end
  fail("%s: %s is %s; there are %s", where, name, tostring(value), table.concat(list, ", "))
end

-- ---- sizes ----

-- How much an old pixel counts in a new one, by the distance of their centres and the new one's size; old ones have size 1.
local METHODS = {
  box = function(distance, scale) -- how much of an old pixel lies within the new one
    return ((distance + 0.5):minimum(scale / 2) - (distance - 0.5):maximum(-scale / 2)):clamp(0, 1)
  end,
  bilinear = function(distance, scale) -- a tent
    return (1 - distance:abs() / math.max(scale, 1)):clamp(0, 1)
  end,
}

-- Of `count` pixels over a length, rounded once: a centre between two pixels is there exactly.
local function centers(count, length)
  return (core.arange(0, count - 1, { dtype = "float64", device = "ref" }) + 0.5) * length / count
end

-- (to, from) on `ref` in float64; rows sum to 1.
local function weights(method, from, to)
  local scale = from / to
  local w = METHODS[method](centers(from, from):reshape(1, -1) - centers(to, from):reshape(-1, 1), scale)
  return w / w:sum(2, { keepdim = true })
end

local function nearest(t, dim, to)
  local list = centers(to, t.shape[dim]):to "int64"
  return t:index_select(dim, list:to(t.device))
end

local function resampled(t, height, width, method)
  local x = t.dtype == "float64" and t or t:to "float32"
  local rank = #x.shape
  local function like(w) return w:to { dtype = x.dtype, device = x.device } end
  local rows = like(weights(method, x.shape[rank - 1], height))
  local columns = like(weights(method, x.shape[rank], width)):transpose()
  return rows:matmul(x:matmul(columns))
end

function image.resize(t, size, given)
  local o = options("image.resize", given, { method = "bilinear" })
  need_tensor("image.resize", t, 2, 4)
  one_of("image.resize", "method", o.method, { "bilinear", "box", "nearest" })
  if type(size) ~= "table" or #size ~= 2 then fail("image.resize: {height, width} expected, got %s", type(size)) end
  local height, width = need_whole("image.resize", "height", size[1], 1), need_whole("image.resize", "width", size[2], 1)
  if o.method == "nearest" then return nearest(nearest(t, #t.shape - 1, height), #t.shape, width) end
  if t.dtype ~= "uint8" and not t.dtype:find "float" then fail("image.resize: %s: uint8 or floats expected", text_of(t)) end
  local y = resampled(t, height, width, o.method)
  return t.dtype == "uint8" and (y + 0.5):clamp(0, 255):to "uint8" or y:to(t.dtype)
end

-- ---- several as one ----

-- The pictures of a batch or a list, each (C, H, W), without history, on the cpu.
local function pictures(where, batch)
  local list = {}
  if core.is_tensor(batch) then
    need_tensor(where, batch, 4, 4)
    batch = batch:detach():to "cpu"
    for k = 1, batch.shape[1] do list[k] = batch[k] end
  elseif type(batch) == "table" and #batch > 0 then
    for k, t in ipairs(batch) do
      need_tensor(where, t, 2, 3)
      t = t:detach():to "cpu"
      list[k] = #t.shape == 2 and t:unsqueeze(1) or t
    end
  else
    fail("%s: a tensor (N, C, H, W) or a list of pictures expected, got %s", where, type(batch))
  end
  return list
end

-- The largest sizes; pictures of one channel go with those of three.
local function common_sizes(where, list)
  local first, channels, height, width = list[1], 1, 0, 0
  for _, t in ipairs(list) do
    if t.dtype ~= first.dtype then fail("%s: pictures are %s and %s", where, first.dtype, t.dtype) end
    channels, height, width = math.max(channels, t.shape[1]), math.max(height, t.shape[2]), math.max(width, t.shape[3])
  end
  for _, t in ipairs(list) do
    if t.shape[1] ~= channels and t.shape[1] ~= 1 then
      fail("%s: pictures have %d and %d channels", where, channels, t.shape[1])
    end
  end
  return channels, height, width
end

-- From 0 to 1, by the least and the largest of all or of each.
local function normalized(list, each)
  local low, high, result = math.huge, -math.huge, {}
  local function range(t) return t:min():item(), t:max():item() end
  for k, t in ipairs(list) do
    result[k] = t.dtype == "float64" and t or t:to "float32"
    local least, most = range(result[k])
    low, high = math.min(low, least), math.max(high, most)
  end
  for k, t in ipairs(result) do
    if each then low, high = range(t) end
    result[k] = (t - low) * (high > low and 1 / (high - low) or 0)
  end
  return result
end

function image.grid(batch, given)
  local o = options("image.grid", given, { columns = options.optional, padding = 2, value = 0, normalize = false })
  local list = pictures("image.grid", batch)
  one_of("image.grid", "normalize", o.normalize, { false, true, "each" })
  if type(o.value) ~= "number" then fail("image.grid: value: a number expected, got %s", type(o.value)) end
  local columns = o.columns and need_whole("image.grid", "columns", o.columns, 1) or math.ceil(math.sqrt(#list))
  local padding = need_whole("image.grid", "padding", o.padding, 0)
  columns = math.min(columns, #list)
  local channels, height, width = common_sizes("image.grid", list)
  if o.normalize then list = normalized(list, o.normalize == "each") end
  local rows, down, across = (#list + columns - 1) // columns, height + padding, width + padding
  return core.no_grad(function()
    local whole = core.full({ channels, rows * down + padding, columns * across + padding }, o.value, { dtype = list[1].dtype })
    for k, t in ipairs(list) do
      local top, left = (k - 1) // columns * down + padding, (k - 1) % columns * across + padding
      whole:slice(2, top + 1, top + t.shape[2]):slice(3, left + 1, left + t.shape[3]):copy_(t)
    end
    return whole
  end)
end

-- ---- the kernels of a layer ----

local KERNELS = "image.kernels"

-- The layer's kernels (O, I, H, W) by name, in order: those of its branches and the one that they make, or its only one.
local function kernels_of(layer)
  if core.is_tensor(layer) then return { layer }, { "weight" } end
  if type(layer) == "table" and layer.branch_weights and layer.mode ~= "deploy" then
    local weights_by_name, list, names = layer:branch_weights(), {}, {}
    for k, name in ipairs(layer.plan.branches) do list[k], names[k] = weights_by_name[name], name end
    list[#list + 1], names[#names + 1] = layer:squeezed_weight(), "squeezed"
    return list, names
  end
  if type(layer) ~= "table" then return {}, {} end
  local deployed = layer.branch_weights and layer[layer.options.deployed .. ".weight"]
  return { deployed or layer.weight }, { "weight" }
end

-- Of a tensor, or along some of its dimensions.
local function magnitude(t, dims)
  t = t:abs()
  for _, dim in ipairs(dims) do t = t:max(dim, { keepdim = true }) end
  return t:maximum(1e-30)
end

-- Zero becomes 1/2, and the largest magnitude 0 or 1.
local function centered(list, normalize, is_colour)
  local result, all = {}, { 1, 2, 3, 4 }
  local dims = normalize == "tile" and (is_colour and { 2, 3, 4 } or { 3, 4 }) or all
  local most
  for _, w in ipairs(normalize == "all" and list or {}) do
    most = most and most:maximum(magnitude(w, all)) or magnitude(w, all)
  end
  for k, w in ipairs(list) do result[k] = w / ((most or magnitude(w, dims)) * 2) + 0.5 end
  return result
end

-- Each pixel `scale` times as high and wide.
local function enlarged(t, scale)
  local n, c, h, w = table.unpack(t.shape)
  return t:reshape(n * c, h, 1, w, 1):expand(n * c, h, scale, w, scale):reshape(n, c, h * scale, w * scale)
end

-- Tiles (O, I, H, W) as one picture (1, ., .): a row for each output, a column for each input, `padding` around each.
local function tiled(w, padding, value)
  w = core.pad(w, { 0, 0, 0, 0, padding, 0, padding, 0 }, value)
  local o, i, height, width = table.unpack(w.shape)
  return core.pad(w:permute(1, 3, 2, 4):reshape(1, o * height, i * width), { 0, 0, 0, padding, 0, padding }, value)
end

local LARGEST, MOST_SCALE = 1024, 16 -- pixels of a picture, and of a number, unless scale says otherwise

local function scale_for(rows, columns, w, padding)
  local room = math.min(LARGEST // rows - padding, LARGEST // columns - padding)
  return math.max(1, math.min(MOST_SCALE, room // math.max(w.shape[3], w.shape[4])))
end

-- The kernels that are to be seen, of the first outputs and inputs if so many are asked for.
local function seen_kernels(layer, o)
  local list, names = kernels_of(layer)
  if #list == 0 or not core.is_tensor(list[1]) or #list[1].shape ~= 4 or list[1]:count() == 0 then
    local what = type(layer) == "table" and tostring(layer.kind or layer.class_name or "a table") or text_of(layer)
    fail("%s: a layer with kernels (O, I, H, W) expected, got %s", KERNELS, what)
  end
  for k, w in ipairs(list) do
    w = w:detach():to { dtype = "float32", device = "cpu" }
    for dim, name in ipairs { "outputs", "inputs" } do
      if o[name] then w = w:slice(dim, 1, math.min(w.shape[dim], need_whole(KERNELS, name, o[name], 1))) end
    end
    list[k] = w
  end
  return list, names
end

local function is_colour(o, inputs)
  if o.colour == nil then return inputs == 3 end
  if type(o.colour) ~= "boolean" then fail("%s: colour: true or false expected, got %s", KERNELS, type(o.colour)) end
  if o.colour and inputs ~= 3 then fail("%s: kernels of %d inputs have no colours", KERNELS, inputs) end
  return o.colour
end

-- How many tiles of a layer are in a row.
local function columns_of(o, colour, outputs, inputs)
  if not o.columns then return colour and math.ceil(math.sqrt(outputs)) or inputs end
  if not colour then fail("%s: columns are chosen for colour; else there is one for each input", KERNELS) end
  return math.min(outputs, need_whole(KERNELS, "columns", o.columns, 1))
end

function image.kernels(layer, given)
  local o = options(KERNELS, given, { normalize = "kernel", scale = options.optional, padding = 1, value = 1,
    outputs = options.optional, inputs = options.optional, columns = options.optional, colour = options.optional })
  one_of(KERNELS, "normalize", o.normalize, { "kernel", "tile", "all" })
  if type(o.value) ~= "number" then fail("%s: value: a number expected, got %s", KERNELS, type(o.value)) end
  local padding = need_whole(KERNELS, "padding", o.padding, 0)
  local list, names = seen_kernels(layer, o)
  local outputs, inputs = list[1].shape[1], list[1].shape[2]
  local colour = is_colour(o, inputs)
  local columns = columns_of(o, colour, outputs, inputs)
  local rows = colour and (outputs + columns - 1) // columns or outputs
  local scale = o.scale and need_whole(KERNELS, "scale", o.scale, 1) or scale_for(rows, #list * columns, list[1], padding)
  local panels = centered(list, o.normalize, colour)
  for k, w in ipairs(panels) do
    w = enlarged(w, scale)
    panels[k] = colour and image.grid(w, { columns = columns, padding = padding, value = o.value })
      or tiled(w, padding, o.value)
  end
  if #panels == 1 then return panels[1], names end
  return image.grid(panels, { columns = #panels, padding = 2 * padding + 1, value = o.value }), names
end

document("image.resize", [[
  image.resize(t, {height, width}, {method=}) -> tensor
  Pictures (H, W), (C, H, W) or (N, C, H, W) in another size. A new pixel is a mean of old ones, whose centres are at i + 1/2 of
  their height or width: "bilinear" (at first) weighs them by a tent around its own centre, as wide to each side as a new pixel,
  at least as an old one; "box" by how much of them it covers; "nearest" takes the one in which its centre lies. uint8 is rounded;
  gradients pass through floats.
  > orepa.image.resize(orepa.rand(3, 30, 40), {15, 20}, {method = "box"}).shape]])
document("image.grid", [[
  image.grid(batch, {columns=, padding=, value=, normalize=}) -> tensor
  The pictures of a tensor (N, C, H, W), or of a list, as one picture (C, h, w), row by row: `columns` (the root of their number)
  in a row, with `padding` (2) pixels of `value` (0) around each. Pictures of a list may have several sizes, and one channel
  beside three. normalize = true stretches them to what lies between the least and the largest value of all, 0 to 1; "each" by
  their own.
  > orepa.image.grid(orepa.rand(10, 3, 8, 8), {columns = 5}).shape]])
document("image.kernels", [[
  image.kernels(layer, {normalize=, scale=, padding=, value=, outputs=, inputs=, colour=, columns=}) -> tensor, names
  The kernels of a layer as a picture from 0 to 1, for orepa.image.save or show: a tile for each kernel, a row of them for each
  output, a column for each input. Gray (1/2) is zero, and the largest magnitude black or white: of each layer's or branch's
  kernels ("kernel", at first), of each "tile", or of "all". Of a block it shows its branches in their order, and what they
  squeeze to last, side by side; `names` tells which. Layers of 3 inputs are shown in colour, a tile for each output, `columns` in
  a row, unless colour = false. Each number is `scale` pixels wide; `padding` (1) of `value` (1) lie between tiles; outputs = n
  and inputs = n show the first n. A tensor (O, I, H, W) may stand for the layer.
  > local picture, names = orepa.image.kernels(nn.OREPA{in_channels = 4, out_channels = 8, kernel_size = 3})
  > orepa.image.save(os.tmpname(), picture, {format = "png"}); assert(names[#names] == "squeezed")]])

return image
