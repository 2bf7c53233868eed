-- Random descriptions of blocks: the squeezed convolution is what the branches compute one by one on the feature map, forward
-- and backward, and all ways to compute it agree.

local orepa = require "orepa"
local descriptions = require "tests.spec.descriptions"
local nn, F, L = orepa.nn, orepa.F, orepa.reparam

local stressed = os.getenv "OREPA_STRESS" == "gc" -- then a description takes seconds
local DESCRIPTIONS, PART = 200, 500
local SHOWN = stressed and 40 or DESCRIPTIONS
local MANY = stressed and 0 or os.getenv "OREPA_AGAIN" and 1000 or 10000 -- fewer where the same is run again
local WIDE, NARROW = 1e-10, 3e-5 -- relative errors allowed in float64 and float32

-- ---- comparing ----

local function wide(t) return t:detach():to("cpu"):to("float64") end

local function largest(t) return t:count() > 0 and t:abs():max():item() or 0 end

local function same(name, got, wanted, limit)
  assert(got and wanted, name .. " is missing")
  assert.same(wanted.shape, got.shape)
  local a, b = wide(got), wide(wanted)
  local error, scale = largest(a - b), math.max(largest(b), 0.1)
  assert(error <= limit * scale, ("%s is off by %.3g of %.3g"):format(name, error, scale))
end

local function same_all(what, got, wanted, limit)
  for name in pairs(got) do assert(wanted[name], what .. name .. " was not expected") end
  for name, t in pairs(wanted) do same(what .. name, got[name], t, limit) end
end

-- ---- the checks ----

-- The description's block on a device, in a type, always with the same numbers.
local function make(d, seed, device, dtype)
  orepa.manual_seed(seed)
  return descriptions.fill(descriptions.build(d)):to(device):to(dtype)
end

local function gradients(block)
  local list = {}
  for name, p in block:named_parameters() do list[name] = p.grad and p.grad:clone() end
  block:zero_grad()
  return list
end

local function input(d, seed, device, dtype)
  orepa.manual_seed(seed + 1)
  local size = descriptions.map_size(d)
  return orepa.randn(3, d.in_channels, size[1], size[2]):to(device):to(dtype):requires_grad_()
end

local function gradient_for(y)
  return orepa.randn(y.shape):to(y.device):to(y.dtype)
end

local function norm_of(d, block, training)
  if not d.post_bn then return end
  local bn = block[d.post_bn == true and "bn" or d.post_bn]
  return { weight = bn.weight, bias = bn.bias, running_mean = bn.running_mean:clone(), running_var = bn.running_var:clone(),
    training = training }
end

local function check_branches(d, seed, training)
  local block, x = make(d, seed, "ref", "float64"), input(d, seed, "ref", "float64")
  block:train(training)
  local norm = norm_of(d, block, training)
  local y = block(x)
  local dy = gradient_for(y)
  y:backward(dy)
  local dx, got = x.grad, gradients(block)
  x.grad = nil
  local sum, used = descriptions.run(d, block, x)
  local wanted = descriptions.finish(d, block, sum, norm)
  wanted:backward(dy)
  same("y", y, wanted, WIDE)
  same("the gradient of x", dx, x.grad, WIDE)
  local others = gradients(block)
  for name in block:named_parameters() do
    local other = name == "bias" or name:find "bn.weight$" or name:find "bn.bias$"
    assert(used[name] or other, name .. " takes part in no branch")
    if got[name] and not others[name] then others[name] = orepa.zeros(block[name].shape) end -- rows that nothing uses
  end
  same_all("the gradient of ", got, others, WIDE)
end

-- The squeezed kernel and the gradients of all parameters for one gradient of it.
local function squeezed(block, seed)
  local w = block:squeezed_weight()
  orepa.manual_seed(seed + 2)
  w:backward(gradient_for(w))
  return w, gradients(block)
end

local function check_forms(d, seed)
  local w, grads = squeezed(make(d, seed, "ref", "float64"), seed)
  for _, form in ipairs { { "cpu", true }, { "cpu", false }, { "ref", false } } do
    local got, got_grads = squeezed(make(d, seed, form[1], "float32"):set_fused(form[2]), seed)
    local what = ("on %s, %s: "):format(form[1], form[2] and "fused" or "leaf by leaf")
    same(what .. "squeezed_weight", got, w, NARROW)
    same_all(what .. "the gradient of ", got_grads, grads, NARROW)
  end
