-- MobileOne (CVPR 2023): depthwise and pointwise blocks in turn, each with several branches; S4 with squeeze-excite. Names of
-- modules are those of the authors' code.

local orepa = require "orepa"
local Classifier = require "orepa.models.classifier"
local options = require "orepa.options"
local models = require "orepa.models"
local nn = orepa.nn

local MobileOne = Classifier:extend("MobileOne")

local known = {
  width = options.required, branches = 1, excite = false, num_blocks = options.optional, mode = options.optional,
  classes = 1000, in_channels = 3, deploy = false,
}

function MobileOne:init(o)
  o = options("mobileone", options.with({ num_blocks = { 2, 8, 10, 1 } }, o or {}), known)
  Classifier.need_four("mobileone", o, "width", "num_blocks")
  local function block(in_channels, out_channels, more)
    return nn.MobileOneBlock(options.with({ in_channels = in_channels, out_channels = out_channels, mode = o.mode }, more))
  end
  local in_channels = math.min(64, math.floor(64 * o.width[1]))
  self.stage0 = block(o.in_channels, in_channels, { kernel_size = 3, stride = 2 })
  local excited = { 0, 0, o.num_blocks[3] // 2, o.num_blocks[4] } -- blocks with squeeze-excite at a stage's end
  for k = 1, 4 do
    local planes, stage = math.floor(64 * 2 ^ (k - 1) * o.width[k]), nn.Sequential()
    for n = 1, o.num_blocks[k] do
      local excite = o.excite and n > o.num_blocks[k] - excited[k]
      stage:add(block(in_channels, in_channels, { kernel_size = 3, stride = n == 1 and 2 or 1, groups = in_channels,
        num_branches = o.branches, excite = excite }))
      stage:add(block(in_channels, planes, { kernel_size = 1, num_branches = o.branches, excite = excite }))
      in_channels = planes
    end
    self["stage" .. k] = stage
  end
  self:finish(in_channels, o)
end

-- ---- names ----

local variants = {
  s0 = { width = { 0.75, 1, 1, 2 }, branches = 4 },
  s1 = { width = { 1.5, 1.5, 2, 2.5 } },
  s2 = { width = { 1.5, 2, 2.5, 4 } },
  s3 = { width = { 2, 2.5, 3, 4 } },
  s4 = { width = { 3, 3.5, 3.5, 4 }, excite = true },
}

models.register("mobileone", function(o) return MobileOne(o) end)
for name, variant in pairs(variants) do
  models.register("mobileone_" .. name, function(o)
    return MobileOne(options.with(variant, options.with(o, { width = models.scaled(variant.width, o.width) })))
  end)
end

return MobileOne
