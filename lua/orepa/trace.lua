-- trace: runs a function and keeps what happened in it, as events: calls of modules, ops, nodes of backward passes and kernels of
-- the device, in the order in which they began. orepa.profile and nn.summary read it.

local core = require "orepa.core"
local internal = require("orepa.nn.module").internal
local ReparamBlock = require("orepa.nn.block").ReparamBlock
local tracing = core.tracing

local trace = {}

-- trace.run(see, f, ...) -> trace, what f returns. `see`, if given, is called as see(module, outputs) before the end of each call
-- of a module.
function trace.run(see, f, ...)
  local modules, numbers = {}, {}
  local function number_of(module)
    if not numbers[module] then
      modules[#modules + 1] = module
      numbers[module] = #modules
    end
    return numbers[module]
  end
  local function around(call, module, ...)
    local _ <close> = tracing.open(number_of(module))
    if not see then return call(module, ...) end
    local outputs = table.pack(call(module, ...))
    see(module, outputs)
    return table.unpack(outputs, 1, outputs.n)
  end
  local function observed(...)
    local _ <close> = internal.observe(around)
    return f(...)
  end
  local results = table.pack(tracing.run(observed, ...))
  return { events = results[1], modules = modules }, table.unpack(results, 2, results.n)
end

-- for k, e in trace.each(t): the fields of event k are those of orepa_trace.h, `stop` its end and `seconds` how long it took;
-- `around` is the event that it is in, 0 where there is none; a module's number is its place in t.modules. The table is the same
-- each time.
function trace.each(t)
  local count, k, e = tracing.count(t.events), 0, {}
  return function()
    k = k + 1
    if k <= count then return k, tracing.event(t.events, k, e) end
  end
end

-- How many events there was no memory for.
function trace.lost(t)
  return select(2, tracing.count(t.events))
end

-- Whose the events are: lists from an event to the call of the innermost module (an event too; 0: none), and to whether it is
-- part of a backward pass. A node belongs to the call in which it was made.
function trace.owners(t)
  local owners, backward = { [0] = 0 }, { [0] = false }
  local calls, first, last = {}, {}, {} -- calls of modules, and the nodes made in each
  local function maker_of(node)
    local low, high = 0, #calls
    while low < high do -- for the last call that began before the node was made
      local middle = (low + high + 1) // 2
      if first[calls[middle]] <= node then low = middle else high = middle - 1 end
    end
    local call = calls[low] or 0
    while call > 0 and last[call] <= node do call = owners.outer[call] end
    return call
  end
  owners.outer = {} -- of a call, the one around it
  for k, e in trace.each(t) do
    owners[k], backward[k] = owners[e.around], backward[e.around]
    if e.kind == "module" then
      owners.outer[k], owners[k] = owners[k], k
      calls[#calls + 1], first[k], last[k] = k, e.nodes_at_start, e.nodes_at_end
    elseif e.kind == "node" then
      owners[k], backward[k] = maker_of(e.number), true
    elseif e.name == "backward" then
      backward[k] = true
    end
  end
  return owners, backward
end

function trace.is_block(module)
  return module.branch_weights == ReparamBlock.branch_weights
end

-- What a module is called: by its class, or as the block that it is.
function trace.type_of(module)
  return trace.is_block(module) and module.kind or module.class_name
end

-- Names for the modules of a trace, as lists by number: the path in the outermost module that was called, the type of that one,
-- and the module's own.
function trace.paths(t, owners)
  local known, labels, paths, roots, types = {}, {}, {}, {}, {}
  local function add_root(module)
    if known[module] then return end
    local label = trace.type_of(module)
    labels[label] = (labels[label] or 0) + 1
    if labels[label] > 1 then label = ("%s (%d)"):format(label, labels[label]) end
    for path, part in module:named_modules() do known[part] = known[part] or { path, label } end
  end
  for _, e in trace.each(t) do
    if e.kind == "module" and owners[e.around] == 0 then add_root(t.modules[e.number]) end
  end
  for number, module in ipairs(t.modules) do
    add_root(module) -- if it was called by one that doesn't hold it
    paths[number], roots[number] = table.unpack(known[module])
    types[number] = trace.type_of(module)
  end
  return paths, roots, types
end

return trace
