-- ResNet-18/34/50/101 and ResNeXt-50, plain and re-parameterized: each convolution with its norm is one block, chosen by
-- `reparam` and the kernel's size. Names of modules are those of the reference, so that its checkpoints load by name.

local orepa = require "orepa"
local Classifier = require "orepa.models.classifier"
local options = require "orepa.options"
local models = require "orepa.models"
local nn, F = orepa.nn, orepa.F

-- ---- residual blocks: the last convolution's norm is followed by the sum, the sum by the ReLU ----

local Basic = nn.Module:extend("Basic")
Basic.expansion = 1

-- A basic block's shortcut is a plain convolution whatever the others are.
function Basic:init(conv, in_channels, planes, o)
  if o.stride ~= 1 or in_channels ~= planes then
    self.shortcut = nn.ConvBN { in_channels = in_channels, out_channels = planes, kernel_size = 1, stride = o.stride }
  end
  self.conv1 = conv(in_channels, planes, 3, { stride = o.stride, act = "relu" })
  self.conv2 = conv(planes, planes, 3, { act = "relu" })
  self.own_relu = o.reparam == "orepa_vgg" -- such a block has a ReLU before the sum too
end

function Basic:forward(x)
  local shortcut, y = self.shortcut and self.shortcut(x) or x, self.conv1(x)
  if self.own_relu then return F.relu(self.conv2(y) + shortcut) end
  return self.conv2(y, shortcut)
end

local Bottleneck = nn.Module:extend("Bottleneck")
Bottleneck.expansion = 4

function Bottleneck:init(conv, in_channels, planes, o)
  local out_channels = planes * Bottleneck.expansion
  local inner = o.cardinality and o.cardinality * math.floor(planes * o.width_per_group / 64) or planes
  if o.stride ~= 1 or in_channels ~= out_channels then
    self.shortcut = conv(in_channels, out_channels, 1, { stride = o.stride })
  end
  self.conv1 = conv(in_channels, inner, 1, { act = "relu" })
  self.conv2 = conv(inner, inner, 3, { stride = o.stride, groups = o.cardinality, act = "relu" })
  self.conv3 = conv(inner, out_channels, 1, { act = "relu" })
end

function Bottleneck:forward(x)
  return self.conv3(self.conv2(self.conv1(x)), self.shortcut and self.shortcut(x) or x)
end

local residuals = { basic = Basic, bottleneck = Bottleneck }

-- ---- the network ----

local ResNet = Classifier:extend("ResNet")

local known = {
  num_blocks = options.required, residual = "basic", width = 1.0, reparam = "none", classes = 1000, in_channels = 3,
  stem = "imagenet", cardinality = options.optional, width_per_group = options.optional, deploy = false,
}

local function stem(conv, kind, in_channels, planes)
  if kind == "small" then return nn.ModuleDict { conv1 = conv(in_channels, planes, 3, { act = "relu" }) } end
  return nn.ModuleDict { conv1 = conv(in_channels, planes, 7, { stride = 2, act = "relu" }),
    maxpool = nn.MaxPool2d { kernel_size = 3, stride = 2, padding = 1 } }
end

local function check(o)
  if not residuals[o.residual] then
    orepa.fail(("resnet: residual is '%s'; there are basic, bottleneck"):format(tostring(o.residual)))
  end
  if o.stem ~= "imagenet" and o.stem ~= "small" then
    orepa.fail(("resnet: stem is '%s'; there are imagenet, small"):format(tostring(o.stem)))
  end
  Classifier.need_four("resnet", o, "num_blocks")
  if (o.cardinality == nil) ~= (o.width_per_group == nil) then
    orepa.fail("resnet: cardinality and width_per_group go together")
  end
  if o.cardinality and o.residual ~= "bottleneck" then orepa.fail("resnet: cardinality goes with residual = \"bottleneck\"") end
end

-- The width multiplier of stage k: one number for all, or a list.
local function multiplier(width, k)
  return type(width) == "table" and width[k] or width
end

function ResNet:init(o)
  o = options("resnet", o, known)
  check(o)
  local conv = models.conv_maker("resnet", o.reparam, { "none", "dbb", "orepa", "orepa_vgg" })
  local residual = residuals[o.residual]
  local in_channels = math.floor(64 * multiplier(o.width, 1))
  self.stage0 = stem(conv, o.stem, o.in_channels, in_channels)
  for k = 1, 4 do
    local planes, stage = math.floor(64 * 2 ^ (k - 1) * multiplier(o.width, k)), nn.Sequential()
    for n = 1, o.num_blocks[k] do
      stage:add(residual(conv, in_channels, planes, { stride = n == 1 and k > 1 and 2 or 1, reparam = o.reparam,
        cardinality = o.cardinality, width_per_group = o.width_per_group }))
      in_channels = planes * residual.expansion
    end
    self["stage" .. k] = stage
  end
  self:finish(in_channels, o)
end

function ResNet:forward(x)
  x = self.stage0.conv1(x)
  if self.stage0.maxpool then x = self.stage0.maxpool(x) end
  return self:classify(x, 1)
end

-- ---- names ----

local function named(num_blocks, residual, more)
  local fixed = options.with({ num_blocks = num_blocks, residual = residual }, more or {})
  return function(o) return ResNet(options.with(fixed, o)) end
end

models.register("resnet", function(o) return ResNet(o) end)
models.register("resnet18", named({ 2, 2, 2, 2 }, "basic"))
models.register("resnet34", named({ 3, 4, 6, 3 }, "basic"))
models.register("resnet50", named({ 3, 4, 6, 3 }, "bottleneck"))
models.register("resnet101", named({ 3, 4, 23, 3 }, "bottleneck"))
models.register("resnext50", named({ 3, 4, 6, 3 }, "bottleneck", { cardinality = 32, width_per_group = 4 }))

return ResNet
