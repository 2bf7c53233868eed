-- autocast: what computes in bfloat16 inside it and what stays float32, that its results and gradients are those of float32 to
-- bfloat16's error, and that it ends when its scope does. Most of this needs bfloat16 whatever the processor is: the file runs
-- itself once more, in a process that forces it.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"
local nn, F = orepa.nn, orepa.F

if os.getenv "OREPA_BFLOAT16" ~= "1" then
  describe("autocast", function()
    it("computes in bfloat16 where that is forced", function()
      local text, code = process.run({ "/usr/bin/busted", "--output=TAP", "tests/spec/autocast_spec.lua" }, process.root,
        { OREPA_BFLOAT16 = "1", OREPA_PROGRAM = process.program })
      assert(code == 0, text)
      assert.is_true(select(2, text:gsub("\nok ", "")) > 10, text)
    end)

    -- What a script prints, and what appears on standard error.
    local text = [[
      local orepa = require "orepa"
      local w = orepa.ones(2, 2):requires_grad_()
      orepa.autocast("bfloat16", function()
        for _ = 1, 3 do print(orepa.F.linear(orepa.ones(1, 2), w).dtype) end
        print(orepa.F.conv2d(orepa.ones(1, 2, 3, 3), orepa.ones(2, 2, 1, 1)).dtype)
      end)]]

    it("says once that float32 is faster, and computes in it", function()
      local output = process.run_text(text, {}, { OREPA_BFLOAT16 = "0" })
      assert.equal(4, select(2, output:gsub("float32\n", "")))
      assert.equal(1, select(2, output:gsub("orepa: autocast computes in float32[^\n]*\n", "")), output)
      assert.equal(("bfloat16\n"):rep(4), process.run_text(text, {}, { OREPA_BFLOAT16 = "1" }))
    end)
  end)
  return
end

local function cast(f) return orepa.autocast("bfloat16", f) end

-- The largest difference, in parts of the largest magnitude.
local function error_of(found, wanted)
  found, wanted = found:to "float32", wanted:to "float32"
  return (found - wanted):abs():max():item() / math.max(wanted:abs():max():item(), 1e-30)
end

local function near(found, wanted, limit, what)
  local e = error_of(found, wanted)
  assert(e <= limit, ("%s: off by %g, limit %g"):format(what or "result", e, limit))
end

