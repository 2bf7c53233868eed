-- Elements found by integers: gather, index_select, scatter, scatter_add, tables of vectors; values, gradients, what is refused.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local check_gradient = require "tests.spec.check_gradient"
local nn, F = orepa.nn, orepa.F

local function integers(list, device) return orepa.tensor(list, { dtype = "int64", device = device or "cpu" }) end
local function list_of(t) return t:tolist() end

for _, device in ipairs { "cpu", "ref" } do
  describe("gather on " .. device, function()
    local x = orepa.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { device = device })

    it("takes elements along a dimension", function()
      assert.same({ { 3, 1 }, { 4, 6 } }, list_of(x:gather(2, integers({ { 2, 0 }, { 0, 2 } }, device))))
      assert.same({ { 4, 2 } }, list_of(x:gather(1, integers({ { 1, 0 } }, device))))
      assert.same({ { 3, 2 }, { 6, 5 } }, list_of(x:gather(-1, integers({ { 2, 1 }, { 2, 1 } }, device))))
      assert.same({ 0, 3 }, x:gather(2, orepa.zeros({ 0, 3 }, { dtype = "int64", device = device })).shape)
      assert.same({ { 3, 3 } }, list_of(x:gather(2, integers({ { 2 } }, device):expand(1, 2))))
      assert.same({ { 2 }, { 1 } }, list_of(x:transpose():gather(1, integers({ { 1 }, { 0 } }, device))))
    end)

    it("says which integer is no position", function()
      fails("gather: 3, at position 2 of dimension 2 of the index, is outside 0 %.%.%. 2", x.gather, x, 2,
        integers({ { 0, 3 }, { 1, 1 } }, device))
      fails("gather: %-1, at position 1 ", x.gather, x, 2, integers({ { -1 } }, device))
      assert.same({ { 1 } }, list_of(x:gather(2, integers({ { 0 } }, device)))) -- and nothing is left of it
    end)
  end)

  describe("index_select on " .. device, function()
    local x = orepa.tensor({ { 1, 2, 3 }, { 4, 5, 6 } }, { device = device })

    it("takes positions in the order of a list", function()
      assert.same({ { 4, 5, 6 }, { 1, 2, 3 }, { 4, 5, 6 } }, list_of(x:index_select(1, integers({ 1, 0, 1 }, device))))
      assert.same({ { 3, 1 }, { 6, 4 } }, list_of(x:index_select(2, integers({ 2, 0 }, device))))
      assert.same({ 2, 0 }, x:index_select(2, orepa.zeros({ 0 }, { dtype = "int64", device = device })).shape)
      local map = orepa.arange(1, 24):reshape(2, 3, 2, 2):to(device)
      assert.same(list_of(map:slice(2, 3, 3)), list_of(map:index_select(2, integers({ 2 }, device))))
    end)

    it("keeps every type exactly", function()
      local large = orepa.tensor({ 9007199254740993, -5 }, { dtype = "int64", device = device })
      assert.same({ -5, 9007199254740993 }, list_of(large:index_select(1, integers({ 1, 0 }, device))))
      for _, dtype in ipairs { "bool", "uint8", "int32", "bfloat16", "float16", "float64" } do
        local y = x:to(dtype):index_select(1, integers({ 1 }, device))
        assert.same({ dtype, list_of(x:to(dtype):slice(1, 2, 2)) }, { y.dtype, list_of(y) })
      end
    end)
  end)

  describe("scatter_add on " .. device, function()
    it("adds where the index says, also twice", function()
      local t = orepa.zeros({ 3 }, { device = device })
      local source = orepa.tensor({ 1, 2, 4 }, { device = device })
      assert.same({ 0, 3, 4 }, list_of(t:scatter_add(1, integers({ 1, 1, 2 }, device), source)))
      assert.same({ 0, 0, 0 }, list_of(t))
      local rows = orepa.ones({ 2, 2 }, { device = device })
      local more = orepa.tensor({ { 1, 2 } }, { device = device })
      assert.same({ { 1, 3 }, { 2, 1 } }, list_of(rows:scatter_add(1, integers({ { 1, 0 } }, device), more)))
      local short = orepa.zeros({ 1 }, { dtype = "bfloat16", device = device }) -- summed in float32: 256 + 1 + 1 is 258
      assert.same({ 258 }, list_of(short:scatter_add(1, integers({ 0, 0, 0 }, device),
        orepa.tensor({ 256, 1, 1 }, { dtype = "bfloat16", device = device }))))
      local whole = orepa.zeros({ 1 }, { dtype = "int64", device = device })
      assert.same({ 9007199254740993 }, list_of(whole:scatter_add(1, integers({ 0, 0 }, device),
        integers({ 9007199254740992, 1 }, device))))
    end)
  end)
