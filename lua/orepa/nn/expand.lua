-- reparam.expand: plain convolutions, trained or deployed, become re-parameterized blocks that compute the same. One branch of
-- the new block is a kernel of the whole size (the origin): it takes what the other branches, as they are initially, leave.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local layers = require "orepa.nn.layers"
local block = require "orepa.nn.block"
local options = require "orepa.options"
local reparam = require "orepa.reparam"
local with, internal = options.with, module.internal

-- ---- what there is ----

-- A plain convolution: {kernel, bias or nil, norm or nil, options of the new block}; nil for anything else.
local function plain(part)
  local class = getmetatable(part).__index
  if class == layers.Conv2d then
    return { kernel = part.weight, bias = part.bias, options = with(part.geometry, { in_channels = part.options.in_channels,
      out_channels = part.options.out_channels, kernel_size = part.options.kernel_size, act = "none" }) }
  end
  if class ~= block.ReparamBlock then return nil end
  local o = part.options
  local like = with(part.geometry, { in_channels = o.in_channels, out_channels = o.out_channels, kernel_size = o.kernel_size,
    act = o.act, se = part.se })
  if part.mode == "deploy" then
    return { kernel = part[o.deployed .. ".weight"], bias = part[o.deployed .. ".bias"], options = like }
  elseif part.mode == "online" and part.plan.plain then
    return { kernel = part[part.plan.plain], bias = part.bias, norm = o.post_bn and part[o.post_bn], options = like }
  end
end

-- ---- the new block's origin ----

-- The parameter of a branch that is one layer with a kernel of the whole size; in a nest, that of one of its branches.
local function origin_of(chains, kernel)
  for _, chain in ipairs(chains) do
    local layer = #chain.layers == 1 and chain.layers[1]
    if layer and layer.kernel[1] == kernel[1] and layer.kernel[2] == kernel[2] then
      if layer.plain and layer.form == "conv" then return layer.path, chain end
      if layer.chains then
        local path = origin_of(layer.chains, kernel)
        if path then return path, chain end
      end
    end
  end
end

local function copy_norm(from, to)
  for _, name in ipairs { "weight", "bias", "running_mean", "running_var" } do
    if from[name] then to[name]:copy_(from[name]) end
  end
end

-- Norms behind branches: the origin's gets the statistics of the plain convolution's, the others start at its scale, so that all
-- branches count alike.
local function prepare_norms(made, chain, source, scale)
  for _, other in ipairs(made.plan.chains) do
    local last = other.layers[#other.layers].norm
    local norm = last and made[last]
    if norm and other == chain and source.norm then
      copy_norm(source.norm, norm)
    elseif norm and other == chain then
      norm.running_var:fill_(1 - norm.options.eps)
    elseif norm and scale then
      norm.weight:copy_(scale)
    end
  end
end

-- Writes the parameters of a new block so that it computes what the plain convolution does.
local function fill(made, source)
  local path, chain = origin_of(made.plan.chains, made.options.kernel_size)
  if not path then return false end
  local plain_kernel, post = source.kernel:to("float64"), made.options.post_bn and made[made.options.post_bn]
  local kernel, bias = plain_kernel, source.bias and source.bias:to("float64")
  if source.norm then
    local scale, shift = source.norm:fold()
    kernel, bias = kernel * scale:reshape(-1, 1, 1, 1), shift + (bias and bias * scale or 0)
    if post then copy_norm(source.norm, post) else prepare_norms(made, chain, source, scale) end
  else
    prepare_norms(made, chain, source)
  end
  local origin = made[path]
  origin:zero_()
  local rest, rest_bias = made:fold("float64")
  origin:fill_(1)
  local factor = (made:fold("float64")) - rest -- of each output channel: what multiplies the origin
  local none = factor:eq(0):to("float64")
  origin:copy_((kernel - rest) * (1 - none) / (factor + none) + plain_kernel * none)
  local norm = made[chain.layers[1].norm]
  local shift = post and post.bias or made.bias or norm and norm.bias
  if shift then shift:copy_(shift:to("float64") + (bias or 0) - rest_bias) end
  return true
end

local function expanded(part, source, make, o)
  local norm = source.norm
  local made_of = with(source.options, { kernel_size = source.options.kernel_size[1], eps = norm and norm.options.eps,
    momentum = norm and norm.options.momentum })
  local made = make(made_of)
  if not norm and made.mode == "online" and not o.post_bn then -- without a norm before, none after
    made = make(with(made_of, { post_bn = false, bias = source.bias ~= nil }))
  end
  made:to(source.kernel.device):to(source.kernel.dtype)
  local done = core.no_grad(function() return fill(made, source) end)
  return done and made:train(part.training) or nil
end

-- ---- a block or a network ----

local function is_expandable(source)
  local k = source.options.kernel_size
  return k[1] == k[2] and k[1] % 2 == 1
end

local function maker(kind)
  if type(kind) == "function" then return kind end
  return function(o) return reparam.make(kind, o) end
end

function reparam.expand(net, kind, o)
  internal.need_module("expand", net)
  o = options("expand", o, { post_bn = false })
  local make, found = maker(kind), {}
  for path, part in net:named_modules() do
    local source = plain(part)
    local made = source and is_expandable(source) and expanded(part, source, make, o)
    if made and made.plan and not made.plan.plain then found[#found + 1] = { path, made, part } end
  end
  if #found == 0 then
    core.fail(("expand: %s has no plain convolution that '%s' has a block for"):format(net.kind or net.class_name,
      tostring(kind)))
  end
  for _, entry in ipairs(found) do
    for _, p in ipairs(entry[3]:parameters()) do internal.gone[p] = "expanded" end
    if entry[1] == "" then return entry[2] end
    net:replace(entry[1], entry[2])
  end
  internal.note(net, { "expand", kind, o })
  return net
end

document("reparam.expand", [[
  reparam.expand(block or network, kind, {post_bn=}) -> module
  The other way: plain convolutions (nn.ConvBN, nn.Conv2d, deployed blocks) become blocks of a kind (dbb, orepa, repvgg,
  orepa_vgg, or a function that makes a block of options) which compute the same in evaluation, to rounding; their origin branch
  takes what the other branches leave. Convolutions that the kind has no such block for stay: kernels of 7x7 and more, even and
  oblong ones.
  A deployed block has no norm, and the new one gets a bias instead, unless post_bn = true. A network is changed, a block gives a
  new one.
  > local b = orepa.reparam.expand(nn.ConvBN{in_channels = 4, out_channels = 4, kernel_size = 3}, "orepa"); return b.kind]])

return {}