describe("autocast", function()
  it("gives back what the function returns, nests, and takes float32 to be off", function()
    local a, b, none = cast(function() return 1, orepa.get_autocast(), nil end)
    assert.same({ 1, "bfloat16" }, { a, b })
    assert.is_nil(none)
    cast(function()
      orepa.autocast("float32", function()
        assert.equal("float32", orepa.get_autocast())
        assert.equal("float32", F.linear(orepa.ones(1, 2), orepa.ones(2, 2)).dtype)
      end)
      assert.equal("bfloat16", orepa.get_autocast())
    end)
    assert.equal("float32", orepa.get_autocast())
  end)

  it("casts a transposed convolution; norms by an image's own statistics, interpolation and borders keep the type", function()
    local x, w, b = orepa.randn(2, 4, 5, 5):requires_grad_(), orepa.randn(4, 6, 3, 3):requires_grad_(), orepa.randn(6)
    local norm = nn.GroupNorm { num_groups = 2, num_channels = 6 }
    b:requires_grad_()
    local function run() return F.conv_transpose2d(x, w, b, { stride = 2 }) end
    local y, wanted = cast(run), run()
    assert.same({ "bfloat16", "float32" }, { y.dtype, wanted.dtype })
    near(y, wanted, 0.02)
    for dtype, map in pairs { bfloat16 = y, float32 = wanted } do
      cast(function()
        for _, z in ipairs { norm(map), F.layer_norm(map, 11), F.interpolate(map, { scale_factor = 2 }), F.pad(map, { 1, 1 }) } do
          assert.equal(dtype, z.dtype)
        end
      end)
    end
    local dy, gradients = orepa.randn(y.shape), {}
    y:backward(dy:to "bfloat16")
    for k, p in ipairs { x, w, b } do
      assert.equal("float32", p.grad.dtype)
      gradients[k], p.grad = p.grad, nil
    end
    wanted:backward(dy)
    for k, p in ipairs { x, w, b } do near(gradients[k], p.grad, 0.02, "gradient " .. k) end
  end)

  it("ends with an error, which passes through unchanged", function()
    local thrown = {}
    local ok, caught = pcall(orepa.autocast, "bfloat16", function() error(thrown) end)
    assert.is_false(ok)
    assert.equal(thrown, caught)
    assert.equal("float32", orepa.get_autocast())
  end)

  it("as a guard ends with its scope, by an error too, and once only", function()
    do
      local guard <close> = orepa.autocast "bfloat16"
      assert.equal("bfloat16", orepa.get_autocast())
      assert.is_userdata(guard)
    end
    assert.equal("float32", orepa.get_autocast())
    pcall(function()
      local _ <close> = orepa.autocast "bfloat16"
      error "out"
    end)
    assert.equal("float32", orepa.get_autocast())
  end)

  it("may yield, and ends with a coroutine that fails or is closed", function()
    local steps = coroutine.wrap(function()
      return cast(function()
        coroutine.yield "between"
        return orepa.get_autocast()
      end)
    end)
    assert.equal("between", steps())
    assert.equal("bfloat16", steps())
    assert.equal("float32", orepa.get_autocast())
    local failing = coroutine.create(function()
      cast(function()
        coroutine.yield()
        error "out"
      end)
    end)
    coroutine.resume(failing)
    assert.is_false(coroutine.resume(failing))
    assert.equal("float32", orepa.get_autocast())
    local closed = coroutine.create(function()
      local _ <close> = orepa.autocast "bfloat16"
      coroutine.yield()
    end)
    coroutine.resume(closed)
    coroutine.close(closed)
    assert.equal("float32", orepa.get_autocast())
  end)

  it("refuses what it doesn't know, and is off then", function()
    fails("there is no float16, only bfloat16 and float32", orepa.autocast, "float16", function() end)
    fails("there is no float64", orepa.autocast, "float64")
    fails("no type is called 'half'", orepa.autocast, "half", function() end)
    fails("name of a type expected", orepa.autocast, function() end)
    fails("function expected", orepa.autocast, "bfloat16", 1)
    assert.equal("float32", orepa.get_autocast())
  end)

  it("names both types where they don't go together", function()
    local wide, short = orepa.ones({ 1, 2, 3, 3 }, { dtype = "float64" }), orepa.ones({ 1, 2, 3, 3 }, { dtype = "bfloat16" })
    local w = orepa.ones(2, 2, 1, 1)
    fails("input is float64, the kernel float32", cast, function() F.conv2d(wide, w) end)
    fails("input is bfloat16, the kernel float32", F.conv2d, short, w)
    fails("input is float32, the weight bfloat16", F.linear, orepa.ones(1, 2), orepa.ones({ 2, 2 }, { dtype = "bfloat16" }))
  end)
end)

-- ---- ops against float32 ----

-- Runs f(x, parameters...) in float32 and inside autocast, backward outside of it; all gradients are compared.
local function compare(f, limit, type, ...)
  local leaves = { ... }
  local function run()
    local copies = {}
    for k, t in ipairs(leaves) do copies[k] = t:clone():requires_grad_() end
    return copies, f(table.unpack(copies))
  end
  local plain, wanted = run()
  local short, found = cast(run)
  assert.equal(type, found.dtype)
  near(found, wanted, limit)
  local dy = orepa.randn(wanted.shape)
  wanted:backward(dy)
  found:backward(dy:to(found.dtype))
  for k in ipairs(leaves) do
    assert.equal("float32", short[k].grad.dtype)
    near(short[k].grad, plain[k].grad, limit, "gradient " .. k)
  end
end

