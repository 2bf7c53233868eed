-- Offline blocks: every branch on the map, each layer with its norm. What they compute is what their description says, in
-- training and evaluation, forward and backward, and deploying is exact.

local orepa = require "orepa"
local descriptions = require "tests.spec.descriptions"

local DESCRIPTIONS = 200
local WIDE, GRADIENT = 1e-10, 1e-9 -- relative errors allowed in float64: norms over a few pixels amplify rounding

local function largest(t) return t:count() > 0 and t:abs():max():item() or 0 end

-- `floor`: errors are relative to at least this much.
local function same(name, got, wanted, limit, floor)
  assert(got and wanted, name .. " is missing")
  assert.same(wanted.shape, got.shape)
  local a, b = got:detach():to("cpu"):to("float64"), wanted:detach():to("cpu"):to("float64")
  local error, scale = largest(a - b), math.max(largest(b), floor or 0.1)
  assert(error <= limit * scale, ("%s is off by %.3g of %.3g"):format(name, error, scale))
end

local function wide(t) return t:to("ref"):to("float64") end

local function make(d, seed)
  orepa.manual_seed(seed)
  local block = wide(descriptions.fill(descriptions.build(d)))
  local size = descriptions.map_size(d)
  return block, wide(orepa.randn(3, d.in_channels, size[1], size[2])):requires_grad_()
end

local function gradients(block)
  local list = {}
  for name, p in block:named_parameters() do list[name] = p.grad and p.grad:clone() or orepa.zeros(p.shape) end
  block:zero_grad()
  return list
end

local function post_norm(d, block, training)
  if not d.post_bn then return end
  local bn = block[d.post_bn == true and "bn" or d.post_bn]
  return { weight = bn.weight, bias = bn.bias, running_mean = bn.running_mean:clone(), running_var = bn.running_var:clone(),
    training = training }
end

local function check(d, seed, training)
  local block, x = make(d, seed)
  block:train(training)
  local norm = post_norm(d, block, training)
  local sum, used, statistics = descriptions.run_offline(d, block, x, training)
  local wanted = descriptions.finish(d, block, sum, norm)
  local dy = wide(orepa.randn(wanted.shape))
  wanted:backward(dy)
  local dx, others = x.grad, gradients(block)
  x.grad = nil
  local y = block(x)
  same("y", y, wanted, WIDE)
  y:backward(dy)
  same("the gradient of x", x.grad, dx, WIDE)
  local floor = 0.1 -- of gradients that a norm makes vanish, only the rounding of the others' size is left
  for _, g in pairs(others) do floor = math.max(floor, largest(g) / 10) end
  for name, g in pairs(gradients(block)) do
    same("the gradient of " .. name, g, others[name], GRADIENT, floor)
    assert(used[name] or name == "bias" or name == "vector" or name:find "bn.weight$" or name:find "bn.bias$",
      name .. " takes part in nothing")
  end
  for path, own in pairs(statistics) do
    same(path .. ".running_mean", block[path].running_mean, own.mean, WIDE)
    same(path .. ".running_var", block[path].running_var, own.var, WIDE)
  end
  return block, x
end

