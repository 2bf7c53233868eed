-- ReparamBlock: many linear branches, trained as one convolution. A description (orepa.reparam) gives parameters and a tree;
-- every forward pass squeezes the branches into one kernel and runs one convolution, then the norm and the activation.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local layers = require "orepa.nn.layers"
local options = require "orepa.options"
local reparam = require "orepa.reparam"
local F, tree, internal = core.F, core.tree, module.internal
local required, optional, with = options.required, options.optional, options.with

local KEPT = {} -- the key of a block's folded kernel

local ReparamBlock = module.Module:extend("ReparamBlock")
ReparamBlock.library = true

local known = {
  in_channels = required, out_channels = required, kernel_size = required, branches = required,
  stride = 1, padding = optional, dilation = 1, groups = 1, act = "none", mode = "online", scaling = "vector",
  post_bn = "bn", bias = false, init = optional, spare_rows = 0, eps = 1e-5, momentum = 0.1, deployed = "reparam",
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
  one_of(o.mode, { "online", "deploy" }, where, "mode")
  check_others(o, where)
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
end

local function add_training_form(self, o, plan)
  for _, p in ipairs(plan.parameters) do
    check_name(self, p.name)
    self[p.name] = internal.Parameter(reparam.initial(p))
  end
  for _, constant in ipairs(plan.constants) do add_constant(self, constant) end
  for _, constant in ipairs(plan.shown) do add_constant(self, constant) end
  if o.bias then self.bias = internal.Parameter(core.zeros(o.out_channels)) end
  if o.post_bn then
    check_name(self, o.post_bn)
    self[o.post_bn] = layers.BatchNorm2d { num_features = o.out_channels, eps = o.eps, momentum = o.momentum }
  end
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
  given.kind = nil
  o = checked(given, where)
  rawset(self, "kind", where)
  rawset(self, "options", o)
  rawset(self, "plan", reparam.compile(o, where))
  rawset(self, "geometry", { stride = o.stride, padding = o.padding, dilation = o.dilation, groups = o.groups })
  rawset(self, "whole", with(self.geometry, { act = o.act })) -- of a deployed or folded block
  if o.mode == "deploy" then
    add_deployed_form(self, core.zeros(o.out_channels, o.in_channels // o.groups, o.kernel_size[1], o.kernel_size[2]),
      core.zeros(o.out_channels))
  else
    rawset(self, "mode", "online")
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

function ReparamBlock:squeezed_weight()
  need_branches(self, "squeezed_weight")
  return tree.squeeze(self.plan.tree, slots(self))
end

function ReparamBlock:branch_weights()
  need_branches(self, "branch_weights")
  local list, weights = slots(self), {}
  for k, name in ipairs(self.plan.branches) do weights[name] = tree.branch(self.plan.tree, k, list) end
  return weights
end

-- Squeezes with the engine's fused pass (true at first) or leaf by leaf: the same kernel, to rounding.
function ReparamBlock:set_fused(on)
  tree.set_fast(self.plan.tree, on)
  return self
end

-- ---- one convolution with bias: squeezed and folded in float64, rounded once ----

local function to_float64(t)
  return t:to("float64")
end

local function folded(self)
  local o = self.options
  return core.no_grad(function()
    local weight, bias
    weight = tree.squeeze(self.plan.tree, slots(self, to_float64))
    if o.post_bn then
      local scale, shift = self[o.post_bn]:fold()
      weight, bias = weight * scale:reshape(-1, 1, 1, 1), shift
    elseif o.bias then
      bias = self.bias:to("float64")
    else
      bias = core.zeros({ o.out_channels }, { dtype = "float64", device = weight.device })
    end
    local dtype = slots(self)[1].dtype
    return weight:to(dtype), bias:to(dtype)
  end)
end

-- Everything that the folded kernel depends on: the tensors, and their versions, which grow with every write. What it is computed
-- in is no part of this: a kernel's cast for autocast is kept with its storage, beside it.
local function fold_key(self)
  local key = slots(self)
  local norm = self.options.post_bn and self[self.options.post_bn]
  if norm then
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

-- The folded kernel may be kept only where no gradient can be asked of it and the norm's statistics stand still.
local function may_fold(self)
  local norm = self.options.post_bn and self[self.options.post_bn]
  if self.training or (norm and (norm.training or not norm.running_var)) or not internal.no_hooks() then return false end
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

function ReparamBlock:changed()
  rawset(self, KEPT, nil)
end

-- ---- forward ----

-- Drops a handle that only this function saw.
local function done_with(t)
  if internal.no_hooks() then t:release() end
end

local function finished(self, y, residual)
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
  return F.conv2d(x, weight, bias, residual and with(self.whole, { add = residual }) or self.whole)
end

local function online(self, x, residual)
  local o = self.options
  local plain = self.plan.plain -- the kernel is this parameter
  local weight = plain and self[plain] or tree.squeeze(self.plan.tree, slots(self), x, self.geometry)
  local y = F.conv2d(x, weight, self.bias, self.geometry)
  if not plain then weight:release() end
  if o.post_bn then
    local z = self[o.post_bn](y)
    done_with(y)
    y = z
  end
  return finished(self, y, residual)
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
  return online(self, x, residual)
end

-- ---- deploying ----

function ReparamBlock:deploy()
  if self.mode ~= "deploy" then
    local o = self.options
    local weight, bias = folded(self)
    for _, p in ipairs(self:parameters()) do internal.deployed_away[p] = true end
    for _, p in ipairs(self.plan.parameters) do self:remove(p.name) end
    for _, c in ipairs(self.plan.constants) do self:remove(c.name) end
    for _, c in ipairs(self.plan.shown) do self:remove(c.name) end
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
  b:squeezed_weight() -> tensor
  The one kernel of a block's branches, with gradients.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:squeezed_weight()]])
document("b:branch_weights", [[
  b:branch_weights() -> table
  From a branch's name to the kernel that it adds to the squeezed one.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:branch_weights().origin]])
document("b:set_fused", [[
  b:set_fused(on) -> b
  Whether squeezing uses the engine's fused pass, where it has one (as at first), or composes leaf by leaf: equal to rounding.
  > nn.OREPA{in_channels = 2, out_channels = 4, kernel_size = 3}:set_fused(false)]])

return { ReparamBlock = ReparamBlock }
