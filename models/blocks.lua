-- Which block stands for a convolution with its norm: by the name of a re-parameterization and the kernel's size, as in the
-- reference.

local orepa = require "orepa"
local nn = orepa.nn

local function between(make)
  return function(o) return (o.kernel_size >= 3 and o.kernel_size < 7 and make or nn.ConvBN)(o) end
end

local makers = {
  none = function(o) return nn.ConvBN(o) end,
  dbb = between(function(o) return nn.DBB(o) end),
  repvgg = between(function(o) return nn.RepVGGBlock(o) end),
  orepa_vgg = between(function(o) return nn.OREPAVGG(o) end),
  orepa = function(o)
    if o.kernel_size == 1 then return nn.OREPA1x1(o) end
    return o.kernel_size >= 7 and nn.OREPALargeConv(o) or nn.OREPA(o)
  end,
}

-- A function conv(in_channels, out_channels, kernel_size, {stride=, groups=, act=}) that makes blocks of one kind, which must
-- be in a list.
local function maker(network, kind, kinds)
  for _, known in ipairs(kinds) do
    if kind == known then
      return function(in_channels, out_channels, kernel_size, o)
        return makers[kind] { in_channels = in_channels, out_channels = out_channels, kernel_size = kernel_size,
          stride = o.stride, groups = o.groups, act = o.act }
      end
    end
  end
  orepa.fail(("%s: reparam is '%s'; there are %s"):format(network, tostring(kind), table.concat(kinds, ", ")))
end

return { maker = maker }