local function check_folded(block, x)
  block:eval()
  local y = block(x)
  same("evaluation, folded", orepa.no_grad(function() return block(x) end), y, WIDE)
  local sum
  for _, w in pairs(block:branch_weights()) do sum = sum and sum + w or w end
  same("the sum of branch_weights", sum, block:squeezed_weight(), WIDE)
  same("the deployed block", block:deploy()(x), y, WIDE)
  local names = {}
  for name in block:named_parameters() do names[#names + 1] = name end
  assert.same({ "reparam.weight", "reparam.bias" }, names)
end

describe("a random offline description", function()
  for seed = 1, DESCRIPTIONS do
    it(("%d computes what its branches do"):format(seed), function()
      local d = descriptions.random_offline(seed)
      local done, problem = pcall(function()
        check_folded(check(d, seed, true))
        check_folded(check(d, seed, false))
      end)
      if not done then error(("%s\n%s"):format(tostring(problem), descriptions.text(d)), 0) end
    end)
  end
end)

-- ---- small maps: a padded kernel whose border meets nothing but the padding's value ----

describe("on a map of one pixel", function()
  for name, layer in pairs { conv = { form = "conv", 3 }, nest = { form = "nest", 3, branches = { { { form = "conv", 3 } },
    { { form = "conv", 1 }, { form = "average", 3 } } } }, prior = { form = "prior", 3 }, average = { form = "average", 3 } } do
    it(("%s sees all of the padding"):format(name), function()
      local d = { mode = "offline", in_channels = 4, out_channels = 4, kernel_size = 3, branches = {
        { { form = "conv", 1 }, layer }, { { form = "conv", 1 }, { form = "conv", 1 }, layer } } }
      for _, training in ipairs { true, false } do
        orepa.manual_seed(2)
        local block = descriptions.fill(descriptions.build(d)):train(training) -- on the cpu, where unused taps are left out
        local x = orepa.randn(5, 4, 1, 1)
        same("y", block(x), (descriptions.run_offline(d, block:clone(), x, training)), 1e-4)
        if training then -- the norms' means tell what the padding was, which they take away
          local own = descriptions.fill(descriptions.build(d))
          local _, _, statistics = descriptions.run_offline(d, own, x, true)
          own(x)
          for path, s in pairs(statistics) do same(path, own[path].running_mean, s.mean, 1e-4) end
        end
      end
    end)
  end
end)

-- ---- beside other things ----

local nn = orepa.nn

local function network()
  orepa.manual_seed(4)
  return descriptions.fill(nn.Sequential(nn.DBB { in_channels = 8, out_channels = 8, kernel_size = 3, act = "relu" },
    nn.RepVGGBlock { in_channels = 8, out_channels = 8, kernel_size = 3 },
    nn.OREPAVGG { in_channels = 8, out_channels = 8, kernel_size = 3, stride = 2 })), orepa.randn(3, 8, 9, 10)
end

describe("offline blocks", function()
  it("under a checkpoint give the same bits, gradients and statistics", function()
    local net, x = network()
    local copy, inputs, results = net:clone(), { x:clone():requires_grad_(), x:clone():requires_grad_() }, {}
    local dy
    for k, n in ipairs { net, nn.Sequential(nn.checkpoint(copy[1]), nn.checkpoint(copy[2]), nn.checkpoint(copy[3])) } do
      results[k] = n(inputs[k])
      dy = dy or orepa.randn(results[k].shape)
      results[k]:backward(dy)
    end
    same("y", results[2], results[1], 0)
    same("the gradient of x", inputs[2].grad, inputs[1].grad, 0)
    local state, parameters = copy:state_dict(), copy:parameters()
    for name, t in pairs(net:state_dict()) do same(name, state[name], t, 0) end
    for k, p in ipairs(net:parameters()) do same("a gradient", parameters[k].grad, p.grad, 0) end
  end)

  it("under autocast keep maps in bfloat16 where that pays", function()
    local net, x = network()
    local y = net:clone()(x)
    local narrow = orepa.autocast("bfloat16", function() return net(x) end)
    local conv = nn.Conv2d { in_channels = 8, out_channels = 8, kernel_size = 1 }
    assert.equal(orepa.autocast("bfloat16", function() return conv(x) end).dtype, narrow.dtype)
    same("y", narrow, y, narrow.dtype == "float32" and 0 or 0.1)
    narrow:sum():backward()
    for name, p in net:named_parameters() do assert(p.grad and p.grad.dtype == "float32", name) end
  end)

  it("that are frozen pad as their statistics say, and keep these", function()
    local net, x = network()
    net:eval()
    local before = {}
    for name, t in pairs(net:state_dict()) do before[name] = t:clone() end
    local y = net(x)
    assert(y.requires_grad)
    same("y", orepa.no_grad(function() return net(x) end), y, 1e-5)
    for name, t in pairs(net:state_dict()) do same(name, t, before[name], 0) end
  end)
end)
