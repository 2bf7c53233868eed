-- nn.summary: what a network is made of and what it costs: shapes, parameters, multiply-adds and memory of each module, seen in
-- one forward pass, and what would be left of it deployed.

local core = require "orepa.core"
local columns = require "orepa.columns"
local document = require "orepa.document"
local internal = require("orepa.nn.module").internal
local options = require "orepa.options"
local trace = require "orepa.trace"

-- ---- inputs: {1, 3, 224, 224}, a tensor, or a list of such ----

-- A list of whole numbers and nothing else.
local function is_shape(value)
  if type(value) ~= "table" then return false end
  local count = 0
  for _, size in pairs(value) do
    if not math.tointeger(size) then return false end
    count = count + 1
  end
  return count > 0 and count == #value
end

local function input_of(value, kind, where)
  if core.is_tensor(value) then return value end
  if not is_shape(value) then
    core.fail(("summary: %s is %s; a shape like {1, 3, 224, 224} or a tensor expected"):format(where,
      type(value) == "table" and "a table that is no list of sizes" or type(value)))
  end
  return core.zeros(value, kind)
end

local function inputs_of(net, given, dtype)
  local p = net:parameters()[1]
  local kind = { dtype = dtype or p and p.dtype or "float32", device = p and p.device or "cpu" }
  if core.is_tensor(given) or is_shape(given) then return { input_of(given, kind, "the input") } end
  if type(given) ~= "table" or #given == 0 then return { input_of(given, kind, "the input") } end
  local list = {}
  for k, value in ipairs(given) do list[k] = input_of(value, kind, ("input %d"):format(k)) end
  return list
end

-- ---- a pass that leaves nothing behind ----

