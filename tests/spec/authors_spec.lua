-- Blocks of other authors, for which there are no golden files: their formulas written out, on the map.

local orepa = require "orepa"
local descriptions = require "tests.spec.descriptions"
local nn, F = orepa.nn, orepa.F

local WIDE = 1e-10

local function wide(t) return t:to("ref"):to("float64") end

local function same(name, got, wanted)
  assert.same(wanted.shape, got.shape)
  local error, scale = (got - wanted):abs():max():item(), math.max(wanted:abs():max():item(), 0.1)
  assert(error <= WIDE * scale, ("%s is off by %.3g of %.3g"):format(name, error, scale))
end

-- ---- pieces of the formulas ----

-- A norm of a block with statistics of its own, which start as the block's.
local function norm(block, path, x, training)
  local bn = block[path]
  return F.batch_norm(x, { weight = bn.weight, bias = bn.bias, running_mean = bn.running_mean:clone(),
    running_var = bn.running_var:clone(), training = training })
end

local function conv(block, path, x, o)
  return F.conv2d(x, block[path], nil, o)
end

-- Compares forward and backward passes, in training and evaluation; `formula(block, x, training)` is what the authors compute.
local function check(make, channels, formula)
  for _, training in ipairs { true, false } do
    orepa.manual_seed(9)
    local block = wide(descriptions.fill(make())):train(training)
    local x = wide(orepa.randn(3, channels, 9, 8)):requires_grad_()
    local wanted = formula(block, x, training)
    local dy = wide(orepa.randn(wanted.shape))
    wanted:backward(dy)
    local dx, gradients = x.grad, {}
    for name, p in block:named_parameters() do gradients[name] = p.grad end
    x.grad = nil
    block:zero_grad()
    local y = block(x)
    same("y", y, wanted)
    y:backward(dy)
    same("the gradient of x", x.grad, dx)
    for name, p in block:named_parameters() do same("the gradient of " .. name, p.grad, gradients[name]) end
    block:eval()
    y = block(x)
    same("deployed", block:deploy()(x), y)
  end
end

-- ---- ACNet ----

-- The authors' rule: with less padding than half the kernel, the map is cropped for the narrow kernels instead.
local function acnet(k, padding, stride)
  local border = padding - k // 2
  local function narrow(block, x, name, high)
    local h, w = high and padding or math.max(border, 0), high and math.max(border, 0) or padding
    if border < 0 then
      local cut = high and { 0, 0, 0, 0, 0, 0, border, border } or { 0, 0, 0, 0, border, border, 0, 0 }
      x = orepa.pad(x, cut)
    end
    return conv(block, name .. "_conv.weight", x, { padding = { h, w }, stride = stride })
  end
  return function(block, x, training)
    local square = conv(block, "square_conv.weight", x, { padding = padding, stride = stride })
    return norm(block, "square_bn", square, training) + norm(block, "ver_bn", narrow(block, x, "ver", true), training)
      + norm(block, "hor_bn", narrow(block, x, "hor", false), training)
  end
end

describe("ACNet's block", function()
  for _, case in ipairs { { 3, 1, 1 }, { 3, 0, 1 }, { 3, 2, 2 }, { 5, 1, 1 }, { 5, 2, 2 }, { 5, 0, 1 } } do
    local k, padding, stride = table.unpack(case)
    it(("of %dx%d, padding %d, stride %d is its authors'"):format(k, k, padding, stride), function()
      check(function()
        return nn.ACBlock { in_channels = 3, out_channels = 4, kernel_size = k, padding = padding, stride = stride }
      end, 3, acnet(k, padding, stride))
    end)
  end
end)

-- ---- ExpandNet ----

describe("ExpandNet's block", function()
  for _, mode in ipairs { "online", "offline" } do
    it("is the padded chain, " .. mode, function()
      check(function()
        return nn.ExpandBlock { in_channels = 3, out_channels = 4, kernel_size = 3, rate = 2, stride = 2, mode = mode }
      end, 3, function(block, x)
        local p = "expanded.conv"
        local y = conv(block, p .. "1.weight", orepa.pad(x, { 0, 0, 0, 0, 1, 1, 1, 1 }))
        y = conv(block, p .. "3.weight", conv(block, p .. "2.weight", y, { stride = 2 }))
        return y + block.bias:reshape(1, -1, 1, 1)
      end)
    end)
  end

  it("has as many channels inside as its rate says", function()
    local block = nn.ExpandBlock { in_channels = 3, out_channels = 4, kernel_size = 3 }
    assert.same({ 12, 3, 1, 1 }, block["expanded.conv1.weight"].shape)
    assert.same({ 16, 12, 3, 3 }, block["expanded.conv2.weight"].shape)
    assert.same({ 4, 16, 1, 1 }, block["expanded.conv3.weight"].shape)
  end)
end)

