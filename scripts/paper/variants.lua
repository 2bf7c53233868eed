-- The networks of the paper's tables, by name. A variant says which model it is and which block stands for each convolution.

local orepa = require "orepa"
local options = require "orepa.options"
local nn, L, reparam = orepa.nn, orepa.reparam, orepa.reparam
local with = options.with

local variants = {}

local function add(name, model, label, make)
  variants[name] = { name = name, model = model, label = label, reparam = make }
end

-- A block for 3x3 alone, others are plain.
local function for_3x3(make)
  return function(o)
    return o.kernel_size == 3 and make(o) or nn.ConvBN(o)
  end
end

-- ---- whole kinds ----

add("plain", "resnet18", "plain", "none")
add("dbb", "resnet18", "DBB", "dbb")
add("orepa", "resnet18", "OREPA", "orepa")
add("vgg-plain", "repvgg_a0", "plain", "none")
add("repvgg", "repvgg_a0", "RepVGG", "repvgg")
add("orepa-vgg", "repvgg_a0", "OREPA-VGG", "orepa_vgg")

-- ---- Table 1: without norms behind branches, one norm behind the sum; and with scalings in their place ----

local function changed(kind, more)
  return for_3x3(function(o) return reparam.make(kind, with(o, more)) end)
end

add("dbb-bare", "resnet18", "DBB without branch norms", changed("dbb", { mode = "online", scaling = "none" }))
add("dbb-scaled", "resnet18", "DBB with scalings", changed("dbb", { mode = "online" }))
add("repvgg-bare", "repvgg_a0", "RepVGG without branch norms", changed("repvgg", { mode = "online", scaling = "none" }))
add("repvgg-scaled", "repvgg_a0", "RepVGG with scalings", changed("repvgg", { mode = "online" }))

-- ---- Table 2 and Fig. 8: components, one after the other ----

-- The branches of an OREPA block that a variant has, in the order in which they are added.
local parts = {
  { "origin", "origin", function(o) return { name = "origin", scale = 0.25, L.conv { o.kernel_size } } end },
  { "1x1", "1x1", function() return { name = "1x1", scale = 1, L.conv { 1 } } end },
  { "kxk", "1x1-3x3", function(o)
    return { name = "1x1_kxk", scale = 0.5, L.conv { 1, plus_identity = true }, L.conv { o.kernel_size } }
  end },
  { "avg", "average", function(o) return { name = "avg", scale = 0.25, L.conv { 1 }, L.average { o.kernel_size } } end },
  { "prior", "frequency prior", function(o) return { name = "pfir", scale = 0, L.conv { 1 }, L.prior { o.kernel_size } } end },
  { "dw", "depthwise-pointwise", function(o)
    return { name = "dw_pw", scale = 0.5, L.depthwise { o.kernel_size, expand = 8 }, L.conv { 1 } }
  end },
}
variants.parts = parts

-- The first `count` parts. Offline the prior's scale, which is 0 at first, has a norm in its place.
local function components(count, mode, stem)
  return function(o)
    if o.kernel_size == 7 and stem then return nn.OREPALargeConv(with(o, { mode = mode })) end
    if o.kernel_size ~= 3 then return nn.ConvBN(o) end
    local branches = {}
    for k = 1, count do branches[k] = parts[k][3](o) end
    return nn.ReparamBlock(o, { mode = mode, init = { kaiming = 0 }, branches = branches })
  end
end

for count = 1, #parts do
  for _, mode in ipairs { "online", "offline" } do
    add(("%s-%d"):format(mode, count), "resnet18", (count == 1 and "" or "+ ") .. parts[count][2], components(count, mode))
  end
end
for _, mode in ipairs { "online", "offline" } do
  add(mode .. "-all", "resnet18", "+ deep stem", components(#parts, mode, true))
end

-- ---- Table 3: scalings and the norm behind the sum ----

local function orepa_with(more)
  return for_3x3(function(o) return nn.OREPA(with(o, more)) end)
end

add("scaling-vector", "resnet18", "vector", orepa_with { scaling = "vector" })
add("scaling-scalar", "resnet18", "scalar", orepa_with { scaling = "scalar" })
add("scaling-none", "resnet18", "no scaling", orepa_with { scaling = "none" })
add("no-post-norm", "resnet18", "vector, no norm behind the sum", orepa_with { post_bn = false, bias = true })

return variants
