-- Layers without parameters, dropout, losses and initial values: what they give, what they say of wrong arguments.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function counts_of_zeros(y)
  return y:eq(0):sum():item()
end

-- ---- layers ----

describe("layers without parameters", function()
  it("are their functions", function()
    local x = orepa.randn(3, 4)
    for layer, f in pairs { ReLU = F.relu, Sigmoid = F.sigmoid, Tanh = F.tanh, SiLU = F.silu, GELU = F.gelu,
      Hardswish = F.hardswish, LeakyReLU = F.leaky_relu } do
      assert.same(f(x):tolist(), nn[layer]()(x):tolist())
    end
    assert.same(F.leaky_relu(x, 0.2):tolist(), nn.LeakyReLU(0.2)(x):tolist())
    assert.same(F.leaky_relu(x, 0.2):tolist(), nn.LeakyReLU { negative_slope = 0.2 } (x):tolist())
    assert.same(F.softmax(x, 1):tolist(), nn.Softmax(1)(x):tolist())
    assert.same(F.softmax(x, 2):tolist(), nn.Softmax { dim = -1 } (x):tolist())
  end)

  it("Identity gives its input itself, also in a Sequential", function()
    local x = orepa.randn(2)
    assert.is_true(nn.Identity()(x) == x)
    local y = nn.Sequential(nn.ReLU(), nn.Identity(), nn.Dropout(0), nn.Tanh())(x)
    assert.same(x:relu():tanh():tolist(), y:tolist())
  end)

  it("Flatten makes one dimension of the second and those after it, or of others", function()
    local x = orepa.randn(2, 3, 4, 5)
    assert.same({ 2, 60 }, nn.Flatten()(x).shape)
    assert.same(x:reshape(2, 60):tolist(), nn.Flatten()(x):tolist())
    assert.same({ 2, 3, 20 }, nn.Flatten(3)(x).shape)
    assert.same({ 120 }, nn.Flatten { dim = 1 } (x).shape)
  end)

  it("print their options", function()
    assert.equal("Sequential\n  0: Flatten from dim 2\n  1: Dropout p 0.2\n  2: LeakyReLU slope 0.1\n  3: Softmax dim 2\n"
      .. "  4: Identity", (tostring(nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.LeakyReLU(0.1), nn.Softmax(2),
        nn.Identity())):gsub("%s+$", "")))
  end)

  it("have no parameters and train with their input", function()
    local net = nn.Sequential(nn.Linear { in_features = 2, out_features = 3 }, nn.GELU(), nn.Dropout(0.5), nn.Softmax(2))
    assert.equal(2, #net:parameters())
    net(orepa.randn(4, 2)):slice(2, 1, 1):sum():backward()
    assert.is_true(net[1].weight.grad:abs():sum():item() > 0)
  end)

  it("name what is wrong with their options", function()
    fails("LeakyReLU: negative_slope is x, a number expected", nn.LeakyReLU, { negative_slope = "x" })
    fails("Softmax: option 'dim' is missing", nn.Softmax)
    fails("Softmax: dim is 0; dimensions count from 1", nn.Softmax, 0)
    fails("Softmax: dim is 1.5; dimensions count from 1", nn.Softmax, 1.5)
    fails("Flatten: dim is x", nn.Flatten, { dim = "x" })
    fails("Flatten: unknown option 'start_dim'", nn.Flatten, { start_dim = 1 })
    fails("Dropout: unknown option 'training'", nn.Dropout, { training = false })
  end)
end)

-- ---- dropout ----

