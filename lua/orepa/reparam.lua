-- The language of blocks: the layers that a description may use, and their translation into a tree that the engine squeezes.
-- A block is a list of branches, a branch a chain of linear layers with a scaling at its end. docs/blocks.md is the manual.
--
-- compile(o) gives a plan:
--   parameters  list of {name, shape, init, slot}     in the order in which they are made
--   constants   list of {name, build(device), slot}   names that start with "~" are never saved
--   tree        of the engine, whose slots are the parameters and constants
--   branches    their names, in order
--   chains      for each branch {row, slot, vector, kernel, layers}: row of the parameter `vector` in a slot that scales it,
--               size of its kernel. A layer is {form, input, output, groups, kernel, tree, norm, path, plain, interleave,
--               plus_identity, chains}: offline the tree of its kernel alone in its own groups, its norm's path, that of its
--               parameter, whether this is the kernel as it is, what stands in between, and the branches of a nest
--   nests       the tree of each nest, by its path
--   norms       the paths of all norms behind layers, with their channels
--   plain       the name of the parameter that is the block's kernel as it is, if there is one

local core = require "orepa.core"
local document = require "orepa.document"
local tree = core.tree

local reparam = {}

-- ---- vocabulary ----

local FORM = {} -- key of a layer's form: not a string, so that it is no option

local function vocabulary(form)
  return function(layer)
    if type(layer) ~= "table" then core.fail(("L.%s: a table expected, got %s"):format(form, type(layer))) end
    layer[FORM] = form
    return layer
  end
end

local layer_options = {
  conv = { out = true, expand = true, groups = true, plus_identity = true, interleave = true, init = true, name = true,
    norm = true },
  depthwise = { out = true, expand = true, init = true, name = true, norm = true },
  average = { name = true, norm = true },
  prior = { name = true, norm = true },
  identity = { norm = true },
  nest = { out = true, expand = true, name = true, branches = true, scaling = true, spare_rows = true, init = true, norm = true },
}
for form in pairs(layer_options) do reparam[form] = vocabulary(form) end

local has_parameters = { conv = true, depthwise = true, nest = true }

-- ---- checks ----

local function need(condition, where, format, ...)
  if not condition then core.fail(where .. ": " .. format:format(...)) end
end

local function whole(value, least, where, what)
  local n = math.tointeger(value)
  need(n and n >= least, where, "%s is %s, an integer of at least %d expected", what, tostring(value), least)
  return n
end

