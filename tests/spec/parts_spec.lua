-- Tensors put side by side and taken apart, dimensions of size 1, and choices by masks: values, gradients, what is refused.

local orepa = require "orepa"
local fails = require "tests.spec.fails"

local function list_of(t) return t:tolist() end

local function filled(...) return orepa.arange(1, orepa.ones(...):count()):reshape(...) end

describe("cat", function()
  it("goes along the first dimension if none is named", function()
    assert.same({ 1, 1, 0 }, list_of(orepa.cat { orepa.ones(2), orepa.zeros(1) }))
    assert.same({ { 1, 0 } }, list_of(orepa.cat({ orepa.ones(1, 1), orepa.zeros(1, 1) }, 2)))
  end)
end)

describe("stack", function()
  it("puts tensors along a new dimension", function()
    local a, b = orepa.tensor { 1, 2, 3 }, orepa.tensor { 4, 5, 6 }
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, list_of(orepa.stack { a, b }))
    assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, list_of(orepa.stack({ a, b }, 2)))
    assert.same({ { 1, 4 }, { 2, 5 }, { 3, 6 } }, list_of(orepa.stack({ a, b }, -1)))
    assert.same({ 1, 2 }, list_of(orepa.stack { orepa.tensor(1), orepa.tensor(2) }))
    assert.same({ 2, 2, 1, 1, 3 }, orepa.stack({ orepa.ones(2, 1, 1, 3), orepa.ones(2, 1, 1, 3) }, 2).shape)
  end)

  it("hands gradients back to each", function()
    local a, b = orepa.ones(2):requires_grad_(), orepa.ones(2):requires_grad_()
    orepa.stack({ a, b, a }, 2):backward(orepa.tensor { { 1, 2, 3 }, { 4, 5, 6 } })
    assert.same({ { 4, 10 }, { 2, 5 } }, { list_of(a.grad), list_of(b.grad) })
  end)

  it("refuses what has no place", function()
    fails("a list of at least one tensor expected", orepa.stack, {})
    fails("part 2 is a number, not a tensor", orepa.stack, { orepa.ones(2), 3 })
    fails("part 2 has 2 dimensions, the first 1", orepa.stack, { orepa.ones(2), orepa.ones(2, 2) })
    fails("all but axis 1 must agree", orepa.stack, { orepa.ones(2), orepa.ones(3) })
    fails("at most 6 dimensions", orepa.stack, { orepa.ones(1, 1, 1, 1, 1, 1) })
    fails("stack", orepa.stack, { orepa.ones(2) }, 3)
  end)
end)

describe("unsqueeze and squeeze", function()
  it("add and take away dimensions of size 1", function()
    local x = filled(2, 3)
    assert.same({ 1, 2, 3 }, x:unsqueeze().shape)
    assert.same({ 2, 1, 3 }, x:unsqueeze(2).shape)
    assert.same({ 2, 3, 1 }, x:unsqueeze(-1).shape)
    assert.same({ 2, 3 }, orepa.ones(1, 2, 1, 3, 1):squeeze().shape)
    assert.same({ 1, 2, 3, 1 }, orepa.ones(1, 2, 1, 3, 1):squeeze(3).shape)
    assert.same({}, orepa.ones(1, 1):squeeze().shape)
    assert.same(list_of(x), list_of(x:unsqueeze(2):squeeze(2)))
    x:unsqueeze(3):fill_(7)
    assert.same({ { 7, 7, 7 }, { 7, 7, 7 } }, list_of(x))
  end)

  it("refuse other sizes and too many dimensions", function()
    fails("dimension 2 has size 3, not 1", orepa.ones(2, 3).squeeze, orepa.ones(2, 3), 2)
    fails("at most 6 dimensions", orepa.ones(1).unsqueeze, orepa.ones(1, 1, 1, 1, 1, 1))
    fails("unsqueeze", orepa.ones(1).unsqueeze, orepa.ones(2), 4)
  end)
end)

