-- Checkpoints: the same gradients to the bit, less memory, and nothing left behind by an error.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"
local nn, F = orepa.nn, orepa.F

local function same_bits(a, b, what)
  assert.same(a.shape, b.shape)
  assert.equal(0, (a - b):abs():max():item(), what)
  assert.same(a:tolist(), b:tolist(), what)
end

-- ---- modules ----

local function class(name, init, forward)
  local result = nn.Module:extend(name)
  result.init, result.forward = init, forward
  return result
end

local Dropout = class("Dropout", function(self, rate) self.rate = rate end, function(self, x)
  if not self.training then return x end
  return x * orepa.rand(x.shape):ge(self.rate):to("float32") / (1 - self.rate)
end)

-- Input, parameters and random numbers are used more than once.
local Residual = class("Residual", function(self, channels)
  self.conv1 = nn.ConvBN { in_channels = channels, out_channels = channels, kernel_size = 3, act = "relu" }
  self.drop = Dropout(0.5)
  self.conv2 = nn.OREPA { in_channels = channels, out_channels = channels, kernel_size = 3 }
end, function(self, x)
  return F.relu(self.conv2(self.drop(self.conv1(x))) + self.conv1(x) + x)
end)

-- Sets all that a comparison needs anew, so that two networks are the same.
local function made(make)
  orepa.manual_seed(3)
  return make()
end

-- Two steps; gradients, statistics, results and the random numbers' state of both.
local function trained(net, inputs)
  local seen = {}
  orepa.manual_seed(4)
  for step = 1, 2 do
    local y = net(table.unpack(inputs))
    y:backward(orepa.randn(y.shape))
    seen[step .. ".y"] = y:detach()
  end
  for name, p in net:named_parameters() do seen["gradient of " .. name] = p.grad end
  for name, b in net:named_buffers() do seen["buffer " .. name] = b end
  for k, x in ipairs(inputs) do
    if x.grad then seen["gradient of input " .. k] = x.grad end
  end
  seen.draws = orepa.tensor(orepa.rng_state().draws)
  return seen
end

local function is_same_as_plain(plain, wrapped, inputs)
  local function own()
    local list = {}
    for k, x in ipairs(inputs) do list[k] = x:detach():clone():requires_grad_(x.requires_grad) end
    return list
  end
  local expected, found = trained(made(plain), own()), trained(made(wrapped), own())
  local count = 0
  for name, t in pairs(expected) do
    assert.is_truthy(found[name], name)
    same_bits(t, found[name], name)
    count = count + 1
  end
  for name in pairs(found) do assert.is_truthy(expected[name], name) end
  return count
end

