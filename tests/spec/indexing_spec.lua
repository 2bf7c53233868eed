-- t[key] and t[key] = value: lists of positions, integers, masks; on both devices, with gradients, and what is refused.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local check_gradient = require "tests.spec.check_gradient"

local function list_of(t) return t:tolist() end

for _, device in ipairs { "cpu", "ref" } do
  local function integers(list) return orepa.tensor(list, { dtype = "int64", device = device }) end
  local function numbers() return orepa.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { device = device }) end

  describe("t[key] on " .. device, function()
    local t = numbers()

    it("takes the positions that a list names, counted from 1", function()
      assert.same({ { 4, 5, 6 }, { 1, 2, 3 }, { 4, 5, 6 } }, list_of(t[{ 2, 1, -1 }]))
      assert.same({ { 4, 5, 6 } }, list_of(t[{ 2.0 }]))
      assert.same({ 0, 3 }, t[{}].shape)
      assert.same({ 3, 1 }, list_of(t[1][{ 3, 1 }]))
    end)

    it("takes the positions that integers name, counted from 0, in their shape", function()
      assert.same({ { 4, 5, 6 }, { 1, 2, 3 } }, list_of(t[integers { 1, 0 }]))
      assert.same({ { { 4, 5, 6 } }, { { 1, 2, 3 } } }, list_of(t[integers { { 1 }, { 0 } }]))
      assert.same({ 4, 5, 6 }, list_of(t[integers(1)]))
    end)

    it("takes what a mask of the first dimensions marks", function()
      assert.same({ 3, 4, 5, 6 }, list_of(t[t:gt(2)]))
      assert.same({ { 4, 5, 6 } }, list_of(t[orepa.tensor({ false, true }, { device = device })]))
      assert.same({ 0 }, t[t:gt(9)].shape)
      assert.same({ 0, 3 }, t[orepa.tensor({ false, false }, { device = device })].shape)
      local map = orepa.arange(1, 24):reshape(2, 3, 2, 2):to(device)
      assert.same({ 1, 9, 13 }, list_of(map[map:eq(1) | map:eq(9) | map:eq(13)]))
    end)
  end)

  describe("t[key] = value on " .. device, function()
    it("writes into the positions of a list", function()
      local t = numbers()
      t[{ 2 }] = 0
      assert.same({ { 1, 2, 3 }, { 0, 0, 0 } }, list_of(t))
      t[{ -1, 1 }] = orepa.tensor({ { 7 }, { 8 } }, { device = device })
      assert.same({ { 8, 8, 8 }, { 7, 7, 7 } }, list_of(t))
      t[{ 1 }] = orepa.tensor({ 1, 2, 3 }, { dtype = "int64", device = device })
      assert.same({ { 1, 2, 3 }, { 7, 7, 7 } }, list_of(t))
      t[{}] = 5
      assert.same({ { 1, 2, 3 }, { 7, 7, 7 } }, list_of(t))
    end)

    it("writes into the positions of integers, the last of equals", function()
      local t = numbers()
      t[integers { 0, 0 }] = orepa.tensor({ { 1, 1, 1 }, { 2, 2, 2 } }, { device = device })
      assert.same({ { 2, 2, 2 }, { 4, 5, 6 } }, list_of(t))
      t[integers { { 1 } }] = orepa.tensor({ 7, 8, 9 }, { device = device })
      assert.same({ { 2, 2, 2 }, { 7, 8, 9 } }, list_of(t))
    end)

    it("writes under a mask: a number, or rows in their order", function()
      local t = numbers()
      t[t:gt(4)] = 0
      assert.same({ { 1, 2, 3 }, { 4, 0, 0 } }, list_of(t))
      t[t:eq(0)] = orepa.tensor({ 8, 9 }, { dtype = "float64", device = device })
      assert.same({ { 1, 2, 3 }, { 4, 8, 9 } }, list_of(t))
      t[orepa.tensor({ true, false }, { device = device })] = orepa.tensor({ 5, 6, 7 }, { device = device })
      assert.same({ { 5, 6, 7 }, { 4, 8, 9 } }, list_of(t))
      t[t:gt(100)] = orepa.ones({ 0 }, { device = device })
      t[t:gt(100)] = orepa.ones({}, { device = device })
      assert.same({ { 5, 6, 7 }, { 4, 8, 9 } }, list_of(t))
      local map = orepa.zeros({ 1, 2, 2, 2 }, { device = device })
      map[map:eq(0)] = orepa.arange(8):to(device)
      assert.same({ 1, 2, 3, 4, 5, 6, 7, 8 }, list_of(map:reshape(-1)))
    end)
  end)
end

it("gradients of t[key] and t[key] = value are those of their slopes", function()
  local mask = orepa.tensor({ { true, false, true }, { false, false, true } }, { device = "ref" })
  local rows = orepa.tensor({ false, true, true }, { device = "ref" })
  check_gradient(function(x) return x[{ 2, 1, 2 }] end, 2, 3)
  check_gradient(function(x) return x[mask] * 2 end, 2, 3)
  check_gradient(function(x) return x[rows] end, 3, 2)
  check_gradient(function(x) local y = x * 1; y[{ 2 }] = x:slice(1, 1, 1) * 3; return y end, 2, 3)
  check_gradient(function(x) local y = x * 1; y[mask] = x[mask] * x[mask]; return y end, 2, 3)
  check_gradient(function(x) local y = x * x; y[mask] = 4; return y end, 2, 3)
  check_gradient(function(x) local y = x * x; y[rows] = x:slice(1, 1, 1); return y end, 3, 2)
end)

it("a key or a value that doesn't fit is refused, and nothing changes", function()
  local t = orepa.ones(2, 3)
  local function set(key, value) t[key] = value end
  local function get(key) return t[key] end
  fails("position 2 of the list is 2.5; a whole number expected", get, { 1, 2.5 })
  fails("position 1 of the list is 3; the dimension has size 2", get, { 3 })
  fails("position 1 of the list is 0", get, { 0 })
  fails("position 1 of the list is true", get, { true })
  fails("this table has the key a", get, { a = 1 })
  fails("float32 2 can't be an index", get, orepa.ones(2))
  fails("a mask of 3 does not fit a tensor of 2x3", get, orepa.ones(3):gt(0))
  fails("a mask of 2x3x1 does not fit", get, orepa.ones(2, 3, 1):gt(0))
  fails("a scalar has no positions", function() return orepa.ones({})[{ 1 }] end)
  fails("got string", set, { 1 }, "x")
  fails("does not broadcast", set, { 1 }, orepa.ones(2))
  fails("expand", set, t:gt(0), orepa.ones(5))
  fails("outside 0", set, orepa.tensor({ 0, 2 }, { dtype = "int64" }), 0)
  fails("a leaf", function() local x = orepa.ones(2):requires_grad_(); x[{ 1 }] = 0 end)
  fails("a leaf", function() local x = orepa.ones(2):requires_grad_(); x[x:gt(0)] = 0 end)
  assert.same({ { 1, 1, 1 }, { 1, 1, 1 } }, t:tolist())
end)
