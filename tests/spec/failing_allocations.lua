-- Runs in tests/failing, whose allocations can be made to fail. usage: failing failing_allocations.lua calls | sequences
--
-- calls: each call below again and again, with its first allocation failing, its second, ...: it alone, the next as well, and
-- all from there on. It gives what it gives otherwise, or an error that says that memory ran out; then its arguments are what
-- they were, and in the end no tensor is left. sequences: random calls one after another on tensors that they share.

local orepa = require "orepa"
local nn, F, optim, L = orepa.nn, orepa.F, orepa.optim, orepa.reparam

local failing = _G.failing
local EVER = 1 << 40 -- allocations

-- ---- what is compared ----

local function flat(value, into)
  into = into or {}
  if orepa.is_tensor(value) then
    into[#into + 1] = value:to "float32":reshape(-1):tolist()
  elseif type(value) == "table" and value.state_dict then
    flat(value:state_dict(), into)
  elseif type(value) == "table" then
    local keys = {}
    for key in pairs(value) do keys[#keys + 1] = key end
    table.sort(keys, function(a, b) return tostring(a) < tostring(b) end)
    for _, key in ipairs(keys) do flat(value[key], into) end
  end
  return into
end

local function same(a, b)
  if #a ~= #b then return false end
  for k, x in ipairs(a) do
    local y = b[k]
    if type(x) == "table" and not same(x, y) or type(x) ~= "table" and x ~= y and (x == x or y == y) then return false end
  end
  return true
end

local function check(condition, ...)
  if not condition then error(string.format(...), 0) end
end

local function says_memory(message)
  return type(message) == "string" and message:find "memory" ~= nil
end

-- ---- the calls: each makes its arguments, and what is called with them ----

local function map(...) return orepa.rand(...) - 0.5 end
local function trained(...) return map(...):requires_grad_() end
local function labels(...) return orepa.tensor({ ... }, { dtype = "int64" }) end
local function backward_of(make)
  return function()
    local xs, f = make()
    return xs, function(...)
      for _, x in ipairs(xs) do x.grad = nil end
      local y = f(...)
      y:backward(orepa.ones_like(y))
      local gradients = {}
      for n, x in ipairs(xs) do gradients[n] = x.grad end
      return gradients
    end
  end
end

local function net_of(make)
  return function()
    local net, x = make(), map(2, 4, 6, 6)
    return { net:parameters(), x }, function() -- running statistics follow each norm that was computed
      net:zero_grad()
      net(x):sum():backward()
    end
  end
end

local calls = {
  tensor = function() return {}, function() return orepa.tensor { { 1, 2 }, { 3, 4 } } end end,
  zeros = function() return {}, function() return orepa.zeros(20, 30) end end,
  randn = function()
    return {}, function()
      orepa.manual_seed(1)
      return orepa.randn(3, 4)
    end
  end,
  arange = function() return {}, function() return orepa.arange(9) end end,
  add = function() return { map(3, 4), map(4) }, function(a, b) return a + b end end,
  add_ = function() return { map(3, 4), map(4) }, function(a, b) return a:clone():add_(b) end end,
  add_number = function() return { orepa.ones({ 3 }, { dtype = "int64" }) }, function(a) return a + 0.5 end end,
  exp = function() return { map(2, 3, 4, 5) }, function(a) return a:exp() end end,
  where = function() return { map(3, 4), map(4) }, function(a, b) return a:gt(0):where(a, b) end end,
  sum = function() return { map(3, 40, 5) }, function(a) return a:sum(2) end end,
  max = function() return { map(3, 40, 5) }, function(a) return a:max { 1, 3 } end end,
  argmax = function() return { map(3, 40) }, function(a) return a:argmax(2) end end,
  var = function() return { map(3, 40) }, function(a) return a:var(2) end end,
  norm = function() return { map(3, 40) }, function(a) return a:norm() end end,
  matmul = function() return { map(2, 3, 4), map(4, 5) }, function(a, b) return a:matmul(b) end end,
  einsum = function() return { map(2, 3, 4), map(4, 5) }, function(a, b) return orepa.einsum("bij,jk->bk", a, b) end end,
  reshape = function() return { map(2, 3, 4, 5) }, function(a) return a:reshape(6, 20) end end,
  permute = function() return { map(2, 3, 4, 5) }, function(a) return a:permute(4, 1, 2, 3):contiguous() end end,
  slice = function() return { map(6, 5) }, function(a) return a:slice(1, 1, -1, 2):clone() end end,
  cat = function() return { map(6, 5), map(2, 5) }, function(a, b) return orepa.cat({ a, b }, 1) end end,
  stack = function() return { map(6), map(6) }, function(a, b) return orepa.stack({ a, b }, 2) end end,
  split = function() return { map(6, 5) }, function(a) return a:split(2) end end,
  pad = function() return { map(2, 3) }, function(a) return orepa.pad(a, { 1, 0, 0, 2 }) end end,
  gather = function() return { map(5, 3) }, function(a) return a[{ 2, 1, 5 }] end end,
  mask = function() return { map(5, 3) }, function(a) return a[a:gt(0)] end end,
  scatter = function()
    return { map(5, 3), map(2, 3) }, function(a, b)
      return a:scatter(1, labels(1, 3):reshape(2, 1):expand(2, 3), b)
    end
  end,
  assign = function()
    return { map(5, 3), map(3) }, function(a, b)
      local t = a:clone()
      t[{ 1, 4 }] = b
      t[t:gt(9)] = 0
      t[2] = b
      return t
    end
  end,
  sort = function() return { map(5, 70) }, function(a) return a:sort() end end,
  topk = function() return { map(5, 700) }, function(a) return a:topk(3) end end,
  cumsum = function() return { map(5, 7) }, function(a) return a:cumsum(1) end end,
  unique = function() return { labels(3, 1, 3) }, function(a) return a:unique() end end,
  to = function() return { map(5, 7) }, function(a) return a:to "bfloat16":to { device = "ref" } end end,
  tolist = function() return { map(5, 7) }, function(a) return orepa.tensor(a:tolist()) end end,
  tostring = function() return { map(20, 20) }, function(a) return { tostring(a) } end end,
  conv2d = function()
    return { map(2, 4, 6, 6), map(8, 4, 3, 3), map(8) }, function(x, w, b)
      return F.conv2d(x, w, b, { padding = 1 })
    end
  end,
  conv2d_groups = function()
    return { map(2, 4, 6, 6), map(8, 2, 3, 3) }, function(x, w)
      return F.conv2d(x, w, { groups = 2, stride = 2 })
    end
  end,
  conv2d_float16 = function()
    return { map(2, 4, 6, 6):to "bfloat16", map(8, 4, 3, 3):to "bfloat16" }, function(x, w) return F.conv2d(x, w) end
  end,
  conv2d_ref = function()
    return { map(2, 4, 6, 6):to "ref", map(8, 4, 3, 3):to "ref" }, function(x, w) return F.conv2d(x, w) end
  end,
  linear = function() return { map(3, 4), map(5, 4), map(5) }, function(x, w, b) return F.linear(x, w, b) end end,
  batch_norm = function()
    return { map(3, 4, 5, 5) }, function(x)
      return F.relu(F.batch_norm(x, { training = true })) + 0
    end
  end,
  running_statistics = function()
    local mean, var = orepa.zeros(4), orepa.ones(4)
    return { map(3, 4, 5, 5), mean, var }, function(x)
      return F.batch_norm(x, { running_mean = mean:clone(), running_var = var:clone(), training = true })
    end
  end,
  pools = function()
    return { map(2, 4, 6, 6) }, function(x)
      return F.max_pool2d(x, { kernel_size = 2 }) + F.avg_pool2d(x, { kernel_size = 2 }) + F.adaptive_avg_pool2d(x, {})
    end
  end,
  softmax = function() return { map(3, 4) }, function(x) return F.softmax(x, 2) end end,
  cross_entropy = function()
    return { map(3, 4) }, function(x)
      return F.cross_entropy(x, labels(0, 3, 1), { label_smoothing = 0.1 })
    end
  end,
  backward_of_ops = backward_of(function()
    return { trained(3, 4), trained(4) }, function(a, b)
      return (a * b):exp():sum(1) + (a - b):norm(2, 1)
    end
  end),
  backward_of_index = backward_of(function()
    return { trained(3, 4) }, function(a)
      return a[{ 1, 1 }] + a:gather(1, labels(2, 0):reshape(2, 1):expand(2, 4))
    end
  end),
  backward_of_conv = backward_of(function()
    return { trained(2, 4, 6, 6), trained(4, 4, 3, 3), trained(4) }, function(x, w, b)
      return F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, w, b, { padding = 1 }), { training = true }) + x), { kernel_size = 2 })
    end
  end),
  backward_of_loss = backward_of(function()
    return { trained(3, 4) }, function(x)
      return F.cross_entropy(x, labels(0, 3, 1))
    end
  end),
  checkpoint = backward_of(function()
    return { trained(3, 4) }, function(x) return orepa.checkpoint(function(a) return (a * a):exp() end, x) end
  end),
  no_grad = function() return { trained(3) }, function(x) return orepa.no_grad(function() return x * 2 end) end end,
  autocast = function() return { map(2, 4, 6, 6), map(8, 4, 3, 3) }, function(x, w)
    return orepa.autocast("bfloat16", function() return F.conv2d(x, w) end)
  end end,
  module = function()
    return {}, function()
      return nn.Conv2d { in_channels = 2, out_channels = 3, kernel_size = 3 }
    end, true
  end,
  repvgg = net_of(function() return nn.RepVGGBlock { in_channels = 4, out_channels = 4, kernel_size = 3 } end),
  orepa_block = net_of(function() return nn.OREPA { in_channels = 4, out_channels = 4, kernel_size = 3, act = "relu" } end),
  declared_block = net_of(function()
    return nn.ReparamBlock { in_channels = 4, out_channels = 4, kernel_size = 3, branches = {
      { name = "a", scale = 1, L.conv { 3 } }, { name = "b", scale = 0.5, L.depthwise { 3, expand = 2 }, L.conv { 1 } } } }
  end),
  deploy = function()
    return {}, function()
      orepa.manual_seed(3)
      return nn.OREPA { in_channels = 4, out_channels = 4, kernel_size = 3 }:deploy()
    end
  end,
  state_dict = function()
    return { nn.Linear { in_features = 3, out_features = 2 } }, function(net)
      return net:state_dict()
    end
  end,
  load_state_dict = function()
    local net, other = nn.Linear { in_features = 3, out_features = 2 }, nn.Linear { in_features = 3, out_features = 2 }
    return { other }, function() net:load_state_dict(other:state_dict()) end
  end,
  clip = function()
    local x = trained(3)
    x:sum():backward()
    return { x }, function() optim.clip_grad_norm_({ x }, 100) end
  end,
  save_and_load = function()
    local path = os.tmpname()
    return { map(3, 4) }, function(x)
      orepa.save(path, { x = x }, { kind = "test" })
      local read = orepa.load(path)
      os.remove(path)
      return read
    end
  end,
  grad = function()
    local a, b = trained(3, 4), trained(4)
    return { a, b }, function()
      local h = a * b
      return orepa.grad({ h:exp():sum(), (h - b):sum() }, { a, h, b }, { retain_graph = true })
    end
  end,
  grad_through_checkpoint = function()
    local a, w = trained(3, 4), trained(4)
    return { a, w }, function()
      return orepa.grad(orepa.checkpoint(function(x) return (x * w):exp() end, a):sum(), { w, a })
    end
  end,
  grad_unused = function()
    local a, w = trained(3, 4), trained(4)
    return { a, w }, function() return orepa.grad(a:sum(), { w, a }, { allow_unused = true })[2] end
  end,
  hooks = function()
    local a = trained(3, 4)
    return { a }, function()
      a.grad = nil
      local h = a * 2
      local hook = a:register_hook(function(g) return g * 2 end)
      local _ <close> = setmetatable({}, { __close = function() hook:remove() end })
      h:register_hook(function(g) return g + 1 end)
      h:register_hook(function() end):remove()
      h:retain_grad();
      (h * h):sum():backward()
      local dh, da = h.grad, a.grad
      a.grad = nil
      return dh, da
    end
  end,
  Function = function()
    local a, b = trained(3, 4), trained(4)
    local op = orepa.Function { name = "op", forward = function(ctx, x, k, y)
      local e = x:exp() * k
      ctx:save(e, y)
      ctx.e = e
      return e * y, x + y, x:argmax(2)
    end, backward = function(ctx, dp, ds)
      local e, y = ctx:saved()
      return dp * e * y + ds, nil, (dp * e + ds):sum(1)
    end }
    return { a, b }, function()
      local p, s = op(a, 2, b)
      return { orepa.grad((p * s):sum(), { a, b }) }
    end
  end,
  Function_in_checkpoint = function()
    local a = trained(3, 4)
    local op = orepa.Function { forward = function(ctx, x) ctx:save(x) return x * x end,
      backward = function(ctx, dy) return dy * ctx:saved() * 2 end }
    return { a }, function() return orepa.grad(orepa.checkpoint(function(x) return op(op(x)) end, a):sum(), a) end
  end,
  make_Function = function() return {}, function() orepa.Function { forward = print, backward = print, name = "n" } end end,
  gradcheck = function()
    local a = trained(2, 2)
    return { a }, function() return { tostring(orepa.gradcheck(function(x) return x * x, x:sum() end, { a })) } end
  end,
  detect_anomaly = function()
    local a = trained(3, 4)
    return { a }, function()
      return orepa.detect_anomaly(function()
        local h = a * a
        return orepa.grad(h:exp():sum(), a)
      end)
    end
  end,
  anomaly = function()
    local a = trained(3, 4)
    return { a }, function()
      local _, message = pcall(orepa.detect_anomaly, function() return (a * 0):log() end)
      if message:find "memory" then error(message, 0) end
      return { message }
    end
  end,
  guard = function()
    return {}, function()
      local _ <close> = orepa.detect_anomaly()
      return orepa.ones(2)
    end
  end,
}
for _, kind in ipairs { "SGD", "AdamW", "RMSprop" } do
  calls["step_of_" .. kind] = function()
    orepa.manual_seed(5)
    local x = trained(3, 4)
    x:mul(x):sum():backward()
    local opt = optim[kind]({ x }, { lr = 0.1 })
    return { x, x.grad }, function() opt:step() end
  end
