-- orepa.grad: the same numbers as backward's, of what was asked for and nothing else.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function same_bits(a, b, what)
  assert.same(a.shape, b.shape)
  assert.same(a:tolist(), b:tolist(), what)
end

local function network()
  orepa.manual_seed(3)
  return nn.Sequential(
    nn.ConvBN { in_channels = 3, out_channels = 4, kernel_size = 3, act = "relu" },
    nn.OREPA { in_channels = 4, out_channels = 4, kernel_size = 3, act = "relu" },
    nn.MaxPool2d { kernel_size = 2 },
    nn.checkpoint(nn.OREPA { in_channels = 4, out_channels = 4, kernel_size = 3, act = "relu" }),
    nn.Flatten(), nn.Linear { in_features = 4 * 3 * 3, out_features = 5 })
end

describe("orepa.grad", function()
  it("gives what backward adds to leaves, and leaves them alone", function()
    local net, x = network(), orepa.randn(2, 3, 6, 6)
    x:requires_grad_()
    local asked = net:parameters()
    asked[#asked + 1] = x
    local loss = (net(x) * orepa.randn(2, 5)):sum()
    local found = orepa.grad(loss, asked, { retain_graph = true })
    for _, p in ipairs(asked) do assert.is_nil(p.grad) end
    loss:backward({ retain_graph = true })
    assert.equal(#asked, #found)
    for k, p in ipairs(asked) do same_bits(p.grad, found[k], k) end
    -- of one alone, through all the others
    same_bits(x.grad, (orepa.grad(loss, x, { retain_graph = true })))
    same_bits(asked[1].grad, (orepa.grad(loss, asked[1], { retain_graph = true })))
    same_bits(asked[#asked - 1].grad, (orepa.grad(loss, asked[#asked - 1])))
  end)

  it("gives the gradients of what ops made, of norms and ReLUs that wait too", function()
    orepa.manual_seed(1)
    local conv = nn.Conv2d { in_channels = 2, out_channels = 4, kernel_size = 3 }
    local norm, x, way = nn.BatchNorm2d(4), orepa.randn(2, 2, 5, 5), {}
    local function forward(keep)
      local a = conv(x)
      local b = norm(a)
      local c = F.relu(b)
      local y = ((c + a) * c):sum()
      for k, t in ipairs { a, b, c } do
        way[k] = t
        if keep then t:retain_grad() end
      end
      return y
    end
    forward(true):backward()
    local kept = { way[1].grad, way[2].grad, way[3].grad }
    local y = forward(false)
    local found = orepa.grad(y, way)
    for k = 1, 3 do same_bits(kept[k], found[k], k) end
  end)

  it("adds up several results, each from where it starts", function()
    local x = orepa.tensor({ 1, 2 }):requires_grad_()
    local h = x * x
    local sum = h:sum()
    local dx = orepa.grad({ h, sum }, x, { grads = { orepa.tensor { 10, 20 } }, retain_graph = true })
    assert.same({ 22, 84 }, dx:tolist())
    dx = orepa.grad(h, { x }, { grads = orepa.tensor { 1, 0 } })
    assert.same({ 2, 0 }, dx[1]:tolist())
    assert.is_true(dx[1].is_leaf and not dx[1].requires_grad)
    local copy = orepa.grad(x:reshape(2, 1):expand(2, 3):sum(), x)
    assert.same({ 3, 3 }, copy:tolist())
  end)

  it("names what has no part in it, or gives nil", function()
    local x, w = orepa.ones(2):requires_grad_(), orepa.ones(3, 4):requires_grad_()
    local function y() return (x * 2):sum() end
    fails("grad_spec.lua:%d+: grad: tensor 2 of those asked for %(float32 3x4%) was not used", function()
      orepa.grad(y(), { x, w })
    end)
    local list = orepa.grad(y(), { w, x }, { allow_unused = true })
    assert.is_nil(list[1])
    assert.same({ 2, 2 }, list[2]:tolist())
    assert.is_nil(orepa.grad(y(), w, { allow_unused = true }))
    local hidden
    local c = orepa.checkpoint(function(t)
      hidden = t * 2
      return hidden + 1
    end, x)
    assert.is_nil(orepa.grad(c:sum(), hidden, { allow_unused = true }))
  end)

  it("says what is wrong", function()
    local x, c = orepa.ones(2):requires_grad_(), orepa.ones(2)
    local y = (x * x):sum()
    fails("no double backward", orepa.grad, y, x, { create_graph = true })
    fails("no double backward", y.backward, y, { create_graph = true })
    fails("unknown option 'retain'", orepa.grad, y, x, { retain = true })
    fails("what is asked for: an empty list", orepa.grad, y, {})
    fails("what is differentiated: an empty list", orepa.grad, {}, x)
    fails("what is asked for 2: a tensor expected, got number", orepa.grad, y, { x, 3 })
    fails("what is differentiated 1: a tensor expected, got nil", orepa.grad, nil, x)
    fails("a list of 1 expected", orepa.grad, y, x, { grads = { orepa.ones(), orepa.ones() } })
    fails("a list of 2 expected", orepa.grad, { y, y }, x, { grads = orepa.ones() })
    fails("the gradient is float32 3", orepa.grad, y, x, { grads = orepa.ones(3) })
    fails("tensor 1 of those asked for %(float32 2%) requires no gradient", orepa.grad, y, c)
    fails("nothing that this tensor %(float32 2%) was computed from", orepa.grad, c, x, { grads = c })
    local gone = orepa.ones(1)
    gone:release()
    fails("this tensor was released", orepa.grad, y, { x, gone })
    assert.same({ 2, 2 }, orepa.grad(y, x):tolist())
    fails("freed by an earlier backward", orepa.grad, y, x)
    local dx = orepa.grad((x * x):sum(), x)
    fails("nothing that this tensor .* requires a gradient", dx.backward, dx:sum())
  end)

  it("survives callbacks that take its arguments away", function()
    local x = orepa.tensor({ 1, 2 }):requires_grad_()
    local h = x * x
    local xs, y = { h, x }, h:sum()
    h:register_hook(function()
      for k = #xs, 1, -1 do table.remove(xs, k):release() end
      y:release()
      collectgarbage()
    end)
    h = nil -- luacheck: ignore
    local found = orepa.grad(y, xs)
    assert.same({ 1, 1 }, found[1]:tolist())
    assert.same({ 2, 4 }, found[2]:tolist())
  end)

  it("may be asked inside a pass, also for what the outer one goes through", function()
    local x, inner = orepa.tensor({ 1, 2 }):requires_grad_(), nil
    local h = x * x
    local side = (h * x):sum()
    local y = h * 2
    y:register_hook(function()
      inner = orepa.grad(side, { x, h }, { retain_graph = true })
    end)
    x:register_hook(function(g) return g + 1 end)
    local found = orepa.grad(y:sum() + h:sum(), { x, h })
    assert.same({ 4, 13 }, inner[1]:tolist())
    assert.same({ 1, 2 }, inner[2]:tolist())
    assert.same({ 7, 13 }, found[1]:tolist())
    assert.same({ 3, 3 }, found[2]:tolist())
    assert.is_nil(x.grad)
  end)

  it("reaches parameters in several devices' types", function()
    local w = orepa.ones({ 2 }, { dtype = "bfloat16" }):requires_grad_()
    local y = (w:to("float32") * orepa.tensor { 3, 4 }):sum()
    local dw = orepa.grad(y, w)
    assert.equal("bfloat16", dw.dtype)
    assert.same({ 3, 4 }, dw:tolist())
  end)
end)
