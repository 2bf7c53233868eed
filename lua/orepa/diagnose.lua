-- orepa.diagnose: what the branches of re-parameterized blocks do: how alike their kernels are, how large their gradients,
-- whether they move and started apart, and what deploying costs in accuracy.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local options = require "orepa.options"
local F = core.F

local diagnose = {}

-- ---- the blocks of a network ----

-- {path, block} of each block that still has its branches.
local function blocks_of(where, net)
  module.internal.need_module("diagnose." .. where, net)
  local list = {}
  for path, part in net:named_modules() do
    if part.plan and part.mode ~= "deploy" then list[#list + 1] = { path, part } end
  end
  if #list == 0 then core.fail(("diagnose.%s: there is no block with branches"):format(where)) end
  return list
end

local function squares(t)
  local wide = t:detach():to("float64")
  return (wide * wide):sum():item()
end

-- Each branch's scaled kernel, flat and in float64, in the order of the branches.
local function kernels_of(block)
  local weights, list = block:branch_weights(), {}
  for k, name in ipairs(block.plan.branches) do list[k] = weights[name]:detach():to("float64"):reshape(-1) end
  return list
end

-- ---- similarity ----

local function cosine(a, b, length_a, length_b)
  if length_a == 0 or length_b == 0 then return 0 end
  return (a * b):sum():item() / (length_a * length_b)
end

local function similarity_of(block)
  local kernels, lengths, matrix = kernels_of(block), {}, {}
  for k, w in ipairs(kernels) do lengths[k] = math.sqrt(squares(w)) end
  for i = 1, #kernels do
    matrix[i] = {}
    for j = 1, i do
      matrix[i][j] = cosine(kernels[i], kernels[j], lengths[i], lengths[j])
      matrix[j][i] = matrix[i][j]
    end
  end
  return matrix
end

function diagnose.similarity(net)
  local list = {}
  for k, entry in ipairs(blocks_of("similarity", net)) do
    list[k] = { path = entry[1], branches = entry[2].plan.branches, matrix = similarity_of(entry[2]) }
  end
  return list
end

-- ---- gradients ----

-- The parameters of each branch: of its layers and those of nests inside, and of its norms.
local function add_chain(block, chain, list)
  for _, layer in ipairs(chain.layers) do
    if layer.path then list[#list + 1] = block[layer.path] end
    if layer.norm then
      for _, p in ipairs(block[layer.norm]:parameters()) do list[#list + 1] = p end
    end
    for _, inner in ipairs(layer.chains or {}) do add_chain(block, inner, list) end
  end
end

-- The root of the sum of squares of a branch's gradients; its row of the scalings counts too. nil: there is no gradient.
local function gradient_norm(block, chain)
  local list, sum = {}, nil
  add_chain(block, chain, list)
  for _, p in ipairs(list) do
    if p.grad then sum = (sum or 0) + squares(p.grad) end
  end
  local vector = chain.vector and block[chain.vector]
  if vector and vector.grad then sum = (sum or 0) + squares(vector.grad[chain.row]) end
  return sum and math.sqrt(sum)
end

function diagnose.gradients(net)
  local list = {}
  for k, entry in ipairs(blocks_of("gradients", net)) do
    local path, block = entry[1], entry[2]
    list[k] = { path = path, branches = block.plan.branches, norms = {} }
    for n, chain in ipairs(block.plan.chains) do list[k].norms[n] = gradient_norm(block, chain) or false end
  end
  return list
end

-- ---- conditions: at least two branches move, and those that do started apart ----

local Watch = {}
Watch.__index = Watch

function diagnose.watch(net)
  local watch = setmetatable({ start = {} }, Watch)
  for k, entry in ipairs(blocks_of("watch", net)) do
    watch.start[k] = { path = entry[1], block = entry[2], kernels = kernels_of(entry[2]) }
  end
  return watch
end

local function distance(a, b)
  return math.sqrt(squares(a - b))
end

-- Branches that moved by more than `tolerance` of the longest kernel, and the least distance of any two of them at the start.
local function conditions(entry, tolerance)
  local now, longest, moved, active = kernels_of(entry.block), 0, {}, {}
  for k, w in ipairs(now) do longest = math.max(longest, math.sqrt(squares(w)), math.sqrt(squares(entry.kernels[k]))) end
  local least = longest > 0 and tolerance * longest or 0
  for k, w in ipairs(now) do
    moved[k] = distance(w, entry.kernels[k])
    if moved[k] > least then active[#active + 1] = k end
  end
  local apart = math.huge
  for i = 1, #active do
    for j = 1, i - 1 do apart = math.min(apart, distance(entry.kernels[active[i]], entry.kernels[active[j]])) end
  end
  return { path = entry.path, branches = entry.block.plan.branches, moved = moved, active = #active,
    apart = #active > 1 and apart or 0, condition1 = #active >= 2, condition2 = #active >= 2 and apart > least }
end

function Watch:check(o)
  o = options("watch:check", o, { tolerance = 1e-6 })
  local list = {}
  for k, entry in ipairs(self.start) do
    if entry.block.mode == "deploy" then
      core.fail(("watch:check: '%s' was deployed, its branches are gone"):format(entry.path))
    end
    list[k] = conditions(entry, o.tolerance)
  end
  return list
end

-- ---- what deploying costs ----

-- Runs the network once and calls see(path, block, input) for each block.
local function visit_inputs(net, list, x, see)
  local hooks = {}
  for k, entry in ipairs(list) do
    hooks[k] = entry[2]:register_forward_hook(function(block, inputs) see(entry[1], block, inputs[1]) end)
  end
  local done, problem = pcall(function() core.no_grad(function() net(x) end) end)
  for _, hook in ipairs(hooks) do hook.remove() end
  if not done then error(problem, 0) end
end

-- The block's convolution in float64, on the device that has one for every type.
local function exact(block, x)
  local weight, bias = block:fold("float64")
  return F.conv2d(x:to("ref"):to("float64"), weight:to("ref"), bias:to("ref"), block.geometry)
end

-- What it is once it is deployed.
local function deployed(block, x)
  local weight, bias = block:fold()
  return F.conv2d(x, weight, bias, block.geometry)
end

function diagnose.deployment(net, x)
  local list, errors = blocks_of("deployment", net), {}
  for _, part in net:named_modules() do
    if part.training then core.fail("diagnose.deployment: the network is in training mode; call net:eval() first") end
  end
  visit_inputs(net, list, x, function(path, block, input)
    local wanted = exact(block, input)
    local got = deployed(block, input):to("ref"):to("float64")
    local largest = wanted:abs():max():item()
    errors[#errors + 1] = { path = path, kind = block.kind, largest = largest,
      error = largest > 0 and (got - wanted):abs():max():item() / largest or 0 }
  end)
  return errors
end

document("diagnose.similarity", [[
  diagnose.similarity(net) -> list
  How alike the kernels of a block's branches are: for each block {path, branches, matrix}, the cosine of each two branches'
  scaled kernels (0 where one is zero).
  > orepa.diagnose.similarity(nn.OREPA{in_channels = 2, out_channels = 2, kernel_size = 3})[1].matrix]])
document("diagnose.gradients", [[
  diagnose.gradients(net) -> list
  After a backward pass: for each block {path, branches, norms}, the length of each branch's gradients (its row of the scalings
  included), false where there are none.
  > orepa.diagnose.gradients(nn.OREPA{in_channels = 2, out_channels = 2, kernel_size = 3})[1].norms]])
document("diagnose.watch", [[
  diagnose.watch(net) -> watch
  Keeps the branches' kernels as they are now, for watch:check().
  > orepa.diagnose.watch(nn.OREPA{in_channels = 2, out_channels = 2, kernel_size = 3})]])
document("watch:check", [[
  watch:check({tolerance=}) -> list
  Whether branches are optimized differently from one kernel: for each block {path, branches, moved, active, apart, condition1,
  condition2}. moved: how far each branch's kernel went since the watch began; active: how many went further than `tolerance`
  (1e-6) of the longest kernel; condition1: at least two; condition2: no two of them started at the same place (`apart` is the
  least distance of two). These are the two conditions of the OREPA paper.
  > orepa.diagnose.watch(nn.OREPA{in_channels = 2, out_channels = 2, kernel_size = 3}):check()[1].condition1]])
document("diagnose.deployment", [[
  diagnose.deployment(net, x) -> list
  What rounding costs when a network is deployed, block by block: {path, kind, error, largest}. Each block is given what the
  network gives it for x; error is the largest difference between the deployed convolution and the same in float64, relative to
  the largest output.
  > orepa.diagnose.deployment(nn.OREPA{in_channels = 2, out_channels = 2, kernel_size = 3}:eval(), orepa.ones(1, 2, 4, 4))]])

return diagnose
