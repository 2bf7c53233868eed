-- Ops written in Lua: what their functions are given, what is checked, and that nothing is held longer than the graph.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"
local Function = orepa.Function

local function double(...)
  return orepa.randn({ ... }, { dtype = "float64", device = "ref" }):requires_grad_()
end

-- exp(a) * k and a + b; k is a number.
local mixed = Function {
  name = "mixed",
  forward = function(ctx, a, k, b)
    local e = a:exp() * k
    ctx:save(e)
    ctx.k = k
    return e, a + b
  end,
  backward = function(ctx, de, ds)
    return de * ctx:saved() + ds, nil, ds
  end,
}

describe("an orepa.Function", function()
  it("is an op with the gradient that it says", function()
    assert(orepa.gradcheck(mixed, { double(2, 3), 2.5, double(2, 3) }))
    assert(orepa.gradcheck(function(a, b)
      local e, s = mixed(a * 0.2, 3, b)
      local f = mixed(e * s * 0.1, 0.1, s)
      return f + e
    end, { double(2, 2), double(2, 2) }))
    local a, b = double(2), double(2)
    local e, s = mixed(a, 1, b)
    assert.same({ 2 }, e.shape)
    assert.is_true(e.requires_grad and s.requires_grad and not e.is_leaf)
    assert.is_nil((select(3, mixed(a, 1, b))))
  end)

  it("knows what is needed, and gives zeros where nothing arrives", function()
    local seen = {}
    local op = Function { forward = function(ctx, a, b, c)
      seen.forward = { table.unpack(ctx.needs) }
      assert.is_false((a * 2).requires_grad)
      return a * b, a + b + (c or 0)
    end, backward = function(ctx, dp, ds)
      seen.backward, seen.dp, seen.ds = { table.unpack(ctx.needs) }, dp:tolist(), ds:tolist()
      return ds, ctx.needs[2] and ds
    end }
    local x, c = orepa.ones(2):requires_grad_(), orepa.ones(2)
    local _, s = op(x, c, nil)
    s:sum():backward()
    assert.same({ true, false, false }, seen.forward)
    assert.same({ true, false, false }, seen.backward)
    assert.same({ 0, 0 }, seen.dp)
    assert.same({ 1, 1 }, seen.ds)
    local h = c * x
    _, s = op(x, h, 1)
    orepa.grad(s:sum(), h)
    assert.same({ false, true, false }, seen.backward)
    local y = orepa.no_grad(function() return op(x, h) end)
    assert.same({ false, false }, seen.forward)
    assert.is_false(y.requires_grad)
  end)

  it("has results without gradient", function()
    local positive = Function { forward = function(ctx, x)
      local mask = x:gt(0):to "float32"
      ctx:mark_non_differentiable(mask)
      return x * mask, mask, x:argmax(1)
    end, backward = function(_, dy, ...)
      assert.equal(2, select("#", ...))
      assert.is_true((...) == nil and select(2, ...) == nil)
      return dy
    end }
    local x = orepa.tensor({ -1, 2 }):requires_grad_()
    local y, mask, index = positive(x)
    assert.is_true(y.requires_grad and not mask.requires_grad and not index.requires_grad)
    y:sum():backward()
    assert.same({ 1, 1 }, x.grad:tolist())
  end)

  it("checks what it is given and gives", function()
    local x = orepa.ones(2):requires_grad_()
    local function op(forward, backward)
      local f = Function { name = "mine", forward = forward, backward = backward or function() end }
    return function() f(x):sum():backward() end
    end
    local function same(_, t) return t * 1 end
    fails("function_spec.lua:%d+: mine: forward gave nothing", op(function() end))
    fails("mine: forward gave a number as result 2", op(function(_, t) return t, 1 end))
    fails("mine: forward changed argument 1 in place", op(function(_, t) return t:mul_(2) end))
    fails("mine: backward gave nothing; a gradient or nil for each of 1 arguments", op(same))
    fails("mine: backward gave float32 3 on 'cpu' as the gradient of argument 1, which is float32 2",
      op(same, function() return orepa.ones(3) end))
    fails("mine: backward gave float32 2 on 'ref'", op(same, function() return orepa.ones({ 2 }, { device = "ref" }) end))
    fails("mine: backward gave a table as gradient 1", op(same, function() return {} end))
    fails("mine: backward gave 2 gradients for 1 arguments", op(same, function(_, dy) return dy, dy end))
    fails("function_spec.lua:%d+: no", op(same, function() error "no" end))
    fails("function_spec.lua:%d+: no", op(function() error "no" end))
    assert.is_true(orepa.is_grad_enabled())
    assert.is_nil(x.grad)
    op(same, function() return nil end)() -- no gradient at all
    assert.is_nil(x.grad)
    fails("option 'backward' is missing", Function, { forward = print })
    fails("option 'forward': a function expected, got number", Function, { forward = 1, backward = print })
    fails("unknown option 'backwards'", Function, { forward = print, backwards = print })
    fails("option 'name': a string expected", Function, { forward = print, backward = print, name = 1 })
    fails("a table {forward=, backward=} expected, got no value", Function)
    fails("an orepa.Function expected, got table", getmetatable(mixed).__call, {})
    fails("an orepa.Context expected, got no value", op(function(ctx) ctx.save() end))
    fails("argument 2: a tensor expected, got number", op(function(ctx) ctx:save(1) end))
    local broken = Function { forward = same, backward = same }
    broken.name = {}
    fails("its name is a table", broken, x)
    broken.name, broken.backward = "broken", nil
    fails("attempt to call a nil value", function() broken(x):sum():backward() end)
  end)

  it("notices that what it saved was changed", function()
    local op = Function { name = "keeps", forward = function(ctx, a, b)
      ctx:save(a)
      ctx:save(b)
      return a * b
    end, backward = function(ctx, dy)
      local a, b = ctx:saved()
      return dy * b, dy * a
    end }
    local x, w = orepa.ones(2):requires_grad_(), orepa.ones(2)
    local y = op(x, w)
    w:add_(1)
    fails("keeps: backward needs a tensor %(float32 2%) that was changed in place", function() y:sum():backward() end)
    y = op(x, w)
    y:sum():backward({ retain_graph = true })
    y:sum():backward()
    assert.same({ 4, 4 }, x.grad:tolist())
    local result = Function { name = "result", forward = function(ctx, t)
      local r = t:exp()
      ctx:save(r)
      return r
    end, backward = function(ctx, dy) return dy * ctx:saved() end }(x)
    result:mul_(2)
    fails("result: backward needs a tensor", function() result:sum():backward() end)
  end)

  it("survives functions that release what they were given", function()
    local x = orepa.tensor({ 1, 2 }):requires_grad_()
    local op = Function { forward = function(ctx, a)
      local y = a * 2
      ctx.x = a:detach()
      a:release()
      collectgarbage()
      return y
    end, backward = function(_, dy)
      local dx = dy * 2
      dy:release()
      collectgarbage()
      return dx
    end }
    local h = x * 1
    op(h):sum():backward()
    assert.same({ 2, 2 }, x.grad:tolist())
    fails("has been released", Function { forward = function(ctx, a)
      local t = a * 1
      ctx:save(t)
      t:release()
      return a * 2
    end, backward = print }, x)
  end)

  it("gives back what it was given as a view", function()
    local x = orepa.tensor({ 1, 2 }):requires_grad_()
    local op = Function { forward = function(_, a) return a end, backward = function(_, dy) return dy * 3 end }
    local h = x * 2
    local y = op(h)
    assert.is_true(y ~= h)
    fails("is a view of another", y.mul_, y, 2)
    y:sum():backward()
    assert.same({ 6, 6 }, x.grad:tolist())
  end)

  it("works in checkpoints, under autocast and beside hooks", function()
    local x = orepa.tensor({ 0.5, 1 }):requires_grad_()
    local function f(t)
      local e, s = mixed(t, 2, t * 3)
      return e * s
    end
    f(x):sum():backward()
    local expected = x.grad:tolist()
    x.grad = nil
    local seen = 0
    local y = orepa.checkpoint(function(t)
      local r = f(t)
      r:register_hook(function() seen = seen + 1 end)
      return r
    end, x)
    orepa.autocast("bfloat16", function() y:sum():backward() end)
    assert.same(expected, x.grad:tolist())
    assert.equal(1, seen)
  end)
end)

