-- ReparamBlock: many linear branches, trained as one convolution. A description (orepa.reparam) gives parameters and a tree.
-- Online, every forward pass squeezes the branches into one kernel and runs one convolution, then the norm and the activation;
-- offline, every branch runs on the map (orepa.nn.branches); deployed, one convolution is left of it.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local branches = require "orepa.nn.branches"
local layers = require "orepa.nn.layers"
local options = require "orepa.options"
local reparam = require "orepa.reparam"
local F, tree, internal = core.F, core.tree, module.internal
local done_with = internal.done_with
local required, optional, with = options.required, options.optional, options.with

local KEPT = {} -- the key of a block's folded kernel

local ReparamBlock = module.Module:extend("ReparamBlock")
ReparamBlock.library = true

local known = {
  in_channels = required, out_channels = required, kernel_size = required, branches = required,
  stride = 1, padding = optional, dilation = 1, groups = 1, act = "none", mode = "online", scaling = optional, norms = optional,
  post_bn = optional, se = optional, bias = false, init = optional, spare_rows = 0, eps = 1e-5, momentum = 0.1,
  deployed = "reparam",
}

-- What follows from the mode.
local defaults = {
  online = { scaling = "vector", norms = false, post_bn = "bn" },
  offline = { scaling = "none", norms = true, post_bn = false },
  deploy = { scaling = "none", norms = false, post_bn = false },
}

-- ---- making ----

local function merged(o, description)
  if type(o) ~= "table" or (description ~= nil and type(description) ~= "table") then
    core.fail(("ReparamBlock: a table of options expected, got %s"):format(type(type(o) == "table" and description or o)))
  end
  return with(description or {}, o)
end

local function one_of(value, list, where, name)
  for _, other in ipairs(list) do
    if value == other then return end
  end
  core.fail(("%s: %s is '%s'; there are %s"):format(where, name, tostring(value), table.concat(list, ", ")))
end

-- Options that are neither sizes nor words of a list.
local function check_others(o, where)
  local function need(condition, name, expected)
    if not condition then core.fail(("%s: %s is %s, %s expected"):format(where, name, tostring(o[name]), expected)) end
  end
  local function is_name(value) return type(value) == "string" and value ~= "" end
  need(type(o.eps) == "number" and o.eps > 0, "eps", "a positive number")
  need(type(o.momentum) == "number", "momentum", "a number")
  need(type(o.bias) == "boolean", "bias", "true or false")
  need(o.se == nil or internal.is_module(o.se), "se", "a module")
  need(type(o.norms) == "boolean", "norms", "true or false")
  need(type(o.post_bn) == "boolean" or is_name(o.post_bn), "post_bn", "true, false or a name")
  need(is_name(o.deployed), "deployed", "a name")
end