describe("inside autocast", function()
  before_each(function() orepa.manual_seed(3) end)

  it("conv2d and linear give bfloat16 and float32 gradients", function()
    compare(function(x, w, b) return F.conv2d(x, w, b, { padding = 1 }) end, 0.02, "bfloat16", orepa.randn(2, 8, 9, 7),
      orepa.randn(16, 8, 3, 3), orepa.randn(16))
    compare(function(x, w) return F.conv2d(x, w, { stride = 2, groups = 2 }) end, 0.02, "bfloat16", orepa.randn(2, 6, 9, 7),
      orepa.randn(4, 3, 1, 1))
    compare(function(x, w) return F.conv2d(x, w, { padding = 3, stride = 2 }) end, 0.02, "bfloat16", orepa.randn(3, 3, 15, 15),
      orepa.randn(8, 3, 7, 7))
    compare(function(x, w, b) return F.linear(x, w, b) end, 0.02, "bfloat16", orepa.randn(5, 12), orepa.randn(7, 12),
      orepa.randn(7))
  end)

  it("norm, ReLU, addition and max pool keep the type that comes, and parameters float32", function()
    local w = orepa.randn(8, 4, 3, 3)
    compare(function(x, gain, bias)
      return F.batch_norm(F.conv2d(x, w, { padding = 1 }), { weight = gain, bias = bias, training = true })
    end, 0.03, "bfloat16", orepa.randn(4, 4, 8, 8), orepa.randn(8), orepa.randn(8))
    cast(function()
      local y = F.conv2d(orepa.randn(2, 4, 8, 8), w, { padding = 1 })
      assert.equal("bfloat16", (F.relu(y) + y).dtype)
      assert.equal("bfloat16", F.max_pool2d(y, { kernel_size = 2 }).dtype)
      assert.equal("bfloat16", F.avg_pool2d(y, { kernel_size = 2 }).dtype)
      assert.equal("float32", (y + orepa.ones(y.shape)).dtype)
    end)
  end)

  it("the pool before a classifier, softmax and the loss are float32", function()
    local w, labels = orepa.randn(8, 4, 3, 3), orepa.tensor({ 1, 0, 7 }, { dtype = "int64" })
    compare(function(x, v) return F.adaptive_avg_pool2d(F.conv2d(x, v), { output_size = 1 }) end, 0.03, "float32",
      orepa.randn(3, 4, 8, 8), w)
    compare(function(x, v) return F.softmax(F.linear(x, v), 2) end, 0.03, "float32", orepa.randn(3, 4), orepa.randn(8, 4))
    compare(function(x, v) return F.log_softmax(F.linear(x, v), 2) end, 0.03, "float32", orepa.randn(3, 4), orepa.randn(8, 4))
    compare(function(x, v) return F.cross_entropy(F.linear(x, v), labels) end, 0.03, "float32", orepa.randn(3, 4),
      orepa.randn(8, 4))
    cast(function() -- other types are left alone
      assert.equal("float64", F.softmax(orepa.ones({ 2, 2 }, { dtype = "float64", device = "ref" }), 2).dtype)
      assert.equal("float32", F.adaptive_avg_pool2d(orepa.ones(1, 1, 2, 2), { output_size = 1 }).dtype)
    end)
  end)

  it("a kernel's gradient is not rounded to bfloat16", function()
    local x, w = orepa.randn(4, 16, 8, 8), orepa.randn(16, 16, 3, 3):requires_grad_()
    local y = cast(function() return F.conv2d(x, w, { padding = 1 }) end)
    y:backward(orepa.randn(y.shape):to "bfloat16")
    assert.is_true((w.grad - w.grad:to("bfloat16"):to "float32"):abs():max():item() > 0)
  end)

  it("a weight that is used twice gets both gradients, and one that is written is cast again", function()
    local x, w = orepa.randn(3, 4), orepa.randn(4, 4)
    compare(function(a, v) return F.linear(F.linear(a, v), v) end, 0.03, "bfloat16", x, w)
    cast(function()
      local first = F.linear(x, w)
      orepa.no_grad(function() w:mul_(2) end)
      near(F.linear(x, w), first:to "float32" * 2, 1e-6, "after a write")
      near(F.linear(x, w:slice(1, 1, 2)), F.linear(x, w):slice(2, 1, 2), 1e-6, "a part")
      near(F.linear(x, w:reshape(2, 8):slice(2, 1, 4)), F.linear(x, w:reshape(2, 8):slice(2, 1, 4):clone()), 1e-6, "a view")
    end)
  end)

  it("a weight that was cast without a graph has gradients when there is one", function()
    local x, w = orepa.randn(3, 4), orepa.randn(4, 4):requires_grad_()
    cast(function()
      orepa.no_grad(function() F.linear(x, w) end)
      F.linear(x, w):to("float32"):sum():backward()
    end)
    assert.is_not_nil(w.grad)
  end)

  it("casts to nearest even, and NaN stays NaN", function()
    local one = orepa.ones({ 1, 1 })
    local function shortened(value) return cast(function() return F.linear(one, orepa.tensor { { value } }):item() end) end
    assert.equal(1.0, shortened(1 + 2 ^ -8)) -- a tie
    assert.equal(1 + 2 ^ -6, shortened(1 + 3 * 2 ^ -8)) -- a tie the other way
    assert.equal(1 + 2 ^ -7, shortened(1 + 2 ^ -8 + 2 ^ -20))
    assert.equal(-1.0, shortened(-(1 + 2 ^ -8)))
    assert.equal(math.huge, shortened(3.4e38))
    local nan = shortened(0 / 0)
    assert.is_true(nan ~= nan)
  end)

  it("a bfloat16 model takes float32 maps, and its gradients are bfloat16", function()
    local layer = nn.Linear { in_features = 3, out_features = 2 }:to "bfloat16"
    local y = cast(function() return layer(orepa.randn(4, 3)) end)
    y:backward(orepa.ones({ 4, 2 }, { dtype = "bfloat16" }))
    assert.equal("bfloat16", layer.weight.grad.dtype)
  end)
end)

