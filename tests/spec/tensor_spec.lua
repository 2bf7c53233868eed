-- Tensors as a script sees them: making, reading, shapes, types, arithmetic, views, errors and where they point.

local orepa = require "orepa"
local fails = require "tests.spec.fails"

local function ints(values) return orepa.tensor(values, { dtype = "int64" }) end
local DTYPES = { "float32", "bfloat16", "float16", "float64", "int64", "int32", "uint8", "bool" }

describe("making tensors", function()
  it("of nested lists, float32 unless a type is named", function()
    local t = orepa.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    assert.same({ 2, 3 }, t.shape)
    assert.equal("float32", t.dtype)
    assert.equal("cpu", t.device)
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, t:tolist())
    assert.equal("int32", orepa.tensor({ 1, 2 }, { dtype = "int32" }).dtype)
    assert.equal("ref", orepa.tensor({ 1 }, { device = "ref" }).device)
  end)

  it("of a number is a scalar, of booleans is bool", function()
    assert.same({}, orepa.tensor(5).shape)
    assert.equal(5, orepa.tensor(5):item())
    assert.equal("bool", orepa.tensor({ true, false }).dtype)
    assert.same({ true, false }, orepa.tensor({ true, false }):tolist())
    assert.equal("float32", orepa.tensor({ true, 2 }).dtype)
  end)

  it("of empty lists keeps the sizes on the way", function()
    assert.same({ 0 }, orepa.tensor({}).shape)
    assert.same({ 2, 0 }, orepa.tensor({ {}, {} }).shape)
    assert.same({ {}, {} }, orepa.tensor({ {}, {} }):tolist())
  end)

  it("of int64 is exact where a double is not", function()
    local large = { math.maxinteger, math.mininteger, (1 << 53) + 1 }
    assert.same(large, ints(large):tolist())
    fails("is not an integer", orepa.tensor, { 1.5 }, { dtype = "int64" })
  end)

  it("of ragged lists or other values is an error that says so", function()
    fails("ragged", orepa.tensor, { { 1, 2 }, { 3 } })
    fails("ragged", orepa.tensor, { { 1, 2 }, 3 })
    fails("element 2 is a string", orepa.tensor, { 1, "2" })
    fails("nested deeper than 6", orepa.tensor, { { { { { { { 1 } } } } } } })
  end)

  it("of a shape, as numbers or as one list, options last", function()
    for _, t in ipairs { orepa.zeros(2, 3), orepa.zeros({ 2, 3 }), orepa.zeros(orepa.ones(2, 3).shape) } do
      assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, t:tolist())
    end
    assert.same({}, orepa.zeros({}).shape)
    assert.same({ 2 }, orepa.zeros(2, {}).shape)
    assert.same({}, orepa.ones().shape)
    assert.equal("int64", orepa.ones(2, { dtype = "int64" }).dtype)
    assert.same({ 0.5, 0.5 }, orepa.full({ 2 }, 0.5):tolist())
    fails("unknown option 'typ'", orepa.zeros, 2, { typ = "int64" })
    fails("neither a list nor options", orepa.zeros, { 2, dtype = "int64" })
    fails("no type is called 'int'", orepa.zeros, 2, { dtype = "int" })
    fails("a size is negative: %-1", orepa.zeros, 2, -1)
    fails("2.5 ?0* is not an integer", orepa.zeros, 2.5)
    fails("a size: an integer expected, got string", orepa.zeros, "2")
  end)

  it("arange includes its last number", function()
    assert.same({ 1, 2, 3 }, orepa.arange(3):tolist())
    assert.same({ 0, 0.25, 0.5, 0.75, 1 }, orepa.arange(0, 1, 0.25):tolist())
    assert.same({ 3, 2, 1 }, orepa.arange(3, 1, -1):tolist())
    assert.same({}, orepa.arange(0):tolist())
    assert.same(11, orepa.arange(0, 1, 0.1).shape[1])
    assert.same({ 4, 5 }, orepa.arange(4, 5, { dtype = "int64" }):tolist())
    fails("no finite list", orepa.arange, 0, 1, 0)
  end)

  it("in every type gives the values back", function()
    for _, dtype in ipairs(DTYPES) do
      local t = orepa.tensor({ 0, 1 }, { dtype = dtype })
      assert.equal(dtype, t.dtype)
      assert.same(dtype == "bool" and { false, true } or { 0, 1 }, t:tolist())
    end
  end)

  it("random numbers follow from the seed alone", function()
    orepa.manual_seed(7)
    local state = orepa.rng_state()
    local first, lua = orepa.randn(3, 4):tolist(), math.random()
    local second = orepa.randn(3, 4):tolist()
    assert.not_same(first, second)
    orepa.set_rng_state(state)
    assert.same(first, orepa.randn(3, 4):tolist())
    orepa.manual_seed(7)
    assert.same(first, orepa.randn(3, 4):tolist())
    assert.equal(lua, math.random())
    assert.equal(state.draws + 1, orepa.rng_state().draws)
    orepa.manual_seed(8)
    assert.not_same(first, orepa.randn(3, 4):tolist())
  end)

  it("random bits are the same on both devices", function()
    orepa.manual_seed(3)
    local a = orepa.rand(2, 3, 4, 5):tolist()
    orepa.manual_seed(3)
    assert.same(a, orepa.rand({ 2, 3, 4, 5 }, { device = "ref" }):tolist())
  end)