end

for _, device in ipairs { "cpu", "ref" } do
  describe("scatter on " .. device, function()
    local t = orepa.zeros({ 2, 3 }, { device = device })
    local index = integers({ { 2, 0 }, { 1, 1 } }, device)
    local source = orepa.tensor({ { 1, 2 }, { 3, 4 } }, { device = device })

    it("writes where the index says; the last of equals stays", function()
      assert.same({ { 2, 0, 1 }, { 0, 4, 0 } }, list_of(t:scatter(2, index, source)))
      assert.same({ { 7, 0, 7 }, { 0, 7, 0 } }, list_of(t:scatter(2, index, 7)))
      assert.same({ { 0, 0, 0 }, { 0, 0, 0 } }, list_of(t))
      for _, dtype in ipairs { "int64", "uint8", "bool", "bfloat16" } do
        local y = t:to(dtype):scatter(2, index, source:to(dtype))
        assert.same({ dtype, list_of(t:scatter(2, index, source:to(dtype):to "float32"):to(dtype)) }, { y.dtype, list_of(y) })
      end
    end)

    it("is written in place as well, by what is in the same memory too", function()
      local y = t:clone()
      assert.equal(y, y:scatter_(2, index, source))
      assert.same({ { 2, 0, 1 }, { 0, 4, 0 } }, list_of(y))
      local cycle = integers({ 1, 2, 0 }, device)
      assert.same({ 0, 1, 2 }, list_of(cycle:scatter_(1, cycle, cycle)))
      local rows = orepa.arange(6):reshape(3, 2):to(device)
      rows:index_copy_(1, integers({ 2, 0 }, device), orepa.tensor({ { 9, 8 } }, { dtype = "int64", device = device }))
      assert.same({ { 9, 8 }, { 3, 4 }, { 9, 8 } }, list_of(rows))
      rows:index_copy_(2, integers({ 1 }, device), 0)
      assert.same({ { 9, 0 }, { 3, 0 }, { 9, 0 } }, list_of(rows))
    end)

    it("leaves everything as it was if an integer is no position", function()
      local y = t:clone()
      for _, method in ipairs { "scatter_", "scatter" } do
        fails(method .. ": 3, at position 2 of dimension 2 of the index, is outside 0 %.%.%. 2", y[method], y, 2,
          integers({ { 0, 3 } }, device), orepa.ones({ 1, 2 }, { device = device }))
      end
      fails("scatter_: %-1", y.index_copy_, y, 1, integers({ 0, -1 }, device), 5)
      assert.same(list_of(t), list_of(y))
      assert.same({ { 0, 0, 0 }, { 1, 1, 1 } }, list_of(y:index_copy_(1, integers({ 1 }, device), 1)))
    end)
  end)
end

