-- RepVGG (CVPR 2021): a stack of 3x3 blocks without residual sums. Names of modules are those of the reference.

local orepa = require "orepa"
local Classifier = require "orepa.models.classifier"
local options = require "orepa.options"
local models = require "orepa.models"
local nn = orepa.nn

local RepVGG = Classifier:extend("RepVGG")

local known = {
  num_blocks = options.required, width = options.required, groups = 1, reparam = "repvgg", classes = 1000, in_channels = 3,
  deploy = false,
}

function RepVGG:init(o)
  o = options("repvgg", o, known)
  Classifier.need_four("repvgg", o, "num_blocks", "width")
  local conv = models.conv_maker("repvgg", o.reparam, { "none", "dbb", "orepa", "repvgg", "orepa_vgg" })
  local in_channels, position = math.min(64, math.floor(64 * o.width[1])), 0
  self.stage0 = conv(o.in_channels, in_channels, 3, { stride = 2, act = "relu" })
  for k = 1, 4 do
    local planes, stage = math.floor(64 * 2 ^ (k - 1) * o.width[k]), nn.Sequential()
    for n = 1, o.num_blocks[k] do
      position = position + 1 -- every second layer is grouped
      stage:add(conv(in_channels, planes, 3, { stride = n == 1 and 2 or 1, act = "relu",
        groups = position % 2 == 0 and o.groups > 1 and o.groups or nil }))
      in_channels = planes
    end
    self["stage" .. k] = stage
  end
  self:finish(in_channels, o)
end

-- ---- names ----

local shallow, deep = { 2, 4, 14, 1 }, { 4, 6, 16, 1 }

local function register(name, num_blocks, width, groups)
  models.register(name, function(o)
    local fixed = { num_blocks = num_blocks, groups = groups }
    return RepVGG(options.with(fixed, options.with(o, { width = models.scaled(width, o.width) })))
  end)
end

models.register("repvgg", function(o) return RepVGG(o) end)
register("repvgg_a0", shallow, { 0.75, 0.75, 0.75, 2.5 })
register("repvgg_a1", shallow, { 1, 1, 1, 2.5 })
register("repvgg_a2", shallow, { 1.5, 1.5, 1.5, 2.75 })
register("repvgg_b0", deep, { 1, 1, 1, 2.5 })
for name, width in pairs { b1 = { 2, 2, 2, 4 }, b2 = { 2.5, 2.5, 2.5, 5 }, b3 = { 3, 3, 3, 5 } } do
  register("repvgg_" .. name, deep, width)
  register("repvgg_" .. name .. "g2", deep, width, 2)
  register("repvgg_" .. name .. "g4", deep, width, 4)
end

return RepVGG
