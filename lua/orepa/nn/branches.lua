-- What a ReparamBlock does when its branches run on the feature map (mode "offline"), each layer followed by its norm.
--
-- A branch is padded once, before its first layer larger than 1x1, and strided once, in its last. The padding's value v is what
-- the layers and norms before make of zero by their running statistics: then evaluation is exactly one convolution. Instead of
-- writing such a border, v is taken off the map, the border is zero, and what the layer makes of v is added after it. The norm
-- before takes v off by itself where nothing but zero came to it.

local core = require "orepa.core"
local done_with = require("orepa.nn.module").internal.done_with
local F, tree = core.F, core.tree

local branches = {}

-- ---- geometry ----

local function is_larger(layer)
  return layer.kernel[1] > 1 or layer.kernel[2] > 1
end

-- The places of the layers that are padded and strided.
local function places(layers)
  local first, last
  for k = 1, #layers do
    if is_larger(layers[k]) then first, last = first or k, k end
  end
  return first or #layers, last or #layers
end

-- Adds to a chain `geometry`, one for each layer; `padded`, a layer; `crop`, {before, after, ...} where the map is cut there;
-- `surrounded`, whether it is padded with more than nothing.
function branches.place(chain, o)
  local padded, strided = places(chain.layers)
  local padding, crop, cut = {}, { 0, 0, 0, 0 }, false
  for d = 1, 2 do
    local p = o.padding[d] - o.dilation[d] * (o.kernel_size[d] - chain.kernel[d]) // 2
    padding[d] = math.max(p, 0)
    for _, side in ipairs { 2 * d + 3, 2 * d + 4 } do crop[side] = math.min(p, 0) end
    cut = cut or p < 0
    chain.surrounded = chain.surrounded or p > 0
  end
  chain.padded, chain.crop, chain.geometry = padded, cut and crop or nil, {}
  for k, layer in ipairs(chain.layers) do
    chain.geometry[k] = { stride = k == strided and o.stride or { 1, 1 }, padding = k == padded and padding or { 0, 0 },
      dilation = o.dilation, groups = layer.groups }
  end
end

-- ---- one layer ----

-- The kernel of a layer on its own, in its own groups.
local function kernel_of(block, layer, slots)
  return layer.plain and block[layer.path] or tree.squeeze(layer.tree, slots)
end

-- Whether the pool does what the layer's constant kernel would.
local function is_pool(layer, geometry)
  if layer.form ~= "average" then return false end
  for d = 1, 2 do
    if geometry.dilation[d] ~= 1 or 2 * geometry.padding[d] > layer.kernel[d] then return false end
  end
  return true
end

local function subsampled(x, geometry)
  local p, s = geometry.padding, geometry.stride
  if p[1] > 0 or p[2] > 0 then x = core.pad(x, { 0, 0, 0, 0, p[1], p[1], p[2], p[2] }) end
  for d = 1, 2 do
    if s[d] > 1 then x = x:slice(2 + d, 1, -1, s[d]) end
  end
  return x
end

-- A number for each channel as a map of 1x1, in the map's type.
local function across(numbers, map)
  return numbers:to(map.dtype):reshape(1, -1, 1, 1)
end

-- A layer on the map; `factor` multiplies its output channels, `bias` is added.
local function run_layer(layer, x, kernel, factor, bias, geometry)
  local y
  if layer.form == "identity" then
    y = subsampled(x, geometry)
  elseif is_pool(layer, geometry) and not factor then
    y = F.avg_pool2d(x, { kernel_size = layer.kernel, stride = geometry.stride, padding = geometry.padding })
  else
    if factor then kernel = kernel * factor:reshape(-1, 1, 1, 1) end
    return F.conv2d(x, kernel, bias and (factor and bias * factor or bias), geometry)
  end
  if bias then y = y + across(bias, y) end
  return factor and y * across(factor, y) or y
end

