-- nn.init: initial values. Each function writes into a tensor, outside of any graph, and gives it back.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"

local init = {}

local function check_tensor(where, t, rank)
  checks.tensor(where, t)
  if not t.dtype:find "float" or #t.shape < (rank or 0) then
    core.fail(("%s: floats of at least %d dimensions expected, got %s of %d"):format(where, rank or 0, t.dtype, #t.shape))
  end
end

local function check_number(where, name, value, lowest)
  if type(value) ~= "number" or value ~= value or (lowest and value < lowest) then
    core.fail(("%s: %s is %s, a number%s expected"):format(where, name, tostring(value),
      lowest and (" of at least %g"):format(lowest) or ""))
  end
end

local function write(t, values)
  core.no_grad(function() t:copy_(values) end)
  values:release()
  return t
end

-- Random numbers for t, of a type that has a generator.
local function drawn(generator, t)
  return generator(t.shape, { dtype = t.dtype == "float64" and "float64" or "float32", device = t.device })
end

-- ---- without a rule ----

function init.constant_(t, value)
  check_tensor("constant_", t)
  check_number("constant_", "the value", value)
  core.no_grad(function() t:fill_(value) end)
  return t
end

function init.zeros_(t)
  check_tensor("zeros_", t)
  return init.constant_(t, 0)
end

function init.ones_(t)
  check_tensor("ones_", t)
  return init.constant_(t, 1)
end

function init.uniform_(t, lowest, highest)
  lowest, highest = lowest or 0, highest or 1
  check_tensor("uniform_", t)
  check_number("uniform_", "the lowest", lowest)
  check_number("uniform_", "the highest", highest, lowest)
  return write(t, drawn(core.rand, t):multiply_add_(highest - lowest, lowest))
end

function init.normal_(t, mean, std)
  mean, std = mean or 0, std or 1
  check_tensor("normal_", t)
  check_number("normal_", "the mean", mean)
  check_number("normal_", "the deviation", std, 0)
  return write(t, drawn(core.randn, t):multiply_add_(std, mean))
end

-- ---- by how many inputs and outputs an element of the layer has ----

function init.fans(t)
  check_tensor("fans", t, 2)
  local window = 1
  for d = 3, #t.shape do window = window * t.shape[d] end
  return t.shape[2] * window, t.shape[1] * window
end

local gains = { linear = 1, conv2d = 1, sigmoid = 1, tanh = 5 / 3, relu = math.sqrt(2), selu = 3 / 4 }

function init.gain(nonlinearity, slope)
  if nonlinearity == "leaky_relu" then
    slope = slope or 0.01
    check_number("gain", "the slope", slope)
    return math.sqrt(2 / (1 + slope * slope))
  end
  if not gains[nonlinearity] then
    core.fail(("gain: there is no nonlinearity '%s' (there are leaky_relu %s)"):format(tostring(nonlinearity),
      table.concat(options.names(gains), " ")))
  end
  return gains[nonlinearity]
end

-- Xavier's deviation: gain * sqrt(2 / (fan_in + fan_out)).
local function xavier(where, t, given)
  check_tensor(where, t, 2)
  local o = options(where, given, { gain = 1 })
  check_number(where, "gain", o.gain, 0)
  local fan_in, fan_out = init.fans(t)
  return o.gain * math.sqrt(2 / math.max(1, fan_in + fan_out))
end

-- Kaiming's: gain / sqrt(fan).
local function kaiming(where, t, given)
  check_tensor(where, t, 2)
  local o = options(where, given, { slope = 0, mode = "fan_in", nonlinearity = "leaky_relu" })
  if o.mode ~= "fan_in" and o.mode ~= "fan_out" then
    core.fail(('%s: mode is %s, "fan_in" or "fan_out" expected'):format(where, tostring(o.mode)))
  end
  local fan_in, fan_out = init.fans(t)
  return init.gain(o.nonlinearity, o.slope) / math.sqrt(math.max(1, o.mode == "fan_in" and fan_in or fan_out))
end

for name, deviation in pairs { xavier = xavier, kaiming = kaiming } do
  init[name .. "_uniform_"] = function(t, o)
    local bound = math.sqrt(3) * deviation(name .. "_uniform_", t, o)
    return init.uniform_(t, -bound, bound)
  end
  init[name .. "_normal_"] = function(t, o)
    return init.normal_(t, 0, deviation(name .. "_normal_", t, o))
  end
end

-- ---- orthogonal: normal numbers, each row without what lies in the rows before it ----

-- Gram and Schmidt's way; what rounding leaves of the rows before is taken off a second time, and that is enough.
local function orthonormal(rows)
  for k = 1, rows.shape[1] do
    local row = rows:slice(1, k, k)
    if k > 1 then
      local before = rows:slice(1, 1, k - 1)
      for _ = 1, 2 do row:sub_(row:matmul(before:transpose()):matmul(before)) end
    end
    row:mul_(1 / math.sqrt((row * row):sum():item()))
  end
  return rows
end

function init.orthogonal_(t, given)
  check_tensor("orthogonal_", t, 2)
  local o = options("orthogonal_", given, { gain = 1 })
  check_number("orthogonal_", "gain", o.gain, 0)
  if t:count() == 0 then return t end
  local rows = t.shape[1]
  local columns = t:count() // rows
  local tall = rows > columns
  local values = core.no_grad(function()
    local short = tall and core.randn(columns, rows) or core.randn(rows, columns)
    local long = orthonormal(short):mul_(o.gain)
    return (tall and long:transpose() or long):reshape(t.shape)
  end)
  return write(t, values)
end

-- ---- documentation ----

local w = "nn.Linear{in_features = 4, out_features = 2}.weight"
for name, text in pairs {
  constant_ = { "t, value", "Writes one value.", ", 0.5" },
  zeros_ = { "t", "Writes zeros.", "" },
  ones_ = { "t", "Writes ones.", "" },
  uniform_ = { "t, lowest, highest", "Uniform numbers between two bounds, 0 and 1 if not given.", ", -1, 1" },
  normal_ = { "t, mean, std", "Normal numbers of a mean (0) and a deviation (1).", ", 0, 0.01" },
  xavier_uniform_ = { "t, {gain=}", "Uniform within +-gain * sqrt(6 / (fan_in + fan_out)) (Glorot, Bengio, 2010).",
    ', {gain = nn.init.gain "tanh"}' },
  xavier_normal_ = { "t, {gain=}", "Normal of deviation gain * sqrt(2 / (fan_in + fan_out)).", "" },
  kaiming_uniform_ = { "t, {slope=, mode=, nonlinearity=}", "Uniform within +-gain * sqrt(3 / fan) (He et al., 2015); the gain "
    .. "is nn.init.gain(nonlinearity, slope), of leaky_relu with slope 0 if not given; mode is \"fan_in\" or \"fan_out\".",
    ', {nonlinearity = "relu"}' },
  kaiming_normal_ = { "t, {slope=, mode=, nonlinearity=}", "Normal of deviation gain / sqrt(fan), with the options of "
    .. "kaiming_uniform_.", ', {mode = "fan_out"}' },
  orthogonal_ = { "t, {gain=}", "Rows, or columns where those are fewer, of length `gain` at right angles to each other; what "
    .. "follows the first dimension counts as one (Saxe et al., 2013).", "" },
} do
  document("nn.init." .. name, ("nn.init.%s(%s) -> t\n%s\n> nn.init.%s(%s%s)"):format(name, text[1], text[2], name, w, text[3]))
end
document("nn.init.fans", [[
  nn.init.fans(t) -> fan_in, fan_out
  With how many inputs an output of a layer with weight t is made, and how many outputs see an input: the second and the first
  size, times those that follow.
  > nn.init.fans(orepa.ones(8, 4, 3, 3))]])
document("nn.init.gain", [[
  nn.init.gain(nonlinearity, slope) -> number
  By how much weights before a function should be larger: "linear", "conv2d", "sigmoid" 1, "tanh" 5/3, "relu" sqrt(2),
  "leaky_relu" sqrt(2 / (1 + slope^2)) with slope 0.01 if not given, "selu" 3/4.
  > nn.init.gain("leaky_relu", 0.2)]])

return { init = init }