-- Modes and buffers as they are now; the guard puts them back, and the random numbers.
local function keep_state(net)
  local modes, buffers, rng = {}, {}, core.rng_state()
  for _, module in net:named_modules() do
    modes[module] = module.training
    module:each(function(name, t, kind)
      if kind == "buffer" then
        buffers[#buffers + 1] = { module = module, name = name, t = t, version = t:version(), copy = t:detach():clone() }
      end
    end)
  end
  return setmetatable({}, { __close = function()
    core.set_rng_state(rng)
    for module, mode in pairs(modes) do rawset(module, "training", mode) end
    for _, b in ipairs(buffers) do
      if rawget(b.module, b.name) ~= b.t then rawset(b.module, b.name, b.t) end
      if b.t:version() ~= b.version then core.no_grad(function() b.t:copy_(b.copy) end) end
    end
  end })
end

local sizes = { float64 = 8, int64 = 8, float32 = 4, int32 = 4, bfloat16 = 2, float16 = 2, uint8 = 1, bool = 1 }

-- Calls visit(t) for the tensors in a value, which may be tables of tables; lists in order, then names, sorted.
local function each_tensor(value, visit, seen)
  if core.is_tensor(value) then return visit(value) end
  if type(value) ~= "table" or seen[value] or internal.is_module(value) then return end
  seen[value] = true
  for _, entry in ipairs(value) do each_tensor(entry, visit, seen) end
  local named = {}
  for key in pairs(value) do
    if type(key) == "string" then named[#named + 1] = key end
  end
  table.sort(named)
  for _, key in ipairs(named) do each_tensor(value[key], visit, seen) end
end

-- One forward pass as in training. Gives the trace and, for each module that was called, the shapes of each call's outputs and
-- their bytes together.
local function run(net, inputs)
  local outputs = {}
  local function see(module, results)
    local shapes = {}
    local seen = outputs[module] or { bytes = 0, calls = {} }
    outputs[module] = seen
    each_tensor(results, function(t)
      shapes[#shapes + 1] = t.shape
      seen.bytes = seen.bytes + t:count() * sizes[t.dtype]
    end, {})
    seen.calls[#seen.calls + 1] = shapes
  end
  local _ <close> = keep_state(net)
  for _, module in net:named_modules() do rawset(module, "training", true) end
  local t = trace.run(see, function()
    local results = table.pack(net(table.unpack(inputs)))
    collectgarbage() -- so that what has memory at the end is in use
    return results
  end)
  return t, outputs
end

-- ---- adding up ----

-- By module, without what is inside: multiply-adds on maps, those of squeezing, and the bytes that its calls got and are in use.
local function costs(t)
  local owners = trace.owners(t)
  local macs, squeeze, kept = {}, {}, {}
  for _, module in ipairs(t.modules) do macs[module], squeeze[module], kept[module] = 0, 0, 0 end
  local module_of = {}
  for k, e in trace.each(t) do
    if e.kind == "module" then module_of[k] = t.modules[e.number] end
    local module = module_of[owners[k]]
    if module then
      local list = e.op == "squeeze" and squeeze or macs
      list[module], kept[module] = list[module] + e.macs, kept[module] + e.kept
    end
  end
  return macs, squeeze, kept
end

local function product(shape)
  local n = 1
  for _, size in ipairs(shape) do n = n * size end
  return n
end

-- What is left of a block: the parameters and multiply-adds of its one convolution. nil: it is no block, or deployed already.
local function convolution_of(module, seen)
  if not trace.is_block(module) or module.mode == "deploy" then return nil end
  local o, macs = module.options, 0
  local each = o.in_channels // o.groups * product(o.kernel_size) -- of an output channel
  for _, shapes in ipairs(seen and seen.calls or {}) do macs = macs + product(shapes[1]) * each end
  return { parameters = o.out_channels * (each + 1), macs = macs }
end

local function new_row(module, path, found)
  local seen = found.outputs[module] or { calls = {}, bytes = 0 }
  return { path = path, type = trace.type_of(module), calls = #seen.calls, shapes = seen.calls[1] or {},
    shape = seen.calls[1] and seen.calls[1][1], bytes = seen.bytes, kept = found.kept[module] or 0, parameters = 0, trained = 0,
    macs = found.macs[module] or 0, squeeze = found.squeeze[module] or 0 }
end

local function add(row, other, ...)
  for _, field in ipairs { ... } do row[field] = row[field] + other[field] end
end

-- Adds the rows of a module and of those inside, and gives the module's; nil if it has one: what is shared counts where it comes
-- first. `gone`: it goes when the block around it is deployed.
local function add_rows(rows, known, module, path, found, gone)
  if known[module] then return nil end
  known[module] = true
  local row, left = new_row(module, path, found), convolution_of(module, found.outputs[module])
  rows[#rows + 1] = row
  local deployed = { parameters = left and left.parameters or 0, macs = left and left.macs or row.macs }
  row.deployed = gone and { parameters = 0, macs = 0 } or deployed
  module:each(function(name, value, kind)
    if kind == "parameter" and not known[value] then
      known[value] = true
      local own = { parameters = value:count(), trained = value.requires_grad and value:count() or 0 }
      add(row, own, "parameters", "trained")
      if not left then add(deployed, own, "parameters") end
    elseif kind == "module" then
      local goes = gone or left ~= nil and name ~= "se" -- squeeze-excite stays
      local inside = add_rows(rows, known, value, internal.join(path, name), found, goes)
      if inside then
        add(row, inside, "parameters", "trained", "macs", "squeeze", "kept")
        if not goes then add(deployed, inside.deployed, "parameters", "macs") end
      end
    end
  end)
  return row
end

-- ---- the result ----

local Summary = {}
Summary.__index = Summary

local function shapes_text(shapes)
  local words = {}
  for k, shape in ipairs(shapes) do words[k] = #shape > 0 and table.concat(shape, "x") or "number" end
  return table.concat(words, ", ")
end

local function unless_zero(text_of)
  return function(n) return n == 0 and "" or text_of(n) end
end

local count_text, macs_text, bytes_text = unless_zero(columns.grouped), unless_zero(columns.short), unless_zero(columns.bytes)

-- Columns that would say nothing are left out.
local layout = {
  { "module", function(row) return row.path == "" and "(all)" or row.path end },
  { "type", function(row) return row.type end },
  { "calls", function(row) return tostring(row.calls) end, function(s)
    for _, row in ipairs(s.rows) do
      if row.calls > 1 then return true end
    end
  end },
  { "output", function(row) return shapes_text(row.shapes) end },
  { "parameters", function(row) return count_text(row.parameters) end },
  { "deployed", function(row) return count_text(row.deployed.parameters) end,
    function(s) return s.totals.deployed.parameters ~= s.totals.parameters end },
  { "mult-adds", function(row) return macs_text(row.macs) end },
  { "squeezing", function(row) return macs_text(row.squeeze) end, function(s) return s.totals.squeeze > 0 end },
  { "deployed", function(row) return macs_text(row.deployed.macs) end,
    function(s) return s.totals.deployed.macs ~= s.totals.macs end },
  { "outputs", function(row) return bytes_text(row.bytes) end },
  { "kept", function(row) return bytes_text(row.kept) end },
}

local function depth_of(path)
  return path == "" and 0 or select(2, path:gsub("%.", "")) + 1
end

local function table_text(self)
  local shown, head = {}, {}
  for _, row in ipairs(self.rows) do
    if not self.depth or depth_of(row.path) <= self.depth then shown[#shown + 1] = row end
  end
  local lines = { head }
  for k = 1, #shown do lines[k + 1] = {} end
  for _, column in ipairs(layout) do
    local name, text_of, has_something = table.unpack(column)
    if not has_something or has_something(self) then
      head[#head + 1] = name
      for k, row in ipairs(shown) do table.insert(lines[k + 1], text_of(row)) end
    end
  end
  return columns.text(lines, 2)
end

function Summary:__tostring()
  local t = self.totals
  local squeezing = t.squeeze > 0 and (", squeezing %s"):format(columns.short(t.squeeze)) or ""
  return table.concat({ table_text(self), "",
    ("input %s"):format(shapes_text(self.inputs)),
    ("parameters %s (%s trained), deployed %s"):format(columns.grouped(t.parameters), columns.grouped(t.trained),
      columns.grouped(t.deployed.parameters)),
    ("multiply-adds %s%s, deployed %s"):format(columns.short(t.macs), squeezing, columns.short(t.deployed.macs)),
    ("kept by a forward pass in training %s"):format(columns.bytes(t.kept)) }, "\n")
end

-- ---- making it ----

local function summary(net, given, o)
  internal.need_module("summary", net)
  o = options("summary", o, { dtype = options.optional, depth = options.optional })
  if o.depth and (math.type(o.depth) ~= "integer" or o.depth < 0) then
    core.fail(("summary: depth is %s, an integer of at least 0 expected"):format(tostring(o.depth)))
  end
  local inputs, found, rows, shapes = inputs_of(net, given, o.dtype), {}, {}, {}
  local t
  t, found.outputs = run(net, inputs)
  found.macs, found.squeeze, found.kept = costs(t)
  local whole = add_rows(rows, {}, net, "", found, false)
  for k, x in ipairs(inputs) do shapes[k] = x.shape end
  local totals = { parameters = whole.parameters, trained = whole.trained, macs = whole.macs, squeeze = whole.squeeze,
    kept = whole.kept, deployed = whole.deployed }
  return setmetatable({ rows = rows, inputs = shapes, depth = o.depth, totals = totals }, Summary)
end

document("nn.summary", [[
  nn.summary(net, input, {dtype=, depth=}) -> summary
  What a network is made of and costs, seen in one forward pass as in training, with gradients: all modules in training mode,
  forward hooks run. Modes, buffers (running statistics), gradients and random numbers are afterwards what they were, after an
  error too. The input is a shape, which stands for zeros of a type (dtype; that of the first parameter if not given), a tensor,
  or a list of such for a network of several inputs. Norms that see one value in each channel need a batch of two.
  print(summary) shows a table, down to `depth` names in a path. summary.rows has a table for each module, in the order of
  net:named_modules(): path, type, calls; shape, the first output's in the first call, and shapes, those of all outputs of that
  call, in tables too; and sums, over all calls and with the modules inside:
  parameters, trained: elements of parameters, and of those that require a gradient. What is shared counts where it comes first.
  macs: multiply-adds of convolutions and matrix products as they ran: elements of the result times (in channels / groups) * KH
  * KW, batch and padding included, whatever way the device takes; M * K * N. An offline block runs all its branches, an online
  one the squeezed convolution. Biases, norms, activations, additions, pools and everything else count nothing.
  squeeze: multiply-adds of kernels with kernels, once a pass whatever the batch is: O * T * KH * KW * (I / groups) for a 1x1
  from I to T channels before a KH x KW from T to O. Scaling and adding up branches count nothing.
  bytes: the sizes of its own outputs, those of modules inside left out. kept: of tensors that were made in its calls and are in
  use when the pass is over: what backward needs, and the network's outputs; without gradients, these alone. A norm's map
  counts where it is stored first, which may be in the next module or nowhere; squeezed kernels count, parameters don't.
  deployed: {parameters=, macs=} after net:deploy(), where each block is one convolution with bias and, if it has one, its
  squeeze-excite; what goes has zeros.
  summary.totals has parameters, trained, macs, squeeze, kept and deployed of the whole; summary.inputs the shapes.
  > print(nn.summary(nn.Sequential(nn.OREPA{in_channels = 3, out_channels = 8, kernel_size = 3}, nn.ReLU()), {1, 3, 8, 8}))
  > return nn.summary(nn.Linear{in_features = 4, out_features = 2}, {1, 4}).totals.macs]])

return { summary = summary }
