-- Statistics, norms, matrices, rearrangements, einsum; against sums written out by hand, on both devices.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local check_gradient = require "tests.spec.check_gradient"

local function near(expected, t, tolerance)
  local found = t:reshape(-1):tolist()
  assert.equal(#expected, #found)
  for k, value in ipairs(expected) do assert.near(value, found[k], tolerance or 1e-5) end
end

for _, device in ipairs { "cpu", "ref" } do
  local function tensor(values, dtype) return orepa.tensor(values, { dtype = dtype or "float32", device = device }) end

  describe("on " .. device, function()
    it("var and std divide by the number of elements less the correction", function()
      local x = tensor { { 1, 2, 3, 4 }, { 2, 2, 2, 10 } }
      near({ 5 / 3, 16 }, x:var(2))
      near({ 5 / 4, 12 }, x:var(2, { correction = 0 }))
      near({ math.sqrt(5 / 3), 4 }, x:std(2, { keepdim = true }))
      near({ 0.5, 0, 0.5, 18 }, x:var(1))
      near({ 57.5 / 7 }, x:var { correction = 1 })
      near({ 1, 1 }, (x * 0 + tensor { { 1e6, 1e6 + 1, 1e6 + 2, 1e6 + 1 } }):var { 2 } * 1.5)
      assert.same({ 1, 1 }, x:var({ 1, 2 }, { keepdim = true }).shape)
      local one = tensor({ 1 }):var():item()
      assert.is_true(one ~= one)
      assert.equal("bfloat16", tensor({ 1, 2 }, "bfloat16"):std().dtype)
    end)

    it("norms are those of their powers", function()
      local x = tensor { { 3, -4 }, { 0, 1 } }
      near({ math.sqrt(26) }, x:norm())
      near({ 5, 1 }, x:norm(2, 2))
      near({ 3, 5 }, x:norm(1, 1))
      near({ 4, 1 }, x:norm(math.huge, 2))
      near({ 3, 0 }, x:norm(-math.huge, -1))
      near({ 2, 1 }, x:norm(0, 2))
      near({ (27 + 64 + 1) ^ (1 / 3) }, x:norm(3))
      assert.same({ 2, 1 }, x:norm(2, 2, { keepdim = true }).shape)
    end)

    it("logsumexp stays finite where exponentials don't", function()
      near({ 1000 + math.log(2), -1000 + math.log(2) }, tensor({ { 1000, 1000 }, { -1000, -1000 } }):logsumexp(2), 1e-3)
      assert.equal(-math.huge, tensor({ -math.huge, -math.huge }):logsumexp():item())
    end)

    it("integers of 64 bits stay exact, whatever writes them", function()
      local odd, least = (1 << 53) + 1, math.mininteger + 1
      local function whole(values) return tensor(values, "int64") end
      local kind, mask = { dtype = "int64", device = device }, orepa.tensor({ true, false }, { device = device })
      for name, write in pairs {
        tensor = function(n) return whole { n, 0 } end,
        full = function(n) return orepa.cat { orepa.full({ 1 }, n, kind), whole { 0 } } end,
        fill_ = function(n) return orepa.cat { whole({ 1 }):fill_(n), whole { 0 } } end,
        masked_fill = function(n) return whole({ 1, 0 }):masked_fill(mask, n) end,
        where = function(n) return orepa.where(mask, n, whole { 1, 0 }) end,
        scatter = function(n) return whole({ 1, 0 }):scatter(1, whole { 0 }, n) end,
        scatter_ = function(n) return whole({ 1, 0 }):scatter_(1, whole { 0 }, n) end,
        index_copy_ = function(n) return whole({ 1, 0 }):index_copy_(1, whole { 0 }, n) end,
        pad = function(n) return orepa.cat { orepa.pad(whole {}, { 1, 0 }, n), whole { 0 } } end,
        arange = function(n) return orepa.arange(n, n - 1, -1, kind) - whole { 0, n - 1 } end,
        clamp = function(n) return whole({ n - 5, 0 }):clamp(n, n) - whole { 0, n } end,
        ["t[1] = n"] = function(n) local t = whole { 1, 0 }; t[1] = n; return t end,
        ["t[{1}] = n"] = function(n) local t = whole { 1, 0 }; t[{ 1 }] = n; return t end,
        ["t[mask] = n"] = function(n) local t = whole { 1, 0 }; t[mask] = n; return t end,
      } do
        for _, n in ipairs { odd, least } do assert.same({ name, n, 0 }, { name, table.unpack(write(n):tolist()) }) end
      end
      assert.same({ odd - 1, odd, odd + 1 }, orepa.arange(odd - 1, odd + 1, kind):tolist())
      local most = math.maxinteger
      assert.same({ least, -1, most - 2 }, orepa.arange(least, most, most - 1, kind):tolist())
      assert.same({}, orepa.arange(odd, odd - 1, kind):tolist())
    end)

    it("sums of long tensors and of short floats lose nothing", function()
      local many = orepa.ones({ 1 << 20 }, { device = device })
      assert.equal((1 << 20) + (1 << 24), (many:sum() + (1 << 24)):item())
      local uneven = orepa.cat { tensor { 1 << 24 }, orepa.ones({ 1 << 16 }, { device = device }) }
      assert.near((1 << 24) + (1 << 16), uneven:sum():item(), 64)
      assert.near((1 << 24) + (1 << 16), uneven:reshape(-1, 1):expand((1 << 16) + 1, 3):sum(1)[2]:item(), 64)
      local tenth = orepa.full({ 1 << 20 }, 0.1, { device = device })
      assert.near(0.1, tenth:mean():item(), 1e-7)
      local short = orepa.ones({ 4096 }, { dtype = "bfloat16", device = device })
      assert.equal(4096, short:sum():item())
      assert.equal(1, short:mean():item())
    end)

    it("matrices have diagonals, triangles and products", function()
      local x = tensor { { 1, 2, 3 }, { 4, 5, 6 } }
      assert.same({ { 1, 0, 0 }, { 4, 5, 0 } }, x:tril():tolist())
      assert.same({ { 1, 2, 0 }, { 4, 5, 6 } }, x:tril(1):tolist())
      assert.same({ { 0, 2, 3 }, { 0, 0, 6 } }, x:triu(1):tolist())
      assert.same({ 1, 5 }, x:diag():tolist())
      assert.same({ 1, 5 }, x:transpose():diag():tolist())
      assert.same({ { 1, 0 }, { 0, 5 } }, x:diag():diag():tolist())
      assert.equal(6, x:slice(2, 1, 2):trace():item())
      assert.equal(32, x[1]:dot(x[2]):item())
      assert.same({ { 4, 5, 6 }, { 8, 10, 12 }, { 12, 15, 18 } }, x[1]:outer(x[2]):tolist())
      assert.same({ { 1, 0, 0 }, { 0, 1, 0 } }, orepa.eye(2, 3, { device = device }):tolist())
      assert.same({ { 1, 0 }, { 0, 1 }, { 0, 0 } }, orepa.eye(3, 2, { dtype = "int64" }):tolist())
      assert.same({ 0, 0 }, orepa.eye(0).shape)
    end)

    it("flip, roll and chunk rearrange", function()
      local x = tensor { { 1, 2, 3 }, { 4, 5, 6 } }
      assert.same({ { 3, 2, 1 }, { 6, 5, 4 } }, x:flip(2):tolist())
      assert.same({ { 6, 5, 4 }, { 3, 2, 1 } }, x:flip(1, -1):tolist())
      assert.same({ { 3, 1, 2 }, { 6, 4, 5 } }, x:roll(1, 2):tolist())
      assert.same({ { 2, 3, 1 }, { 5, 6, 4 } }, x:roll(-4, 2):tolist())
      local parts = x:chunk(2, 2)
      assert.same({ { { 1, 2 }, { 4, 5 } }, { { 3 }, { 6 } } }, { parts[1]:tolist(), parts[2]:tolist() })
    end)

    it("floor division and remainders are Lua's", function()
      local a, b = { 7, -7, 7, -7, 0, 6 }, { 2, 2, -2, -2, 3, 3 }
      for _, dtype in ipairs { "float32", "int64", "int32" } do
        local q, r = tensor(a, dtype) // tensor(b, dtype), tensor(a, dtype) % tensor(b, dtype)
        assert.equal(dtype, q.dtype)
        for k = 1, #a do
          assert.equal(a[k] // b[k], q[k]:item())
          assert.equal(a[k] % b[k], r[k]:item())
        end
      end
      local smallest = tensor({ math.mininteger, 5 }, "int64")
      assert.same({ math.mininteger, 0 }, (smallest // tensor({ -1, 0 }, "int64")):tolist())
      assert.same({ 0, 0 }, (smallest % tensor({ -1, 0 }, "int64")):tolist())
      assert.same({ true, false }, (~tensor({ false, true }, "bool")):tolist())
    end)

    it("einsum is the sum that is written", function()
      local x, y = tensor { { 1, 2, 3 }, { 4, 5, 6 } }, tensor { { 1, 0 }, { 2, 1 }, { 0, 3 } }
      assert.same(x:matmul(y):tolist(), orepa.einsum("ik,kj->ij", x, y):tolist())
      assert.same(x:matmul(y):transpose():tolist(), orepa.einsum("ik, kj -> ji", x, y):tolist())
      assert.same(x:matmul(y):tolist(), orepa.einsum("ik,kj", x, y):tolist())
      assert.equal(21, orepa.einsum("ij->", x):item())
      assert.same(x:transpose():tolist(), orepa.einsum("ij->ji", x):tolist())
      assert.equal(6, orepa.einsum("ii", x:slice(2, 1, 2)):item())
      assert.same({ 1, 5 }, orepa.einsum("ii->i", x:slice(2, 1, 2)):tolist())
      assert.same((x * x):sum(2):tolist(), orepa.einsum("ij,ij->i", x, x):tolist())
      assert.same(x[1]:outer(x[2]):tolist(), orepa.einsum("i,j->ij", x[1], x[2]):tolist())
      assert.equal(x:sum():item() * y:sum():item(), orepa.einsum("ij,kl->", x, y):item())
    end)
  end)
end

-- Every index of the sum, one by one.
local function sum_by_hand(inputs, output, tensors, sizes)
  local letters = {}
  for letter in pairs(sizes) do letters[#letters + 1] = letter end
  table.sort(letters)
  local shape = {}
  for letter in output:gmatch "." do shape[#shape + 1] = sizes[letter] end
  local sum, at = orepa.zeros(shape, { dtype = "float64", device = "ref" }):reshape(-1):tolist(), {}
  local function element(t, word)
    local place = 0
    for letter in word:gmatch "." do place = place * sizes[letter] + at[letter] end
    return t[place + 1], place + 1
  end
  local function walk(n)
    if n > #letters then
      local product = 1
      for k, word in ipairs(inputs) do product = product * element(tensors[k], word) end
      local _, place = element(sum, output)
      sum[place] = sum[place] + product
      return
    end
    for value = 0, sizes[letters[n]] - 1 do
      at[letters[n]] = value
      walk(n + 1)
    end
  end
  walk(1)
  return sum
end

it("einsum of random equations is the sum that is written", function()
  local random = math.random
  math.randomseed(7)
  for _ = 1, 60 do
    local sizes, inputs, tensors, values, seen = {}, {}, {}, {}, ""
    for n = 1, random(1, 3) do
      local word, shape = "", {}
      for d = 1, random(0, 4) do
        local letter = ("abcde"):sub(random(5) // 1, -1):sub(1, 1)
        sizes[letter] = sizes[letter] or random(1, 3)
        word, shape[d] = word .. letter, sizes[letter]
        if not seen:find(letter) then seen = seen .. letter end
      end
      inputs[n], tensors[n] = word, orepa.randn(shape, { dtype = "float64", device = "ref" })
      values[n] = tensors[n]:reshape(-1):tolist()
    end
    local output = ""
    for letter in seen:gmatch "." do
      if random(2) == 1 then output = random(2) == 1 and output .. letter or letter .. output end
    end
    local equation = table.concat(inputs, ",") .. "->" .. output
    local y = orepa.einsum(equation, table.unpack(tensors))
    near(sum_by_hand(inputs, output, values, sizes), y, 1e-9)
  end
end)

it("gradients of what is made of ops are those of their slopes", function()
  check_gradient(function(x) return x:var(2) end, 2, 3)
  check_gradient(function(x) return x:std(1, { correction = 0 }) end, 3, 2)
  check_gradient(function(x) return x:norm(2, 2) end, 2, 3)
  check_gradient(function(x) return x:norm(3) end, 2, 3)
  check_gradient(function(x) return x:norm(math.huge, 2) end, 2, 3)
  check_gradient(function(x) return x:logsumexp(2) end, 2, 3)
  check_gradient(function(x) return x:tril() * 2 + x:flip(1) + x:roll(1, 2) end, 2, 3)
  check_gradient(function(x) return x:diag() end, 2, 3)
  check_gradient(function(x) return x:reshape(-1):diag() end, 2, 2)
  check_gradient(function(x) return orepa.einsum("ij,kj->ik", x, x) end, 2, 3)
  local zero = orepa.zeros(2):requires_grad_()
  zero:norm():backward()
  assert.same({ 0, 0 }, zero.grad:tolist())
end)

it("makers make what they say", function()
  near({ 0, 0.25, 0.5, 0.75, 1 }, orepa.linspace(0, 1, 5))
  near({ 3 }, orepa.linspace(3, 9, 1))
  near({ 2, 2 }, orepa.linspace(2, 2, 2))
  assert.same({ 0 }, orepa.linspace(0, 1, 0).shape)
  local dice = orepa.randint(1, 6, { 6000 })
  local values, _, counts = dice:unique()
  assert.same({ "int64", { 1, 2, 3, 4, 5, 6 } }, { dice.dtype, values:tolist() })
  for _, count in ipairs(counts:tolist()) do assert.near(1000, count, 150) end
  assert.same({ 0, 1, 2, 3, 4 }, (orepa.randperm(5):sort()):tolist())
  local x = orepa.ones(2, 3):to "bfloat16"
  for _, name in ipairs { "zeros_like", "ones_like" } do
    local y = orepa[name](x)
    assert.same({ "bfloat16", { 2, 3 } }, { y.dtype, y.shape })
  end
  assert.same({ 2, 3 }, orepa.randn_like(orepa.ones(2, 3)).shape)
end)

it("wrong arguments are refused", function()
  local x, whole = orepa.ones(2, 3), orepa.ones({ 2 }, { dtype = "int64" })
  fails("var: floats expected, got int64", whole.var, whole)
  fails("var: there is no dimension 3 in a tensor of 2", x.var, x, 3)
  fails("var: unknown option 'unbiased'", x.var, x, { unbiased = true })
  fails("norm: p is", x.norm, x, "fro")
  fails("tril: a matrix expected", x.tril, x[1])
  fails("diag: a list or a matrix expected", x.diag, orepa.ones(1, 2, 3))
  fails("dot: a tensor of 1 dimension expected, got one of 2", x.dot, x, x)
  fails("dot: 3 and 2 elements", x.dot, x[1], orepa.ones(2))
  fails("flip: a dimension expected", x.flip, x)
  fails("eye: the number of rows is 2.5", orepa.eye, 2.5)
  fails("randint: from 3 to 1", orepa.randint, 3, 1, { 2 })
  fails("linspace: the number of elements", orepa.linspace, 0, 1, "x")
  fails('einsum "ij,jk": 2 operands are named, 1 given', orepa.einsum, "ij,jk", x)
  fails("operand 1 has 2 dimensions %(2x3%), its letters are 'ijk'", orepa.einsum, "ijk->i", x)
  fails("'j' is 2 in operand 2 and 3 before", orepa.einsum, "ij,jk->ik", x, x)
  fails("'k' of the result is in no operand", orepa.einsum, "ij->k", x)
  fails("'i' stands twice in the result", orepa.einsum, "ij->ii", x)
  fails("'1' is no letter", orepa.einsum, "i1->i", x)
  fails("operand 2 is a number", orepa.einsum, "ij,ij->i", x, 3)
end)