end

-- ---- each call with each of its allocations failing ----

local function run(name, make, from, many, expected)
  orepa.manual_seed(1)
  local arguments, f, random = make()
  local before = flat(arguments)
  local results = table.pack(failing.call(from, many, f, table.unpack(arguments)))
  local asked = table.remove(results, 1)
  check(orepa.is_grad_enabled(), "%s: gradients are off behind allocation %d", name, from)
  if not results[1] then
    check(says_memory(results[2]), "%s, allocation %d of %d: %s", name, from, asked, tostring(results[2]))
    check(same(before, flat(arguments)), "%s, allocation %d: an argument has changed", name, from)
  elseif expected and not random then
    check(same(expected, flat(table.move(results, 2, #results, 1, {}))), "%s, allocation %d: another result", name, from)
  end
  return asked, results[1], flat(table.move(results, 2, #results, 1, {}))
end

local function live()
  collectgarbage()
  collectgarbage()
  return orepa.memory().live
end

local function check_call(name, make)
  for _ = 1, 2 do run(name, make, EVER, 1) end -- what is made once is there
  local asked, _, expected = run(name, make, EVER, 1)
  local start, failed = live(), 0
  for from = 1, asked + 2 do
    for _, many in ipairs { 1, 2, EVER } do
      local _, ok = run(name, make, from, many, expected)
      if not ok then failed = failed + 1 end
    end
  end
  run(name, make, EVER, 1, expected)
  check(live() <= start, "%s: %d bytes of tensors are left", name, live() - start)
  check(failed > 0, "%s: no allocation failed", name)
  return asked, failed
end

-- ---- random calls on shared tensors ----

local shared = { -- of tensors of one shape (4, 6)
  function(a, b) return a + b end, function(a, b) return a * b end, function(a) return a:exp():clamp(-3, 3) end,
  function(a) return F.softmax(a, 2) end, function(a, b) return a:matmul(b:transpose()):matmul(b):clamp(-3, 3) end,
  function(a) return a:sort(2) end, function(a) return a[{ 4, 1, 2, 2 }] end, function(a, b) return a:gt(0):where(a, b) end,
  function(a) return a:cumsum(1):clamp(-3, 3) end, function(a) return a:reshape(3, 8):reshape(4, 6) end,
  function(a) return a:transpose():contiguous():transpose() end,
  function(a, b) return orepa.cat({ a, b }, 1):slice(1, 3, 6) end,
  function(a) return F.batch_norm(a, { training = true }) end, function(a, b) return (a - b):norm(2, 1) + a end,
  function(a)
    F.relu(a * a):sum():backward()
    return a
  end,
  function(a, b) return orepa.checkpoint(function(x, y) return (x * y):sigmoid() end, a, b) end,
  function(a, b)
    orepa.no_grad(function() a:detach():copy_(b:detach()) end)
    return a
  end,
}

local function sequence(seed)
  math.randomseed(seed)
  orepa.manual_seed(seed)
  local pool, failed = {}, 0
  for k = 1, 4 do pool[k] = trained(4, 6) end
  for _ = 1, 25 do
    local f, a, b = shared[math.random(#shared)], pool[math.random(#pool)], pool[math.random(#pool)]
    local _, ok, y = failing.call(math.random(60), ({ 1, 3, EVER })[math.random(3)], f, a, b)
    if ok then
      check(orepa.is_tensor(y) and #y.shape == 2, "sequence %d: no tensor", seed)
      pool[math.random(#pool)] = y
    else
      check(says_memory(y) or y:find "was freed" or y:find "changed" or y:find "no graph", "sequence %d: %s", seed,
        tostring(y))
      failed = failed + 1
    end
    check(orepa.is_grad_enabled(), "sequence %d: gradients are off", seed)
  end
  for _, t in ipairs(pool) do check(#t:detach():tolist() == 4, "sequence %d: a tensor can't be read", seed) end
  return failed
end

-- ---- the command ----

local what = ...
local asked, failed, count = 0, 0, 0
if what == "calls" then
  local names = {}
  for name in pairs(calls) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    local a, f = check_call(name, calls[name])
    asked, failed, count = asked + a, failed + f, count + 1
  end
else
  local start
  for seed = 1, 200 do
    failed, count = failed + sequence(seed), count + 1
    if seed == 100 then start = live() end -- what is kept for good, as kernels' scratch, is there
  end
  check(live() <= start, "%d bytes of tensors are left", live() - start)
end
io.stderr:write(("%d %s, %d allocations, %d errors\n"):format(count, what, asked, failed))
