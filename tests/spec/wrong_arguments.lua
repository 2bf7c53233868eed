-- Calls documented functions with everything that is wrong: a Lua error or a valid result is right, a crash ends this process,
-- which arguments_spec.lua starts. usage: orepa wrong_arguments.lua PART PARTS; the file `last` tells what was called.

local orepa = require "orepa"
local models, datasets = require "orepa.models", require "orepa.datasets"
local part, parts = tonumber(arg[1]), tonumber(arg[2])

local LIMIT = 64 << 20 -- bytes of tensors
local SAMPLES = 1500

-- ---- values ----

local function made(f)
  return { make = f }
end

-- Each is a value, or `made` anew for each call, since calls change it.
local values = table.pack(
  nil, false, true, 0, 1, -1, 2, 3, 0.5, -7, 1 << 31, (1 << 31) - 1, -(1 << 31), 1 << 32, (1 << 53) + 1, math.maxinteger,
  math.mininteger, 1e300, -1e300, 0 / 0, 1 / 0, "", "cpu", "float64", "bfloat16", "no such thing", ("x"):rep(5000), "a\0b", print,
  io.stdout,
  made(function() return {} end), made(function() return { 1, 2 } end), made(function() return { 1, x = 2 } end),
  made(function() return { dtype = "int64" } end), made(function() return { device = 1 } end),
  made(function() return { { 1, 2 }, { 3 } } end), made(function() return { math.maxinteger, 3 } end),
  made(function() return { -1, 2 } end), made(function() return { {}, {} } end),
  made(function() return { orepa.ones(2), "x" } end), made(function() return { orepa.ones(2), orepa.ones(2) } end),
  made(function() return coroutine.create(print) end), made(function()
    local guard <close> = orepa.no_grad()
    return guard
  end),
  made(function() return orepa.tree.leaf { slot = 1, input = 1, output = 1 } end),
  made(function() return orepa.ones() end), made(function() return orepa.rand(3) end),
  made(function() return orepa.rand(2, 3) end), made(function() return orepa.rand(2, 4, 5, 3) end),
  made(function() return orepa.rand(2, 4, 5, 3):requires_grad_() end), made(function() return orepa.zeros(0, 3) end),
  made(function() return orepa.zeros({ 2, 0, 4, 4 }) end), made(function() return orepa.zeros(1, 1, 1, 1, 1, 1) end),
  made(function() return orepa.tensor({ 0, 1 }, { dtype = "int64" }) end),
  made(function() return orepa.tensor({ -1, math.maxinteger }, { dtype = "int64" }) end),
  made(function() return orepa.tensor { true, false } end),
  made(function() return orepa.ones({ 2, 3 }, { dtype = "uint8" }) end),
  made(function() return orepa.ones({ 2, 3 }, { dtype = "bfloat16" }) end),
  made(function() return orepa.ones({ 4, 4, 1, 1 }, { dtype = "float64", device = "ref" }) end),
  made(function() return orepa.rand(3, 2):transpose() end), made(function() return orepa.ones(1, 3):expand(2, 3) end),
  made(function() return orepa.tensor { 0 / 0, 1 / 0 } end),
  made(function()
    local t = orepa.ones(2)
    t:release()
    return t
  end)
)
local COUNT = values.n

local state = 12345
local function below(n)
  state = (state * 6364136223846793005 + 1442695040888963407) & math.maxinteger
  return (state >> 33) % n + 1
end

local function value(k)
  local v = values[k]
  if type(v) == "table" and v.make then return v.make() end
  return v
end

-- ---- one call ----

local log = assert(io.open("last", "w"))
log:setvbuf "no"

