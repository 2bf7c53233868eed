-- The named blocks: each is a few lines of description. Names, initial values and the order of branches (that of the rows of
-- `vector`) are those of the reference implementation, so that its checkpoints load by name.

local core = require "orepa.core"
local document = require "orepa.document"
local L = require "orepa.reparam"
local ReparamBlock = require("orepa.nn.block").ReparamBlock

local nn = {}

local function block(kind, o, description)
  description.kind = kind
  return ReparamBlock(o, description)
end

local function check_table(kind, o)
  if type(o) ~= "table" then core.fail(("%s: a table of options expected, got %s"):format(kind, type(o))) end
end

local function only(kind, o, name, value)
  check_table(kind, o)
  if o[name] ~= nil and o[name] ~= value then
    core.fail(("%s: %s is %s, this block has %s"):format(kind, name, tostring(o[name]), tostring(value)))
  end
end

local LARGEST = 513 -- a chain of the engine has at most 256 layers

-- A kernel size that must be given, as a number.
local function odd_kernel(kind, o, least)
  check_table(kind, o)
  local k = math.tointeger(o.kernel_size)
  if not k or k % 2 == 0 or k < least or k > LARGEST then
    core.fail(("%s: kernel_size is %s, an odd number of at least %d (and at most %d) expected"):format(kind,
      tostring(o.kernel_size), least, LARGEST))
  end
  return k
end

function nn.ConvBN(o)
  check_table("ConvBN", o)
  return block("ConvBN", o, { scaling = "none", deployed = "conv", branches = {
    { name = "conv", L.conv { o.kernel_size, name = "conv.weight" } } } })
end

-- The OREPA block's branches; p is the prefix of the names.
local function body(o, k, p)
  local inner = (math.tointeger(o.groups) or 1) > 4 and 2 or 1
  return { deployed = "orepa_reparam", init = { kaiming = 0 }, branches = {
    { name = "origin", scale = 0.25, L.conv { k, name = p .. "origin" } },
    { name = "avg", scale = 0.25, L.conv { 1, name = p .. "avg_conv" }, L.average { k, name = p .. "avg_avg" } },
    { name = "pfir", scale = 0, L.conv { 1, name = p .. "pfir_conv" }, L.prior { k, name = p .. "prior" } },
    { name = "1x1_kxk", scale = 0.5,
      L.conv { 1, expand = inner, plus_identity = "id_tensor", name = p .. "1x1_kxk_idconv1" },
      L.conv { k, name = p .. "1x1_kxk_conv2" } },
    { name = "1x1", scale = 1, L.conv { 1, name = p .. "1x1" } },
    { name = "dw_pw", scale = 0.5, L.depthwise { k, expand = 8, name = p .. "gconv_dw" },
      L.conv { 1, interleave = true, name = p .. "gconv_pw" } } } }
end

function nn.OREPA(o)
  check_table("OREPA", o)
  return block("OREPA", o, body(o, o.kernel_size, "weight_orepa_"))
end

function nn.OREPA1x1(o)
  local kind, p = "OREPA1x1", "weight_or1x1_"
  only(kind, o, "kernel_size", 1)
  only(kind, o, "groups", 1)
  local I, O = math.tointeger(o.in_channels) or 1, math.tointeger(o.out_channels) or 1 -- ReparamBlock checks them
  return block(kind, o, { kernel_size = 1, init = { kaiming = 1 }, deployed = "or1x1_reparam", branches = {
    { name = "origin", scale = 1, L.conv { 1, name = p .. "origin" } },
    { name = "l2i", scale = 0.5,
      L.conv { 1, out = math.min(I, O), init = O > I and "identity" or nil, name = p .. "l2i_conv1" },
      L.conv { 1, init = O <= I and "identity" or nil, name = p .. "l2i_conv2" } } } })
end

-- The linear deep stem: a chain of 3x3 layers squeezed to k x k, correlated as the reference does.
local function stem(kind, o, layer)
  local chain = { name = "stem", correlate = true }
  for l = 0, (odd_kernel(kind, o, 5) - 3) // 2 do chain[l + 1] = layer("weight" .. l, o.out_channels) end
  return block(kind, o, { scaling = "none", deployed = "or_large_reparam", branches = { chain } })
end

function nn.OREPALargeConvBase(o)
  return stem("OREPALargeConvBase", o, function(name, out) return L.conv { 3, out = out, name = name } end)
end

function nn.OREPALargeConv(o)
  only("OREPALargeConv", o, "groups", 1)
  return stem("OREPALargeConv", o, function(name, out)
    local d = body(o, 3, "weight_orepa_")
    return L.nest { 3, name = name, out = out, init = d.init, branches = d.branches }
  end)
end

document("nn.ConvBN", [[
  nn.ConvBN{in_channels=, out_channels=, kernel_size=, stride=, padding=, dilation=, groups=, act=} -> module
  A plain convolution with its norm.
  > nn.ConvBN{in_channels = 4, out_channels = 8, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.OREPA", [[
  nn.OREPA{in_channels=, out_channels=, kernel_size=, stride=, padding=, dilation=, groups=, act=} -> module
  The OREPA block (CVPR 2022): six branches that train as one convolution.
  > nn.OREPA{in_channels = 4, out_channels = 8, kernel_size = 3, act = "relu"}(orepa.ones(2, 4, 6, 6))]])
document("nn.OREPA1x1", [[
  nn.OREPA1x1{in_channels=, out_channels=, stride=, act=} -> module
  The OREPA block for 1x1 convolutions.
  > nn.OREPA1x1{in_channels = 4, out_channels = 8}(orepa.ones(2, 4, 6, 6))]])
document("nn.OREPALargeConvBase", [[
  nn.OREPALargeConvBase{in_channels=, out_channels=, kernel_size=, stride=, padding=, groups=, act=} -> module
  A chain of plain 3x3 layers squeezed into one odd kernel of at least 5.
  > nn.OREPALargeConvBase{in_channels = 3, out_channels = 8, kernel_size = 7, stride = 2}(orepa.ones(2, 3, 16, 16))]])
document("nn.OREPALargeConv", [[
  nn.OREPALargeConv{in_channels=, out_channels=, kernel_size=, stride=, padding=, act=} -> module
  The linear deep stem: a chain of 3x3 OREPA layers squeezed into one odd kernel of at least 5.
  > nn.OREPALargeConv{in_channels = 3, out_channels = 8, kernel_size = 7, stride = 2}(orepa.ones(2, 3, 16, 16))]])

return nn
