-- ResNet-18/34/50/101, plain and re-parameterized: each convolution with its norm is one block, chosen by `reparam` and the
-- kernel's size. Names of modules are those of the reference, so that its checkpoints load by name.

local orepa = require "orepa"
local options = require "orepa.options"
local models = require "orepa.models"
local nn, F = orepa.nn, orepa.F

-- ---- which block ----

local blocks = {
  none = function(o) return nn.ConvBN(o) end,
  orepa = function(o)
    if o.kernel_size == 1 then return nn.OREPA1x1(o) end
    return o.kernel_size >= 7 and nn.OREPALargeConv(o) or nn.OREPA(o)
  end,
}

-- A function conv(in_channels, out_channels, kernel_size, stride, act) that makes blocks of one kind.
local function block_maker(kind)
  return function(in_channels, out_channels, kernel_size, stride, act)
    return blocks[kind] { in_channels = in_channels, out_channels = out_channels, kernel_size = kernel_size,
      stride = stride, act = act }
  end
end

-- ---- residual blocks: the last convolution's norm is followed by the sum, the sum by the ReLU ----

local Basic = nn.Module:extend("Basic")
Basic.expansion = 1

-- A basic block's shortcut is a plain convolution whatever the others are.
function Basic:init(conv, in_channels, planes, stride)
  if stride ~= 1 or in_channels ~= planes then
    self.shortcut = block_maker("none")(in_channels, planes, 1, stride)
  end
  self.conv1 = conv(in_channels, planes, 3, stride, "relu")
  self.conv2 = conv(planes, planes, 3, 1, "relu")
end

function Basic:forward(x)
  return self.conv2(self.conv1(x), self.shortcut and self.shortcut(x) or x)
end

local Bottleneck = nn.Module:extend("Bottleneck")
Bottleneck.expansion = 4

function Bottleneck:init(conv, in_channels, planes, stride)
  local out_channels = planes * Bottleneck.expansion
  if stride ~= 1 or in_channels ~= out_channels then
    self.shortcut = conv(in_channels, out_channels, 1, stride)
  end
  self.conv1 = conv(in_channels, planes, 1, 1, "relu")
  self.conv2 = conv(planes, planes, 3, stride, "relu")
  self.conv3 = conv(planes, out_channels, 1, 1, "relu")
end

function Bottleneck:forward(x)
  return self.conv3(self.conv2(self.conv1(x)), self.shortcut and self.shortcut(x) or x)
end

local residuals = { basic = Basic, bottleneck = Bottleneck }

-- ---- the network ----

local ResNet = nn.Module:extend("ResNet")

local known = {
  num_blocks = options.required, residual = "basic", width = 1.0, reparam = "none", classes = 1000, in_channels = 3,
  stem = "imagenet", deploy = false,
}

local function stem(conv, kind, in_channels, planes)
  if kind == "small" then return nn.ModuleDict { conv1 = conv(in_channels, planes, 3, 1, "relu") } end
  return nn.ModuleDict { conv1 = conv(in_channels, planes, 7, 2, "relu"),
    maxpool = nn.MaxPool2d { kernel_size = 3, stride = 2, padding = 1 } }
end

local function check(o)
  if not blocks[o.reparam] then orepa.fail(("resnet: reparam is '%s'; there are none, orepa"):format(tostring(o.reparam))) end
  if not residuals[o.residual] then
    orepa.fail(("resnet: residual is '%s'; there are basic, bottleneck"):format(tostring(o.residual)))
  end
  if o.stem ~= "imagenet" and o.stem ~= "small" then
    orepa.fail(("resnet: stem is '%s'; there are imagenet, small"):format(tostring(o.stem)))
  end
  if type(o.num_blocks) ~= "table" or #o.num_blocks ~= 4 then orepa.fail("resnet: num_blocks is a list of four numbers") end
end

-- The width multiplier of stage k: one number for all, or a list.
local function multiplier(width, k)
  return type(width) == "table" and width[k] or width
end

function ResNet:init(o)
  o = options("resnet", o, known)
  check(o)
  local conv, residual = block_maker(o.reparam), residuals[o.residual]
  local in_channels = math.floor(64 * multiplier(o.width, 1))
  self.stage0 = stem(conv, o.stem, o.in_channels, in_channels)
  for k = 1, 4 do
    local planes, stage = math.floor(64 * 2 ^ (k - 1) * multiplier(o.width, k)), nn.Sequential()
    for n = 1, o.num_blocks[k] do
      stage:add(residual(conv, in_channels, planes, n == 1 and k > 1 and 2 or 1))
      in_channels = planes * residual.expansion
    end
    self["stage" .. k] = stage
  end
  self.linear = nn.Linear { in_features = in_channels, out_features = o.classes }
  if o.deploy then self:deploy() end
end

function ResNet:forward(x)
  x = self.stage0.conv1(x)
  if self.stage0.maxpool then x = self.stage0.maxpool(x) end
  for k = 1, 4 do x = self["stage" .. k](x) end
  return self.linear(F.adaptive_avg_pool2d(x):flatten(2))
end

-- ---- names ----

local function named(num_blocks, residual)
  return function(o)
    return ResNet(options.with({ num_blocks = num_blocks, residual = residual }, o))
  end
end

models.register("resnet", function(o) return ResNet(o) end)
models.register("resnet18", named({ 2, 2, 2, 2 }, "basic"))
models.register("resnet34", named({ 3, 4, 6, 3 }, "basic"))
models.register("resnet50", named({ 3, 4, 6, 3 }, "bottleneck"))
models.register("resnet101", named({ 3, 4, 23, 3 }, "bottleneck"))

return ResNet