local function text_of(v)
  if orepa.is_tensor(v) then return "tensor" end
  if type(v) ~= "table" then return tostring(v):sub(1, 40) end
  local entries = {}
  for key, item in pairs(v) do
    entries[#entries + 1] = ("%s=%s"):format(key, orepa.is_tensor(item) and "tensor" or tostring(item))
  end
  return "{" .. table.concat(entries, ", "):sub(1, 80) .. "}"
end

local function note(name, arguments)
  local words = { name }
  for k = 1, arguments.n do words[#words + 1] = text_of(arguments[k]) end
  log:seek "set"
  log:write((table.concat(words, " | "):gsub("%c", "?")), "\n")
end

local function restore()
  orepa.set_memory_limit(LIMIT)
  orepa.set_memory_limit(LIMIT, "ref")
  orepa.set_threads(2)
  assert(orepa.is_grad_enabled(), "gradients are off")
end

-- What a call gave must be whole: tensors of it can be read.
local function look_at(v)
  if orepa.is_tensor(v) then
    local ok, count = pcall(v.count, v)
    if ok and count < 100000 then return #tostring(v) end
  end
end

local called, errors = 0, 0
local function attempt(name, f, arguments)
  called = called + 1
  note(name, arguments)
  local results = table.pack(pcall(f, table.unpack(arguments, 1, arguments.n)))
  if not results[1] then
    errors = errors + 1
    if type(results[2]) ~= "string" then error("not a message: " .. tostring(results[2])) end
  end
  for k = 2, results.n do
    local v = results[k]
    local guards = name == "orepa.no_grad" or name == "orepa.autocast" or name == "orepa.detect_anomaly"
    if guards and type(v) == "userdata" and not orepa.is_tensor(v) then
      local _ <close> = v
    end
    look_at(v)
  end
  restore()
end

-- ---- functions ----

local roots = { orepa = orepa, F = orepa.F, nn = orepa.nn, ["nn.init"] = orepa.nn.init, optim = orepa.optim,
  data = orepa.data, train = orepa.train, reparam = orepa.reparam, models = models, datasets = datasets, tree = orepa.tree }

local tensors = {}
for k = 1, COUNT do
  if type(values[k]) == "table" and values[k].make and orepa.is_tensor(value(k)) then tensors[#tensors + 1] = k end
end

local function options_in(documentation)
  local names = {}
  for name in documentation:match("^[^\n]*"):gmatch "([%a_]+)=" do names[#names + 1] = name end
  return names
end

-- Calls that are right, to which one wrong option is added.
local bases = {
  ["F.conv2d"] = function() return { orepa.rand(2, 4, 5, 3), orepa.rand(4, 4, 3, 3), {} } end,
  ["F.conv_transpose2d"] = function() return { orepa.rand(2, 4, 5, 3), orepa.rand(4, 4, 3, 3), {} } end,
  ["F.interpolate"] = function() return { orepa.rand(2, 4, 5, 3), { scale_factor = 2 } } end,
  ["F.pad"] = function() return { orepa.rand(2, 4, 5, 3), { 1, 2, 0, 1 }, {} } end,
  ["F.group_norm"] = function() return { orepa.rand(2, 4, 5, 3), 2, {} } end,
  ["F.layer_norm"] = function() return { orepa.rand(2, 4, 5, 3), 3, {} } end,
  ["F.embedding"] = function() return { orepa.tensor({ 0, 1 }, { dtype = "int64" }), orepa.rand(2, 3), {} } end,
  ["F.nll_loss"] = function() return { orepa.rand(2, 3), orepa.zeros({ 2 }, { dtype = "int64" }), {} } end,
  ["F.gelu"] = function() return { orepa.rand(2, 3), {} } end,
  ["nn.ConvTranspose2d"] = function() return { { in_channels = 2, out_channels = 2, kernel_size = 2 } } end,
  ["nn.GroupNorm"] = function() return { { num_groups = 2, num_channels = 4 } } end,
  ["nn.LayerNorm"] = function() return { { normalized_shape = 4 } } end,
  ["nn.Embedding"] = function() return { { num_embeddings = 2, embedding_dim = 2 } } end,
  ["F.batch_norm"] = function() return { orepa.rand(2, 4, 5, 3), { training = true } } end,
  ["F.max_pool2d"] = function() return { orepa.rand(2, 4, 5, 3), { kernel_size = 2 } } end,
  ["F.avg_pool2d"] = function() return { orepa.rand(2, 4, 5, 3), { kernel_size = 2 } } end,
  ["F.adaptive_avg_pool2d"] = function() return { orepa.rand(2, 4, 5, 3), {} } end,
  ["F.adaptive_max_pool2d"] = function() return { orepa.rand(2, 4, 5, 3), {} } end,
  ["F.cross_entropy"] = function() return { orepa.rand(2, 3), orepa.zeros({ 2 }, { dtype = "int64" }), {} } end,
  ["F.dropout"] = function() return { orepa.rand(2, 3), {} } end,
  ["F.binary_cross_entropy_with_logits"] = function() return { orepa.rand(2, 3), orepa.rand(2, 3), {} } end,
  ["F.mse_loss"] = function() return { orepa.rand(2, 3), orepa.rand(2, 3), {} } end,
  ["F.smooth_l1_loss"] = function() return { orepa.rand(2, 3), orepa.rand(2, 3), {} } end,
  ["F.kl_div"] = function() return { orepa.rand(2, 3), orepa.rand(2, 3), {} } end,
  ["nn.init.xavier_uniform_"] = function() return { orepa.rand(2, 3), {} } end,
  ["nn.init.kaiming_normal_"] = function() return { orepa.rand(2, 3), {} } end,
  ["nn.init.orthogonal_"] = function() return { orepa.rand(2, 3), {} } end,
  ["data.image_batch"] = function()
    return { orepa.rand(4, 3, 5, 6), orepa.zeros({ 2 }, { dtype = "int64" }), { mean = { 0, 0, 0 } } }
  end,
  ["orepa.sgd_step"] = function() return { { orepa.ones(2):requires_grad_() }, {}, { 1 }, { 0 }, {} } end,
  ["orepa.zeros"] = function() return { 2, 3, {} } end,
  ["orepa.arange"] = function() return { 5, {} } end,
  ["orepa.grad"] = function()
    local x = orepa.ones(2):requires_grad_()
    return { (x * x):sum(), x, {} }
  end,
  ["orepa.gradcheck"] = function() return { function(x) return x * x end, { orepa.ones(2):requires_grad_() }, {} } end,
  ["orepa.detect_anomaly"] = function() return { function() end, {} } end,
  ["orepa.Function"] = function() return { { forward = print, backward = print } } end,
  ["t:backward"] = function() return { orepa.ones(1):requires_grad_(), nil, {} } end,
  ["t:sum"] = function() return { orepa.rand(2, 3), 1, {} } end,
  ["t:to"] = function() return { orepa.rand(2, 3), {} } end,
}

local function one_wrong_option(name, f, names)
  for _, option in ipairs(bases[name] and names or {}) do
    for k = 1, 2 * COUNT do -- a value, or a pair of it
      local arguments = bases[name]()
      local v = value((k - 1) % COUNT + 1)
      arguments[#arguments][option] = k > COUNT and { v, 1 } or v
      attempt(name, f, table.pack(table.unpack(arguments)))
    end
  end
end

-- Numbers as the only thing that is wrong, in each place.
local function one_wrong_number(name, f)
  for k = 1, COUNT do
    if type(values[k]) == "number" then
      for position = 2, 5 do
        local arguments = { orepa.rand(2, 4, 5, 3), 1, 1, 1, 1, n = 5 }
        arguments[position] = values[k]
        for n = position, 5 do
          arguments.n = n
          attempt(name, f, arguments)
        end
      end
    end
  end
end

local function random_options(names)
  local options = {}
  for _ = 1, below(3) do options[names[below(#names)]] = value(below(COUNT)) end
  return options
end

local function random_argument(k, method, names)
  if method and k == 1 and below(8) > 1 then return value(tensors[below(#tensors)]) end
  if #names > 0 and below(3) == 1 then return random_options(names) end
  if below(3) == 1 then return value(tensors[below(#tensors)]) end
  return value(below(COUNT))
end

local function try_all(name, f, documentation)
  local method, names = name:sub(1, 2) == "t:", options_in(documentation or "")
  attempt(name, f, table.pack())
  for k = 1, COUNT do
    attempt(name, f, table.pack(value(k)))
    if method then attempt(name, f, table.pack(orepa.rand(2, 4, 5, 3), value(k))) end
  end
  one_wrong_option(name, f, names)
  if method then one_wrong_number(name, f) end
  for _ = 1, SAMPLES do
    local arguments = { n = below(4) }
    for k = 1, arguments.n do arguments[k] = random_argument(k, method, names) end
    attempt(name, f, arguments)
  end
end

local function find(name)
  if name:sub(1, 2) == "t:" then return orepa.methods[name:sub(3)] end
  local root, rest = name:match "^([%a.]+)%.(.+)$"
  return root and roots[root] and roots[root][rest]
end

local names = {}
for name in pairs(orepa.documentation) do
  if find(name) then names[#names + 1] = name end
end
for name in pairs(orepa.tree) do names[#names + 1] = "tree." .. name end
table.sort(names)

restore()
for k, name in ipairs(names) do
  if k % parts == part - 1 then
    state = k
    try_all(name, find(name), orepa.documentation[name])
    assert(orepa.ones(2, 3):sum():item() == 6)
  end
end
io.stderr:write(("%d calls, %d errors\n"):format(called, errors))