local function checked(given, where)
  local o = options(where, given, known)
  local pair, whole = reparam.check.pair, reparam.check.whole
  for _, name in ipairs { "in_channels", "out_channels", "groups" } do o[name] = whole(o[name], 1, where, name) end
  for _, name in ipairs { "kernel_size", "stride", "dilation" } do o[name] = pair(o[name], 1, where, name) end
  o.padding = o.padding and pair(o.padding, 0, where, "padding") or { o.kernel_size[1] // 2, o.kernel_size[2] // 2 }
  if o.in_channels % o.groups ~= 0 or o.out_channels % o.groups ~= 0 then
    core.fail(("%s: %d groups don't divide %d -> %d channels"):format(where, o.groups, o.in_channels, o.out_channels))
  end
  one_of(o.act, { "none", "relu" }, where, "act")
  one_of(o.mode, { "online", "offline", "deploy" }, where, "mode")
  for name, default in pairs(defaults[o.mode]) do
    if o[name] == nil then o[name] = default end
  end
  check_others(o, where)
  if o.norms and o.mode ~= "offline" then
    core.fail(("%s: a norm behind a layer can't be squeezed: norms = true goes with mode = \"offline\""):format(where))
  end
  if o.post_bn == true then o.post_bn = "bn" end
  if o.bias and o.post_bn then
    core.fail(("%s: a bias before a norm has no effect; bias = true goes with post_bn = false"):format(where))
  end
  return o
end

-- A description's names must leave the block's own alone.
local function check_name(self, name)
  if self[name] ~= nil then core.fail(("%s: nothing can be named '%s', the block has that already"):format(self.kind, name)) end
end

local function add_constant(self, constant)
  check_name(self, constant.name)
  self:register_buffer(constant.name, constant.build {}, { constant = true })
  constant.dtype = self[constant.name].dtype
end

local function add_norm(self, o, name, channels)
  check_name(self, name)
  self[name] = layers.BatchNorm2d { num_features = channels, eps = o.eps, momentum = o.momentum }
end

local function add_training_form(self, o, plan)
  for _, p in ipairs(plan.parameters) do
    check_name(self, p.name)
    self[p.name] = internal.Parameter(reparam.initial(p))
  end
  for _, constant in ipairs(plan.constants) do add_constant(self, constant) end
  for _, constant in ipairs(plan.shown) do add_constant(self, constant) end
  if o.bias then self.bias = internal.Parameter(core.zeros(o.out_channels)) end
  for _, norm in ipairs(plan.norms) do add_norm(self, o, norm.name, norm.channels) end
  if o.post_bn then add_norm(self, o, o.post_bn, o.out_channels) end
end

local function add_deployed_form(self, weight, bias)
  local name = self.options.deployed
  self[name .. ".weight"] = internal.Parameter(weight)
  self[name .. ".bias"] = internal.Parameter(bias)
  rawset(self, "mode", "deploy")
end

function ReparamBlock:init(o, description)
  local given = merged(o, description)
  local where = given.kind or "ReparamBlock"
  rawset(self, "description", with(given, {}))
  given.kind = nil
  o = checked(given, where)
  rawset(self, "kind", where)
  rawset(self, "options", o)
  rawset(self, "plan", reparam.compile(o, where))
  self.se = o.se
  rawset(self, "geometry", { stride = o.stride, padding = o.padding, dilation = o.dilation, groups = o.groups })
  rawset(self, "whole", with(self.geometry, { act = o.act })) -- of a deployed or folded block
  if o.mode == "deploy" then
    add_deployed_form(self, core.zeros(o.out_channels, o.in_channels // o.groups, o.kernel_size[1], o.kernel_size[2]),
      core.zeros(o.out_channels))
  else
    rawset(self, "mode", o.mode)
    if o.mode == "offline" then
      for _, chain in ipairs(self.plan.chains) do branches.place(chain, o) end
    end
    add_training_form(self, o, self.plan)
  end
end

-- ---- squeezing ----

-- The tensors of the tree's slots; `convert` is applied to each.
local function slots(self, convert)
  local list = {}
  for _, p in ipairs(self.plan.parameters) do list[p.slot] = convert and convert(self[p.name]) or self[p.name] end
  for _, c in ipairs(self.plan.constants) do list[c.slot] = convert and convert(self[c.name]) or self[c.name] end
  return list
end

local function need_branches(self, what)
  if self.mode == "deploy" then
    core.fail(("%s: %s: the branches went when the block was deployed"):format(self.kind, what))
  end
end

local function to_float64(t)
  return t:to("float64")
end

-- The type in which the block computes.
local function dtype_of(self)
  return (slots(self)[1] or self:parameters()[1]).dtype
end

-- Of an offline block: the list of its branches' kernels, their sum, and the sum's bias (nil: zero), in float64.
local function folded_branches(self)
  return core.no_grad(function() return branches.fold(self, slots(self, to_float64)) end)
end

-- The kernel of the block, or that of a nest inside.
function ReparamBlock:squeezed_weight(nest)
  need_branches(self, "squeezed_weight")
  if nest then
    local sum = self.plan.nests[nest]
    if not sum then core.fail(("%s: there is no nest '%s'"):format(self.kind, tostring(nest))) end
    return tree.squeeze(sum, slots(self))
  end
  if self.mode == "online" then return tree.squeeze(self.plan.tree, slots(self)) end
  local _, sum = folded_branches(self)
  return sum:to(dtype_of(self))
end

function ReparamBlock:branch_weights()
  need_branches(self, "branch_weights")
  local list, weights = slots(self), {}
  local kernels = self.mode == "offline" and folded_branches(self)
  for k, name in ipairs(self.plan.branches) do
    weights[name] = kernels and kernels[k]:to(dtype_of(self)) or tree.branch(self.plan.tree, k, list)
  end
  return weights
end

-- Squeezes with the engine's fused pass (true at first) or leaf by leaf: the same kernel, to rounding.
function ReparamBlock:set_fused(on)
  tree.set_fast(self.plan.tree, on)
  for _, chain in ipairs(self.plan.chains) do
    for _, layer in ipairs(chain.layers) do
      if layer.tree then tree.set_fast(layer.tree, on) end
    end
  end
  return self
end

-- ---- one convolution with bias: squeezed and folded in float64, rounded once ----

-- The sum of the branches; its bias is nil where it is zero.
local function folded_sum(self)
  if self.mode == "online" then return tree.squeeze(self.plan.tree, slots(self, to_float64)) end
  return select(2, folded_branches(self))
end

local function folded(self, dtype)
  local o = self.options
  dtype = dtype or dtype_of(self)
  return core.no_grad(function()
    local weight, bias = folded_sum(self)
    bias = bias or core.zeros({ o.out_channels }, { dtype = "float64", device = weight.device })
    if o.bias then bias = bias + self.bias:to("float64") end
    if o.post_bn then
      local scale, shift = self[o.post_bn]:fold()
      weight, bias = weight * scale:reshape(-1, 1, 1, 1), bias * scale + shift
    end
    return weight:to(dtype), bias:to(dtype)
  end)
end

-- Kernel and bias of the one convolution that evaluation is, in a type (the block's own if none is given).
function ReparamBlock:fold(dtype)
  need_branches(self, "fold")
  return folded(self, dtype)
end

-- All norms of a block: those behind layers and the one behind the sum.
local function norms_of(self)
  local list = {}
  for k, norm in ipairs(self.plan.norms) do list[k] = self[norm.name] end
  if self.options.post_bn then list[#list + 1] = self[self.options.post_bn] end
  return list
end

-- Everything that the folded kernel depends on: the tensors, and their versions, which grow with every write. What it is computed
-- in is no part of this: a kernel's cast for autocast is kept with its storage, beside it.
local function fold_key(self)
  local key = slots(self)
  for _, norm in ipairs(norms_of(self)) do
    for _, name in ipairs { "weight", "bias", "running_mean", "running_var" } do key[#key + 1] = norm[name] end
  end
  if self.options.bias then key[#key + 1] = self.bias end
  for k = 1, #key do key[#key + 1] = key[k]:version() end
  return key
end

local function same_key(a, b)
  if #a ~= #b then return false end
  for k, value in ipairs(a) do
    if value ~= b[k] then return false end
  end
  return true
end

-- The folded kernel may be kept only where no gradient can be asked of it and the norms' statistics stand still.
local function may_fold(self)
  if self.training or not internal.no_hooks() then return false end
  for _, norm in ipairs(norms_of(self)) do
    if norm:uses_batch() then return false end
  end
  if not core.is_grad_enabled() then return true end
  for _, p in ipairs(self:parameters()) do
    if p.requires_grad then return false end
  end
  return true
end

local function kept_fold(self)
  local key = fold_key(self)
  local kept = rawget(self, KEPT)
  if not kept or not same_key(kept.key, key) then
    local weight, bias = folded(self)
    kept = { key = key, weight = weight, bias = bias }
    rawset(self, KEPT, kept)
  end
  return kept.weight, kept.bias
end

-- In another type, constants are what their definitions give in it, not what the former type had room for.
function ReparamBlock:changed()
  rawset(self, KEPT, nil)
  if self.mode == "deploy" then return end
  for _, list in ipairs { self.plan.constants, self.plan.shown } do
    for _, c in ipairs(list) do
      local t = self[c.name]
      if t.dtype ~= c.dtype and internal.is_constant(self, c.name) then
        t:copy_(c.build { dtype = t.dtype, device = t.device })
      end
      c.dtype = t.dtype
    end
  end
end

-- ---- forward ----

local function finished(self, y, residual)
  if self.se then
    local weighted = self.se(y)
    done_with(y)
    y = weighted
  end
  if residual then
    local sum = y + residual
    done_with(y)
    y = sum
  end
  if self.options.act ~= "relu" then return y end
  local z = F.relu(y)
  done_with(y)
  return z
end

-- One convolution that does everything.
local function whole(self, x, weight, bias, residual)
  if self.se then return finished(self, F.conv2d(x, weight, bias, self.geometry), residual) end
  return F.conv2d(x, weight, bias, residual and with(self.whole, { add = residual }) or self.whole)
end

-- One convolution with the squeezed kernel.
local function squeezed(self, x)
  local plain = self.plan.plain -- the kernel is this parameter
  local weight = plain and self[plain] or tree.squeeze(self.plan.tree, slots(self), x, self.geometry)
  local y = F.conv2d(x, weight, self.bias, self.geometry)
  if not plain then weight:release() end
  return y
end

-- Every branch on the map.
local function summed(self, x)
  local y = branches.run(self, x, slots(self))
  if not self.options.bias then return y end
  local z = y + self.bias:reshape(1, -1, 1, 1)
  done_with(y)
  return z
end

-- With a residual, that is added before the activation.
function ReparamBlock:forward(x, residual)
  if self.mode == "deploy" then
    local name = self.options.deployed
    return whole(self, x, self[name .. ".weight"], self[name .. ".bias"], residual)
  elseif may_fold(self) then
    local weight, bias = kept_fold(self)
    return whole(self, x, weight, bias, residual)
  end
  local y, norm = self.mode == "online" and squeezed(self, x) or summed(self, x), self.options.post_bn
  if norm then
    local z = self[norm](y)
    done_with(y)
    y = z
  end
  return finished(self, y, residual)
end

-- ---- deploying ----

function ReparamBlock:deploy()
  if self.mode ~= "deploy" then
    local o = self.options
    local weight, bias = folded(self)
    for _, p in ipairs(self:parameters()) do internal.gone[p] = "deployed" end
    for _, p in ipairs(self.plan.parameters) do self:remove(p.name) end
    for _, c in ipairs(self.plan.constants) do self:remove(c.name) end
    for _, c in ipairs(self.plan.shown) do self:remove(c.name) end
    for _, norm in ipairs(self.plan.norms) do self:remove(norm.name) end
    if o.bias then self:remove("bias") end
    if o.post_bn then self:remove(o.post_bn) end
    add_deployed_form(self, weight, bias)
    self:changed()
  end
  return self:eval()
end

function ReparamBlock:extra()
  local o = self.options
  local function size(k) return ("%dx%d"):format(k[1], k[2]) end
  local parts = { ("%d -> %d, %s"):format(o.in_channels, o.out_channels, size(o.kernel_size)) }
  if o.stride[1] ~= 1 or o.stride[2] ~= 1 then parts[#parts + 1] = "stride " .. size(o.stride) end
  if o.groups ~= 1 then parts[#parts + 1] = ("groups %d"):format(o.groups) end
  if o.dilation[1] ~= 1 or o.dilation[2] ~= 1 then parts[#parts + 1] = "dilation " .. size(o.dilation) end
  if o.act ~= "none" then parts[#parts + 1] = o.act end
  if self.mode == "deploy" then
    parts[#parts + 1] = "deployed"
  else
    parts[#parts + 1] = "branches " .. table.concat(self.plan.branches, " ")
  end
  return table.concat(parts, ", ")
end

function ReparamBlock:describe(indent)
  local text = module.Module.describe(self, indent)
  return (text:gsub("^ReparamBlock", self.kind))
end

document("nn.ReparamBlock", [[
  nn.ReparamBlock({in_channels=, out_channels=, kernel_size=, stride=, padding=, ...}, {branches=, ...}) -> module
  A block of linear branches that trains as one convolution; the options may be one table or two. docs/blocks.md has all of
  them. b(x, residual) adds the residual before the activation. b:squeezed_weight() is the one kernel, b:branch_weights() what
  each branch adds to it, b:deploy() leaves the convolution alone.
  > local L = orepa.reparam
  > return nn.ReparamBlock{in_channels = 4, out_channels = 8, kernel_size = 3, act = "relu", branches = {
  >   {name = "plain", L.conv{3}}, {name = "smooth", scale = 0.5, L.conv{1}, L.average{3}}}}(orepa.ones(1, 4, 6, 6))]])

document("b:squeezed_weight", [[
  b:squeezed_weight(nest) -> tensor
  The one kernel of a block's branches, with gradients; of an offline block by its norms' running statistics, and without. With
  the path of a nest, that nest's kernel.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:squeezed_weight()]])
document("b:branch_weights", [[
  b:branch_weights() -> table
  From a branch's name to the kernel that it adds to the squeezed one.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:branch_weights().origin]])
document("b:fold", [[
  b:fold(type) -> weight, bias
  The one convolution that the block is in evaluation, its norms folded; in the block's own type or another. The block stays.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:fold()]])
document("b:set_fused", [[
  b:set_fused(on) -> b
  Whether squeezing uses the engine's fused pass, where it has one (as at first), or composes leaf by leaf: equal to rounding.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:set_fused(false)]])

return { ReparamBlock = ReparamBlock }