describe("dropout", function()
  it("takes away a share of the elements and keeps the mean", function()
    orepa.manual_seed(1)
    for _, p in ipairs { 0.1, 0.5, 0.9 } do
      local n = 100000
      local y = F.dropout(orepa.ones(n), { p = p })
      local deviation = math.sqrt(p * (1 - p) / n)
      assert.near(p, counts_of_zeros(y) / n, 5 * deviation)
      assert.near(1, y:max():item() * (1 - p), 1e-6)
      assert.near(1, y:mean():item(), 5 * deviation / (1 - p))
    end
  end)

  it("is repeated by the seed, another time another one, on every device the same", function()
    orepa.manual_seed(7)
    local first = F.dropout(orepa.ones(64)):tolist()
    local second = F.dropout(orepa.ones(64)):tolist()
    assert.not_same(first, second)
    orepa.manual_seed(7)
    assert.same(first, F.dropout(orepa.ones(64)):tolist())
    orepa.manual_seed(7)
    assert.same(first, F.dropout(orepa.ones({ 64 }, { device = "ref" })):tolist())
  end)

  it("lets gradients through where it let numbers through", function()
    local x = orepa.ones(1000):requires_grad_()
    local y = F.dropout(x, { p = 0.25 })
    y:backward(orepa.ones(1000))
    assert.same(y:tolist(), x.grad:tolist())
  end)

  it("is drawn again as it was inside a checkpoint", function()
    local x = orepa.ones(1000):requires_grad_()
    local y = nn.checkpoint(nn.Dropout(0.5))(x)
    y:backward(orepa.ones(1000))
    assert.same(y:tolist(), x.grad:tolist())
  end)

  it("keeps the type; in evaluation, and for p = 0, it is the input", function()
    local x = orepa.ones({ 8 }, { dtype = "bfloat16" })
    assert.equal("bfloat16", F.dropout(x).dtype)
    assert.is_true(F.dropout(x, { p = 0 }) == x)
    assert.is_true(F.dropout(x, { training = false }) == x)
    local layer = nn.Dropout(0.5)
    assert.is_false(layer(x) == x)
    assert.is_true(layer:eval()(x) == x)
  end)

  it("names what is wrong", function()
    for _, p in ipairs { -0.1, 1, 2, 0 / 0, "0.5", true } do
      fails("dropout: p is .*, a number of at least 0 and less than 1 expected", F.dropout, orepa.ones(2), { p = p })
      fails("Dropout: p is .*, a number of at least 0 and less than 1 expected", nn.Dropout, { p = p })
    end
    fails("dropout: training is 1, true or false expected", F.dropout, orepa.ones(2), { training = 1 })
    fails("dropout: floats expected, got int64", F.dropout, orepa.ones({ 2 }, { dtype = "int64" }))
    fails("dropout: a tensor expected, got number", F.dropout, 1)
  end)
end)

-- ---- losses ----