end)

describe("types", function()
  it("are not promoted between tensors, except short floats with float32", function()
    for _, a in ipairs(DTYPES) do
      for _, b in ipairs(DTYPES) do
        local x, y = orepa.ones({ 2 }, { dtype = a, device = "ref" }), orepa.ones({ 2 }, { dtype = b, device = "ref" })
        local short = { bfloat16 = true, float16 = true }
        if a == b then
          assert.equal(a == "bool" and "int64" or a, (x + y).dtype)
        elseif (short[a] and b == "float32") or (short[b] and a == "float32") then
          assert.equal("float32", (x + y).dtype)
        else
          fails("add: " .. a .. " and " .. b .. " don't mix", function() return x + y end)
        end
      end
    end
  end)

  it("of a tensor are taken by Lua numbers; integers and fractions make float32", function()
    assert.equal("bfloat16", (orepa.ones({ 2 }, { dtype = "bfloat16" }) + 0.5).dtype)
    assert.equal("int64", (ints { 1, 2 } + 1).dtype)
    assert.equal("int64", (ints { 1, 2 } * 2.0).dtype)
    local half = ints { 1, 2 } + 0.5
    assert.equal("float32", half.dtype)
    assert.same({ 1.5, 2.5 }, half:tolist())
    local ratio = ints { 1, 3 } / ints { 2, 2 }
    assert.equal("float32", ratio.dtype)
    assert.same({ 0.5, 1.5 }, ratio:tolist())
    assert.equal("float32", (ints { 1 } / 2).dtype)
  end)

  it("of sums of integers and bools are int64, of comparisons bool", function()
    assert.equal("int64", orepa.ones({ 2 }, { dtype = "uint8" }):sum().dtype)
    assert.equal(600, orepa.full({ 3 }, 200, { dtype = "uint8" }):sum():item())
    assert.equal("int64", orepa.tensor({ true, true }):sum().dtype)
    assert.equal("bool", orepa.ones(2):eq(1).dtype)
    assert.equal("int64", orepa.ones(2):argmax(1).dtype)
    fails("mean: int64", ints { 1 }.mean, ints { 1 })
  end)

  it("on two devices don't meet", function()
    fails("one tensor is on 'cpu', another on 'ref'", function() return orepa.ones(2) + orepa.ones({ 2 }, { device = "ref" }) end)
  end)

  it("change by to, which gives the tensor itself if nothing changes", function()
    local t = orepa.tensor { 1.5, -2 }
    assert.is_true(t:to "float32" == t)
    assert.same({ 1, -2 }, t:to("int64"):tolist())
    assert.equal("ref", t:to("ref").device)
    local both = t:to { dtype = "float64", device = "ref" }
    assert.same({ "float64", "ref" }, { both.dtype, both.device })
    fails("neither a type nor a device", t.to, t, "gpu9")
  end)
end)

