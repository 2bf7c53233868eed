-- reparam.make: the block that stands for a convolution with its norm in a network of one kind. The kernel's size decides, as in
-- the reference.

local core = require "orepa.core"
local document = require "orepa.document"
local blocks = require "orepa.nn.named_blocks"
local options = require "orepa.options"
local reparam = require "orepa.reparam"

-- Kernels from 3 up to 7 are re-parameterized, others are plain.
local function between(make)
  return function(o)
    local k = o.kernel_size
    return (math.type(k) == "integer" and k >= 3 and k < 7 and make or blocks.ConvBN)(o)
  end
end

local kinds = {
  none = blocks.ConvBN,
  dbb = between(blocks.DBB),
  repvgg = between(blocks.RepVGGBlock),
  orepa_vgg = between(blocks.OREPAVGG),
  orepa = function(o)
    if o.kernel_size == 1 and (o.groups or 1) == 1 then return blocks.OREPA1x1(o) end
    if o.kernel_size == 1 then return blocks.ConvBN(o) end
    return math.type(o.kernel_size) == "integer" and o.kernel_size >= 7 and blocks.OREPALargeConv(o) or blocks.OREPA(o)
  end,
}

function reparam.make(kind, o)
  local make = kinds[kind]
  if not make then
    core.fail(("reparam.make: no kind of block is called '%s' (there are %s)"):format(tostring(kind),
      table.concat(options.names(kinds), " ")))
  end
  if type(o) ~= "table" then core.fail(("reparam.make: a table of options expected, got %s"):format(type(o))) end
  return make(o)
end

document("reparam.make", [[
  reparam.make(kind, {in_channels=, out_channels=, kernel_size=, stride=, groups=, act=, ...}) -> module
  The block that stands for a convolution with its norm in networks of a kind: none, dbb, orepa, repvgg or orepa_vgg. Where the
  kind has no block for a size (dbb, repvgg and orepa_vgg are for 3x3 and 5x5) it is nn.ConvBN.
  > orepa.reparam.make("orepa", {in_channels = 4, out_channels = 8, kernel_size = 1})]])

return {}
