-- The named blocks: each is a few lines of description. Names, initial values and the order of branches (that of the rows of
-- `vector`) are those of the reference implementation, so that its checkpoints load by name.

local core = require "orepa.core"
local document = require "orepa.document"
local L = require "orepa.reparam"
local layers = require "orepa.nn.layers"
local ReparamBlock = require("orepa.nn.block").ReparamBlock
local with = require("orepa.options").with

local nn = {}

local function block(kind, o, description)
  description.kind = kind
  return ReparamBlock(o, description)
end

local function check_table(kind, o)
  if type(o) ~= "table" then core.fail(("%s: a table of options expected, got %s"):format(kind, type(o))) end
end

-- Options without some that are the named block's own.
local function without(o, ...)
  local rest = with(o, {})
  for _, name in ipairs { ... } do rest[name] = nil end
  return rest
end

local function only(kind, o, name, value)
  check_table(kind, o)
  if o[name] ~= nil and o[name] ~= value then
    core.fail(("%s: %s is %s, this block has %s"):format(kind, name, tostring(o[name]), tostring(value)))
  end
end

local LARGEST = 513 -- a chain of the engine has at most 256 layers
local MOST_BRANCHES = 250 -- and a sum as many branches

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

-- The OREPA block's branches; p is the prefix of the names, `one` says whether there is a 1x1 branch.
local function body(o, k, p, kaiming, one)
  local inner = (math.tointeger(o.groups) or 1) > 4 and 2 or 1
  return { deployed = "orepa_reparam", init = { kaiming = kaiming }, branches = {
    { name = "origin", scale = 0.25, L.conv { k, name = p .. "origin" } },
    { name = "avg", scale = 0.25, L.conv { 1, name = p .. "avg_conv" }, L.average { k, name = p .. "avg_avg" } },
    { name = "pfir", scale = 0, L.conv { 1, name = p .. "pfir_conv" }, L.prior { k, name = p .. "prior" } },
    { name = "1x1_kxk", scale = 0.5,
      L.conv { 1, expand = inner, plus_identity = "id_tensor", name = p .. "1x1_kxk_idconv1" },
      L.conv { k, name = p .. "1x1_kxk_conv2" } },
    one and { name = "1x1", scale = 1, L.conv { 1, name = p .. "1x1" } },
    { name = "dw_pw", scale = 0.5, L.depthwise { k, expand = 8, name = p .. "gconv_dw" },
      L.conv { 1, interleave = true, name = p .. "gconv_pw" } } } }
end

function nn.OREPA(o)
  check_table("OREPA", o)
  return block("OREPA", o, body(o, o.kernel_size, "weight_orepa_", 0, true))
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
    local d = body(o, 3, "weight_orepa_", 0, true)
    return L.nest { 3, name = name, out = out, init = d.init, branches = d.branches }
  end)
end

-- ---- offline ----

local function same_map(o)
  return o.in_channels == o.out_channels and (o.stride or 1) == 1
end

function nn.DBB(o)
  check_table("DBB", o)
  local k, depthwise = o.kernel_size, o.groups ~= nil and o.groups == o.out_channels
  return block("DBB", o, { mode = "offline", deployed = "dbb_reparam", branches = {
    { name = "dbb_origin", L.conv { k } },
    not depthwise and { name = "dbb_1x1", L.conv { 1 } },
    { name = "dbb_avg", not depthwise and L.conv { 1, norm = ".bn.bn" }, L.average { k, norm = ".avgbn" } },
    { name = "dbb_1x1_kxk",
      depthwise and L.conv { 1, expand = 2, norm = ".bn1.bn" }
        or L.conv { 1, plus_identity = true, name = ".idconv1.weight", norm = ".bn1.bn" },
      L.conv { k } } } })
end