local function pair(value, least, where, what)
  if type(value) == "table" then
    need(#value == 2, where, "%s: a number or {height, width} expected", what)
    return { whole(value[1], least, where, what), whole(value[2], least, where, what) }
  end
  local n = whole(value, least, where, what)
  return { n, n }
end

local function size_text(k) return ("%dx%d"):format(k[1], k[2]) end

-- The entries of a list that may hold `false`; a nil inside is an error, which a count of numbered keys shows.
local function entries(list, where, what)
  need(type(list) == "table", where, "%s: a list expected, got %s", what, type(list))
  local highest, count, kept = 0, 0, {}
  for key in pairs(list) do
    if math.type(key) == "integer" then highest, count = math.max(highest, key), count + 1 end
  end
  need(highest == count, where, "there is a nil in the list of %s (write false to leave one out)", what)
  for k = 1, count do
    if list[k] then
      need(type(list[k]) == "table", where, "%s %d is a %s, not a table", what, k, type(list[k]))
      kept[#kept + 1] = list[k]
    end
  end
  return kept
end

-- Why a layer has none of these: a branch is one kernel, and what is done to the map stands at the block.
local refused = {
  stride = "a stride between layers leaves no kernel that fits; the block has the stride",
  padding = "padding between layers is not the same at the border; the block's padding surrounds its input",
  dilation = "layers of different dilation leave no kernel that fits; the block has the dilation",
  bias = "a bias before padding is no constant at the border; the block has a bias, offline its norms have",
}

local function check_keys(t, known, where)
  for key in pairs(t) do
    if key ~= FORM and math.type(key) ~= "integer" then
      need(known[key] or not refused[key] or not t[FORM], where, "%s: %s", tostring(key), refused[key])
      need(known[key], where, "unknown option '%s'", tostring(key))
    end
  end
end

-- ---- the plan under construction ----

local Plan = {}
Plan.__index = Plan

function Plan:take(name, what, where)
  need(not self.taken[name], where, "two %s are named '%s'", what, name)
  self.taken[name] = true
end

function Plan:next_slot()
  self.slots = self.slots + 1
  return self.slots
end

function Plan:parameter(name, shape, init, where)
  self:take(name, "parameters", where)
  local slot = self:next_slot()
  self.parameters[#self.parameters + 1] = { name = name, shape = shape, init = init, slot = slot }
  return slot
end

-- A norm, with all that it has in a state dict.
function Plan:norm(name, where)
  self:take(name, "things", where)
  for _, field in ipairs { "weight", "bias", "running_mean", "running_var", "num_batches_tracked" } do
    self:take(name .. "." .. field, "things", where)
  end
end

function Plan:constant(name, build, where)
  self:take(name, "constants", where)
  local slot = self:next_slot()
  self.constants[#self.constants + 1] = { name = name, build = build, slot = slot }
  return slot
end

-- ---- layers ----

local function check_init(init, c, out, k, where)
  if type(init) == "number" then return init end
  if init == "identity" then
    need(out == c and k[1] % 2 == 1 and k[2] % 2 == 1, where,
      "init = \"identity\" needs as many output as input channels and an odd kernel (%d -> %d, %s)", c, out, size_text(k))
    return init
  end
  need(type(init) == "table" and type(init.kaiming) == "number", where,
    "init: a number, \"identity\" or {kaiming = a} expected")
  return init
end

local function conv_leaf(plan, l, form, c, out, k, groups, name, default_init, where)
  local shape = { out, c // groups, k[1], k[2] }
  local init = l.init or default_init
  if l.plus_identity then
    need(k[1] % 2 == 1 and k[2] % 2 == 1, where, "plus_identity needs an odd kernel, not %s", size_text(k))
    need(out % c == 0, where, "plus_identity: %d output channels are no multiple of %d", out, c)
    init = l.init or 0
  end
  local leaf = { kind = "parameter", input = c, output = out, groups = groups, kernel = k,
    plus_identity = l.plus_identity and true or false, interleave = form == "conv" and l.interleave and true or false }
  leaf.slot = plan:parameter(name, shape, check_init(init, c, out, k, where), where)
  if type(l.plus_identity) == "string" then -- E stands in the tree; under a name it is in the state dict too
    local path = plan.path(l.plus_identity)
    plan:take(path, "constants", where)
    plan.shown[#plan.shown + 1] = { name = path, build = function(kind)
      return tree.identity_kernel(shape[1], shape[2], k, kind)
    end }
  end
  return tree.leaf(leaf)
end

local function pattern_leaf(plan, form, c, k, path, where)
  local slot = plan:constant(path, function(kind)
    if form == "prior" then return tree.prior(c, k, kind) end
    return core.full({ k[1], k[2] }, 1 / (k[1] * k[2]), kind)
  end, where)
  return tree.leaf { kind = "pattern", slot = slot, input = c, output = c, groups = c, kernel = k }
end

-- The output channels of a layer.
local function channels_out(l, form, c, last, out, where)
  if not has_parameters[form] then return c end
  need(not (l.out and l.expand), where, "both out and expand")
  if l.out then return whole(l.out, 1, where, "out") end
  if l.expand then return whole(l.expand, 1, where, "expand") * c end
  return last and out or c
end

local build_sum -- nests are sums

-- ---- branches ----

-- Where names come from: a given one continues the branch's if it starts with a dot.
local function namer(root, branch)
  return function(name) return root .. (name:sub(1, 1) == "." and branch .. name or name) end
end

local function check_norm(given, s, where)
  need(given == nil or type(given) == "boolean" or (type(given) == "string" and given ~= ""), where,
    "norm is %s; true, false or a name expected", tostring(given))
  need(not (s.nested and given), where, "a nest is one kernel, its layers have no norms")
end

-- The path of a layer's norm, or nil.
local function take_norm(plan, l, s, where)
  local given = l.norm
  if s.nested or not plan.with_norms or given == false then return nil end
  local path = type(given) == "string" and plan.path(given) or ("%s%s.bn%s"):format(plan.root, s.branch, s.norm_number)
  plan:norm(path, where)
  return path
end

-- The tree of one layer's kernel, and its output channels, size and groups; and what it is made of.
local function build_kernel(plan, l, s, where)
  local form = l[FORM]
  check_keys(l, layer_options[form], where)
  check_norm(l.norm, s, where)
  local sizes = form == "identity" and 0 or 1
  need(#l == sizes, where, sizes == 0 and "takes no kernel size" or "one kernel size expected, got %d", #l)
  local k = form == "identity" and { 1, 1 } or pair(l[1], 1, where, "the kernel size")
  local out = channels_out(l, form, s.channels, s.last, s.out, where)
  local groups = form == "nest" and plan.groups or form == "conv" and whole(l.groups or plan.groups, 1, where, "groups")
    or s.channels
  need(groups % plan.groups == 0, where, "%d groups are no multiple of the block's %d", groups, plan.groups)
  need(s.channels % groups == 0 and out % groups == 0, where, "%d groups don't divide %d -> %d channels", groups,
    s.channels, out)
  local name = l.name and plan.path(l.name)
  if form == "nest" then
    local root = (name or ("%s.conv%s"):format(plan.root .. s.branch, s.number)) .. "."
    local sum, _, chains = build_sum(plan, l, s.channels, out, k, root, where, true)
    plan.nests[root:sub(1, -2)] = sum
    return sum, out, k, groups, { chains = chains }
  elseif form == "identity" then
    return tree.leaf { kind = "identity", input = out, output = out, groups = out }, out, k, groups
  elseif form == "average" or form == "prior" then
    return pattern_leaf(plan, form, out, k, name or ("~%s%s.%d"):format(plan.root, s.branch, s.position), where), out, k, groups
  end
  local path = name or ("%s%s.conv%s.weight"):format(plan.root, s.branch, s.number)
  return conv_leaf(plan, l, form, s.channels, out, k, groups, path, s.init, where), out, k, groups,
    { path = path, interleave = l.interleave, plus_identity = l.plus_identity }
end

local function build_layer(plan, l, s)
  local where = ("%s, layer %d (%s)"):format(s.where, s.position, l[FORM])
  local root, path = plan.root, plan.path -- a nest has its own
  local whole_tree, out, kernel, groups, made_of = build_kernel(plan, l, s, where)
  local layer = made_of or {}
  layer.form, layer.input, layer.output, layer.kernel, layer.groups = l[FORM], s.channels, out, kernel, groups
  plan.root, plan.path = root, path
  layer.norm = take_norm(plan, l, s, where)
  if layer.norm then plan.norms[#plan.norms + 1] = { name = layer.norm, channels = layer.output } end
  local turned = s.correlate and s.position > 1 and (kernel[1] > 1 or kernel[2] > 1)
  layer.plain = layer.path and not (turned or layer.plus_identity or layer.interleave)
  if plan.apart then
    local identity = { kind = "identity", input = s.channels, output = s.channels, groups = s.channels }
    layer.tree = tree.chain(turned and { tree.leaf(identity), whole_tree } or { whole_tree }, groups, turned)
  end
  return layer, whole_tree
end

local function build_branch(plan, b, s)
  local layers = entries(b, s.where, "layers")
  check_keys(b, { name = true, scale = true, correlate = true }, s.where)
  need(#layers > 0, s.where, "it has no layers (L.identity{} is the identity)")
  local with_parameters, last, with_norms = 0, 0, 0
  for k, l in ipairs(layers) do
    need(l[FORM], s.where, "layer %d is no layer of orepa.reparam", k)
    if has_parameters[l[FORM]] then with_parameters, last = with_parameters + 1, k end
    if l.norm ~= false then with_norms = with_norms + 1 end
  end
  local c, size, number, norm_number = s.input, { 1, 1 }, 0, 0
  local chain, trees, correlate = { layers = {}, kernel = size }, {}, b.correlate and true or false
  plan.path = namer(plan.root, s.branch)
  for k, l in ipairs(layers) do
    if has_parameters[l[FORM]] then number = number + 1 end
    if l.norm ~= false then norm_number = norm_number + 1 end
    local layer, whole_tree = build_layer(plan, l, { where = s.where, branch = s.branch, position = k, channels = c, out = s.out,
      last = k == last, number = with_parameters > 1 and tostring(number) or "", init = s.init, nested = s.nested,
      norm_number = with_norms > 1 and tostring(norm_number) or "", correlate = correlate })
    c, trees[k], chain.layers[k] = layer.output, whole_tree, layer
    for d = 1, 2 do size[d] = size[d] + layer.kernel[d] - 1 end
  end
  need(c == s.out, s.where, "it ends with %d channels, the block has %d", c, s.out)
  for d = 1, 2 do
    need(size[d] <= s.kernel[d], s.where, "its kernel of %s does not fit into the block's %s", size_text(size),
      size_text(s.kernel))
    need((s.kernel[d] - size[d]) % 2 == 0, s.where, "its kernel of %s has no centre in the block's %s", size_text(size),
      size_text(s.kernel))
  end
  return tree.chain(trees, plan.groups, correlate), chain
end

-- ---- sums: the block's own, and nests ----

function build_sum(plan, d, input, out, kernel, root, where, nested)
  local scaling, init = d.scaling or "vector", d.init or { kaiming = math.sqrt(5) }
  need(scaling == "vector" or scaling == "scalar" or scaling == "none", where,
    "scaling is '%s'; \"vector\", \"scalar\" or \"none\" expected", tostring(scaling))
  local branches = entries(d.branches, where, "branches")
  need(#branches > 0, where, "it has no branches")
  plan.root = root
  local trees, chains, names, known, rows = {}, {}, {}, {}, {}
  for k, b in ipairs(branches) do
    local name = b.name or ("branch%d"):format(k - 1)
    need(type(name) == "string", where, "branch %d: its name is a %s", k, type(name))
    local s = { where = ("%s, branch '%s'"):format(where, name), branch = name, input = input, out = out,
      kernel = kernel, init = init, nested = nested }
    need(not known[name], s.where, "two branches have this name")
    known[name], names[k] = true, name
    trees[k], chains[k] = build_branch(plan, b, s)
    if scaling ~= "none" and b.scale ~= false then
      need(b.scale == nil or type(b.scale) == "number", s.where, "scale: a number or false expected")
      rows[#rows + 1] = { branch = k, value = b.scale or 1 }
    end
  end
  local spare = whole(d.spare_rows or 0, 0, where, "spare_rows")
  if scaling == "none" then spare = 0 end
  if #rows + spare > 0 then
    local values = {}
    for k, row in ipairs(rows) do values[k] = row.value end
    for k = 1, spare do values[#rows + k] = 0 end
    local slot = plan:parameter(root .. "vector", { #values, scaling == "vector" and out or 1 }, { rows = values }, where)
    for k, row in ipairs(rows) do
      trees[row.branch] = tree.scale(trees[row.branch], slot, k)
      chains[row.branch].vector, chains[row.branch].slot, chains[row.branch].row = root .. "vector", slot, k
    end
  end
  return tree.sum(trees, plan.groups, kernel), names, chains
end

-- ---- the whole block ----

-- The norm behind the sum and the bias.
local function take_others(plan, o)
  if o.bias then plan:take("bias", "things", plan.where) end
  if o.post_bn then plan:norm(o.post_bn, plan.where) end
end

-- The name of the parameter that is the block's kernel as it is; nil where there is anything to squeeze.
local function plain_kernel(plan, o)
  local p = plan.parameters[1]
  if not p then return nil end
  local branch = entries(o.branches, plan.where, "branches")[1]
  local l = entries(branch, plan.where, "layers")[1]
  if #plan.parameters > 1 or plan.slots > 1 or l[FORM] ~= "conv" or l.plus_identity or l.interleave then return nil end
  local groups, shape = l.groups or o.groups, p.shape
  local fills = shape[3] == o.kernel_size[1] and shape[4] == o.kernel_size[2]
  return fills and groups == o.groups and p.name or nil
end

function reparam.compile(o, where)
  local plan = setmetatable({ where = where, groups = o.groups, with_norms = o.norms, apart = o.mode == "offline",
    parameters = {}, constants = {}, shown = {}, norms = {}, nests = {}, taken = {}, slots = 0 }, Plan)
  plan.tree, plan.branches, plan.chains = build_sum(plan, o, o.in_channels, o.out_channels, o.kernel_size, "", where, false)
  need(plan.slots > 0 or #plan.norms > 0, where, "it has nothing to train and no constant: identities alone are no block")
  take_others(plan, o)
  plan.plain = plain_kernel(plan, o)
  plan.taken, plan.path = nil, nil -- a network has many plans
  return plan
end

-- A parameter's initial values.
function reparam.initial(p)
  local init, shape = p.init, p.shape
  if type(init) == "number" then return core.full(shape, init) end
  if init == "identity" then return tree.identity_kernel(shape[1], shape[2], { shape[3], shape[4] }) end
  if init.rows then
    local t = core.zeros(shape)
    for k, value in ipairs(init.rows) do t[k] = value end
    return t
  end
  local bound = math.sqrt(6 / ((1 + init.kaiming ^ 2) * shape[2] * shape[3] * shape[4]))
  return core.rand(shape):multiply_add(2 * bound, -bound)
end

reparam.check = { pair = pair, whole = whole }

document("reparam.conv", [[
  reparam.conv{k, out=, expand=, groups=, plus_identity=, interleave=, init=, name=} -> layer
  A convolution k x k of a branch; k is a number or {height, width}.
  > orepa.reparam.conv{3}]])
document("reparam.depthwise", [[
  reparam.depthwise{k, out=, expand=, init=, name=} -> layer
  A convolution with as many groups as channels.
  > orepa.reparam.depthwise{3, expand = 8}]])
document("reparam.average", [[
  reparam.average{k, name=} -> layer
  The constant mean of a window.
  > orepa.reparam.average{3}]])
document("reparam.prior", [[
  reparam.prior{k, name=} -> layer
  The constant frequency prior: a cosine along the height for the first half of the channels, along the width for the rest.
  > orepa.reparam.prior{3}]])
document("reparam.identity", [[
  reparam.identity{} -> layer
  The identity, as a kernel.
  > orepa.reparam.identity{}]])
document("reparam.nest", [[
  reparam.nest{k, branches=, scaling=, spare_rows=, init=, out=, expand=, name=} -> layer
  A squeezed sum of branches used as one layer, k x k.
  > orepa.reparam.nest{3, branches = {{orepa.reparam.conv{3}}}}]])
document("reparam.compile", [[
  reparam.compile(options, where) -> plan
  What nn.ReparamBlock makes of a description: parameters, constants and the engine's tree. For tools that look inside.
  > local L = orepa.reparam; return L.compile({in_channels = 2, out_channels = 2, kernel_size = {3, 3}, groups = 1,
  >   branches = {{L.conv{3}}}}, "example").branches]])
document("reparam.initial", [[
  reparam.initial(parameter) -> tensor
  The initial values of a plan's parameter {shape=, init=}.
  > orepa.reparam.initial{shape = {4, 2, 3, 3}, init = {kaiming = 0}}]])

return reparam