describe("split", function()
  local function parts(...)
    local list = {}
    for k, part in ipairs(filled(5):split(...)) do list[k] = list_of(part) end
    return list
  end

  it("gives views of so many positions, or of each size listed", function()
    assert.same({ { 1, 2 }, { 3, 4 }, { 5 } }, parts(2))
    assert.same({ { 1, 2, 3, 4, 5 } }, parts(9))
    assert.same({ { 1 }, {}, { 2, 3, 4, 5 } }, parts { 1, 0, 4 })
    local x = filled(2, 4)
    local halves = x:split(2, 2)
    halves[2]:fill_(0)
    assert.same({ { 1, 2, 0, 0 }, { 5, 6, 0, 0 } }, list_of(x))
    assert.same({}, orepa.ones(0):split(3))
  end)

  it("hands gradients back", function()
    local x = filled(4):requires_grad_()
    local first, second = table.unpack(x:split(2))
    local y = first * second * second
    y:sum():backward()
    assert.same({ 9, 16, 6, 16 }, list_of(x.grad))
  end)

  it("refuses sizes that are none, or don't come to the whole", function()
    local x = orepa.ones(5)
    fails("the size is 0, at least 1 expected", x.split, x, 0)
    fails("the sizes come to 4, dimension 1 has 5", x.split, x, { 2, 2 })
    fails("size 4 of part 2 does not fit into the 3 that are left of dimension 1", x.split, x, { 2, 4 })
    fails("size %-1 of part 1", x.split, x, { -1, 6 })
    fails("a scalar has no dimensions", x.split, orepa.tensor(1), 1)
    fails("2.5", x.split, x, 2.5)
  end)
end)

describe("where", function()
  local x = orepa.tensor { -1, 2, -3, 4 }

  it("chooses by a mask, and broadcasts", function()
    assert.same({ 0, 2, 0, 4 }, list_of(orepa.where(x:gt(0), x, 0)))
    assert.same({ 0, 2, 0, 4 }, list_of(x:gt(0):where(x, 0)))
    assert.same({ { 1, 2 }, { 3, 2 } }, list_of(orepa.where(orepa.tensor { true, false }, orepa.tensor { { 1 }, { 3 } }, 2)))
    assert.same({ { 1, 7 }, { 1, 7 } }, list_of(orepa.where(orepa.tensor { true, false }, orepa.ones(2, 1), 7)))
  end)

  it("gives what it chooses from exactly, NaN on the other side or not", function()
    local big = orepa.tensor({ 9007199254740993, 5 }, { dtype = "int64" })
    assert.same({ 9007199254740993, 0 }, list_of(orepa.where(big:gt(5), big, 0)))
    local nan = orepa.tensor { 0 / 0, 1 }
    assert.same({ 2, 1 }, list_of(orepa.where(nan:isfinite(), nan, 2)))
    local kinds = { int64 = { 1, 0 }, float32 = { 1, 0.5 } }
    for dtype, numbers in pairs(kinds) do
      local y = orepa.where(orepa.tensor { true, false }, numbers[1], numbers[2])
      assert.same({ dtype, numbers }, { y.dtype, list_of(y) })
    end
    assert.equal("bfloat16", orepa.where(x:gt(0), x:to "bfloat16", 0).dtype)
  end)

  it("has gradients for what is chosen alone", function()
    local b, c = orepa.ones(3):requires_grad_(), orepa.ones(1):requires_grad_()
    orepa.where(orepa.tensor { true, false, false }, b, c):backward(orepa.tensor { 1, 2, 3 })
    assert.same({ { 1, 0, 0 }, { 5 } }, { list_of(b.grad), list_of(c.grad) })
  end)

  it("refuses conditions that are none, and types that don't mix", function()
    fails("the condition is int64 4 beside float32; a bool tensor expected", orepa.where, x:to "int64", x, 0)
    fails("don't mix", orepa.where, x:gt(0), x, orepa.ones({ 4 }, { dtype = "int64" }))
    fails("don't broadcast", orepa.where, orepa.tensor { true, false }, x, 0)
    fails("3 operands expected", orepa.where, x:gt(0), x)
    fails("one tensor is on 'ref', another on 'cpu'", orepa.where, x:gt(0):to "ref", x, 0)
  end)
end)

describe("masked_fill", function()
  it("writes where a mask is true", function()
    local x = filled(2, 3)
    assert.same({ { 0, 2, 0 }, { 0, 5, 0 } }, list_of(x:masked_fill(orepa.tensor { true, false, true }, 0)))
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, list_of(x))
    assert.equal(x, x:masked_fill_(x:gt(4), -1))
    assert.same({ { 1, 2, 3 }, { 4, -1, -1 } }, list_of(x))
  end)

  it("lets gradients through elsewhere", function()
    local x = filled(3):requires_grad_()
    local y = x * 2
    y:masked_fill_(y:gt(3), 0)
    y:backward(orepa.tensor { 1, 1, 1 })
    assert.same({ 2, 0, 0 }, list_of(x.grad))
  end)

  it("refuses masks of other types, and a mask that makes it larger in place", function()
    local x = orepa.ones(2)
    fails("the mask is float32; a bool tensor expected", x.masked_fill, x, x, 0)
    fails("copy_", x.masked_fill_, x, orepa.ones(3, 2):gt(0), 0)
    assert.same({ 1, 1 }, list_of(x))
  end)
end)