-- ---- MobileOne ----

local function mobileone(o)
  return function(block, x, training)
    local geometry = { padding = o.kernel_size // 2, stride = o.stride, groups = o.groups }
    local sum
    for k = 0, o.num_branches - 1 do
      local name = "rbr_conv." .. k
      local y = norm(block, name .. ".bn", conv(block, name .. ".conv.weight", x, geometry), training)
      sum = sum and sum + y or y
    end
    if o.kernel_size > 1 then
      sum = sum + norm(block, "rbr_scale.bn", conv(block, "rbr_scale.conv.weight", x, { stride = o.stride, groups = o.groups }),
        training)
    end
    if o.in_channels == o.out_channels and (o.stride or 1) == 1 then sum = sum + norm(block, "rbr_skip", x, training) end
    if o.excite then
      local se = block.se
      local weight = F.conv2d(sum:mean(3, 4, { keepdim = true }), se.reduce.weight, se.reduce.bias)
      weight = F.conv2d(F.relu(weight), se.expand.weight, se.expand.bias)
      sum = sum * (1 / ((weight * -1):exp() + 1))
    end
    return F.relu(sum)
  end
end

describe("MobileOne's block", function()
  for what, o in pairs {
    ["depthwise, 4 branches"] = { in_channels = 6, out_channels = 6, kernel_size = 3, groups = 6, num_branches = 4 },
    ["depthwise with stride"] = { in_channels = 6, out_channels = 6, kernel_size = 3, groups = 6, num_branches = 2, stride = 2 },
    ["pointwise"] = { in_channels = 6, out_channels = 32, kernel_size = 1, num_branches = 3 },
    ["pointwise with skip"] = { in_channels = 6, out_channels = 6, kernel_size = 1, num_branches = 2 },
    ["with squeeze-excite"] = { in_channels = 6, out_channels = 32, kernel_size = 3, num_branches = 1, excite = true },
  } do
    it(what .. " is its authors'", function()
      check(function()
        local copy = {}
        for key, value in pairs(o) do copy[key] = value end
        return nn.MobileOneBlock(copy)
      end, o.in_channels, mobileone(o))
    end)
  end
end)

-- ---- RepLKNet ----

describe("RepLKNet's block", function()
  for _, case in ipairs { { 7, 3 }, { 9, 5 } } do
    local k, small = table.unpack(case)
    it(("of %dx%d and %dx%d is its authors'"):format(k, k, small, small), function()
      check(function()
        return nn.RepLKBlock { in_channels = 4, out_channels = 4, kernel_size = k, small_kernel = small, act = "relu" }
      end, 4, function(block, x, training)
        return F.relu(norm(block, "lkb_origin.bn", conv(block, "lkb_origin.conv.weight", x, { padding = k // 2, groups = 4 }),
          training) + norm(block, "small_conv.bn", conv(block, "small_conv.conv.weight", x, { padding = small // 2, groups = 4 }),
          training))
      end)
    end)
  end
end)

-- ---- all of them, linearized ----

describe("linearized, online,", function()
  for kind, o in pairs {
    ACBlock = { in_channels = 3, out_channels = 4, kernel_size = 3 },
    MobileOneBlock = { in_channels = 4, out_channels = 4, kernel_size = 3, groups = 4, num_branches = 3 },
    RepLKBlock = { in_channels = 4, out_channels = 4, kernel_size = 7 },
    DBB = { in_channels = 4, out_channels = 4, kernel_size = 3 },
    RepVGGBlock = { in_channels = 4, out_channels = 4, kernel_size = 3 },
  } do
    it(kind .. " is one convolution of the scaled kernels' sum, and its norm", function()
      orepa.manual_seed(2)
      o.mode, o.act = "online", "none"
      local block = wide(descriptions.fill(nn[kind](o)))
      local x = wide(orepa.randn(3, o.in_channels, 9, 8))
      local sum
      for _, w in pairs(block:branch_weights()) do sum = sum and sum + w or w end
      local y = F.conv2d(x, sum, nil, { padding = o.kernel_size // 2, groups = block.options.groups })
      same("y", block(x), norm(block, "bn", y, true))
      assert.equal(1, #block.plan.norms + 1)
    end)
  end
end)
