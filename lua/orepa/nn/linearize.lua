-- reparam.linearize: an offline block becomes an online one that computes the same in evaluation. The norms behind its layers go;
-- what they multiplied by becomes the branches' scalings, what they added the shift of one norm (or a bias) behind the sum.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local block = require "orepa.nn.block"
local options = require "orepa.options"
local reparam = require "orepa.reparam"
local with, internal = options.with, module.internal

-- ---- multiplying the output channels of a branch, in its parameters ----
-- `values` holds the parameters in float64 by path; s is a number for each output channel.

local scale_chain

-- A kernel's row o is the parameter's row (o mod r)*n + o // r where rows are interleaved.
local function in_parameter_order(layer, s)
  if not layer.interleave then return s end
  return s:reshape(layer.groups, -1):transpose(1, 2):contiguous():reshape(-1)
end

local function scale_layer(values, layer, s)
  if layer.chains then
    local done = true
    for _, chain in ipairs(layer.chains) do done = scale_chain(values, chain, s) and done end
    return done
  end
  local rows = in_parameter_order(layer, s):reshape(-1, 1, 1, 1)
  local kernel = values[layer.path]
  if layer.plus_identity then -- s*(D + E) - E
    local shape = kernel.shape
    local identity = core.tree.identity_kernel(shape[1], shape[2], { shape[3], shape[4] },
      { dtype = "float64", device = kernel.device })
    values[layer.path] = kernel * rows + identity * (rows - 1)
  else
    values[layer.path] = kernel * rows
  end
  return true
end

-- The last layer with parameters up to one: constants behind it are depthwise and let the factor through.
local function scale_layers(values, layers, last, s)
  for k = last, 1, -1 do
    if layers[k].path or layers[k].chains then return scale_layer(values, layers[k], s) end
  end
  return false
end

function scale_chain(values, chain, s)
  local rows = chain.vector and values[chain.vector]
  if rows and rows.shape[2] == s.shape[1] then
    local kept = {}
    for k = 1, rows.shape[1] do kept[k] = (k == chain.row and rows[k] * s or rows[k]):reshape(1, -1) end
    values[chain.vector] = core.cat(kept, 1)
    return true
  end
  return scale_layers(values, chain.layers, #chain.layers, s)
end

-- ---- one block ----

local function refuse(self, chain_name, what)
  core.fail(("linearize: %s, branch '%s': %s"):format(self.kind, chain_name, what))
end

-- Works the norms inside a branch into its parameters and gives what is left to multiply at its end.
local function take_norms(self, chain, name, values)
  local factor
  for k, layer in ipairs(chain.layers) do
    local s = layer.norm and (self[layer.norm]:fold())
    if s and k < #chain.layers then
      if not scale_layers(values, chain.layers, k, s) then
        refuse(self, name, ("there is no parameter before the norm '%s' that could take its scale"):format(layer.norm))
      end
    elseif s then
      factor = s
    end
  end
  if chain.slot then
    local row = values[chain.vector][chain.row]
    factor = factor and factor * row or row
  end
  local ones = core.ones({ self.options.out_channels }, { dtype = "float64", device = self:parameters()[1].device })
  return factor and factor * ones or ones -- a row may be one number for all channels
end

-- The factors of all branches, those of the sum's norm included where that goes.
local function factors_of(self, values, outer)
  local list = {}
  for k, chain in ipairs(self.plan.chains) do
    list[k] = take_norms(self, chain, self.plan.branches[k], values)
    if outer then list[k] = list[k] * outer end
  end
  return list
end

-- Gives a branch of the new block its factor: its row, or its parameters where the row has no place for it.
local function put_factor(self, chain, name, values, factor, rows)
  if chain.slot and rows.shape[2] > 1 then
    rows[chain.row] = factor
    return
  end
  local rest = factor
  if chain.slot then
    local mean = factor:mean():item()
    if mean == 0 then mean = 1 end
    rows[chain.row] = mean
    rest = factor / mean
    if (rest - 1):abs():max():item() < 1e-12 then return end
  end
  if not scale_layers(values, chain.layers, #chain.layers, rest) then
    refuse(self, name, "it has no parameter that could take its scale; scaling = \"vector\" has a place for it")
  end
end

local function write(block_, values)
  for _, p in ipairs(block_.plan.parameters) do
    local value = values[p.name]
    if value then block_[p.name]:copy_(value) end
  end
end

local function linearized(self, o)
  local given = with(self.description, { mode = "online", norms = false, scaling = o.scaling, post_bn = o.post_bn,
    bias = not o.post_bn, se = self.se })
  if self.options.post_bn and o.post_bn then given.post_bn = self.options.post_bn end
  local made = block.ReparamBlock(given)
  local like = self:parameters()[1]
  made:to(like.device):to(like.dtype)
  core.no_grad(function()
    local values = {}
    for _, p in ipairs(self.plan.parameters) do values[p.name] = self[p.name]:to("float64") end
    local _, shift = self:fold("float64")
    local norm = self.options.post_bn and self[self.options.post_bn]
    local s = norm and (norm:fold()) or nil
    local factors = factors_of(self, values, not made.options.post_bn and s or nil)
    local rows = made.vector and made.vector:to("float64")
    for k, chain in ipairs(made.plan.chains) do
      put_factor(self, chain, made.plan.branches[k], values, factors[k], rows)
    end
    values.vector = rows
    write(made, values)
    for _, c in ipairs(made.plan.constants) do made[c.name]:copy_(self[c.name]) end
    if made.options.post_bn then
      local post = made[made.options.post_bn]
      if s then post.weight:copy_(s) end
      post.bias:copy_(shift)
      post.running_var:fill_(1 - made.options.eps)
    else
      made.bias:copy_(shift)
    end
  end)
  for _, p in ipairs(self:parameters()) do internal.gone[p] = "linearized" end
  return made:train(self.training)
end

-- ---- a block or a network ----

local known = { scaling = "vector", post_bn = true }

function reparam.linearize(net, o)
  internal.need_module("linearize", net)
  o = options("linearize", o, known)
  if net.mode == "offline" then return linearized(net, o) end
  local found = {}
  for path, part in net:named_modules() do
    if path ~= "" and part.mode == "offline" then found[#found + 1] = { path, part } end
  end
  if #found == 0 then core.fail(("linearize: %s has no offline block"):format(net.kind or net.class_name)) end
  for _, entry in ipairs(found) do entry[2] = linearized(entry[2], o) end -- first all, as any may be refused
  for _, entry in ipairs(found) do net:replace(entry[1], entry[2]) end
  internal.note(net, { "linearize", o })
  return net
end

document("reparam.linearize", [[
  reparam.linearize(block or network, {scaling=, post_bn=}) -> module
  Offline blocks become online ones, which train as one convolution: norms behind layers go, each branch gets a row of `vector`
  that starts as its norm's scale, one norm follows the sum. What it computes in evaluation stays the same. A network is
  changed, a block gives a new one. scaling: "vector", "scalar" or "none"; post_bn = false: a bias in the norm's place.
  > local b = orepa.reparam.linearize(nn.DBB{in_channels = 4, out_channels = 4, kernel_size = 3}); return b.mode]])

return {}
