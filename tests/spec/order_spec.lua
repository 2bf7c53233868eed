-- Order and running sums along a dimension: sort, argsort, topk, cumsum, and what is made of them.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local check_gradient = require "tests.spec.check_gradient"

local function lists(...)
  local all = {}
  for n, t in ipairs { ... } do all[n] = t:tolist() end
  return all
end

for _, device in ipairs { "cpu", "ref" } do
  local function tensor(values, dtype) return orepa.tensor(values, { dtype = dtype or "float32", device = device }) end

  describe("on " .. device, function()
    it("sort gives elements in order and where they were", function()
      assert.same({ { 1, 2, 3 }, { 1, 2, 0 } }, lists(tensor({ 3, 1, 2 }):sort()))
      assert.same({ { 3, 2, 1 }, { 0, 2, 1 } }, lists(tensor({ 3, 1, 2 }):sort { descending = true }))
      assert.same({ { { 1, 0 }, { 3, 2 } }, { { 1, 0 }, { 0, 1 } } }, lists(tensor({ { 3, 0 }, { 1, 2 } }):sort(1)))
      assert.same({ { 1, 1, 1, 2 }, { 0, 2, 3, 1 } }, lists(tensor({ 1, 2, 1, 1 }):sort()))
      assert.same({ { 2, 1, 1, 1 }, { 1, 0, 2, 3 } }, lists(tensor({ 1, 2, 1, 1 }):sort(1, { descending = true })))
      assert.same({ 2, 1, 0 }, tensor({ 0 / 0, 3, -1 }):argsort():tolist())
      assert.same({ 0, 1, 2 }, tensor({ 0 / 0, 3, -1 }):argsort { descending = true }:tolist())
      assert.same({ 9007199254740992, 9007199254740993 },
        (tensor({ 9007199254740993, 9007199254740992 }, "int64"):sort()):tolist())
      assert.same({ 0, 3 }, tensor({}):reshape(0, 3):sort().shape)
    end)

    it("topk gives the first of them", function()
      assert.same({ { { 6, 5 }, { 9, 3 } }, { { 2, 0 }, { 1, 2 } } }, lists(tensor({ { 5, 1, 6 }, { 2, 9, 3 } }):topk(2)))
      assert.same({ { { 2, 1 } }, { { 1, 0 } } }, lists(tensor({ { 5, 1 }, { 2, 9 } }):topk(1, 1, { largest = false })))
      local x = orepa.randn(3, 500):to(device)
      local sorted, where = x:sort(2, { descending = true })
      local values, positions = x:topk(7)
      assert.same(lists(sorted:slice(2, 1, 7), where:slice(2, 1, 7)), lists(values, positions))
    end)

    it("cumsum adds up what came before, exactly for integers and in more than float32 for floats", function()
      assert.same({ { 1, 3, 6 }, { 4, 9, 15 } }, tensor({ { 1, 2, 3 }, { 4, 5, 6 } }):cumsum():tolist())
      assert.same({ { 1, 2 }, { 4, 6 } }, tensor({ { 1, 2 }, { 3, 4 } }):cumsum(1):tolist())
      local counted = tensor({ true, false, true }, "bool"):cumsum()
      assert.same({ "int64", { 1, 1, 2 } }, { counted.dtype, counted:tolist() })
      assert.equal(16777217 + 1, tensor({ 16777216, 1, 1 }):cumsum()[3]:item()) -- in float32 one is lost
      assert.equal(258, tensor({ 256, 1, 1 }, "bfloat16"):cumsum()[3]:item())
    end)

    it("nonzero and unique say where elements are", function()
      local x = tensor { { 0, 3, 3 }, { 5, 0, 3 } }
      assert.same({ { 0, 1 }, { 0, 2 }, { 1, 0 }, { 1, 2 } }, x:nonzero():tolist())
      assert.same({ 1, 2, 3, 5 }, x:flat_nonzero():tolist())
      assert.same({ 0, 2 }, (x * 0):nonzero().shape)
      assert.same({ 1, 0 }, tensor(4):nonzero().shape)
      assert.same({ { 0, 3, 5 }, { { 0, 1, 1 }, { 2, 0, 1 } }, { 2, 3, 1 } }, lists(x:unique()))
      assert.same({ {}, {}, {} }, lists(tensor({}):unique()))
    end)

    it("quantiles lie between neighbours, and NaN wins", function()
      local x = tensor({ { 4, 1, 3, 2 }, { 10, 30, 20, 40 } })
      assert.same({ 2.5, 25 }, x:quantile(0.5, 2):tolist())
      assert.same({ { 1, 10 }, { 1.75, 17.5 }, { 4, 40 } }, x:quantile({ 0, 0.25, 1 }, -1):tolist())
      assert.same({ { 7, 15.5, 11.5, 21 } }, x:quantile(0.5, 1, { keepdim = true }):tolist())
      assert.equal(7, x:quantile(0.5):item())
      assert.same({ 1, 1 }, x:quantile(0.5, { keepdim = true }).shape)
      assert.same({ 2, 1, 1 }, x:quantile({ 0.5, 1 }, { keepdim = true }).shape)
      local odd = tensor({ { 1, 0 / 0, 2 }, { -math.huge, 5, math.huge } }):quantile(0.5, 2):tolist()
      assert.is_true(odd[1] ~= odd[1] and odd[2] == 5)
      assert.equal(math.huge, tensor({ 1, math.huge, math.huge }):quantile(0.75):item())
      assert.equal("bfloat16", tensor({ 1, 2 }, "bfloat16"):quantile(0.5).dtype)
    end)

    it("histc counts what is in each part of a range", function()
      assert.same({ 1, 2, 0, 1 }, tensor({ 1, 2, 2, 5 }):histc(4):tolist())
      assert.same({ 1, 0, 2 }, tensor({ 0, 0 / 0, 3, 2.5, -0.1, 3.1, math.huge }):histc(3, 0, 3):tolist())
      assert.same({ 0, 3 }, tensor({ 7, 7, 7 }, "int64"):histc(2):tolist())
      assert.same({ 0, 0 }, tensor({}):histc(2):tolist())
      local x = orepa.randn({ 5000 }, { device = device })
      local counts = x:histc()
      assert.same({ 100, 5000, "int64", device }, { #counts, counts:sum():item(), counts.dtype, counts.device })
    end)

    it("median is the lower one in the middle, or NaN", function()
      assert.equal(2, tensor({ 4, 2, 1, 3 }):median():item())
      assert.same({ { 2, 5 }, { 0, 1 } }, lists(tensor({ { 2, 3, 1 }, { 4, 5, 6 } }):median(2)))
      assert.same({ 2, 1 }, (tensor({ { 2, 3, 1 }, { 4, 5, 6 } }):median(2, { keepdim = true })).shape)
      local value, at = tensor({ { 1, 0 / 0, 2 } }):median(2)
      assert.is_true(value:item() ~= value:item())
      assert.equal(1, at:item())
    end)
  end)
end

it("gradients go to the elements that were chosen", function()
  check_gradient(function(x) return (x:reshape(-1) - 1):abs():sort() end, 2, 3)
  check_gradient(function(x) return (x:topk(2, 1)) end, 3, 2)
  check_gradient(function(x) return x:cumsum(1) * x end, 3, 2)
  check_gradient(function(x) return (x:median(2)) end, 2, 3)
  check_gradient(function(x) return x:quantile({ 0.3, 0.8 }, 2) end, 2, 5)
end)

it("wrong arguments are refused", function()
  local x = orepa.ones(2, 3)
  fails("topk: 4 of a dimension of size 3", x.topk, x, 4)
  fails("topk: how many", x.topk, x, 1.5)
  fails("topk: unknown option 'sorted'", x.topk, x, 1, { sorted = true })
  fails("sort: unknown option 'stable'", x.sort, x, { stable = true })
  fails("sort: a scalar has no dimensions", x.sort, orepa.ones {})
  fails("cumsum", x.cumsum, x, 3)
  fails("median: dimension 1 has no elements", x.median, orepa.ones { 0 })
  fails("quantile: dimension 2 has no elements", x.quantile, orepa.ones { 3, 0 }, 0.5, 2)
  fails("quantile: 1.5 is no share from 0 to 1", x.quantile, x, { 0.5, 1.5 })
  fails("quantile: a number from 0 to 1 expected", x.quantile, x)
  fails("quantile: a number from 0 to 1 expected, or a list of them", x.quantile, x, {})
  fails("quantile: floats expected, got int64", x.quantile, x:to "int64", 0.5)
  fails("histc: 0 bins", x.histc, x, 0)
  fails("histc: the number of bins is 2.5, a whole number expected", x.histc, x, 2.5)
  fails("histc: there are no bins from 3 to 1", x.histc, x, 4, 3, 1)
  fails("histc: there are no bins from 0.0 to inf", x.histc, orepa.tensor { 0, math.huge }, 4)
end)
