-- orepa.gradcheck: it agrees with what is right, of any strides, and says where something is wrong.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function double(...)
  return orepa.randn({ ... }, { dtype = "float64", device = "ref" })
end

local function wrong(pattern, ...)
  local ok, message = orepa.gradcheck(...)
  assert.is_false(ok)
  assert.matches(pattern, message)
end

-- x^2 whose gradient is wrong by `factor`, at one element or everywhere.
local function square(factor, at)
  return orepa.Function { forward = function(ctx, x)
    ctx:save(x)
    return x * x
  end, backward = function(ctx, dy)
    local dx = dy * ctx:saved() * 2
    if not at then return dx * factor end
    local scale = orepa.ones(dx.shape, { dtype = dx.dtype, device = dx.device }):reshape(-1)
    scale[at] = factor
    return dx * scale:reshape(dx.shape)
  end }
end

describe("orepa.gradcheck", function()
  it("agrees with the engine, for inputs of any strides and several results", function()
    orepa.manual_seed(2)
    local function f(a, k, b)
      return a:matmul(b) * k, a:sum(), b:exp() + 1, b:ge(0)
    end
    assert(orepa.gradcheck(f, { double(3, 2):transpose():requires_grad_(), 0.5, double(3, 2):requires_grad_() }))
    assert(orepa.gradcheck(f, { double(5, 3):slice(1, 1, 4, 2):requires_grad_(), 2, double(3, 1):expand(3, 2):requires_grad_() }))
    assert(orepa.gradcheck(f, { double(2, 3), 2, double(3, 2):requires_grad_() })) -- of one alone
    assert(orepa.gradcheck(function(x) return F.conv2d(x, x) end, { double(1, 1, 3, 3):requires_grad_() }))
    assert(orepa.gradcheck(function(x) return x:exp() end, double():requires_grad_()))
    assert(orepa.gradcheck(function(x) return x:exp() end, double(0, 3):requires_grad_()))
    assert(orepa.gradcheck(function(x, y) return x * 2, y end, { double(2):requires_grad_(), double(2):requires_grad_() }))
  end)

  it("names input, element and both numbers", function()
    local x = orepa.full({ 2, 3 }, 2, { dtype = "float64", device = "ref" }):requires_grad_()
    assert(orepa.gradcheck(square(1), { x }))
    wrong("^gradcheck: input 1 %(float64 2x3%), element {1, 1}, result 1: backward gives %-?[%d.]+, differences give %-?[%d.]+$",
      square(1.01), { x })
    wrong("element {2, 1}", square(1.001, 4), { x })
    wrong("input 3 .* element {2, 3}, result 2", function(_, k, b) return b * k, square(1.001, 6)(b) end, { x, 2, x })
  end)

  it("notices what a function does not tell", function()
    local x = double(3):requires_grad_()
    local calls = 0
    wrong("result 1 %(float64 3%), element {1} is .* when it is computed again", function(t)
      calls = calls + 1
      return t * calls
    end, { x })
    wrong("backward gives 0, differences give", function(t) return t:detach() * 2 + t * 0 end, { x })
    assert(orepa.gradcheck(function(t) return t * orepa.rand({ 3 }, { dtype = "float64", device = "ref" }) end, { x }))
    wrong("backward gives %-?nan", function(t) return (t * 0):sqrt() end, { orepa.ones({ 2 },
      { dtype = "float64", device = "ref" }):requires_grad_() })
  end)

  it("checks modules with their parameters, and leaves them as they were", function()
    orepa.manual_seed(5)
    local net = nn.Sequential(nn.Conv2d { in_channels = 2, out_channels = 3, kernel_size = 3 }, nn.SiLU(),
      nn.BatchNorm2d(3))
    local x, before, rng = orepa.randn(2, 2, 4, 4), {}, orepa.rng_state()
    for k, p in ipairs(net:parameters()) do before[k] = p:tolist() end
    assert(orepa.gradcheck(net, { x }))
    for k, p in ipairs(net:parameters()) do
      assert.same(before[k], p:tolist())
      assert.is_nil(p.grad)
    end
    assert.same(rng, orepa.rng_state())
    local w = nn.Parameter(orepa.tensor { 1, 2 })
    wrong("parameter 1 %(float32 2%), element {1}", function(t) return square(1.1)(w) * t end, { orepa.ones(2) },
      { parameters = { w } })
    assert.same({ 1, 2 }, w:tolist())
    fails("broken", orepa.gradcheck, function() error "broken" end, {}, { parameters = { w } })
    local calls = 0
    fails("broken", orepa.gradcheck, function()
      calls = calls + 1
      if calls > 3 then error "broken" end
      return w * 2
    end, {}, { parameters = { w } })
    assert.same({ 1, 2 }, w:tolist())
  end)

  it("takes steps and tolerances", function()
    local x = double(2):requires_grad_()
    assert(orepa.gradcheck(square(1.01), { x }, { tolerance = 0.1 }))
    assert(orepa.gradcheck(function(t) return t:exp() end, { x }, { eps = 1e-3, tolerance = 1e-4 }))
    assert.is_false((orepa.gradcheck(function(t) return (t * 10):exp() end, { x }, { eps = 0.1 })))
    fails("option 'eps': a positive number expected, got 0", orepa.gradcheck, print, { x }, { eps = 0 })
    fails("unknown option 'atol'", orepa.gradcheck, print, { x }, { atol = 1 })
    fails("a function expected, got number", orepa.gradcheck, 1, { x })
    fails("a list of inputs expected, got string", orepa.gradcheck, print, "x")
    fails("none of the inputs requires a gradient", orepa.gradcheck, print, { 1 })
    fails("no result requires a gradient", orepa.gradcheck, function() return 1 end, { x })
    fails("input 1 is bfloat16 2; differences need float32 or float64", orepa.gradcheck, print,
      { orepa.ones({ 2 }, { dtype = "bfloat16" }):requires_grad_() })
  end)
end)
