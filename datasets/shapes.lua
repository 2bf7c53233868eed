-- Shapes: a square, a disc or a cross of random size somewhere in a noisy grey picture, made when it is asked for: other pictures
-- in each epoch. A dataset in Lua to copy and change. For data.loader{dataset = "orepa.datasets.shapes", dataset_options =
-- {size = 1000, side = 28}, ...}, whose batches are images (B, 1, side, side) and labels 0, 1, 2.

local orepa = require "orepa"
local options = require "orepa.options"

-- Whether a pixel this far from the centre belongs to the shape of a radius.
local shapes = {
  function(down, right, radius) return math.max(math.abs(down), math.abs(right)) <= radius end,
  function(down, right, radius) return down * down + right * right <= radius * radius end,
  function(down, right, radius)
    local near, far = math.abs(down), math.abs(right)
    return math.min(near, far) <= radius / 3 and math.max(near, far) <= radius
  end,
}

local Shapes = {}
Shapes.__index = Shapes

-- Sample i: an image (1, side, side) and its label.
function Shapes:get(i)
  local label, side = i % #shapes, self.side
  local radius = math.random(side // 8 + 1, side // 4 + 1)
  local top, left = math.random(radius + 1, side - radius), math.random(radius + 1, side - radius)
  local rows = {}
  for y = 1, side do
    rows[y] = {}
    for x = 1, side do rows[y][x] = shapes[label + 1](y - top, x - left, radius) and 1 or 0 end
  end
  local noise <close> = orepa.randn(1, side, side) * 0.2
  return orepa.tensor { rows } + noise, label
end

return function(o)
  o = options("shapes", o, { size = 1000, side = 28 })
  if math.type(o.side) ~= "integer" or o.side < 8 then
    orepa.fail(("shapes: side is %s, an integer of at least 8 expected"):format(tostring(o.side)))
  end
  return setmetatable({ size = o.size, side = o.side, classes = #shapes }, Shapes)
end