describe("gradients of elements found by integers", function()
  local function there(list) return integers(list, "ref") end

  it("are those of their slopes", function()
    check_gradient(function(x) return x:gather(2, there { { 2, 0, 2 }, { 1, 1, 1 } }) end, 2, 3)
    check_gradient(function(x) return x:gather(1, there { { 1, 0 } }) * x:slice(1, 1, 1):slice(2, 1, 2) end, 2, 3)
    check_gradient(function(x) return x:index_select(1, there { 2, 0, 2 }) end, 3, 2)
    check_gradient(function(x) return x:index_select(2, there { 1, 1 }):permute(2, 1, 4, 3) end, 2, 3, 2, 2)
    check_gradient(function(x) return x:scatter_add(1, there { { 0, 1, 0 } }, x:slice(1, 2, 2) * 2) end, 2, 3)
    check_gradient(function(x) return x:scatter_add(2, there { { 2, 0, 2 }, { 1, 1, 1 } }, x * 2) end, 2, 3)
    check_gradient(function(x) return x:scatter(1, there { { 0, 1, 0 } }, x:slice(1, 2, 2) * 2) end, 2, 3)
    check_gradient(function(x) return x:scatter(2, there { { 1, 1, 0 }, { 2, 2, 2 } }, x * 2) end, 2, 3)
    check_gradient(function(x) return (x * 2):scatter_(2, there { { 1, 1, 0 }, { 2, 2, 2 } }, x * x) end, 2, 3)
    check_gradient(function(x) return (x * 2):index_copy_(1, there { 2, 0 }, x:slice(1, 2, 2)) end, 3, 2)
  end)

  it("of bfloat16 are summed in float32", function()
    local x = orepa.zeros({ 1 }, { dtype = "bfloat16" }):requires_grad_()
    x:index_select(1, integers { 0, 0, 0 }):backward(orepa.tensor({ 256, 1, 1 }, { dtype = "bfloat16" }))
    assert.same({ 258 }, list_of(x.grad))
  end)
end)

describe("an index", function()
  local x = orepa.ones(2, 3)

  it("is refused if it doesn't fit", function()
    fails("the index is float32 2 on 'cpu'; int64 on 'cpu' expected", x.index_select, x, 1, orepa.ones(2))
    fails("int64 on 'cpu' expected", x.index_select, x, 1, integers({ 0 }, "ref"))
    fails("a list expected", x.index_select, x, 1, integers { { 0 } })
    fails("an index of 2 does not fit float32 2x3 along dimension 1", x.gather, x, 1, integers { 0, 1 })
    fails("an index of 3x1 does not fit float32 2x3 along dimension 2", x.gather, x, 2, integers { { 0 }, { 0 }, { 0 } })
    fails("the source is float32 2 on 'cpu'; float32 1x1 on 'cpu', as the index, expected", x.scatter_add, x, 1,
      integers { { 0 } }, orepa.ones(2))
    fails("scatter: the source is float32 2", x.scatter, x, 1, integers { { 0 } }, orepa.ones(2))
    fails("scatter_: an index of 3x1 does not fit", x.scatter_, x, 2, integers { { 0 }, { 0 }, { 0 } }, 1)
    fails("index_copy_: expand: 2 does not broadcast", x.index_copy_, x, 1, integers { 0 }, orepa.ones(2))
    fails("gather", x.gather, x, 3, integers { { 0 } })
    fails("index_select: 7, at position 1 ", x.index_select, x, 1, integers { 7 })
    fails("scatter_add: 7, at position 1 ", x.scatter_add, x, 1, integers { { 7 } }, orepa.ones(1, 1))
  end)
end)

describe("embedding", function()
  it("looks vectors up, under whatever shape the integers have", function()
    local table_of = orepa.tensor { { 1, 2 }, { 3, 4 }, { 5, 6 } }
    assert.same({ { { 5, 6 }, { 1, 2 } }, { { 3, 4 }, { 3, 4 } } },
      list_of(F.embedding(integers { { 2, 0 }, { 1, 1 } }, table_of)))
    assert.same({ 3, 4 }, list_of(F.embedding(integers(1), table_of)))
    fails("embedding", F.embedding, orepa.ones(2), table_of)
    fails("embedding", F.embedding, integers { 1 }, orepa.ones(3))
  end)

  it("is a layer that trains the rows that were asked for", function()
    local layer = nn.Embedding { num_embeddings = 4, embedding_dim = 3 }
    assert.same({ 4, 3 }, layer.weight.shape)
    layer(integers { 2, 2, 0 }):sum():backward()
    assert.same({ { 1, 1, 1 }, { 0, 0, 0 }, { 2, 2, 2 }, { 0, 0, 0 } }, list_of(layer.weight.grad))
    assert.equal("Embedding 4, 3  (12 parameters)", tostring(layer))
    fails("num_embeddings", nn.Embedding, { embedding_dim = 3 })
  end)
end)