describe("arithmetic", function()
  local a, b = orepa.tensor { { 1, 2 }, { 3, 4 } }, orepa.tensor { 10, 20 }

  it("broadcasts, with numbers on either side", function()
    assert.same({ { 11, 22 }, { 13, 24 } }, (a + b):tolist())
    assert.same({ { -9, -18 }, { -7, -16 } }, (a - b):tolist())
    assert.same({ { 10, 40 }, { 30, 80 } }, (a * b):tolist())
    assert.same({ { 10, 10 }, { 10 / 3, 5 } }, (b:to "float64" / a:to "float64"):tolist())
    assert.same({ { 9, 8 }, { 7, 6 } }, (10 - a):tolist())
    assert.same({ { 1, 4 }, { 9, 16 } }, (a ^ 2):tolist())
    assert.same({ { -1, -2 }, { -3, -4 } }, (-a):tolist())
    assert.same({ { 11, 12 }, { 21, 22 } }, (b:reshape(2, 1) + orepa.arange(2)):tolist())
    assert.same({ { 50, 110 } }, b:reshape(1, 2):matmul(orepa.tensor { { 1, 3 }, { 2, 4 } }):tolist())
  end)

  it("in place writes into the tensor and gives it back", function()
    local t = orepa.zeros(2)
    local version = t:version()
    assert.is_true(t:add_(3):mul_(2) == t)
    assert.same({ 6, 6 }, t:tolist())
    assert.is_true(t:version() > version)
    fails("does not fit into", t.add_, t, orepa.ones(3, 2))
    fails("the result is float32 2", function() ints({ 1, 2 }):add_(0.5) end)
  end)

  it("of functions agrees with Lua's", function()
    local x = orepa.tensor({ 0.25, 1, 2 }, { dtype = "float64", device = "ref" })
    for _, name in ipairs { "sqrt", "exp", "log", "abs" } do
      local got = x[name](x):tolist()
      for k, v in ipairs { 0.25, 1, 2 } do assert.near(math[name](v), got[k], 1e-15) end
    end
    assert.same({ 2, 2, 3 }, orepa.arange(3):maximum(2):tolist())
    assert.same({ 2, 2, 3 }, orepa.arange(3):clamp(2, 3):tolist())
    assert.same({ 3, 5, 7 }, orepa.arange(3):multiply_add(2, 1):tolist())
  end)

  it("compares by methods; `==` is identity", function()
    local t = orepa.arange(3)
    assert.same({ false, true, false }, t:eq(2):tolist())
    assert.same({ true, false, true }, t:ne(2):tolist())
    assert.same({ true, false, false }, t:lt(2):tolist())
    assert.same({ true, true, false }, t:le(2):tolist())
    assert.same({ false, false, true }, t:gt(2):tolist())
    assert.same({ false, true, true }, t:ge(orepa.tensor { 2, 2, 2 }):tolist())
    assert.is_false(t == t:clone())
    assert.is_false(t == 1)
    local p = orepa.ones(1):requires_grad_();
    (p * 2):sum():backward()
    assert.is_true(p.grad == p.grad)
    fails("attempt to compare", function() return t < t end)
  end)

  it("that does not fit names both shapes, at the caller's line", function()
    local line = debug.getinfo(1, "l").currentline + 1
    local message = fails("add: shapes 2x3 and 4 don't broadcast", function() return orepa.ones(2, 3) + orepa.ones(4) end)
    assert.matches("tensor_spec.lua:" .. line .. ":", message, 1, true)
    message = fails("conv2d: kernel has 4 input channels, input has 3", function()
      local y = orepa.nn.Conv2d { in_channels = 4, out_channels = 2, kernel_size = 1 }(orepa.ones(1, 3, 2, 2))
      return y -- after a tail call no line would be left to name
    end)
    assert.matches("tensor_spec.lua:" .. line + 3 .. ":", message, 1, true)
  end)

  it("takes no strings, tables or nil", function()
    for _, v in ipairs { "1", {}, true, print } do
      fails("a tensor or a number expected", function() return a + v end)
      fails("a tensor or a number expected", function() return v * a end)
    end
    fails("2 operands expected, got 1", a.add, a)
    fails("a tensor expected, got no value", a.matmul, a)
  end)
end)

