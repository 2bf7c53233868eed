-- For specs: random descriptions of blocks, and what they mean. `random` makes a description as plain tables, `build` makes the
-- block of it, `text` writes it as the Lua that a user would. `run` computes what the block must: every layer of every branch is
-- a convolution of its own on the feature map, with the parameters that the language's rules name. Nothing here asks the
-- library how it composes kernels.

local assert = require "luassert"
local orepa = require "orepa"
local nn, F, L = orepa.nn, orepa.F, orepa.reparam

local descriptions = {}

-- ---- making ----

local random = math.random

local function chance(p) return random() < p end
local function pick(list) return list[random(#list)] end

-- The sizes of `count` layers whose composition has size k: k - 1 is dealt out.
local function split(k, count)
  local sizes = {}
  for l = 1, count do sizes[l] = 1 end
  for _ = 1, k - 1 do
    local l = random(count)
    sizes[l] = sizes[l] + 1
  end
  return sizes
end

local function size(h, w) return h == w and chance(0.7) and h or { h, w } end
local function both(k) return type(k) == "table" and k or { k, k } end

local make_sum

-- A number of groups for a conv from c to out channels: a multiple of the block's that divides both.
local function some_groups(s, c, out)
  local list = {}
  for n = s.groups, math.min(c, out), s.groups do
    if c % n == 0 and out % n == 0 then list[#list + 1] = n end
  end
  return chance(0.6) and s.groups or pick(list)
end

local function widen(s, l, c)
  if s.last then return s.out end
  if chance(0.4) then
    l.expand = random(3)
    return l.expand * c
  elseif chance(0.6) then
    l.out = s.groups * random(3)
    return l.out
  end
  return c
end

local function name_layer(s, l, kind)
  if not chance(0.3) then return end
  s.root.names = s.root.names + 1
  l.name = (chance(0.5) and "." or "") .. kind .. s.root.names
end

local function make_conv(s, c, k)
  local l = { form = "conv", k }
  local out = widen(s, l, c)
  local n = some_groups(s, c, out)
  if n ~= s.groups or chance(0.1) then l.groups = n end
  local odd = both(k)[1] % 2 == 1 and both(k)[2] % 2 == 1
  if odd and out % c == 0 and chance(0.4) then
    s.root.names = s.root.names + 1
    l.plus_identity = chance(0.5) or (chance(0.5) and "." or "") .. "eye" .. s.root.names
  elseif chance(0.25) then
    l.interleave = true
  end
  if chance(0.1) then l.init = pick { 0.5, { kaiming = 1 } } end
  name_layer(s, l, "w")
  return l, out
end

local function make_depthwise(s, c, k)
  local l, out = { form = "depthwise", k }, s.out
  if not s.last then
    l.expand = random(3)
    out = c * l.expand
    if l.expand == 1 then l.expand = nil end
  end
  name_layer(s, l, "dw")
  return l, out
end

local function make_nest(s, c, k)
  local l = { form = "nest", k }
  local out = widen(s, l, c)
  make_sum(l, { root = s.root, groups = s.groups, input = c, out = out, kernel = both(k), depth = s.depth + 1 })
  if chance(0.2) then l.init = { kaiming = 2 } end
  if chance(0.4) then
    s.root.names = s.root.names + 1
    l.name = "nest" .. s.root.names
  end
  return l, out
end

local function make_parametric(s, c, k)
  local forms = { "conv", "conv" }
  if not s.last or s.out % c == 0 then forms[3] = "depthwise" end
  if s.depth < 2 and chance(0.5) then forms[#forms + 1] = "nest" end
  local form = pick(forms)
  return (form == "conv" and make_conv or form == "nest" and make_nest or make_depthwise)(s, c, k)
end

local function make_constant(s, k)
  if both(k)[1] * both(k)[2] == 1 and chance(0.6) then return { form = "identity" } end
  local l = { form = pick { "average", "prior" }, k }
  if chance(0.3) then
    s.root.names = s.root.names + 1
    l.name = "fixed" .. s.root.names
  end
  return l
end

local function fitting(k)
  return k - 2 * random(0, (k - 1) // 2)
end

-- A branch of up to four layers. The last layer with parameters gives the block's channels; none is needed if they agree.
local function make_branch(s)
  local count, b = random(4), {}
  local heights, widths = split(fitting(s.kernel[1]), count), split(fitting(s.kernel[2]), count)
  local last = s.input == s.out and chance(0.2) and 0 or random(count)
  local c = s.input
  for l = 1, count do
    local k = size(heights[l], widths[l])
    if l == last or (l < last and chance(0.7)) then
      s.last = l == last
      b[l], c = make_parametric(s, c, k)
    else
      b[l] = make_constant(s, k)
    end
  end
  if chance(0.2) then b.correlate = true end
  return b
end

-- A branch of the shapes that the fused pass knows.
local function make_known(s)
  local k = size(s.kernel[1], s.kernel[2])
  local odd = s.kernel[1] % 2 == 1 and s.kernel[2] % 2 == 1
  local which = random(6)
  if which == 1 then return { { form = "conv", size(fitting(s.kernel[1]), fitting(s.kernel[2])) } } end
  if which == 2 then return { { form = "conv", 1 }, { form = "average", k } } end
  if which == 3 then return { { form = "conv", 1 }, { form = "prior", k } } end
  if which == 4 and odd then return { { form = "conv", 1, plus_identity = true, expand = random(2) }, { form = "conv", k } } end
  if which == 5 then return { { form = "depthwise", k, expand = random(4) }, { form = "conv", 1, interleave = chance(0.5) } } end
  return { { form = "conv", 1, out = s.groups * random(3) }, { form = "conv", k } }
end

function make_sum(d, s)
  d.branches = {}
  local known, count = chance(0.4), chance(0.05) and 18 or random(5)
  for b = 1, count do
    local branch = (known and make_known or make_branch)(s)
    if chance(0.3) then branch.name = "named" .. b end
    if chance(0.5) then branch.scale = pick { 0, 0.25, 1, 2.5, false } end
    d.branches[b] = branch
  end
  if chance(0.15) then table.insert(d.branches, random(count + 1), false) end
  if chance(0.4) then d.scaling = pick { "vector", "scalar", "none" } end
  if chance(0.2) then d.spare_rows = random(2) end
end

-- Whether some tensor is squeezed at all: a description of nothing but identities without scaling has none.
local function has_tensor(d)
  if d.scaling ~= "none" then
    if (d.spare_rows or 0) > 0 then return true end
    for _, b in ipairs(d.branches) do
      if b and b.scale ~= false then return true end
    end
  end
  for _, b in ipairs(d.branches) do
    for _, l in ipairs(b or {}) do
      if l.form ~= "identity" and (l.form ~= "nest" or has_tensor(l)) then return true end
    end
  end
  return false
end

local function make_geometry(d)
  if chance(0.4) then d.stride = size(random(3), random(3)) end
  if chance(0.4) then d.dilation = size(random(2), random(2)) end
  if chance(0.6) then d.padding = size(random(0, 4), random(0, 4)) end
end

function descriptions.random(seed)
  math.randomseed(seed)
  local groups = pick { 1, 1, 2, 3 }
  local d = { in_channels = groups * random(3), kernel_size = size(pick { 1, 2, 3, 3, 4, 5, 7 }, pick { 1, 3, 3, 5, 6, 7 }) }
  if chance(0.4) then d.kernel_size = pick { 1, 3, 5, 7 } end
  d.out_channels = chance(0.4) and d.in_channels or groups * random(3)
  if groups > 1 then d.groups = groups end
  make_geometry(d)
  if chance(0.5) then d.act = "relu" end
  d.post_bn = pick { false, "bn", "after.bn", true }
  if not d.post_bn and chance(0.5) then d.bias = true end
  local s = { root = { names = 0 }, groups = groups, input = d.in_channels, out = d.out_channels,
    kernel = both(d.kernel_size), depth = 0 }
  repeat make_sum(d, s) until has_tensor(d)
  return d
end

-- The same for mode "offline": some layers have no norm, or one with a name; scaling, norms and a norm behind the sum are asked
-- for or not.
function descriptions.random_offline(seed)
  local d
  repeat
    d = descriptions.random(seed)
    seed = seed + 1000003
    d.mode, d.scaling, d.norms, d.post_bn = "offline", pick { nil, "vector", "scalar", "none" }, pick { nil, true, false }, nil
    if chance(0.3) then d.post_bn = pick { true, "after.bn" } end
    d.bias = not d.post_bn and chance(0.3) or nil
    for k, b in ipairs(d.branches) do
      for n, l in ipairs(b or {}) do
        if chance(0.2) then l.norm = false end
        if chance(0.2) then l.norm = (".norm%d"):format(n) end
        if chance(0.2) then l.norm = ("norm%d_%d"):format(k, n) end
      end
    end
  until has_tensor(d)
  return d
end

-- ---- as Lua, and as a block ----

local function as_text(value)
  if type(value) ~= "table" then return type(value) == "string" and ("%q"):format(value) or tostring(value) end
  local parts, keys = {}, {}
  for key in pairs(value) do
    if type(key) == "string" and key ~= "form" then keys[#keys + 1] = key end
  end
  table.sort(keys)
  for _, key in ipairs(keys) do parts[#parts + 1] = key .. " = " .. as_text(value[key]) end
  for _, entry in ipairs(value) do parts[#parts + 1] = as_text(entry) end
  return (value.form and "L." .. value.form or "") .. "{" .. table.concat(parts, ", ") .. "}"
end

function descriptions.text(d)
  return "nn.ReparamBlock" .. as_text(d)
end

local function as_options(value)
  if type(value) ~= "table" then return value end
  local copy = {}
  for key, entry in pairs(value) do
    if key ~= "form" then copy[key] = as_options(entry) end
  end
  return value.form and L[value.form](copy) or copy
end

function descriptions.build(d)
  return nn.ReparamBlock(as_options(d))
end

-- Gives all parameters and statistics numbers with which every branch counts. Returns the block.
function descriptions.fill(block)
  orepa.no_grad(function()
    for name, p in block:named_parameters() do
      local fan = #p.shape == 4 and p:count() / p.shape[1] or 1
      p:copy_(orepa.randn(p.shape) / math.sqrt(fan))
      if name:find "bn.weight$" then p:copy_(orepa.rand(p.shape) + 0.5) end
    end
    for name, b in block:named_buffers() do
      if name:find "running_var$" then b:copy_(orepa.rand(b.shape) + 0.5) end
      if name:find "running_mean$" then b:copy_(orepa.randn(b.shape) * 0.3) end
    end
  end)
  return block
end

-- ---- meaning ----

-- The kernel of a layer that is a constant.
local function constant(shape, value, like)
  local list, n = {}, 0
  for o = 0, shape[1] - 1 do
    for i = 0, shape[2] - 1 do
      for h = 0, shape[3] - 1 do
        for w = 0, shape[4] - 1 do
          n = n + 1
          list[n] = value(o, i, h, w)
        end
      end
    end
  end
  return orepa.tensor(list, { dtype = "float64" }):reshape(shape):to(like.device):to(like.dtype)
end

local function average(c, k, like)
  return constant({ c, 1, k[1], k[2] }, function() return 1 / (k[1] * k[2]) end, like)
end

local function prior(c, k, like)
  return constant({ c, 1, k[1], k[2] }, function(q, _, h, w)
    if q < c / 2 then return math.cos(math.pi * (h + 0.5) * (q + 1) / k[1]) end
    return math.cos(math.pi * (w + 0.5) * (q + 1 - c / 2) / k[2])
  end, like)
end

local function identity(shape, like)
  return constant(shape, function(t, i, h, w)
    return i == t % shape[2] and h == shape[3] // 2 and w == shape[4] // 2 and 1 or 0
  end, like)
end

local function interleaved(weight, n)
  local rows, r = {}, weight.shape[1] // n
  for o = 0, weight.shape[1] - 1 do
    local at = o % r * n + o // r + 1
    rows[o + 1] = weight:slice(1, at, at)
  end
  return orepa.cat(rows, 1)
end

local function turned(weight)
  for dim = 3, 4 do
    local parts = {}
    for k = weight.shape[dim], 1, -1 do parts[#parts + 1] = weight:slice(dim, k, k) end
    weight = orepa.cat(parts, dim)
  end
  return weight
end

local run_sum

-- c: channels that reach the layer, out: that leave it. Gives the kernel and its groups.
local function layer_kernel(e, l, c, out, path, like)
  local k = both(l[1] or 1)
  if l.form == "identity" then return constant({ c, 1, 1, 1 }, function() return 1 end, like), c end
  if l.form == "average" then return average(c, k, like), c end
  if l.form == "prior" then return prior(c, k, like), c end
  local weight, n = e.block[path], l.form == "depthwise" and c or l.groups or e.groups
  assert(weight, "there is no parameter " .. path)
  assert.same({ out, c // n, k[1], k[2] }, weight.shape)
  e.used[path] = true
  if l.interleave then weight = interleaved(weight, n) end
  if l.plus_identity then weight = weight + identity(weight.shape, like) end
  return weight, n
end

local parametric = { conv = true, depthwise = true, nest = true }

local function channels(l, c, last, out)
  if not parametric[l.form] then return c end
  return l.out or l.expand and l.expand * c or last and out or c
end

local function is_larger(l)
  local k = both(l[1] or 1)
  return k[1] > 1 or k[2] > 1
end

local function span(b)
  local k = { 1, 1 }
  for _, l in ipairs(b) do
    for d = 1, 2 do k[d] = k[d] + both(l[1] or 1)[d] - 1 end
  end
  return k
end

-- By how much the map is surrounded (or cropped) so that a kernel of size k lies centred in one of size `whole`.
local function around(e, k, whole, padding)
  local p = {}
  for d = 1, 2 do p[d] = padding[d] - e.dilation[d] * (whole[d] - k[d]) // 2 end
  return p
end

-- The default names count the layers with parameters where there are several.
local function path_of(s, l, number)
  if l.name then return s.root .. (l.name:sub(1, 1) == "." and s.branch or "") .. l.name end
  return ("%s%s.conv%s%s"):format(s.root, s.branch, number, l.form == "nest" and "" or ".weight")
end

-- One layer on the map.
local function run_layer(e, l, x, s)
  if l.form == "nest" then
    return run_sum(e, l, x, { input = s.input, out = s.out, kernel = both(l[1]), root = s.path .. ".", turn = s.turn,
      stride = s.stride, padding = { 0, 0 } })
  end
  local weight, groups = layer_kernel(e, l, s.input, s.out, s.path, x)
  return F.conv2d(x, s.turn and turned(weight) or weight, { groups = groups, dilation = e.dilation, stride = s.stride })
end

-- What each layer of a branch is given: channels, path, whether it is turned, its stride. The last layer larger than 1x1 (or the
-- last of all) has the stride; `padded` is the first one larger than 1x1, or the last of all.
local function layers_of(e, b, s)
  local strided, padded, last, count, number, norms, c = #b, nil, 0, 0, 0, 0, s.input
  for k, l in ipairs(b) do
    if is_larger(l) then strided, padded = k, padded or k end
    if parametric[l.form] then last, count = k, count + 1 end
    if l.norm ~= false then norms = norms + 1 end
  end
  local list, norm = {}, 0
  for k, l in ipairs(b) do
    if parametric[l.form] then number = number + 1 end
    if l.norm ~= false then norm = norm + 1 end
    local out = channels(l, c, k == last, s.out)
    list[k] = { input = c, out = out, path = path_of(s, l, count > 1 and number or ""),
      turn = s.turn ~= (b.correlate and k > 1 or false), stride = k == strided and s.stride or { 1, 1 } }
    if e.norms and l.norm ~= false then
      list[k].norm = type(l.norm) == "string" and s.root .. (l.norm:sub(1, 1) == "." and s.branch or "") .. l.norm
        or ("%s%s.bn%s"):format(s.root, s.branch, norms > 1 and norm or "")
    end
    c = out
  end
  return list, padded or #b
end

-- One branch on a map that is surrounded already: layer by layer.
local function run_branch(e, b, x, s)
  local list = layers_of(e, b, s)
  for k, l in ipairs(b) do x = run_layer(e, l, x, list[k]) end
  return x
end

-- ---- offline: every layer on the map, with its norm ----

-- A norm's statistics are copies, which a pass in training writes.
local function statistics(e, path)
  local bn = e.block[path]
  e.statistics[path] = e.statistics[path] or { mean = bn.running_mean:clone(), var = bn.running_var:clone() }
  return e.statistics[path]
end

local function normed(e, path, x, training)
  local bn, own = e.block[path], statistics(e, path)
  e.used[path .. ".weight"], e.used[path .. ".bias"] = true, true
  return F.batch_norm(x, { weight = bn.weight, bias = bn.bias, running_mean = own.mean, running_var = own.var,
    training = training })
end

-- Surrounds the map by v, (1, c, 1, 1) without gradient; negative widths crop.
local function surrounded_by(x, v, p)
  local widths = { 0, 0, 0, 0, p[1], p[1], p[2], p[2] }
  local inside = orepa.pad(orepa.ones(x.shape[1], 1, x.shape[3], x.shape[4]):to(x.device):to(x.dtype), widths)
  return orepa.pad(x, widths) + v:detach() * (1 - inside)
end

local function run_offline_branch(e, b, x, s)
  local list, padded = layers_of(e, b, s)
  local v = orepa.zeros(1, s.input, 1, 1):to(x.device):to(x.dtype)
  for k, l in ipairs(b) do
    if k == padded then x = surrounded_by(x, v, s.around) end
    x = run_layer(e, l, x, list[k])
    if k < padded then v = orepa.no_grad(function() return run_layer(e, l, v, list[k]) end) end
    if list[k].norm then
      x = normed(e, list[k].norm, x, e.training)
      if k < padded then v = orepa.no_grad(function() return normed(e, list[k].norm, v, false) end) end
    end
  end
  return x
end

-- A list without the entries that are false.
local function kept(list)
  local rest = {}
  for _, entry in ipairs(list) do
    if entry then rest[#rest + 1] = entry end
  end
  return rest
end

function run_sum(e, d, x, s)
  local row, vector, sum = 0, e.block[s.root .. "vector"], nil
  for position, b in ipairs(kept(d.branches)) do
    local y
    local inner = { input = s.input, out = s.out, root = s.root, branch = b.name or ("branch%d"):format(position - 1),
      turn = s.turn, stride = s.stride, around = around(e, span(b), s.kernel, s.padding) }
    if e.statistics and s.root == "" then
      y = run_offline_branch(e, b, x, inner)
    else
      local p = inner.around
      y = run_branch(e, b, orepa.pad(x, { 0, 0, 0, 0, p[1], p[1], p[2], p[2] }), inner)
    end
    if d.scaling ~= "none" and b.scale ~= false then
      row = row + 1
      y = y * vector:slice(1, row, row):reshape(1, -1, 1, 1)
    end
    sum = sum and sum + y or y
  end
  local rows = row + (d.scaling ~= "none" and d.spare_rows or 0)
  assert.same(rows > 0 and { rows, d.scaling == "scalar" and 1 or s.out } or nil, vector and vector.shape)
  e.used[s.root .. "vector"] = vector and true
  return sum
end

local function run_block(e, d, x)
  local k, scaling = both(d.kernel_size), d.scaling
  if not scaling and d.mode == "offline" then scaling = "none" end
  return run_sum(e, { branches = d.branches, scaling = scaling, spare_rows = d.spare_rows }, x, { input = d.in_channels,
    out = d.out_channels, kernel = k, root = "", turn = false, stride = both(d.stride or 1),
    padding = d.padding and both(d.padding) or { k[1] // 2, k[2] // 2 } })
end

local function evaluator(d, block)
  return { block = block, groups = d.groups or 1, dilation = both(d.dilation or 1), used = {} }
end

-- The sum of the branches on the map x, before bias, norm and activation. Also the set of names of parameters that took part.
function descriptions.run(d, block, x)
  local e = evaluator(d, block)
  return run_block(e, d, x), e.used
end

-- The same of an offline block: each layer is followed by its norm. Also gives the norms' statistics after the pass.
function descriptions.run_offline(d, block, x, training)
  local e = evaluator(d, block)
  e.statistics, e.training, e.norms = {}, training, d.norms ~= false
  return run_block(e, d, x), e.used, e.statistics
end

-- The same with norm (by the batch's statistics if training) and activation; `norm` has its parameters and statistics.
function descriptions.finish(d, block, y, norm)
  if d.bias then y = y + block.bias:reshape(1, -1, 1, 1) end
  if norm then y = F.batch_norm(y, norm) end
  return d.act == "relu" and F.relu(y) or y
end

-- A map's size at which the convolution has a few outputs in each dimension.
function descriptions.map_size(d)
  local k, dilation, stride = both(d.kernel_size), both(d.dilation or 1), both(d.stride or 1)
  local padding = d.padding and both(d.padding) or { k[1] // 2, k[2] // 2 }
  local sizes = {}
  for n = 1, 2 do
    sizes[n] = math.max(1, dilation[n] * (k[n] - 1) + 1 - 2 * padding[n] + stride[n] * random(1, 3) + random(0, 1))
    -- a branch that is cropped must have something left
    sizes[n] = math.max(sizes[n], dilation[n] * (k[n] - 1) + 1 - 2 * padding[n])
  end
  return sizes
end

return descriptions
