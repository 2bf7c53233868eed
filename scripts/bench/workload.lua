-- The work that benchmarks time: a network with a batch of random images, one step of it, and the operations in a step.

local orepa = require "orepa"
local models = require "orepa.models"
local measure = require "measure"
local F, optim = orepa.F, orepa.optim

local workload = {}

-- Each calls a function of a forward pass so that it computes in that precision. Where bfloat16 does not pay, autocast says so
-- and computes in float32.
workload.precisions = {
  fp32 = function(f, ...) return f(...) end,
  bf16 = function(f, ...)
    local _ <close> = orepa.autocast "bfloat16"
    return f(...)
  end,
}
workload.modes = { "train", "eval", "deploy" }

function workload.precision_names()
  local names = {}
  for name in pairs(workload.precisions) do names[#names + 1] = name end
  table.sort(names)
  return names
end

-- ---- options that all scripts take ----

-- `defaults` may change what an option is if it is not given.
function workload.add_options(parser, defaults)
  local function default(name, otherwise) return defaults and defaults[name] or otherwise end
  parser:option("--model", "name of the network", default("model", "resnet18"))
  parser:option("--reparam", "blocks of the network: none, dbb, orepa, repvgg, orepa_vgg", default("reparam", "orepa"))
  parser:option("--batch-size", "images in a step", default("batch_size", 16)):convert(measure.at_least(1))
  parser:option("--size", "height and width of the images", default("size", 224)):convert(measure.at_least(1))
  parser:option("--width", "width multiplier", 1.0):convert(tonumber)
  parser:option("--classes", "classes of the network", 1000):convert(measure.at_least(1))
  parser:option("--threads", "threads of the kernels", orepa.threads()):convert(measure.at_least(1))
  parser:option("--precision", "what convolutions compute in", "fp32"):choices(workload.precision_names())
  parser:option("--rounds", "how often everything is run", default("rounds", 5)):convert(measure.at_least(1))
  parser:flag("--json", "one JSON object a line instead of text")
end

-- What was run, as those options say it: "resnet18 orepa, width 1, batch 16, 224 px, train, fp32".
function workload.title(o)
  return ("%s %s, width %g, batch %d, %d px%s, %s"):format(o.model, o.reparam, o.width, o.batch_size, o.size,
    o.mode and ", " .. o.mode or "", o.precision)
end

function workload.network(o)
  return models.create(o.model, { reparam = o.reparam, classes = o.classes, width = o.width })
end

-- ---- operations ----

local function product(list)
  local n = 1
  for _, value in ipairs(list) do n = n * value end
  return n
end

-- Calls f while orepa.F's function `name` also tells `seen` its arguments and what it gave.
local function watched(name, seen, f)
  local original = F[name]
  F[name] = function(...)
    local y = original(...)
    seen(y, ...)
    return y
  end
  local ok, message = pcall(f)
  F[name] = original
  if not ok then error(message, 0) end
end

local function conv_layer(y, x, w, bias, options)
  if type(bias) == "table" then bias, options = nil, bias end
  local geometry = {}
  for _, name in ipairs { "stride", "padding", "dilation", "groups" } do geometry[name] = (options or {})[name] end
  return { kind = "conv", macs = product(y.shape) * product(w.shape) // w.shape[1], input = x.shape, kernel = w.shape,
    output = y.shape, geometry = geometry, bias = bias ~= nil }
end

-- Convolutions and linear layers of a network, in the order in which a pass meets them, for `batch_size` images: kind,
-- multiply-adds (of the direct convolution), input, kernel, output, geometry. `net` is left in evaluation mode.
function workload.layers(net, batch_size, size, channels)
  local layers = {}
  local function add(layer)
    layer.macs, layer.input[1], layer.output[1] = layer.macs * batch_size, batch_size, batch_size
    layers[#layers + 1] = layer
  end
  local function pass()
    orepa.no_grad(function() net:eval()(orepa.zeros(1, channels or 3, size, size)):release() end)
  end
  watched("conv2d", function(...) add(conv_layer(...)) end, function()
    watched("linear", function(y, x, w)
      add { kind = "linear", macs = product(y.shape) * w.shape[2], input = x.shape, kernel = w.shape, output = y.shape }
    end, pass)
  end)
  return layers
end

-- A number or {height, width} as in " stride 2", nothing for 1.
local function pair_text(name, value)
  if type(value) == "table" and value[1] == value[2] then value = value[1] end
  if type(value) == "table" then return (" %s %dx%d"):format(name, value[1], value[2]) end
  return value and value ~= 1 and (" %s %d"):format(name, value) or ""
end

-- The kind of a convolution's kernel, "3x3 stride 2", and the whole geometry, "3x3 stride 2, 64 -> 128, 56x56", spelled as
-- orepa.timings spells it.
function workload.kernel_text(layer)
  local g = layer.geometry
  return ("%dx%d%s%s%s"):format(layer.kernel[3], layer.kernel[4], pair_text("stride", g.stride),
    pair_text("dilation", g.dilation), pair_text("groups", g.groups))
end

function workload.geometry_text(layer)
  return ("%s, %d -> %d, %dx%d"):format(workload.kernel_text(layer), layer.input[2], layer.kernel[1], layer.input[3],
    layer.input[4])
end

-- Operations of a step: two for each multiply-add, once forward, and in training three times, less the gradient of the images.
function workload.operations(layers, mode)
  local macs, first = 0, nil
  for _, layer in ipairs(layers) do
    macs = macs + layer.macs
    first = first or layer.kind == "conv" and layer.macs
  end
  return mode == "train" and 2 * (3 * macs - (first or 0)) or 2 * macs
end

-- The type that convolutions give in a precision, on this processor.
function workload.dtype(compute)
  local _ <close> = orepa.no_grad()
  return compute(F.linear, orepa.ones(1, 1), orepa.ones(1, 1)).dtype
end

-- ---- a network and its steps ----

-- A step is parts, each {name, function}, called in turn; `compute` is one of the precisions.
local function train_parts(net, compute, x, labels)
  local optimizer = optim.SGD(optim.param_groups(net), { lr = 0.01, momentum = 0.9, weight_decay = 1e-4 })
  local loss
  return {
    { "forward", function()
      local logits <close> = compute(net, x)
      loss = compute(F.cross_entropy, logits, labels)
    end },
    { "backward", function()
      optimizer:zero_grad()
      loss:backward()
      loss:release()
    end },
    { "update", function() optimizer:step() end },
  }
end

local function eval_parts(net, compute, x)
  return { { "forward", function() orepa.no_grad(function() compute(net, x):release() end) end } }
end

local function random_labels(count, classes)
  local list = {}
  for k = 1, count do list[k] = math.random(0, classes - 1) end
  return orepa.tensor(list):to "int64"
end

-- A network and a batch by the options of add_options and `mode`, ready to step: {net=, parts=, layers=, operations=, dtype=}.
function workload.create(o)
  local mode, compute = o.mode or "train", workload.precisions[o.precision]
  orepa.manual_seed(1)
  orepa.set_threads(o.threads)
  local net = workload.network(o)
  local self = { net = net, layers = workload.layers(net, o.batch_size, o.size), dtype = workload.dtype(compute) }
  self.operations = workload.operations(self.layers, mode)
  local x = orepa.randn(o.batch_size, 3, o.size, o.size)
  if mode == "train" then
    self.parts = train_parts(net:train(), compute, x, random_labels(o.batch_size, o.classes))
  else
    if mode == "deploy" then net:deploy() end
    self.parts = eval_parts(net:eval(), compute, x)
  end
  measure.reset_peak_memory()
  return self
end

function workload.step(work)
  for _, part in ipairs(work.parts) do part[2]() end
end

-- `count` steps after `warm_up` others: their seconds, and Lua's collections among them.
function workload.time_steps(work, warm_up, count)
  for _ = 1, warm_up do workload.step(work) end
  local before, seconds = orepa.memory(), {}
  for k = 1, count do
    local start = orepa.clock()
    workload.step(work)
    seconds[k] = orepa.clock() - start
  end
  local after = orepa.memory()
  return { seconds = seconds, collections = after.collections - before.collections,
    collection_seconds = after.collection_seconds - before.collection_seconds }
end

return workload