-- What a layer makes of a map that is v everywhere: a number for each channel.
local function response(layer, kernel, v)
  if layer.form == "identity" or layer.form == "average" then return v end
  local n, sums = layer.groups, kernel:sum(3, 4)
  return (sums:reshape(n, layer.output // n, -1) * v:reshape(n, 1, -1)):sum(3):reshape(-1)
end

-- What a norm makes of v (nil: zero) by its running statistics.
local function normed(norm, v)
  local scale, shift = norm:fold()
  if v then shift = shift + scale * v:to("float64") end
  return shift:to(norm.running_mean.dtype)
end

-- Whether a norm takes away whatever constant is added before it.
local function takes_constants(norm)
  return norm and norm:uses_batch()
end

-- ---- one branch ----

local function release(t, keep)
  if t ~= keep then done_with(t) end
end

-- On its way through a branch: the map x, the padding's value v (nil: zero), whether v is off the map already.
local Pass = {}
Pass.__index = Pass

function Pass:take(y)
  if y ~= self.x then release(self.x, self.given) end
  self.x = y
end

-- Takes v off the map before the padded layer, and gives what the layer makes of it.
function Pass:take_off(layer, kernel, norm)
  if not self.is_off then self:take(self.x - across(self.v, self.x)) end
  return response(layer, takes_constants(norm) and kernel:detach() or kernel, self.v)
end

-- Layer k and its norm; `factor` multiplies what comes out.
function Pass:run(block, chain, k, slots, factor)
  local layer, geometry, at_padding = chain.layers[k], chain.geometry[k], k == chain.padded
  local norm = layer.norm and block[layer.norm]
  if at_padding and chain.crop then self:take(core.pad(self.x, chain.crop)) end
  local kernel = kernel_of(block, layer, slots)
  local constant = at_padding and self.v and self:take_off(layer, kernel, norm) or nil
  local taken = constant and takes_constants(norm)
  self:take(run_layer(layer, self.x, kernel, not norm and factor or nil, not taken and constant or nil, geometry))
  if norm then
    self.is_off = chain.surrounded and k + 1 == chain.padded and not self.v
    self:take(norm(self.x, factor, self.is_off))
    if taken then norm:shift_statistics(constant) end
  end
  if chain.surrounded and k < chain.padded then
    core.no_grad(function()
      if self.v then self.v = response(layer, kernel, self.v) end
      if norm then self.v = normed(norm, self.v) end
    end)
  end
end

local function run_branch(block, chain, x, slots)
  local pass, last = setmetatable({ given = x, x = x, is_off = false }, Pass), #chain.layers
  for k = 1, last do
    pass:run(block, chain, k, slots, k == last and chain.slot and slots[chain.slot][chain.row] or nil)
  end
  return pass.x
end

-- The sum of all branches.
function branches.run(block, x, slots)
  local sum
  for _, chain in ipairs(block.plan.chains) do
    local y = run_branch(block, chain, x, slots)
    if sum then
      local more = sum + y
      release(sum, x)
      release(y, x)
      sum = more
    else
      sum = y
    end
  end
  return sum
end

-- ---- folding, in float64 ----

-- The chain's tree for kernels that are folded already: one slot for each layer.
local function folding_tree(chain, groups)
  local layers = {}
  for k, layer in ipairs(chain.layers) do
    layers[k] = tree.leaf { kind = "parameter", slot = k, input = layer.input, output = layer.output, groups = layer.groups,
      kernel = layer.kernel }
  end
  return tree.chain(layers, groups, false)
end

-- One branch's kernel, scaled and centred, and its bias (nil: zero); slots are float64.
local function fold_branch(block, chain, slots)
  local kernels, bias = {}, nil
  for k, layer in ipairs(chain.layers) do
    local kernel = tree.squeeze(layer.tree, slots)
    if bias then bias = response(layer, kernel, bias) end
    if layer.norm then
      local scale, shift = block[layer.norm]:fold()
      kernel = kernel * scale:reshape(-1, 1, 1, 1)
      bias = bias and bias * scale + shift or shift
    end
    kernels[k] = kernel
  end
  chain.folding = chain.folding or folding_tree(chain, block.options.groups)
  local weight, size = tree.squeeze(chain.folding, kernels), block.options.kernel_size
  if chain.slot then
    local factor = slots[chain.slot][chain.row]
    weight, bias = weight * factor:reshape(-1, 1, 1, 1), bias and bias * factor
  end
  local h, w = (size[1] - chain.kernel[1]) // 2, (size[2] - chain.kernel[2]) // 2
  return core.pad(weight, { 0, 0, 0, 0, h, h, w, w }), bias
end

-- A list with each branch's kernel, their sum, and the sum of their biases (nil: zero), in float64.
function branches.fold(block, slots)
  local weights, sum, bias = {}, nil, nil
  for k, chain in ipairs(block.plan.chains) do
    local weight, b = fold_branch(block, chain, slots)
    weights[k], sum = weight, sum and sum + weight or weight
    if b then bias = bias and bias + b or b end
  end
  return weights, sum, bias
end

return branches