describe("losses", function()
  local two = { "binary_cross_entropy_with_logits", "mse_loss", "smooth_l1_loss", "kl_div" }

  it("are float32 for short floats", function()
    local x, y = orepa.randn({ 2, 3 }, { dtype = "float32" }):to "bfloat16", orepa.rand(2, 3):to "bfloat16"
    for _, name in ipairs(two) do
      local loss = F[name](x, y)
      assert.equal("float32", loss.dtype)
      assert.same(F[name](x:to "float32", y:to "float32"):item(), loss:item())
    end
  end)

  it("of logits far from 0 are finite and have a gradient", function()
    local x = orepa.tensor({ -1e4, 1e4 }):requires_grad_()
    local loss = F.binary_cross_entropy_with_logits(x, orepa.tensor { 1, 0 }, { reduction = "none" })
    assert.same({ 1e4, 1e4 }, loss:tolist())
    loss:sum():backward()
    assert.same({ -1, 1 }, x.grad:tolist())
  end)

  it("of probabilities that are 0 are finite and so are their gradients", function()
    local q = orepa.tensor({ 0, 1 }):requires_grad_()
    local loss = F.kl_div(orepa.tensor { -2, -3 }, q, { reduction = "none" })
    assert.same({ 0, 3 }, loss:tolist())
    loss:sum():backward()
    assert.same({ 2, 4 }, q.grad:tolist())
  end)

  it("take one shape and one type, and nothing is broadcast", function()
    for _, name in ipairs(two) do
      fails(name .. ": float32 2x3 on 'cpu' and float32 3 on 'cpu'; one shape and one device expected", F[name],
        orepa.ones(2, 3), orepa.ones(3))
      fails(name .. ": float32 2 on 'cpu' and float32 2 on 'ref'", F[name], orepa.ones(2), orepa.ones({ 2 }, { device = "ref" }))
      fails(name .. ": argument 2 is int64; floats expected", F[name], orepa.ones(2), orepa.ones({ 2 }, { dtype = "int64" }))
      fails(name .. ": argument 1: a tensor expected, got number", F[name], 1, orepa.ones(2))
      fails(name .. ': reduction is avg; "mean", "sum"', F[name], orepa.ones(2), orepa.ones(2), { reduction = "avg" })
      fails(name .. ": unknown option 'size'", F[name], orepa.ones(2), orepa.ones(2), { size = 1 })
    end
  end)

  it("name what is wrong with their options", function()
    local a, labels = orepa.ones(2, 3), orepa.zeros({ 2 }, { dtype = "int64" })
    for _, beta in ipairs { -1, 0 / 0, "1" } do
      fails("smooth_l1_loss: beta is .*, a number of at least 0 expected", F.smooth_l1_loss, a, a, { beta = beta })
    end
    fails("kl_div: log_target is 1, true or false expected", F.kl_div, a, a, { log_target = 1 })
    fails("kl_div: a scalar has no batch", F.kl_div, a:sum(), a:sum(), { reduction = "batchmean" })
    fails("mse_loss: reduction is batchmean", F.mse_loss, a, a, { reduction = "batchmean" })
    for _, name in ipairs { "weight", "pos_weight" } do
      fails(name .. " is float32 5x1x1 on 'cpu', which doesn't broadcast to float32 2x3", F.binary_cross_entropy_with_logits,
        a, a, { [name] = orepa.ones(5, 1, 1) })
      fails(name .. " is a number, a tensor expected", F.binary_cross_entropy_with_logits, a, a, { [name] = 2 })
    end
    fails("cross_entropy: weight is float32 2 on 'cpu'; a number for each of 3 classes expected", F.cross_entropy, a, labels,
      { weight = orepa.ones(2) })
    fails("cross_entropy: weight is number", F.cross_entropy, a, labels, { weight = 1 })
    fails("cross_entropy: label_smoothing is 2, it lies between 0 and 1", F.cross_entropy, a, labels,
      { weight = orepa.ones(3), label_smoothing = 2 })
    fails("cross_entropy: label 3 at position 1 is outside 0 ... 2", F.cross_entropy, a, labels + 3,
      { weight = orepa.ones(3) })
    fails('cross_entropy: reduction is avg; "mean", "sum" or "none" expected', F.cross_entropy, a, labels, { reduction = "avg" })
  end)

  it("cross_entropy with weights is 0 where nothing counts, and leaves out what is ignored though it is a class", function()
    local x, weight = orepa.randn(2, 3):requires_grad_(), orepa.tensor { 1, 2, 4 }
    local none = orepa.full({ 2 }, -100, { dtype = "int64" })
    assert.equal(0, F.cross_entropy(x, none, { weight = weight }):item())
    local some = orepa.tensor({ 1, 2 }, { dtype = "int64" })
    local loss = F.cross_entropy(x, some, { weight = weight, ignore_index = 1 })
    assert.near(F.cross_entropy(x:slice(1, 2, 2), some:slice(1, 2, 2)):item(), loss:item(), 1e-6)
    loss:backward()
    assert.same({ 0, 0, 0 }, x.grad[1]:tolist())
  end)
end)

-- ---- initial values ----

-- Mean and deviation.
local function moments(t)
  local mean = t:mean():item()
  return mean, math.sqrt(((t - mean) ^ 2):mean():item())
end

