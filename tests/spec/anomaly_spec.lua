-- orepa.detect_anomaly: the op and the line that made the first number that is not finite.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function line()
  return debug.getinfo(2, "l").currentline
end

describe("orepa.detect_anomaly", function()
  it("names the op and its line in forward", function()
    local x, at = orepa.tensor({ 1, 0, -2 }), nil
    local message = fails("'log' gives %-inf at {2} of float32 3, and 1 more$", orepa.detect_anomaly, function()
      local y = x + 1
      at = line() + 1
      local z = (y - 1):log()
      return z + 1
    end)
    assert.matches("anomaly_spec.lua:" .. at .. ": detect_anomaly: ", message)
    fails("'div' gives inf", orepa.detect_anomaly, function() return orepa.no_grad(function() return x / 0 end) end)
    fails("'mul' gives nan .*its input 2 was not finite before", orepa.detect_anomaly, function()
      return x * orepa.tensor { 1, 1 / 0, 1 }
    end)
    fails("'log' gives %-inf", orepa.detect_anomaly, function() x:clone():log_() end)
    fails("'assign_' gives nan", orepa.detect_anomaly, function()
      local y = x:clone():requires_grad_() * 1
      y[1] = 0 / 0
    end)
    fails("'conv2d' gives", orepa.detect_anomaly, function()
      return F.conv2d(orepa.full({ 1, 1, 3, 3 }, 3e38), orepa.full({ 1, 1, 3, 3 }, 3e38))
    end)
  end)

  it("names the op and the line of forward in backward", function()
    local x, at = orepa.tensor({ 4, 0 }):requires_grad_(), nil
    local message = fails("the backward of 'sqrt' %(called at [^)]*anomaly_spec.lua:%d+%) gives its input 1 a gradient that has "
      .. "inf at {2} of float32 2", orepa.detect_anomaly, function()
      at = line() + 1
      local y = x:sqrt() * 2
      y:sum():backward()
    end)
    assert.matches("called at .*anomaly_spec.lua:" .. at .. "%)", message)
    assert.matches("^tests/spec/anomaly_spec.lua:" .. at + 1 .. ": ", message)
    assert.is_nil(x.grad)
    local y = x:sqrt() -- made outside: no line is known
    fails("the backward of 'sqrt' gives", orepa.detect_anomaly, function() y:sum():backward() end)
    fails("the backward of 'sqrt' .* gives", orepa.detect_anomaly, function() orepa.grad(x:sqrt():sum(), x) end)
    fails("what backward began with.*of 'mul' has nan at {1}", orepa.detect_anomaly, function()
      (x * 2):backward(orepa.tensor { 0 / 0, 1 })
    end)
    local h = x * 2
    h:register_hook(function(g) return g / 0 end)
    fails("anomaly_spec.lua:%d+: detect_anomaly: 'div' gives inf", orepa.detect_anomaly, function() h:sum():backward() end)
    h = x * 2
    h:register_hook(function() return orepa.tensor { 1, 0 / 0 } end)
    fails("what a function gave to 'register_hook' has nan at {2}", orepa.detect_anomaly, function() h:sum():backward() end)
    x.grad = nil
  end)

  it("names an orepa.Function and its line", function()
    local op, at = orepa.Function { name = "root", forward = function(ctx, t)
      local y = t:sqrt()
      ctx:save(y)
      return y
    end, backward = function(ctx, dy) return dy * ctx:saved():pow(-1) / 2 end }, nil
    local x = orepa.tensor({ 4, 0 }):requires_grad_()
    fails("'pow' gives inf", orepa.detect_anomaly, function() op(x):sum():backward() end)
    local constant = orepa.Function { name = "wild", forward = function(_, t) return t * 1 end,
      backward = function() return orepa.tensor { 1, 1 / 0 } end }
    local message = fails("the backward of 'wild' %(called at", orepa.detect_anomaly, function()
      at = line() + 1
      constant(x):sum():backward()
    end)
    assert.matches("called at .*anomaly_spec.lua:" .. at .. "%)", message)
    local made = orepa.Function { name = "made", forward = function() return orepa.tensor { 1, 1 / 0 } end, backward = print }
    fails("'made' gives inf at {2}", orepa.detect_anomaly, made and function() made(x) end)
  end)

  it("finds it behind norms and gradients that wait, and in checkpoints", function()
    orepa.manual_seed(1)
    local norm, conv = nn.BatchNorm2d(4), nn.Conv2d { in_channels = 4, out_channels = 4, kernel_size = 3 }
    local net = nn.Sequential(nn.Conv2d { in_channels = 2, out_channels = 4, kernel_size = 3 }, norm, nn.ReLU(), conv)
    local x = orepa.randn(2, 2, 8, 8)
    local function run(m)
      return orepa.detect_anomaly(function()
        local y = m(x)
        y:sum():backward()
        return y
      end)
    end
    assert.same({ 2, 4, 4, 4 }, run(net).shape)
    orepa.no_grad(function() norm.weight:mul_(3e38) end)
    fails("'batch_norm' gives %-?%l+", run, net)
    fails("'batch_norm' gives %-?%l+", run, nn.checkpoint(net))
    orepa.no_grad(function() norm.weight:fill_(1e30) conv.weight:fill_(1e20) end)
    fails("'conv2d' gives", run, net)
    local sqrt = nn.Module:extend "Sqrt"
    function sqrt:forward(t) return (t * 0):sqrt() end -- luacheck: ignore
    local deep = nn.Sequential(nn.Conv2d { in_channels = 2, out_channels = 4, kernel_size = 3 }, nn.checkpoint(sqrt()))
    fails("the backward of 'sqrt' %(called at [^)]*anomaly_spec.lua:%d+%) gives", run, deep)
  end)

  it("is a region: entered and left by a call or a guard, by errors too", function()
    local zero = orepa.zeros(2)
    local function is_on() return not pcall(zero.log, zero) end
    assert.is_false(is_on())
    local a, b = orepa.detect_anomaly(function() return is_on(), "b" end)
    assert.is_true(a and b == "b")
    assert.is_false(is_on())
    do
      local _ <close> = orepa.detect_anomaly()
      assert.is_true(is_on())
      orepa.detect_anomaly(function() assert.is_true(is_on()) end)
      assert.is_true(is_on())
    end
    assert.is_false(is_on())
    pcall(orepa.detect_anomaly, error)
    assert.is_false(is_on())
    pcall(function()
      local _ <close> = orepa.detect_anomaly { nan_only = true }
      error "out"
    end)
    assert.is_false(is_on())
    local wrap = coroutine.wrap(function() orepa.detect_anomaly(function() coroutine.yield(is_on()) end) end)
    assert.is_true(wrap())
    wrap()
    assert.is_false(is_on())
    fails("unknown option 'nan'", orepa.detect_anomaly, print, { nan = true })
    fails("function expected", orepa.detect_anomaly, 1)
  end)

  it("leaves infinities alone if only NaN is wanted", function()
    local x = orepa.tensor { 0, 1 }
    orepa.detect_anomaly(function() assert.same({ -math.huge, 0 }, x:log():tolist()) end, { nan_only = true })
    do
      local _ <close> = orepa.detect_anomaly { nan_only = true }
      assert.equal(math.huge, (orepa.ones(1) / 0):item())
      fails("'div' gives nan at {1}", function() return x / 0 end)
    end
  end)

  it("sees all types, and changes no result and no random number", function()
    for _, kind in ipairs { { dtype = "float64", device = "ref" }, { dtype = "bfloat16" }, { dtype = "float16" },
      { dtype = "float64" } } do
      local message = fails("'concatenate' gives nan at {2} of " .. kind.dtype .. " 3; its input 2 was not", orepa.detect_anomaly,
        function()
          local bad = orepa.tensor({ 0 / 0, 1 }, kind):clone() -- made, moved and shown
          assert.matches("nan", tostring(bad))
          assert.is_true(bad:slice(1, 1, 1):item() ~= bad:tolist()[1])
          return orepa.cat { orepa.tensor({ 1 }, kind), bad }
        end)
      assert.matches("anomaly_spec.lua:%d+: ", message)
    end
    local function train()
      orepa.manual_seed(2)
      local net = nn.Sequential(nn.OREPA { in_channels = 2, out_channels = 4, kernel_size = 3, act = "relu" },
        nn.MaxPool2d { kernel_size = 2 }, nn.Flatten(), nn.Linear { in_features = 16, out_features = 3 })
      local loss = F.cross_entropy(net(orepa.randn(2, 2, 4, 4)), orepa.tensor({ 0, 2 }, { dtype = "int64" }))
      loss:backward()
      local list = { loss:item(), orepa.rng_state().draws }
      for _, p in ipairs(net:parameters()) do list[#list + 1] = p.grad:tolist() end
      return list
    end
    assert.same(train(), orepa.detect_anomaly(train))
  end)
end)