local function repvgg(kind, o, dense)
  return block(kind, o, { mode = "offline", act = "relu", deployed = "rbr_reparam", branches = {
    same_map(o) and { name = "rbr_identity", L.identity { norm = "rbr_identity" } },
    { name = "rbr_dense", dense },
    { name = "rbr_1x1", L.conv { 1 } } } })
end

function nn.RepVGGBlock(o)
  check_table("RepVGGBlock", o)
  return repvgg("RepVGGBlock", o, L.conv { o.kernel_size })
end

-- The squeezed branches of an OREPA-VGG block.
local function vgg_body(o)
  local d = body(o, o.kernel_size, "weight_rbr_", 1, false)
  d.spare_rows = same_map(o) and 1 or 0
  return d
end

function nn.OREPAVGG(o)
  check_table("OREPAVGG", o)
  local d = vgg_body(o)
  return repvgg("OREPAVGG", o, L.nest { o.kernel_size, name = "rbr_dense", init = d.init, spare_rows = d.spare_rows,
    branches = d.branches })
end

function nn.OREPAVGGInner(o)
  check_table("OREPAVGGInner", o)
  return block("OREPAVGGInner", o, vgg_body(o))
end

-- ---- of other authors: names as in their code ----

-- Asymmetric convolutions (ICCV 2019).
function nn.ACBlock(o)
  check_table("ACBlock", o)
  local k = o.kernel_size
  local function branch(name, size)
    return { name = name, L.conv { size, name = name .. "_conv.weight", norm = name .. "_bn" } }
  end
  return block("ACBlock", o, { mode = "offline", deployed = "fused_conv", branches = {
    branch("square", k), branch("ver", { k, 1 }), branch("hor", { 1, k }) } })
end

-- ExpandNets (NeurIPS 2020): a wide linear chain in a convolution's place.
function nn.ExpandBlock(o)
  check_table("ExpandBlock", o)
  local rate = L.check.whole(o.rate or 4, 1, "ExpandBlock", "rate")
  local out = math.tointeger(o.out_channels) or 1 -- ReparamBlock checks it
  return block("ExpandBlock", without(o, "rate"), { scaling = "none", norms = false, post_bn = false,
    bias = not o.post_bn, branches = {
    { name = "expanded", L.conv { 1, expand = rate }, L.conv { o.kernel_size, out = rate * out }, L.conv { 1 } } } })
end