describe("an orepa.Function's memory", function()
  -- Weak keys of what a graph should not keep alive.
  local function is_gone(make)
    local weak = setmetatable({}, { __mode = "k" })
    make(weak)
    for _ = 1, 3 do collectgarbage() end
    return next(weak) == nil
  end

  it("is the graph's, however that ends", function()
    local x = orepa.ones(1000):requires_grad_()
    collectgarbage()
    collectgarbage()
    local live = orepa.memory().live
    local function use(finish)
      return function(weak)
        local op = Function { forward = function(ctx, t)
          local y = t * 2
          ctx:save(y, t)
          ctx.y, ctx.big, ctx.self = y, { t }, ctx -- its own result, and itself
          weak[ctx], weak[ctx.big] = true, true
          return y, y + 1
        end, backward = function(ctx, dy)
          weak[dy] = true
          local y = ctx:saved()
          weak[y] = true
          return dy * y
        end }
        weak[op] = true
        finish(op(x))
      end
    end
    assert.is_true(is_gone(use(function() end)))
    assert.is_true(is_gone(use(function(y) y:sum():backward() end)))
    assert.is_true(is_gone(use(function(y, z) (y * z):sum():backward() end)))
    assert.is_true(is_gone(use(function(y) y:sum():backward({ retain_graph = true }) end)))
    assert.is_true(is_gone(use(function(y) pcall(y.backward, y) end)))
    assert.is_true(is_gone(use(function(y) y:release() end)))
    assert.is_true(is_gone(use(function(y) coroutine.wrap(function() y:sum():backward() end)() end)))
    assert.is_true(is_gone(use(function(y) orepa.grad(y:sum(), x) end)))
    x.grad = nil
    collectgarbage()
    assert.equal(live, orepa.memory().live)
  end)

  it("stays flat in a loop", function()
    local output = process.run_text [[
local orepa = require "orepa"
local op = orepa.Function { forward = function(ctx, t) local y = t * 2; ctx:save(y); ctx.y = y; return y end,
  backward = function(ctx, dy) return dy * ctx:saved() end }
local x = orepa.ones(1 << 20):requires_grad_() -- 4 MiB
local peak
for k = 1, 40 do
  op(op(x)):sum():backward()
  x.grad = nil
  if k == 10 then orepa.reset_peak() peak = orepa.memory().peak end
end
print((orepa.memory().peak - orepa.memory().live) / (1 << 20), collectgarbage "count" < 20000)
]]
    local mebibytes, small = output:match "^(%S+)%s+(%a+)"
    assert.is_true(tonumber(mebibytes) < 80, output)
    assert.equal("true", small)
  end)
end)