-- ---- blocks and networks ----

local function small_net(reparam)
  return require "orepa.models".create("resnet", { num_blocks = { 1, 1, 1, 1 }, width = 0.125, classes = 4, in_channels = 2,
    residual = "basic", reparam = reparam, stem = "small" })
end

describe("blocks inside autocast", function()
  before_each(function() orepa.manual_seed(7) end)

  it("squeeze in float32, and hand bfloat16 to the convolution", function()
    local block = nn.OREPA { in_channels = 8, out_channels = 8, kernel_size = 3 }
    local x, dy = orepa.randn(4, 8, 8, 8), orepa.randn(4, 8, 8, 8)
    local plain = block(x)
    local gradients = {}
    plain:backward(dy)
    for name, p in block:named_parameters() do
      gradients[name] = p.grad
      p.grad = nil
    end
    local short = cast(function()
      assert.equal("float32", block:squeezed_weight().dtype)
      return block(x)
    end)
    assert.equal("bfloat16", short.dtype)
    near(short, plain, 0.02)
    short:backward(dy:to "bfloat16")
    for name, p in block:named_parameters() do
      assert.same({ "float32", "float32" }, { p.dtype, p.grad.dtype })
      near(p.grad, gradients[name], 0.03, name)
    end
  end)

  it("keep what they fold for each type, and deploy", function()
    local block = nn.OREPA { in_channels = 8, out_channels = 8, kernel_size = 3, act = "relu" }
    local x = orepa.randn(4, 8, 8, 8)
    for _ = 1, 3 do block(x) end
    block:eval()
    orepa.no_grad(function()
      local wanted = block(x)
      local found = cast(function() return block(x) end)
      assert.same({ "float32", "bfloat16" }, { wanted.dtype, found.dtype })
      near(found, wanted, 0.02, "folded")
      assert.same(wanted:tolist(), block(x):tolist())
      assert.same(found:tolist(), cast(function() return block(x) end):tolist())
      block["bn"].weight:mul_(2)
      block["bn"].bias:mul_(2)
      near(cast(function() return block(x) end), wanted * 2, 0.02, "folded again")
      block:deploy()
      near(cast(function() return block(x) end), wanted * 2, 0.02, "deployed")
    end)
  end)

  it("leave networks' states float32, and run as units", function()
    for _, reparam in ipairs { "none", "orepa" } do
      local net = small_net(reparam)
      local x = orepa.randn(4, 2, 16, 16)
      local wanted = net(x):detach()
      local found = cast(function() return net(x) end)
      assert.equal("bfloat16", found.dtype)
      near(found, wanted, 0.1, reparam)
      for name, t in pairs((net:state_dict())) do
        assert(t.dtype == "float32" or t.dtype == "int64", name)
      end
    end
  end)
end)

describe("training inside autocast", function()
  -- The mean loss of the last steps.
  local function trained(precision, reparam)
    orepa.manual_seed(11)
    local net = small_net(reparam)
    local optimizer = orepa.optim.SGD(orepa.optim.param_groups(net), { lr = 0.05, momentum = 0.9, weight_decay = 1e-4 })
    local labels = orepa.tensor({ 0, 1, 2, 3, 0, 1, 2, 3 }, { dtype = "int64" })
    local x, sum = orepa.randn(8, 2, 16, 16), 0
    for step = 1, 12 do
      local loss = orepa.autocast(precision, function() return F.cross_entropy(net(x + orepa.randn(x.shape) * 0.1), labels) end)
      optimizer:zero_grad()
      loss:backward()
      optimizer:step()
      if step <= 6 then sum = sum + loss:item() / 6 end
    end
    return sum, F.cross_entropy(net(x), labels):item()
  end

  it("goes as in float32", function()
    for _, reparam in ipairs { "none", "orepa" } do
      local wanted, last = trained("float32", reparam)
      local found, found_last = trained("bfloat16", reparam)
      assert(math.abs(found - wanted) < 0.05 * wanted, ("loss %g, in float32 %g"):format(found, wanted))
      assert(last < 0.3 and found_last < 0.3, ("it didn't learn: %g, %g"):format(last, found_last))
    end
  end)
end)
