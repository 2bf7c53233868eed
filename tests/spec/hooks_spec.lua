-- Hooks on gradients and tensors that retain theirs: order and numbers of PyTorch's, also where norms and gradients wait; and
-- what callbacks may do: fail, yield, be registered by a coroutine that is gone.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"

describe("a hook", function()
  it("sees the whole gradient and may exchange it, in order", function()
    local x, seen = orepa.tensor({ 1, 2 }):requires_grad_(), {}
    local function note(name, factor)
      return function(g)
        seen[#seen + 1] = name .. " " .. table.concat(g:tolist(), " ")
        assert.is_false(g.requires_grad)
        return factor and g * factor -- false is nothing
      end
    end
    local h = x * 2
    h:retain_grad()
    h:register_hook(note("h1", 10))
    h:register_hook(note("h2", false))
    x:register_hook(note("x", 0.5))
    local y = (h * h):sum() + h:sum()
    -- numbers of PyTorch 2.13
    assert.same({ 50, 90 }, orepa.grad(y, h, { retain_graph = true }):tolist())
    assert.same({ "h1 5.0 9.0", "h2 50.0 90.0" }, seen)
    assert.same({ 50, 90 }, orepa.grad(y, x, { retain_graph = true }):tolist())
    assert.same("x 100.0 180.0", seen[5])
    assert.is_nil(x.grad)
    y:backward()
    assert.same({ 50, 90 }, x.grad:tolist())
    assert.same({ 150, 270 }, h.grad:tolist())
  end)

  it("is called as long as it isn't removed, and no longer than its graph", function()
    local x, calls = orepa.ones(2):requires_grad_(), 0
    local hook = x:register_hook(function() calls = calls + 1 end)
    for _ = 1, 3 do (x * 2):sum():backward() end
    assert.equal(3, calls)
    hook:remove()
    hook:remove();
    (x * 2):sum():backward()
    assert.equal(3, calls)
    assert.same({ 8, 8 }, x.grad:tolist())
    x:register_hook(function() calls = calls + 1 end) -- the handle is nobody's
    collectgarbage();
    (x * 2):sum():backward()
    assert.equal(4, calls)
    local weak = setmetatable({}, { __mode = "k" })
    do
      local h = x * 2
      local f = function() calls = calls + 1 end
      weak[f] = true
      local handle = h:register_hook(f)
      h:sum():backward()
      f = nil -- luacheck: ignore
      collectgarbage()
      assert.is_nil(next(weak))
      handle:remove()
    end
    local g
    do
      g = function() end
      weak[g] = true;
      (x * 2):register_hook(g)
      g = nil -- luacheck: ignore
    end
    collectgarbage()
    collectgarbage()
    assert.is_nil(next(weak))
  end)

  it("that removes itself or others, or adds some", function()
    local x, seen = orepa.ones(1):requires_grad_(), {}
    local a, b
    a = x:register_hook(function()
      seen[#seen + 1] = "a"
      a:remove()
      b:remove()
      x:register_hook(function() seen[#seen + 1] = "c" end)
      collectgarbage()
    end)
    b = x:register_hook(function() seen[#seen + 1] = "b" end)
    for _ = 1, 2 do (x * 1):sum():backward() end
    assert.same({ "a", "c" }, seen)
  end)

  it("sees a gradient of its tensor's type, on its device", function()
    local x, seen = orepa.ones(2):requires_grad_(), nil
    local h = x * 2
    h:register_hook(function(g) seen = { g.dtype, g.device } end)
    h:to({ dtype = "float64", device = "ref" }):sum():backward()
    assert.same({ "float32", "cpu" }, seen)
  end)

  it("keeps the gradient that it was given", function()
    local x, kept = orepa.tensor({ 1, 2 }):requires_grad_(), {}
    local h = x * 1
    h:register_hook(function(g) kept[#kept + 1] = g end)
    x:register_hook(function(g) kept[#kept + 1] = g end);
    (h * 3 + h * 4 + x):sum():backward();
    (x * 100):sum():backward()
    assert.same({ 7, 7 }, kept[1]:tolist())
    assert.same({ 8, 8 }, kept[2]:tolist())
    assert.same({ 108, 108 }, x.grad:tolist())
  end)

  it("is refused what it must not give or do", function()
    local x = orepa.ones(2):requires_grad_()
    local function pass(f, on_leaf)
      local h = x * x
      local y = h * 2;
      (on_leaf and x or h):register_hook(f)
      y:backward(orepa.ones(2))
    end
    fails("hooks_spec.lua:%d+: register_hook: the hook gave float32 3 .* for a gradient of float32 2", pass,
      function() return orepa.ones(3) end)
    fails("the hook gave a number; a tensor or nothing expected", pass, function() return 1 end)
    fails("changed its gradient %(float32 2%) in place", pass, function(g) g:mul_(2) end)
    fails("a function expected, got no value", x.register_hook, x)
    fails("requires no gradient", function() orepa.ones(2):register_hook(print) end)
    fails("requires no gradient", function() orepa.ones(2):retain_grad() end)
    fails("a hook expected", x:register_hook(print).remove, 3)
    assert.is_nil(x.grad)
  end)
end)

describe("a callback", function()
  local x = orepa.ones(2):requires_grad_()

  it("raises its error where backward was called, and frees the graph", function()
    local thrown = { "mine" }
    for _, error_value in ipairs { thrown, "text" } do
      local h = x * x
      h:register_hook(function() error(error_value) end)
      local y = (h * 2):sum()
      local ok, caught = pcall(y.backward, y)
      assert.is_false(ok)
      if error_value == thrown then
        assert.equal(thrown, caught)
      else
        assert.matches("hooks_spec.lua:%d+: text", caught)
      end
      assert.is_nil(x.grad)
      assert.is_true(orepa.is_grad_enabled() and (x * 2).requires_grad)
      fails("freed by an earlier backward", y.backward, y)
    end
  end)

  it("can't yield", function()
    local double = orepa.Function { forward = function(_, t) return t * 2 end, backward = function(_, dy)
      coroutine.yield()
      return dy * 2
    end }
    local waits = orepa.Function { forward = function(_, t)
      coroutine.yield()
      return t * 2
    end, backward = function(_, dy) return dy * 2 end }
    local h = x * 1
    h:register_hook(coroutine.yield)
    for _, f in ipairs { function() h:sum():backward() end, function() double(x):sum():backward() end,
      function() orepa.grad(double(x):sum(), x) end, function() waits(x) end } do
      local ok, message = coroutine.resume(coroutine.create(f))
      assert.is_false(ok)
      assert.matches("yield across", message)
      assert.is_true(orepa.is_grad_enabled())
    end
    assert.is_nil(x.grad)
  end)

  it("of a coroutine that is gone runs on the state that called backward", function()
    local where, y = {}, nil
    local function note(name)
      return function(...)
        where[name] = coroutine.running()
        return select(-1, ...)
      end
    end
    local function make()
      local apply = orepa.Function { forward = function(_, t) return t * 1 end, backward = note "function" }
      local h = apply(x)
      h:register_hook(note "hook")
      y = h:sum()
    end
    coroutine.wrap(make)()
    for _ = 1, 3 do collectgarbage() end
    y:backward()
    assert.same({ hook = coroutine.running(), ["function"] = coroutine.running() }, where)
    coroutine.wrap(make)()
    collectgarbage()
    local other = coroutine.create(function() y:backward() end)
    assert(coroutine.resume(other))
    assert.same({ hook = other, ["function"] = other }, where)
    local suspended = coroutine.create(function() -- the one that registered them waits
      make()
      coroutine.yield()
      return "here"
    end)
    assert(coroutine.resume(suspended))
    y:backward()
    assert.same(coroutine.running(), where.hook)
    assert.equal("here", select(2, coroutine.resume(suspended)))
    x.grad = nil
  end)

  it("may compute, and go backward itself", function()
    local p, seen = orepa.tensor({ 3 }):requires_grad_(), {}
    local h = x * 2
    h:register_hook(function(g)
      assert.is_false((p * p).requires_grad) -- a pass records nothing
      seen[1] = g:sum():item()
    end)
    local y = h:sum()
    local side = (p * p):sum()
    y:register_hook(function() side:backward() end)
    y:backward()
    assert.same({ 6 }, p.grad:tolist())
    assert.equal(2, seen[1])
    local again
    again = (x * 3):sum()
    x:register_hook(function() again:backward({ retain_graph = true }) end) -- without end
    fails("C stack overflow", again.backward, again, { retain_graph = true })
    assert.is_true(orepa.is_grad_enabled())
  end)
end)

-- ---- norms and gradients that wait ----

-- What hooks and retained gradients see in a network whose maps and gradients are promised, as text of hexadecimal numbers.
local waiting = [[
local orepa = require "orepa"
local nn, F = orepa.nn, orepa.F
orepa.manual_seed(7)
local function hex(t)
  local list = t:reshape(-1):tolist()
  for k, v in ipairs(list) do list[k] = ("%a"):format(v) end
  return table.concat(list, " ")
end
local function conv(i, o) return nn.Conv2d { in_channels = i, out_channels = o, kernel_size = 3, padding = 1 } end
local c1, c2, c3, n1, n2 = conv(3, 8), conv(8, 8), conv(8, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
local x = orepa.randn(2, 3, 8, 8)
for _, what in ipairs { "none", "look", "scale", "retain" } do
  local way = {}
  local function on(name, t)
    if what == "look" then t:register_hook(function(g) print(name, hex(g)) end) end
    if what == "scale" then t:register_hook(function(g) return g * 0.5 end) end
    if what == "retain" then way[#way + 1] = t:retain_grad() end
    return t
  end
  local a = on("a", c1(x))
  local b = on("b", n1(a))
  local r = on("r", F.relu(b))
  local d = on("d", n2(c2(r)))
  local s = on("s", d + r)
  local z = on("z", F.relu(s))
  local p = on("p", F.max_pool2d(z, { kernel_size = 2 }))
  local y = on("y", c3(p));
  (y * y):sum():backward()
  for _, t in ipairs(way) do print(hex(t.grad)) end
  for _, m in ipairs { c1, c2, c3, n1, n2 } do
    for _, w in ipairs(m:parameters()) do
      print(what, hex(w.grad))
      w.grad = nil
    end
  end
end
]]

describe("hooks and retained gradients", function()
  it("see the same bits whether norms wait or not, and change none by looking", function()
    local deferred = process.run_text(waiting, {}, { OREPA_DEFER = "1", OMP_NUM_THREADS = "1" })
    local plain = process.run_text(waiting, {}, { OREPA_DEFER = "0", OMP_NUM_THREADS = "1" })
    assert.is_true(#deferred > 10000)
    assert.is_true(deferred == plain, "they differ")
    local by = {}
    for line in deferred:gmatch "[^\n]+" do
      local what, rest = line:match "^(%l%l+)\t(.*)$"
      if what then by[what] = (by[what] or "") .. rest end
    end
    assert.is_true(by.none == by.look and by.none == by.retain)
    assert.is_true(by.none ~= by.scale)
  end)

  it("are there for results of checkpoints", function()
    local x, seen = orepa.tensor({ 1, 2 }):requires_grad_(), {}
    local y = orepa.checkpoint(function(t)
      local h = t * t
      h:register_hook(function(g) seen[#seen + 1] = g:tolist() end)
      h:retain_grad()
      return h
    end, x)
    y:retain_grad()
    y:register_hook(function(g) return g * 2 end);
    (y * 3):sum():backward()
    assert.same({ { 6, 6 } }, seen)
    assert.same({ 6, 6 }, y.grad:tolist())
    assert.same({ 12, 24 }, x.grad:tolist())
  end)

  it("follow a tensor that is changed in place as PyTorch's do", function()
    local x, seen = orepa.tensor({ 1, 2 }):requires_grad_(), {}
    local h = x * 2
    h:retain_grad()
    h:register_hook(function(g) seen[#seen + 1] = g:tolist() end)
    h:mul_(3)
    h:register_hook(function(g) seen[#seen + 1] = g:tolist() end)
    h:sum():backward()
    assert.same({ { 1, 1 }, { 3, 3 } }, seen)
    assert.same({ 1, 1 }, h.grad:tolist())
    assert.same({ 6, 6 }, x.grad:tolist())
  end)
end)
