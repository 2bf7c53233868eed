-- Optimizers: SGD against plain Lua arithmetic, groups, the schedule, gradient norms, errors. optimizers_spec.lua has what all
-- optimizers do, training_spec.lua their numbers beside PyTorch's.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, optim = orepa.nn, orepa.optim

-- The gradient of sum(p * p * (k + 1) + p) for element k = 0, 1, ...
local function gradient(p, k) return 2 * p * (k + 1) + 1 end

local function plain(values, steps, o)
  local p, v = { table.unpack(values) }, {}
  for _ = 1, steps do
    for k, x in ipairs(p) do
      local g = gradient(x, k - 1) + o.weight_decay * x
      v[k] = o.momentum * (v[k] or 0) + g
      p[k] = x - o.lr * (o.nesterov and g + o.momentum * v[k] or v[k])
    end
  end
  return p
end

local function trained(values, steps, o, kind)
  local p = nn.Parameter(orepa.tensor(values, kind))
  local weights = orepa.arange(#values, kind)
  local opt = optim.SGD({ p }, o)
  for _ = 1, steps do
    opt:zero_grad();
    (p * p * weights + p):sum():backward()
    opt:step()
  end
  return p:tolist()
end

describe("SGD", function()
  local start = { 1, -2, 0.5, 3 }
  for _, momentum in ipairs { 0, 0.9 } do
    for _, weight_decay in ipairs { 0, 0.1 } do
      for _, nesterov in ipairs(momentum > 0 and { false, true } or { false }) do
        local title = "agrees with plain arithmetic: momentum %g, decay %g, nesterov %s"
        it(title:format(momentum, weight_decay, nesterov), function()
          local o = { lr = 0.05, momentum = momentum, weight_decay = weight_decay, nesterov = nesterov }
          local wanted = plain(start, 6, o)
          local exact = trained(start, 6, o, { dtype = "float64", device = "ref" })
          local short = trained(start, 6, o, {})
          for k, x in ipairs(wanted) do
            assert.near(x, exact[k], 1e-12)
            assert.near(x, short[k], 1e-5)
          end
        end)
      end
    end
  end

  it("changes what has a gradient, and nothing else", function()
    local a, b = nn.Parameter(orepa.ones(2)), nn.Parameter(orepa.ones(2))
    local opt = optim.SGD({ a, b }, { lr = 1, momentum = 0.9, weight_decay = 0.5 })
    opt:step()
    a:sum():backward()
    opt:step()
    assert.same({ -0.5, -0.5 }, a:tolist())
    assert.same({ 1, 1 }, b:tolist())
    opt:zero_grad()
    assert.is_nil(a.grad)
    assert.equal(0, opt:gradient_norm())
  end)

  it("takes a new rate at any time", function()
    local p = nn.Parameter(orepa.ones(1))
    local opt = optim.SGD({ p }, { lr = 1 })
    opt.lr = 0.25
    p:sum():backward()
    opt:step()
    assert.same({ 0.75 }, p:tolist())
  end)

  it("counts as a write: a graph from before is an error", function()
    local p = nn.Parameter(orepa.ones(1))
    local opt = optim.SGD({ p }, { lr = 1 })
    local y = (p * p):sum()
    p:sum():backward()
    opt:step()
    fails("mul", y.backward, y)
  end)
end)

describe("param_groups", function()
  local net = nn.Sequential(nn.ModuleDict { conv = nn.Conv2d { in_channels = 1, out_channels = 1, kernel_size = 1 },
    bn = nn.BatchNorm2d(1) })

  it("follow the reference's rule: no decay for bias, bn and prior, twice the rate for bias", function()
    net[1].prior = nn.Parameter(orepa.ones(1))
    local factors = {}
    for _, group in ipairs(optim.param_groups(net)) do
      factors[group.name] = { group.rate_factor, group.decay_factor }
    end
    assert.same({ ["0.conv.weight"] = { 1, 1 }, ["0.conv.bias"] = { 2, 0 }, ["0.bn.weight"] = { 1, 0 },
      ["0.bn.bias"] = { 2, 0 }, ["0.prior"] = { 1, 0 } }, factors)
  end)

  it("follow a rule of one's own", function()
    local groups = optim.param_groups(net, function(name, p)
      assert.is_true(orepa.is_tensor(p))
      if name == "0.conv.weight" then return { rate_factor = 3 } end
    end)
    for _, group in ipairs(groups) do
      assert.equal(group.name == "0.conv.weight" and 3 or 1, group.rate_factor)
      assert.equal(1, group.decay_factor)
    end
  end)

  it("scale rate and decay of a step", function()
    local a, b = nn.Parameter(orepa.ones(1)), nn.Parameter(orepa.ones(1))
    local opt = optim.SGD({ { parameters = { a }, rate_factor = 2, decay_factor = 0 }, { parameters = { b }, decay_factor = 3 } },
      { lr = 0.1, weight_decay = 1 });
    (a + b):sum():backward()
    opt:step()
    assert.near(1 - 0.2, a:item(), 1e-6)
    assert.near(1 - 0.1 * (1 + 3), b:item(), 1e-6)
  end)
end)

describe("warmup_cosine", function()
  it("rises linearly, then falls as half a cosine to 0 and stays there", function()
    local rate = optim.warmup_cosine { lr = 0.2, steps = 110, warmup = 10 }
    assert.near(0.02, rate(1), 1e-12)
    assert.near(0.1, rate(5), 1e-12)
    assert.near(0.2, rate(10), 1e-12)
    assert.near(0.2 * 0.5 * (1 + math.cos(math.pi / 4)), rate(35), 1e-12)
    assert.near(0.1, rate(60), 1e-12)
    assert.near(0, rate(110), 1e-12)
    assert.near(0, rate(500), 1e-12)
  end)

  it("without warm-up starts at the highest rate", function()
    local rate = optim.warmup_cosine { lr = 1, steps = 4 }
    assert.near(0.5 * (1 + math.cos(math.pi / 4)), rate(1), 1e-12)
    assert.near(0.5, rate(2), 1e-12)
  end)
end)

describe("gradient_norm", function()
  it("is that of all gradients together", function()
    local a, b = nn.Parameter(orepa.zeros(2)), nn.Parameter(orepa.zeros(1, 1))
    local opt = optim.SGD({ a, b }, { lr = 1 })
    assert.equal(0, opt:gradient_norm())
    a.grad, b.grad = orepa.tensor { 2, 3 }, orepa.full({ 1, 1 }, 6)
    assert.near(7, opt:gradient_norm(), 1e-6)
  end)

  it("names the first parameter whose gradient is not finite", function()
    local net = nn.Sequential(nn.Linear { in_features = 2, out_features = 1 })
    local opt = optim.SGD(optim.param_groups(net), { lr = 1 })
    for _, bad in ipairs { 0 / 0, 1 / 0, -1 / 0 } do
      net[1].weight.grad, net[1].bias.grad = orepa.ones(1, 2), orepa.tensor { bad }
      local norm, name = opt:gradient_norm()
      assert.is_false(norm < math.huge)
      assert.equal("0.bias", name)
    end
  end)

  it("is finite for gradients whose squares float32 can't hold", function()
    local p = nn.Parameter(orepa.zeros(1))
    p.grad = orepa.tensor { 1e30 }
    assert.near(1, optim.SGD({ p }, { lr = 1 }):gradient_norm() / 1e30, 1e-6)
  end)
end)

describe("errors", function()
  local p = nn.Parameter(orepa.ones(1))

  it("name what is wrong with the options", function()
    fails("SGD: option 'lr' is missing", optim.SGD, { p })
    fails("SGD: unknown option 'rate' %(there are lr momentum nesterov weight_decay%)", optim.SGD, { p }, { lr = 1, rate = 1 })
    fails("SGD: nesterov needs a momentum", optim.SGD, { p }, { lr = 1, nesterov = true })
    for _, name in ipairs { "lr", "momentum", "weight_decay" } do
      for _, wrong in ipairs { "1", -1, 0 / 0, true } do
        fails("SGD: " .. name .. " is .*, a number of at least 0 expected", optim.SGD, { p }, { lr = 1, [name] = wrong })
      end
    end
    fails("warmup_cosine: option 'steps' is missing", optim.warmup_cosine, { lr = 1 })
    fails("warmup_cosine: steps is x", optim.warmup_cosine, { lr = 1, steps = "x" })
  end)

  it("name what is wrong with the parameters", function()
    fails("SGD: there is nothing to train", optim.SGD, {}, { lr = 1 })
    fails("SGD: a list of parameters or groups expected", optim.SGD, 5, { lr = 1 })
    fails("SGD: item 2 is neither a parameter nor a group", optim.SGD, { p, "x" }, { lr = 1 })
    fails("SGD: parameter 2 of group 1 is a number", optim.SGD, { { parameters = { p, 3 } } }, { lr = 1 })
  end)

  it("name parameters that went when their block was deployed", function()
    local block = nn.OREPA { in_channels = 1, out_channels = 1, kernel_size = 3 }
    local opt = optim.SGD(optim.param_groups(block), { lr = 1 })
    block:deploy()
    fails("SGD: '.+' went when its block was deployed; make a new optimizer", opt.step, opt)
  end)
end)