describe("a checkpoint", function()
  local image = orepa.rand(2, 4, 7, 6)

  it("changes no bit of a network's training", function()
    local function network(wrap)
      return function()
        local seq = nn.Sequential(Residual(4), Residual(4), Residual(4))
        for k = 1, #seq do seq[k] = wrap(seq[k]) end
        return seq
      end
    end
    local function plain(m) return m end
    assert.is_true(is_same_as_plain(network(plain), network(nn.checkpoint), { image }) > 60)
    is_same_as_plain(network(plain), network(nn.checkpoint), { image:detach():requires_grad_() })
    is_same_as_plain(network(plain), network(function(m) return nn.checkpoint(nn.checkpoint(m)) end), { image })
  end)

  it("holds others, and layers, which have their own shares of the random numbers", function()
    local function network(inner, outer)
      return function()
        return outer(nn.Sequential(inner(Residual(4)), Dropout(0.3), inner(nn.BatchNorm2d(4)), nn.ReLU(),
          inner(nn.Conv2d { in_channels = 4, out_channels = 3, kernel_size = 3 })))
      end
    end
    local function plain(m) return m end
    is_same_as_plain(network(plain, plain), network(nn.checkpoint, nn.checkpoint), { image })
    is_same_as_plain(network(plain, plain), network(nn.checkpoint, plain), { image:detach():requires_grad_() })
  end)

  it("adds up gradients in the order of the plain graph", function()
    local Twice = class("Twice", function(self, wrap)
      self.inner = wrap(nn.Conv2d { in_channels = 4, out_channels = 4, kernel_size = 3, padding = 1 })
      self.outer = nn.Conv2d { in_channels = 4, out_channels = 4, kernel_size = 1 }
    end, function(self, x)
      local h = self.outer(x)
      return self.inner(h) * h + self.inner(h * 0.3) + h
    end)
    is_same_as_plain(function() return Twice(function(m) return m end) end, function() return Twice(nn.checkpoint) end,
      { image:detach():requires_grad_() })
  end)

  it("takes and gives several tensors, and other arguments too", function()
    local Pair = class("Pair", function(self)
      self.weight = nn.Parameter(orepa.ones(3) * 0.7)
    end, function(self, x, factor, y)
      return x * y * self.weight * factor, (x + y):exp(), x, x:detach() + 1
    end)
    local Around = class("Around", function(self, wrap) self.pair = wrap(Pair()) end, function(self, a, b)
      local p, q, r, s = self.pair(a * 2, 3, b, nil)
      return (p * 2 + q * r + s) / 4
    end)
    local a, b = orepa.tensor({ 1, 2, 3 }):requires_grad_(), orepa.tensor { 0.1, 0.2, 0.3 }
    local function pair(wrap)
      return function() return Around(wrap) end
    end
    is_same_as_plain(pair(function(m) return m end), pair(nn.checkpoint), { a, b })
    is_same_as_plain(pair(function(m) return m end), pair(nn.checkpoint), { b, a })
    local p, q, r, s = nn.checkpoint(Pair())(b, 2, b)
    assert.is_true(p.requires_grad)
    assert.is_false(q.requires_grad or r.requires_grad or s.requires_grad)
    -- of one result alone
    local x = orepa.tensor({ 1, 2, 3 }):requires_grad_()
    local _, e = nn.checkpoint(Pair())(x, 1, b)
    e:sum():backward()
    same_bits((x:detach() + b):exp(), x.grad)
    -- the same tensor twice, and as it came in
    x.grad = nil
    local one, two = orepa.checkpoint(function(t) return t, t end, x);
    (one * 2 + two * 3):sum():backward()
    assert.same({ 5, 5, 5 }, x.grad:tolist())
  end)

  it("reaches a graph behind the function, not only behind its arguments", function()
    local p, x = orepa.tensor({ 2 }):requires_grad_(), orepa.tensor { 3 }
    local h = p * p
    local y = orepa.checkpoint(function(t) return t * h * h end, x);
    (y + h):sum():backward()
    assert.same({ 3 * 2 * 4 * 4 + 4 }, p.grad:tolist()) -- 3p^4 + p^2
  end)

  it("follows changes in place inside it", function()
    local p, x = orepa.tensor({ 2, 5 }):requires_grad_(), orepa.tensor { 3, 4 }
    local function f(t)
      local sum = orepa.zeros(2)
      sum:add_(p)
      sum:mul_(t)
      sum[1] = p:sum()
      return sum * sum
    end
    f(x):sum():backward()
    local expected = p.grad
    p.grad = nil
    orepa.checkpoint(f, x):sum():backward()
    same_bits(expected, p.grad)
    local y = orepa.checkpoint(f, x)
    y:mul_(2) -- a result is no view
    p.grad = nil
    y:sum():backward()
    same_bits(expected * 2, p.grad)
  end)

  it("is just its module in evaluation and under no_grad", function()
    local m = made(function() return Residual(4) end)
    local c = nn.checkpoint(m)
    c:eval()
    assert.is_false(m.training or m.drop.training)
    local y = c(image)
    same_bits(m(image), y)
    local calls = 0
    m:register_forward_hook(function() calls = calls + 1 end)
    c(image):sum():backward()
    assert.equal(1, calls)
    c:train()
    orepa.manual_seed(1)
    y = orepa.no_grad(function() return c(image) end)
    assert.is_false(y.requires_grad)
    assert.equal(2, calls)
    c(image):sum():backward()
    assert.equal(4, calls)
  end)

  it("computes with frozen norms as the plain module does", function()
    local function network(wrap)
      return function()
        local m = wrap(Residual(4))
        for path, child in m:named_modules() do
          if path:find "bn" then rawset(child, "training", false) end
        end
        m:get("conv2"):eval()
        return m
      end
    end
    is_same_as_plain(network(function(m) return m end), network(nn.checkpoint), { image })
  end)

  it("has the names of what it wraps, and is replaced as one", function()
    local function model() return nn.Sequential(Residual(2), nn.Conv2d { in_channels = 2, out_channels = 2, kernel_size = 1 }) end
    local plain, wrapped = model(), model()
    wrapped[1], wrapped[2] = nn.checkpoint(wrapped[1]), nn.checkpoint(wrapped[2])
    local _, names = plain:state_dict()
    local _, found = wrapped:state_dict()
    assert.same(names, found)
    wrapped:load_state_dict((plain:state_dict()))
    same_bits(plain:get "0.conv2.weight_orepa_origin", wrapped:get "0.conv2.weight_orepa_origin")
    assert.equal(#plain:parameters(), #wrapped:parameters())
    local text = tostring(wrapped):gsub("checkpoint of ", "")
    assert.equal(tostring(plain), text)
    local mine = nn.ReLU()
    wrapped:replace("1", mine)
    assert.equal(mine, wrapped[2])
    assert.equal(mine, wrapped:get "1")
    wrapped:deploy()
    assert.equal("deploy", wrapped:get("0.conv2").mode)
    assert.same({ 1, 2, 3, 3 }, wrapped(orepa.ones(1, 2, 3, 3)).shape)
    fails("a module expected, got function", nn.checkpoint, function() end)
    fails("a module expected, got a tensor", nn.checkpoint, orepa.ones(1))
  end)

  it("updates running statistics once", function()
    local norm = nn.BatchNorm2d(4)
    local c = nn.checkpoint(norm)
    c(image):sum():backward()
    assert.equal(1, norm.num_batches_tracked:item())
    local once = norm.running_mean:clone()
    local plain = nn.BatchNorm2d(4)
    plain(image)
    same_bits(plain.running_mean, once)
    -- those of a user's own call of F.batch_norm as well
    local mean, var = orepa.zeros(4), orepa.ones(4)
    local seen = {}
    local x = image:detach():requires_grad_()
    orepa.checkpoint(function(t)
      seen[#seen + 1] = orepa.is_recomputing()
      return F.batch_norm(t, { running_mean = mean, running_var = var, training = true })
    end, x):sum():backward()
    same_bits(once, mean)
    assert.same({ false, true }, seen)
    assert.is_false(orepa.is_recomputing())
  end)
end)

describe("a checkpoint's graph", function()
  local function exp(t) return t:exp() end

  it("is used once unless retained", function()
    local x = orepa.ones(2):requires_grad_()
    local y = orepa.checkpoint(exp, x):sum()
    y:backward(nil, { retain_graph = true })
    y:backward()
    same_bits(x:detach():exp() * 2, x.grad)
    fails("freed by an earlier backward", y.backward, y)
  end)

  it("notices inputs that were changed, then or later", function()
    local x = orepa.ones(2):requires_grad_()
    local h = x * 2
    local y = orepa.checkpoint(exp, h)
    h:add_(1)
    fails("checkpoint: .*changed in place", function() y:sum():backward() end)
    fails("checkpoint: input 1 .*is changed in place", orepa.checkpoint, function(t) return t:mul_(2) end, x * 2)
    assert.is_true(orepa.is_grad_enabled() and (x * 2).requires_grad)
  end)

  it("notices a function that computes something else the second time", function()
    local x, calls = orepa.ones(2):requires_grad_(), 0
    local function counted(f)
      return orepa.checkpoint(function(t)
        calls = calls + 1
        return f(t, calls % 2)
      end, x)
    end
    local y = counted(function(t, odd) return t:slice(1, 1, 1 + odd) end)
    fails("result 1 is float32 1 when it is computed again, and was float32 2", function() y:sum():backward() end)
    y = counted(function(t, odd) if odd == 1 then return t * 2, t * 3 end return t end)
    fails("gives 1 results when it is called again, and gave 2", function() y:sum():backward() end)
    fails("result 1 is a number", orepa.checkpoint, function() return 1 end, x)
    fails("result 2 is a table", orepa.checkpoint, function(t) return t, {} end, x)
  end)

  it("does not lead through what its part computed on the way", function()
    local x, kept = orepa.ones(2):requires_grad_(), nil
    orepa.checkpoint(function(t)
      kept = t * 2
      return kept + 1
    end, x)
    fails("a checkpoint computed on its way", function() kept:sum():backward() end)
  end)

  local function state()
    local rng = orepa.rng_state()
    return { orepa.is_grad_enabled(), orepa.is_recomputing(), rng.seed, rng.draws }
  end

  it("leaves everything as it was after an error, which is the user's own", function()
    local x, thrown, calls = orepa.ones(2):requires_grad_(), { "mine" }, 0
    local function broken(at, what)
      calls = 0
      return function(t)
        calls = calls + 1
        orepa.rand(3)
        if calls == at then error(what) end
        return t * orepa.rand(2)
      end
    end
    local before = state()
    local ok, caught = pcall(orepa.checkpoint, broken(1, thrown), x)
    assert.is_false(ok)
    assert.equal(thrown, caught)
    assert.is_true((x * 2).requires_grad)
    before[4] = before[4] + 1
    assert.same(before, state())
    for _, what in ipairs { thrown, "text" } do
      local inner = broken(2, what)
      local y = orepa.checkpoint(function(t) return orepa.checkpoint(inner, t * 2) + 1 end, x)
      before = state()
      ok, caught = pcall(y.backward, y, orepa.ones(2))
      assert.is_false(ok)
      if what == thrown then assert.equal(thrown, caught) else assert.matches("checkpoint_spec.lua:%d+: text", caught) end
      assert.same(before, state())
      assert.is_nil(x.grad)
      fails("freed by an earlier backward", y.backward, y, orepa.ones(2))
      assert.is_true((x * 2).requires_grad)
    end
    local y = orepa.checkpoint(function(t) return orepa.is_recomputing() and t:reshape(3) or t * 2 end, x)
    fails("checkpoint_spec.lua:%d+: reshape", y.backward, y, orepa.ones(2))
    assert.same({ 2, 2 }, (function() x.grad = nil (x * 2):sum():backward() return x.grad:tolist() end)())
  end)

  it("is computed on the Lua state that called backward, where it can't yield", function()
    local x, where, y = orepa.ones(2):requires_grad_(), nil, nil
    coroutine.wrap(function()
      y = orepa.checkpoint(function(t)
        where = coroutine.running()
        return t * 3
      end, x)
    end)()
    collectgarbage()
    y:sum():backward()
    assert.equal(coroutine.running(), where)
    local other = coroutine.create(function()
      orepa.checkpoint(function(t)
        where = coroutine.running()
        return t * 3
      end, x):sum():backward()
    end)
    assert(coroutine.resume(other))
    assert.equal(other, where)
    assert.same({ 6, 6 }, x.grad:tolist())
    y = orepa.checkpoint(function(t)
      if orepa.is_recomputing() then coroutine.yield() end
      return t * 3
    end, x)
    local ok, message = coroutine.resume(coroutine.create(function() y:sum():backward() end))
    assert.is_false(ok)
    assert.matches("yield", message)
    assert.is_false(orepa.is_recomputing())
    assert.is_true(orepa.is_grad_enabled())
  end)

  it("allows whole backward passes inside", function()
    local x, p = orepa.ones(2):requires_grad_(), orepa.tensor({ 2, 3 }):requires_grad_()
    local inside
    local function f(t)
      if orepa.is_recomputing() then
        local q = orepa.tensor({ 1, 2 }):requires_grad_();
        orepa.checkpoint(exp, q * q):sum():backward()
        inside = q.grad
      end
      return t * p
    end
    local h = x * 2
    local y = orepa.checkpoint(f, h) + h
    y:backward(orepa.tensor { 1, 10 })
    assert.same({ 6, 80 }, x.grad:tolist())
    assert.same({ 2, 20 }, p.grad:tolist())
    assert.near(2 * math.exp(1), inside[1]:item(), 1e-5)
    -- one that comes to nodes where gradients of the outer one wait
    x.grad = nil
    h = x * 2
    local side, seen = h * 5, nil
    y = orepa.checkpoint(function(t)
      if orepa.is_recomputing() then
        side:backward(orepa.ones(2), { retain_graph = true })
        seen = x.grad:clone()
      end
      return t * 3
    end, orepa.ones(2):requires_grad_())
    local z = h + y -- the sum's gradient reaches h before the checkpoint is computed again
    z:backward(orepa.ones(2))
    assert.same({ 10, 10 }, seen:tolist())
    assert.same({ 12, 12 }, x.grad:tolist())
    -- one that leads through the checkpoint itself
    local loss
    loss = orepa.checkpoint(function(t)
      if orepa.is_recomputing() then loss:backward() end
      return t:sum()
    end, x)
    fails("leads through that op itself", loss.backward, loss)
  end)
end)

describe("a checkpoint's memory", function()
  -- Peaks of the second of two steps, in MiB, in a process of its own: how often Lua collects hangs on its heap.
  local function peak(how)
    local output = process.run_text([[
local orepa = require "orepa"
local nn = orepa.nn
local wrap = ... == "checkpoint" and nn.checkpoint or function(m) return m end
local Block = nn.Module:extend("Block") -- not of the library: nothing is released before it is collected
function Block:init()
  self.conv1 = nn.ConvBN { in_channels = 8, out_channels = 8, kernel_size = 3, act = "relu" }
  self.conv2 = nn.ConvBN { in_channels = 8, out_channels = 8, kernel_size = 3 }
end
function Block:forward(x) return orepa.F.relu(self.conv2(self.conv1(x)) + x) end
local net, x = nn.Sequential(), orepa.rand(8, 8, 128, 128) -- 4 MiB a map
for _ = 1, 16 do net:add(wrap(Block())) end
local before
for _ = 1, 2 do
  before = orepa.memory().live
  orepa.reset_peak()
  net(x):sum():backward()
end
print((orepa.memory().peak - before) / (1 << 20))
]], { how })
    return assert(tonumber(output), output)
  end

  it("is that of the inputs and of one part", function()
    local plain, wrapped = peak "plain", peak "checkpoint"
    assert.is_true(plain > 16 * 3 * 4, plain) -- three maps in each part
    assert.is_true(wrapped < 0.6 * plain, ("%.1f MiB, %.1f without checkpoints"):format(wrapped, plain))
  end)

  it("computes again in the type of the first pass", function()
    local net = made(function() return nn.Conv2d { in_channels = 2, out_channels = 4, kernel_size = 3 } end)
    local x, gradients = orepa.randn(2, 2, 6, 6), {}
    for k, f in ipairs { net, function(t) return orepa.checkpoint(net, t) end } do
      local y = orepa.autocast("bfloat16", function() return f(x) end)
      y:to("float32"):sum():backward()
      gradients[k], net.weight.grad = net.weight.grad, nil
    end
    same_bits(gradients[1], gradients[2], "gradient")
  end)

  it("holds no function, argument or tensor longer than its graph", function()
    collectgarbage()
    collectgarbage()
    local live, start = orepa.memory().live, collectgarbage "count"
    do
      local x, weak = orepa.ones(1000):requires_grad_(), setmetatable({}, { __mode = "k" })
      for k = 1, 1000 do
        local f = function(t, factor) return t * factor[1] end
        local factor = { k }
        weak[f], weak[factor] = true, true
        local y = orepa.checkpoint(f, x, factor)
        if k % 3 == 0 then y:sum():backward() end
        if k % 3 == 1 then pcall(y.backward, y) end
      end
      collectgarbage()
      collectgarbage()
      assert.is_nil(next(weak))
    end
    collectgarbage()
    assert.equal(live, orepa.memory().live)
    assert.is_true(collectgarbage "count" < start + 50)
  end)
end)