describe("positions", function()
  it("count from 1, and from the end as -1", function()
    local t = orepa.arange(6):reshape(3, 2)
    assert.same({ 1, 2 }, t[1]:tolist())
    assert.same({ 5, 6 }, t[-1]:tolist())
    assert.equal(4, t[2][2]:item())
    assert.equal(3, #t)
    for _, k in ipairs { 0, 4, -4 } do
      fails("there is no position " .. ("%d"):format(k):gsub("%-", "%%-"), function() return t[k] end)
    end
    fails("a scalar has no positions", function() return orepa.ones()[1] end)
    fails("is not an integer", function() return t[1.5] end)
    fails("no field or method 'size'", function() return t.size end)
    fails("a scalar has no length", function() return #orepa.ones() end)
  end)

  it("of slice and select: both ends are included, dimensions too count from 1", function()
    local t = orepa.arange(12):reshape(3, 4)
    assert.same({ { 2, 3 }, { 6, 7 }, { 10, 11 } }, t:slice(2, 2, 3):tolist())
    assert.same({ { 3, 4 } }, t:slice(1, 1, 1):slice(-1, -2, -1):tolist())
    assert.same({ { 1, 3 }, { 5, 7 }, { 9, 11 } }, t:slice(2, 1, 4, 2):tolist())
    assert.same({ 3, 0 }, t:slice(2, 2, 1).shape)
    assert.same({ 4, 8, 12 }, t:select(2, -1):tolist())
    assert.same({ 5, 6, 7, 8 }, t:select(1, 2):tolist())
    fails("positions 1 to 5 of a dimension of size 4", t.slice, t, 2, 1, 5)
    fails("positions 0 to 2", t.slice, t, 2, 0, 2)
    fails("no dimension 3 in a tensor of 2", t.slice, t, 3, 1, 1)
    fails("no dimension 0", t.select, t, 0, 1)
    fails("steps of 0", t.slice, t, 2, 1, 4, 0)
  end)

  it("can be assigned, by numbers and by what broadcasts", function()
    local t = orepa.zeros(3, 2)
    t[1], t[-1] = 5, orepa.tensor { 1, 2 }
    assert.same({ { 5, 5 }, { 0, 0 }, { 1, 2 } }, t:tolist())
    t[2][1] = 7 -- a view: writes through
    assert.same({ { 5, 5 }, { 7, 0 }, { 1, 2 } }, t:tolist())
    fails("there is no position 4", function() t[4] = 1 end)
    fails("2x2", function() t[1] = orepa.ones(2, 2) end)
    fails("can't be assigned", function() t.shape = {} end)
    fails("a tensor or a number expected, got string", function() t[1] = "1" end)
  end)

  it("assigned in a graph send gradients to what was written", function()
    local x, v = orepa.ones(3):requires_grad_(), orepa.tensor({ 4 }):requires_grad_()
    local t = x * 2
    t[2] = v:reshape({})
    t:sum():backward()
    assert.same({ 2, 0, 2 }, x.grad:tolist())
    assert.same({ 1 }, v.grad:tolist())
  end)
end)

describe("shapes", function()
  it("are read in logical order, whatever the memory", function()
    local t = orepa.arange(24):reshape(1, 2, 3, 4)
    assert.is_false(t:is_contiguous())
    assert.is_true(t:contiguous():is_contiguous())
    assert.same(orepa.arange(24):tolist(), t:contiguous():flatten():tolist())
    assert.same({ { 1, 2, 3, 4 }, { 5, 6, 7, 8 }, { 9, 10, 11, 12 } }, t[1][1]:tolist())
    assert.same({ 1, 13 }, t:select(4, 1):select(3, 1)[1]:tolist())
    assert.same({ { 1, 2 }, { 3, 4 } }, t:reshape(12, 2):slice(1, 1, 2):tolist())
    assert.same(orepa.arange(24):tolist(), t:permute(1, 3, 4, 2):contiguous():permute(1, 4, 2, 3):reshape(-1):tolist())
    assert.same({ 6, 4 }, t:reshape(-1, 4).shape)
    assert.same({ 1, 24 }, t:flatten(2).shape)
    assert.same({ 4, 3, 2, 1 }, t:permute(4, 3, 2, 1).shape)
  end)

  it("that don't fit are errors with both", function()
    fails("reshape: 2x3 has 6 elements and can't become 4x2", function() orepa.ones(2, 3):reshape(4, 2) end)
    fails("listed twice", function() orepa.ones(2, 3):permute(1, 1) end)
    fails("1 dimensions listed for a tensor of 2", function() orepa.ones(2, 3):permute(1) end)
    fails("expand: 2x3 does not broadcast to 2x4", function() orepa.ones(2, 3):expand(2, 4) end)
    fails("which two", function() orepa.ones(2, 3, 4):transpose() end)
    fails("all but axis 1 must agree", orepa.cat, { orepa.ones(1, 2), orepa.ones(1, 3) }, 1)
  end)

  it("of cat and pad", function()
    assert.same({ { 1, 1, 0 }, { 1, 1, 0 } }, orepa.cat({ orepa.ones(2, 2), orepa.zeros(2, 1) }, 2):tolist())
    assert.same({ 9, 1, 2, 9, 9 }, orepa.pad(orepa.arange(2), { 1, 2 }, 9):tolist())
    assert.same({ 2 }, orepa.pad(orepa.arange(3), { -1, -1 }):tolist())
  end)
end)

describe("reductions", function()
  local t = orepa.tensor { { 1, 5, 3 }, { 4, 2, 6 } }

  it("go over all, one or several dimensions", function()
    assert.equal(21, t:sum():item())
    assert.same({ 5, 7, 9 }, t:sum(1):tolist())
    assert.same({ { 9 }, { 12 } }, t:sum(-1, { keepdim = true }):tolist())
    assert.same({ 9, 12 }, t:sum({ 2 }):tolist())
    assert.same({ 9, 12 }, t:sum(2, {}):tolist())
    assert.equal(3.5, t:mean(1, 2):item())
    assert.same({ 5, 6 }, t:max(2):tolist())
    assert.same({ 1, 2, 3 }, t:min(1):tolist())
    assert.same({ 1, 2 }, t:argmax(2):tolist())
    assert.same({ 0, 1, 0 }, t:argmin(1):tolist())
    assert.equal(5, t:argmax():item())
    assert.same({ true, false }, orepa.tensor({ { 1, 2 }, { 1, 0 } }):all(2):tolist())
    assert.is_false(orepa.zeros(3):any():item())
  end)

  it("of nothing are 0, or an error where nothing can be chosen", function()
    assert.equal(0, orepa.zeros(0, 3):sum():item())
    assert.same({ 0, 0, 0 }, orepa.zeros(0, 3):sum(1):tolist())
    fails("no element to choose", function() orepa.zeros(0):max() end)
    fails("listed twice", t.sum, t, 1, 1)
    fails("unknown option 'keep'", t.sum, t, 1, { keep = true })
  end)
end)

describe("printing", function()
  it("shows small tensors whole, with type, shape and device", function()
    assert.equal("{{1, 2},\n {3, 4}}  (float32 2x2 on cpu)", tostring(orepa.arange(4):reshape(2, 2)))
    assert.equal("{true, false}  (bool 2 on cpu)", tostring(orepa.tensor { true, false }))
    assert.equal("2.5  (float32 on ref, requires grad)", tostring(orepa.tensor(2.5, { device = "ref" }):requires_grad_()))
    assert.equal("{}  (int64 0 on cpu)", tostring(orepa.zeros({ 0 }, { dtype = "int64" })))
  end)

  it("shows the ends of large ones", function()
    assert.equal("{1, 2, 3, ..., 98, 99, 100}  (float32 100 on cpu)", tostring(orepa.arange(100)))
    assert.is_true(#tostring(orepa.zeros(100, 100, 100)) < 10000)
    assert.equal("{{1, 2},\n {3, 4},\n {5, 6},\n ...,\n {15, 16},\n {17, 18},\n {19, 20}}  (float32 10x2 on cpu)",
      tostring(orepa.arange(20):reshape(10, 2)))
    assert.equal("{{1, 3, 5, ..., 15, 17, 19},\n {2, 4, 6, ..., 16, 18, 20}}  (float32 2x10 on cpu)",
      tostring(orepa.arange(20):reshape(10, 2):transpose()))
    assert.equal("{{}, \n {}}  (float32 2x0 on cpu)", (tostring(orepa.zeros(2, 0)):gsub(",\n", ", \n")))
  end)

  it("says so when the tensor was released", function()
    local t = orepa.ones(1)
    t:release()
    assert.equal("tensor (released)", tostring(t))
    fails("this tensor was released", t.sum, t)
    t:release()
  end)

  it("of one element as a number", function()
    assert.equal(3, orepa.full({ 1, 1 }, 3):item())
    assert.is_true(orepa.ones(1):eq(1):item())
    fails("2 elements is not a single number", function() orepa.ones(2):item() end)
  end)
end)