-- MobileOne (CVPR 2023): several equal branches, 1x1 and identity; squeeze-excite before the activation on demand.
function nn.MobileOneBlock(o)
  check_table("MobileOneBlock", o)
  local count = L.check.whole(o.num_branches or 1, 1, "MobileOneBlock", "num_branches")
  if count > MOST_BRANCHES then
    core.fail(("MobileOneBlock: num_branches is %d, at most %d expected"):format(count, MOST_BRANCHES))
  end
  local branches = {
    same_map(o) and { name = "rbr_skip", L.identity { norm = "rbr_skip" } },
    o.kernel_size ~= 1 and { name = "rbr_scale", L.conv { 1 } } }
  for k = 1, count do branches[2 + k] = { name = "rbr_conv." .. k - 1, L.conv { o.kernel_size } } end
  local rest = without(o, "num_branches", "excite")
  if o.excite then
    local channels = L.check.whole(o.out_channels, 1, "MobileOneBlock", "out_channels")
    rest.se = layers.SqueezeExcite { channels = channels, reduced = math.max(1, channels // 16) }
  end
  return block("MobileOneBlock", rest, { mode = "offline", act = "relu", deployed = "reparam_conv", branches = branches })
end

-- RepLKNet (CVPR 2022): a large depthwise kernel beside a small one.
function nn.RepLKBlock(o)
  check_table("RepLKBlock", o)
  return block("RepLKBlock", without(o, "small_kernel"), { mode = "offline", groups = o.in_channels, deployed = "lkb_reparam",
    branches = { { name = "lkb_origin", L.conv { o.kernel_size } }, { name = "small_conv", L.conv { o.small_kernel or 3 } } } })
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
document("nn.DBB", [[
  nn.DBB{in_channels=, out_channels=, kernel_size=, stride=, padding=, groups=, act=} -> module
  The diverse branch block (CVPR 2021): four branches with norms of their own, on the map. mode = "online" linearizes it.
  > nn.DBB{in_channels = 4, out_channels = 8, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.RepVGGBlock", [[
  nn.RepVGGBlock{in_channels=, out_channels=, kernel_size=, stride=, groups=, act=} -> module
  RepVGG's block (CVPR 2021): 3x3, 1x1 and identity with a norm each, then ReLU.
  > nn.RepVGGBlock{in_channels = 4, out_channels = 4, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.OREPAVGG", [[
  nn.OREPAVGG{in_channels=, out_channels=, kernel_size=, stride=, act=} -> module
  RepVGG's block whose 3x3 branch is squeezed from five OREPA branches.
  > nn.OREPAVGG{in_channels = 4, out_channels = 4, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.OREPAVGGInner", [[
  nn.OREPAVGGInner{in_channels=, out_channels=, kernel_size=, stride=, act=} -> module
  The squeezed branch of nn.OREPAVGG alone, with a norm.
  > nn.OREPAVGGInner{in_channels = 4, out_channels = 4, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.ACBlock", [[
  nn.ACBlock{in_channels=, out_channels=, kernel_size=, stride=, padding=, groups=, act=} -> module
  ACNet's block: k x k, k x 1 and 1 x k with a norm each.
  > nn.ACBlock{in_channels = 4, out_channels = 8, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.ExpandBlock", [[
  nn.ExpandBlock{in_channels=, out_channels=, kernel_size=, rate=, stride=, padding=, act=} -> module
  ExpandNet's chain 1x1, k x k, 1x1 with `rate` (4) times as many channels inside, and a bias; no norms.
  > nn.ExpandBlock{in_channels = 4, out_channels = 8, kernel_size = 3}(orepa.ones(2, 4, 6, 6))]])
document("nn.MobileOneBlock", [[
  nn.MobileOneBlock{in_channels=, out_channels=, kernel_size=, num_branches=, excite=, stride=, groups=, act=} -> module
  MobileOne's block: `num_branches` (1) k x k convolutions, 1x1 and identity with a norm each, squeeze-excite if asked for, ReLU.
  > nn.MobileOneBlock{in_channels = 16, out_channels = 16, kernel_size = 3, groups = 16, num_branches = 4, excite = true}(
  >   orepa.ones(2, 16, 6, 6))]])
document("nn.RepLKBlock", [[
  nn.RepLKBlock{in_channels=, out_channels=, kernel_size=, small_kernel=, stride=, act=} -> module
  RepLKNet's depthwise block: a large kernel and a small one (3), with a norm each.
  > nn.RepLKBlock{in_channels = 4, out_channels = 4, kernel_size = 7}(orepa.ones(2, 4, 9, 9))]])
document("nn.OREPALargeConvBase", [[
  nn.OREPALargeConvBase{in_channels=, out_channels=, kernel_size=, stride=, padding=, groups=, act=} -> module
  A chain of plain 3x3 layers squeezed into one odd kernel of at least 5.
  > nn.OREPALargeConvBase{in_channels = 3, out_channels = 8, kernel_size = 7, stride = 2}(orepa.ones(2, 3, 16, 16))]])
document("nn.OREPALargeConv", [[
  nn.OREPALargeConv{in_channels=, out_channels=, kernel_size=, stride=, padding=, act=} -> module
  The linear deep stem: a chain of 3x3 OREPA layers squeezed into one odd kernel of at least 5.
  > nn.OREPALargeConv{in_channels = 3, out_channels = 8, kernel_size = 7, stride = 2}(orepa.ones(2, 3, 16, 16))]])

return nn