end

local function check_branch_weights(d, seed)
  local block, sum = make(d, seed, "ref", "float64"), nil
  local count = 0
  for _, w in pairs(block:branch_weights()) do
    sum, count = sum and sum + w or w, count + 1
  end
  local branches = 0
  for _, b in ipairs(d.branches) do branches = branches + (b and 1 or 0) end
  assert.equal(branches, count)
  same("the sum of branch_weights", sum, block:squeezed_weight(), WIDE)
end

local function check_evaluation(d, seed, device, dtype, limit)
  local block, x = make(d, seed, device, dtype):eval(), input(d, seed, device, dtype):requires_grad_(false)
  local y = block(x)
  same("evaluation, folded", orepa.no_grad(function() return block(x) end), y, limit)
  block:deploy()
  local names = {}
  for name in block:named_parameters() do names[#names + 1] = name end
  assert.same({ "reparam.weight", "reparam.bias" }, names)
  same("the deployed block", block(x), y, limit)
end

local function check(d, seed)
  check_branches(d, seed, true)
  check_branches(d, seed, false)
  check_forms(d, seed)
  check_branch_weights(d, seed)
  check_evaluation(d, seed, "ref", "float64", WIDE)
  check_evaluation(d, seed, "cpu", "float32", NARROW)
end

describe("a random description", function()
  for seed = 1, SHOWN do
    it(("%d squeezes to what its branches compute on the map"):format(seed), function()
      local d = descriptions.random(seed)
      local done, problem = pcall(check, d, seed)
      if not done then
        error(("%s\n%s"):format(type(problem) == "table" and tostring(problem.message or problem) or problem,
          descriptions.text(d)), 0)
      end
    end)
  end
end)

-- The first ones in every form, all of them in float64, forward and backward.
describe("many random descriptions", function()
  for first = DESCRIPTIONS + 1, MANY, PART do
    local last = math.min(first + PART - 1, MANY)
    it(("%d to %d squeeze to what their branches compute on the map"):format(first, last), function()
      for seed = first, last do
        local d = descriptions.random(seed)
        local done, problem = pcall(check_branches, d, seed, seed % 2 == 0)
        if not done then error(("%d: %s\n%s"):format(seed, tostring(problem), descriptions.text(d)), 0) end
      end
    end)
  end
end)

-- ---- what the descriptions hold ----

local function count_in(d, counts)
  local function add(key) counts[key] = (counts[key] or 0) + 1 end
  add("scaling " .. (d.scaling or "default"))
  if d.spare_rows then add "spare_rows" end
  for _, b in ipairs(d.branches) do
    if not b then
      add "false"
    else
      if b.correlate and #b > 1 then add "correlate" end
      if b.scale == false then add "scale = false" end
      for _, l in ipairs(b) do
        add(l.form)
        for _, option in ipairs { "groups", "plus_identity", "interleave", "expand", "out", "name" } do
          if l[option] then add(option) end
        end
        if l.form == "nest" then count_in(l, counts) end
      end
    end
  end
end

describe("the random descriptions", function()
  it("cover the vocabulary many times", function()
    local counts = {}
    for seed = 1, DESCRIPTIONS do
      local d = descriptions.random(seed)
      count_in(d, counts)
      for _, option in ipairs { "stride", "padding", "dilation", "groups", "bias", "act" } do
        if d[option] then counts["block " .. option] = (counts["block " .. option] or 0) + 1 end
      end
      local k = d.kernel_size
      local key = type(k) == "table" and "rectangular" or k .. "x" .. k
      counts[key] = (counts[key] or 0) + 1
    end
    for _, key in ipairs { "conv", "depthwise", "average", "prior", "identity", "nest", "groups", "plus_identity", "interleave",
      "expand", "out", "name", "correlate", "scale = false", "scaling vector", "scaling scalar", "scaling none",
      "scaling default", "spare_rows", "false", "block stride", "block padding", "block dilation", "block groups",
      "block bias", "block act", "rectangular", "1x1", "3x3", "5x5", "7x7" } do
      assert((counts[key] or 0) >= 10, ("%s occurs %d times"):format(key, counts[key] or 0))
    end
  end)
end)

-- ---- stacks that pad every map ----

-- The linear stem's layers, turned where they are correlated, each a convolution with its own padding of 1.
local function padded_stack(block, x)
  local y
  for l = 0, (block.options.kernel_size[1] - 3) // 2 do
    local w = block["weight" .. l]
    if l > 0 then
      local rows = {}
      for h = 3, 1, -1 do
        for v = 3, 1, -1 do rows[#rows + 1] = w:slice(3, h, h):slice(4, v, v) end
      end
      w = orepa.cat(rows, 4):reshape(w.shape)
    end
    y = F.conv2d(y or x, w, { padding = 1 })
  end
  return y
end

local function interior(t, border)
  return t:slice(3, border + 1, -border - 1):slice(4, border + 1, -border - 1)
end

describe("a stack of layers that pads every map", function()
  for _, k in ipairs { 5, 7 } do
    it(("is the %dx%d stem in the interior, and not at the border"):format(k, k), function()
      orepa.manual_seed(k)
      local block = nn.OREPALargeConvBase { in_channels = 2, out_channels = 3, kernel_size = k, post_bn = false }
      block:to("ref"):to("float64")
      local x = orepa.randn(2, 2, 11, 12):to("ref"):to("float64")
      local y, stack = block(x), padded_stack(block, x)
      same("the interior", interior(y, k // 2 - 1), interior(stack, k // 2 - 1), WIDE)
      assert(largest(wide(y) - wide(stack)) > 1e-3)
    end)
  end
end)

-- ---- beyond the random ones ----

describe("a description", function()
  it("of one grouped layer with finer groups than the block's has zeros outside its own blocks", function()
    local block = nn.ReparamBlock { in_channels = 4, out_channels = 4, kernel_size = 1, scaling = "none", post_bn = false,
      branches = { { L.conv { 1, groups = 4 } } } }
    orepa.no_grad(function() block["branch0.conv.weight"]:copy_(orepa.arange(4):reshape(4, 1, 1, 1)) end)
    assert.same({ { 1, 0, 0, 0 }, { 0, 2, 0, 0 }, { 0, 0, 3, 0 }, { 0, 0, 0, 4 } },
      block:squeezed_weight():reshape(4, 4):tolist())
  end)

  it("of more branches than a fused pass takes is squeezed like any other", function()
    local d = { in_channels = 4, out_channels = 6, groups = 2, kernel_size = 3, post_bn = false, branches = {} }
    for b = 1, 20 do
      d.branches[b] = b % 2 == 0 and { { form = "conv", 3 } } or { { form = "conv", 1 }, { form = "prior", 3 } }
    end
    check(d, 1)
  end)

  it("may be 256 layers deep", function()
    local b = {}
    for l = 1, 256 do b[l] = { form = "conv", 1 } end
    check({ in_channels = 2, out_channels = 2, kernel_size = 1, scaling = "none", post_bn = false, branches = { b } }, 1)
  end)

  -- A description of one layer hands that layer's kernel on: what is kept for the gradient must not hold what holds it.
  local function nest(...) return L.nest { 3, scaling = "none", branches = { ... } } end
  for name, layer in pairs {
    ["a description alone"] = nest({ L.conv { 1 } }, { L.conv { 3 } }),
    ["a description of a description"] = nest { nest({ L.conv { 1 } }, { L.conv { 3 } }) },
    ["a layer alone"] = L.conv { 3 },
    ["a layer in descriptions"] = nest { nest { L.conv { 3 } } },
  } do
    it(("of %s is let go of with its kernel, where no gradient is asked for"):format(name), function()
      local block = nn.ReparamBlock { in_channels = 4, out_channels = 4, kernel_size = 3, mode = "offline",
        branches = { { layer } } }
      local x = orepa.ones(1, 4, 4, 4)
      local function live_after(count)
        for _ = 1, count do assert.is_true(block(x).requires_grad) end
        collectgarbage() collectgarbage()
        return orepa.memory().live
      end
      assert.equal(live_after(1), live_after(5))
    end)
  end
end)