describe("nn.init", function()
  local w = nn.Conv2d { in_channels = 32, out_channels = 64, kernel_size = 3 }.weight

  it("writes constants and gives the tensor back", function()
    assert.is_true(nn.init.zeros_(w) == w)
    assert.equal(w:count(), counts_of_zeros(w))
    assert.equal(w:count(), nn.init.ones_(w):sum():item())
    assert.equal(2.5, nn.init.constant_(w, 2.5):max():item())
    assert.is_true(w.requires_grad and w.is_leaf)
  end)

  it("draws within bounds, with the mean and deviation asked for", function()
    orepa.manual_seed(3)
    local mean, deviation = moments(nn.init.uniform_(w, -1, 3))
    assert.near(1, mean, 0.05)
    assert.near(4 / math.sqrt(12), deviation, 0.03)
    assert.is_true(w:min():item() >= -1 and w:max():item() <= 3)
    mean, deviation = moments(nn.init.normal_(w, 2, 0.5))
    assert.near(2, mean, 0.02)
    assert.near(0.5, deviation, 0.02)
  end)

  it("knows Xavier's and Kaiming's rules", function()
    orepa.manual_seed(4)
    local fan_in, fan_out, gain = 32 * 9, 64 * 9, 5 / 3
    for name, wanted in pairs {
      xavier = { { gain = gain }, gain * math.sqrt(2 / (fan_in + fan_out)) },
      kaiming = { { mode = "fan_out", nonlinearity = "leaky_relu", slope = 1 }, 1 / math.sqrt(fan_out) },
    } do
      local _, normal = moments(nn.init[name .. "_normal_"](w, wanted[1]))
      assert.near(1, normal / wanted[2], 0.02)
      local _, uniform = moments(nn.init[name .. "_uniform_"](w, wanted[1]))
      assert.near(1, uniform / wanted[2], 0.02)
      assert.near(math.sqrt(3), w:abs():max():item() / wanted[2], 1e-3)
    end
    local _, plain = moments(nn.init.kaiming_normal_(w))
    assert.near(1, plain / math.sqrt(2 / fan_in), 0.02)
  end)

  it("makes orthogonal rows, or columns", function()
    for _, shape in ipairs { { 5, 5 }, { 100, 100 }, { 3, 8 }, { 8, 3 }, { 6, 2, 3, 3 }, { 40, 2, 3, 3 }, { 1, 4 }, { 0, 3 } } do
      local t = nn.init.orthogonal_(orepa.zeros(shape), { gain = 2 })
      local rows = t:reshape(shape[1], t:count() // math.max(1, shape[1]))
      if rows.shape[1] > rows.shape[2] then rows = rows:transpose() end
      local product = rows:matmul(rows:transpose())
      for i, row in ipairs(product:tolist()) do
        for j, value in ipairs(row) do assert.near(i == j and 4 or 0, value, 1e-5) end
      end
    end
  end)

  it("is repeated by the seed, and writes into any type of float", function()
    for _, dtype in ipairs { "float32", "float64", "bfloat16" } do
      local t = orepa.zeros({ 4, 3 }, { dtype = dtype })
      for _, name in ipairs { "uniform_", "normal_", "xavier_uniform_", "kaiming_normal_", "orthogonal_" } do
        orepa.manual_seed(5)
        local first = nn.init[name](t):tolist()
        orepa.manual_seed(5)
        assert.same(first, nn.init[name](t):tolist())
        assert.equal(dtype, t.dtype)
      end
    end
  end)

  it("names what is wrong", function()
    for _, name in ipairs { "zeros_", "ones_", "constant_", "uniform_", "normal_" } do
      fails(name .. ": a tensor expected, got number", nn.init[name], 1, 1)
      fails(name .. ": floats .* expected, got int64 of 1", nn.init[name], orepa.ones({ 2 }, { dtype = "int64" }), 1)
    end
    for _, name in ipairs { "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_", "orthogonal_", "fans" } do
      fails(name .. ": floats of at least 2 dimensions expected, got float32 of 1", nn.init[name], orepa.ones(2))
    end
    fails("constant_: the value is x, a number expected", nn.init.constant_, w, "x")
    fails("uniform_: the highest is 0, a number of at least 1 expected", nn.init.uniform_, w, 1, 0)
    fails("normal_: the deviation is %-1, a number of at least 0 expected", nn.init.normal_, w, 0, -1)
    fails("xavier_normal_: gain is x, a number of at least 0 expected", nn.init.xavier_normal_, w, { gain = "x" })
    fails('kaiming_normal_: mode is x, "fan_in" or "fan_out" expected', nn.init.kaiming_normal_, w, { mode = "x" })
    fails("gain: there is no nonlinearity 'x' %(there are leaky_relu conv2d", nn.init.kaiming_normal_, w, { nonlinearity = "x" })
    fails("orthogonal_: unknown option 'a'", nn.init.orthogonal_, w, { a = 1 })
  end)
end)
