-- Layers with parameters, and pools: each is its parameters, their initial values, and one call of orepa.F.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local whole, sizes = require("orepa.reparam").check.whole, require("orepa.reparam").check.pair
local module = require "orepa.nn.module"
local embedding_row = require("orepa.functional").embedding_row
local F, Parameter = core.F, module.internal.Parameter
local required = options.required

local layers = {}

local layer = module.internal.lister(layers)

local function pair(value)
  return type(value) == "table" and ("%dx%d"):format(value[1], value[2]) or ("%dx%d"):format(value, value)
end

-- Uniform within +-bound.
local function uniform(shape, bound)
  return core.rand(shape):multiply_add(2 * bound, -bound)
end

-- ---- Conv2d ----

local Conv2d = layer "Conv2d"

function Conv2d:init(o)
  o = options("Conv2d", o, { in_channels = required, out_channels = required, kernel_size = required, stride = 1,
    padding = 0, dilation = 1, groups = 1, bias = true })
  for _, name in ipairs { "in_channels", "out_channels", "groups" } do o[name] = whole(o[name], 1, "Conv2d", name) end
  for _, name in ipairs { "kernel_size", "stride", "dilation" } do o[name] = sizes(o[name], 1, "Conv2d", name) end
  o.padding = sizes(o.padding, 0, "Conv2d", "padding")
  local kh, kw = o.kernel_size[1], o.kernel_size[2]
  if o.in_channels % o.groups ~= 0 or o.out_channels % o.groups ~= 0 then
    core.fail(("Conv2d: %d groups don't divide %d -> %d channels"):format(o.groups, o.in_channels, o.out_channels))
  end
  local fan = o.in_channels // o.groups * kh * kw
  self.weight = Parameter(uniform({ o.out_channels, o.in_channels // o.groups, kh, kw }, 1 / math.sqrt(fan)))
  if o.bias then self.bias = Parameter(uniform({ o.out_channels }, 1 / math.sqrt(fan))) end
  self.options = o
  self.geometry = { stride = o.stride, padding = o.padding, dilation = o.dilation, groups = o.groups }
end

function Conv2d:forward(x)
  return F.conv2d(x, self.weight, self.bias, self.geometry)
end

function Conv2d:extra()
  local o = self.options
  return ("%d -> %d, %s, stride %s, padding %s%s"):format(o.in_channels, o.out_channels, pair(o.kernel_size), pair(o.stride),
    pair(o.padding), o.groups > 1 and (", groups %d"):format(o.groups) or "")
end

-- ---- ConvTranspose2d ----

local ConvTranspose2d = layer "ConvTranspose2d"

function ConvTranspose2d:init(o)
  o = options("ConvTranspose2d", o, { in_channels = required, out_channels = required, kernel_size = required, stride = 1,
    padding = 0, output_padding = 0, dilation = 1, groups = 1, bias = true })
  for _, name in ipairs { "in_channels", "out_channels", "groups" } do o[name] = whole(o[name], 1, "ConvTranspose2d", name) end
  for _, name in ipairs { "kernel_size", "stride", "dilation" } do o[name] = sizes(o[name], 1, "ConvTranspose2d", name) end
  for _, name in ipairs { "padding", "output_padding" } do o[name] = sizes(o[name], 0, "ConvTranspose2d", name) end
  local kh, kw = o.kernel_size[1], o.kernel_size[2]
  if o.in_channels % o.groups ~= 0 or o.out_channels % o.groups ~= 0 then
    core.fail(("ConvTranspose2d: %d groups don't divide %d -> %d channels"):format(o.groups, o.in_channels, o.out_channels))
  end
  for d = 1, 2 do
    if o.output_padding[d] >= math.max(o.stride[d], o.dilation[d]) then
      core.fail(("ConvTranspose2d: output_padding %d must be less than the stride %d or the dilation %d"):format(
        o.output_padding[d], o.stride[d], o.dilation[d]))
    end
  end
  local bound = 1 / math.sqrt(o.out_channels // o.groups * kh * kw)
  self.weight = Parameter(uniform({ o.in_channels, o.out_channels // o.groups, kh, kw }, bound))
  if o.bias then self.bias = Parameter(uniform({ o.out_channels }, bound)) end
  self.options = o
  self.geometry = { stride = o.stride, padding = o.padding, output_padding = o.output_padding, dilation = o.dilation,
    groups = o.groups }
end

function ConvTranspose2d:forward(x)
  return F.conv_transpose2d(x, self.weight, self.bias, self.geometry)
end

ConvTranspose2d.extra = Conv2d.extra

-- ---- Linear ----

local Linear = layer "Linear"

function Linear:init(o)
  o = options("Linear", o, { in_features = required, out_features = required, bias = true })
  for _, name in ipairs { "in_features", "out_features" } do o[name] = whole(o[name], 1, "Linear", name) end
  local bound = 1 / math.sqrt(o.in_features)
  self.weight = Parameter(uniform({ o.out_features, o.in_features }, bound))
  if o.bias then self.bias = Parameter(uniform({ o.out_features }, bound)) end
  self.options = o
end

function Linear:forward(x)
  return F.linear(x, self.weight, self.bias)
end

function Linear:extra()
  return ("%d -> %d"):format(self.options.in_features, self.options.out_features)
end

-- ---- Embedding ----

local Embedding = layer "Embedding"

function Embedding:init(o)
  o = options("Embedding", o, { num_embeddings = required, embedding_dim = required, padding_idx = options.optional })
  for _, name in ipairs { "num_embeddings", "embedding_dim" } do o[name] = whole(o[name], 1, "Embedding", name) end
  local weight = core.randn(o.num_embeddings, o.embedding_dim)
  o.padding_idx = embedding_row("Embedding", o.padding_idx, o.num_embeddings)
  if o.padding_idx then weight:select(1, o.padding_idx + 1):zero_() end
  self.weight = Parameter(weight)
  self.options = o
  self.padding = { padding_idx = o.padding_idx }
end

function Embedding:forward(x)
  return F.embedding(x, self.weight, self.padding)
end

function Embedding:extra()
  local o = self.options
  return ("%d, %d%s"):format(o.num_embeddings, o.embedding_dim, o.padding_idx and (", padding %d"):format(o.padding_idx) or "")
end

-- ---- BatchNorm2d ----

local BatchNorm2d = layer "BatchNorm2d"

function BatchNorm2d:init(o)
  if type(o) == "number" then o = { num_features = o } end
  o = options("BatchNorm2d", o, { num_features = required, eps = 1e-5, momentum = 0.1, affine = true,
    track_running_stats = true })
  local c = whole(o.num_features, 1, "BatchNorm2d", "num_features")
  if o.affine then
    self.weight = Parameter(core.ones(c))
    self.bias = Parameter(core.zeros(c))
  end
  if o.track_running_stats then
    self:register_buffer("running_mean", core.zeros(c))
    self:register_buffer("running_var", core.ones(c))
    self:register_buffer("num_batches_tracked", core.zeros({}, { dtype = "int64" }))
  end
  self.options = o
end

-- Whether it normalises by the statistics of the batch.
function BatchNorm2d:uses_batch()
  return self.training or not self.options.track_running_stats
end

-- What comes out is multiplied by `factor`, if there is one: a number for each channel. With `less_zero` it is less what the
-- running statistics make of zero.
function BatchNorm2d:forward(x, factor, less_zero)
  local o, weight, bias = self.options, self.weight, self.bias
  if factor then
    weight, bias = weight and weight * factor or factor:expand(o.num_features), bias and bias * factor
  end
  local training = self:uses_batch()
  if training and o.track_running_stats and not core.is_recomputing() then self.num_batches_tracked:add_(1) end
  return F.batch_norm(x, { weight = weight, bias = bias, running_mean = self.running_mean,
    running_var = self.running_var, training = training, momentum = o.momentum, eps = o.eps,
    less_zero = less_zero })
end

-- Corrects the running mean for a constant that should have been added to the last batch, and was not.
function BatchNorm2d:shift_statistics(constant)
  if not self.running_mean or core.is_recomputing() then return end
  core.no_grad(function() self.running_mean:add_(constant:detach() * self.options.momentum) end)
end

-- scale, shift in float64 with which evaluation multiplies and adds.
function BatchNorm2d:fold()
  if not self.running_var then
    core.fail("BatchNorm2d: a norm without running statistics can't be folded into a convolution")
  end
  local scale = (self.running_var:to("float64") + self.options.eps) ^ -0.5
  if self.weight then scale = scale * self.weight:to("float64") end
  local shift = -self.running_mean:to("float64") * scale
  if self.bias then shift = shift + self.bias:to("float64") end
  return scale, shift
end

function BatchNorm2d:extra()
  return tostring(self.options.num_features)
end

-- ---- squeeze-excite: channels are weighted by what their means say ----

local SqueezeExcite = layer "SqueezeExcite"

function SqueezeExcite:init(o)
  o = options("SqueezeExcite", o, { channels = required, reduced = required })
  local channels, reduced = whole(o.channels, 1, "SqueezeExcite", "channels"), whole(o.reduced, 1, "SqueezeExcite", "reduced")
  self.reduce = Conv2d { in_channels = channels, out_channels = reduced, kernel_size = 1 }
  self.expand = Conv2d { in_channels = reduced, out_channels = channels, kernel_size = 1 }
end

function SqueezeExcite:forward(x)
  return x * self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x)))):sigmoid()
end

function SqueezeExcite:extra()
  return ("%d by %d"):format(self.reduce.options.in_channels, self.reduce.options.out_channels)
end

-- A class that passes its options to a function of F. A lone number is option `natural`.
local function pooling(name, f, known, natural)
  local class = layer(name)
  function class:init(o)
    if type(o) == "number" then o = { [natural] = o } end
    self.options = options(name, o, known)
  end
  function class:forward(x)
    return f(x, self.options)
  end
  function class:extra()
    local o = self.options
    if natural == "output_size" then return "to " .. pair(o.output_size) end
    return ("%s, stride %s, padding %s"):format(pair(o.kernel_size), pair(o.stride or o.kernel_size), pair(o.padding))
  end
end

pooling("MaxPool2d", F.max_pool2d, { kernel_size = required, stride = options.optional, padding = 0, dilation = 1,
  ceil_mode = false }, "kernel_size")
pooling("AvgPool2d", F.avg_pool2d, { kernel_size = required, stride = options.optional, padding = 0, ceil_mode = false,
  count_include_pad = true }, "kernel_size")
pooling("AdaptiveAvgPool2d", F.adaptive_avg_pool2d, { output_size = required }, "output_size")
pooling("AdaptiveMaxPool2d", F.adaptive_max_pool2d, { output_size = required }, "output_size")

document("nn.Conv2d", [[
  nn.Conv2d{in_channels=, out_channels=, kernel_size=, stride=, padding=, dilation=, groups=, bias=} -> module
  A convolution of (N, I, H, W). Weight and bias start uniform within 1/sqrt(I/groups * KH * KW).
  > nn.Conv2d{in_channels = 3, out_channels = 8, kernel_size = 3, padding = 1}(orepa.ones(1, 3, 8, 8))]])
document("nn.ConvTranspose2d", "nn.ConvTranspose2d{in_channels=, out_channels=, kernel_size=, stride=, padding=, "
  .. "output_padding=, dilation=, groups=, bias=} -> module" .. [[

  F.conv_transpose2d as a layer: it undoes what a convolution of this geometry does to sizes. The weight is
  (I, O/groups, KH, KW); it and the bias start uniform within 1/sqrt(O/groups * KH * KW).
  > nn.ConvTranspose2d{in_channels = 8, out_channels = 3, kernel_size = 2, stride = 2}(orepa.ones(1, 8, 4, 4))]])
document("nn.Linear", [[
  nn.Linear{in_features=, out_features=, bias=} -> module
  x times the transposed weight, plus a bias.
  > nn.Linear{in_features = 4, out_features = 2}(orepa.ones(3, 4))]])
document("nn.Embedding", [[
  nn.Embedding{num_embeddings=, embedding_dim=, padding_idx=} -> module
  F.embedding with a table of its own, normal at first. The row padding_idx, if there is one, starts as zeros and gets no
  gradient.
  > nn.Embedding{num_embeddings = 10, embedding_dim = 3}(orepa.tensor({7, 0}, {dtype = "int64"}))]])
document("nn.BatchNorm2d", [[
  nn.BatchNorm2d{num_features=, eps=, momentum=, affine=, track_running_stats=} -> module
  Normalises each channel; nn.BatchNorm2d(8) names the channels alone.
  > nn.BatchNorm2d(8)(orepa.randn(2, 8, 4, 4))]])
document("norm:fold", [[
  norm:fold() -> scale, shift
  With what an nn.BatchNorm2d multiplies and adds in evaluation, a float64 number for each channel.
  > nn.BatchNorm2d(8):fold()]])
document("norm:uses_batch", [[
  norm:uses_batch() -> boolean
  Whether a forward pass normalises by the statistics of the batch: in training, and always without running statistics.
  > nn.BatchNorm2d(8):eval():uses_batch()]])
document("norm:shift_statistics", [[
  norm:shift_statistics(constant)
  Corrects the running mean as if a constant, a number for each channel, had been added to the last batch.
  > nn.BatchNorm2d(8):shift_statistics(orepa.ones(8))]])
document("nn.SqueezeExcite", [[
  nn.SqueezeExcite{channels=, reduced=} -> module
  Multiplies each channel by a weight between 0 and 1, which two 1x1 convolutions (`reduce`, `expand`) make of all channels'
  means.
  > nn.SqueezeExcite{channels = 8, reduced = 2}(orepa.ones(1, 8, 4, 4))]])
document("nn.MaxPool2d", [[
  nn.MaxPool2d{kernel_size=, stride=, padding=, dilation=, ceil_mode=} -> module
  F.max_pool2d as a layer; nn.MaxPool2d(2) names the window alone.
  > nn.MaxPool2d(2)(orepa.ones(1, 1, 4, 4))]])
document("nn.AvgPool2d", [[
  nn.AvgPool2d{kernel_size=, stride=, padding=, ceil_mode=, count_include_pad=} -> module
  F.avg_pool2d as a layer.
  > nn.AvgPool2d(2)(orepa.ones(1, 1, 4, 4))]])
document("nn.AdaptiveAvgPool2d", [[
  nn.AdaptiveAvgPool2d{output_size=} -> module
  F.adaptive_avg_pool2d as a layer.
  > nn.AdaptiveAvgPool2d(1)(orepa.ones(1, 1, 4, 4))]])
document("nn.AdaptiveMaxPool2d", [[
  nn.AdaptiveMaxPool2d{output_size=} -> module
  F.adaptive_max_pool2d as a layer.
  > nn.AdaptiveMaxPool2d(2)(orepa.ones(1, 1, 4, 4))]])

return layers
