-- Module: what layers, blocks and networks are. A field of a module may be a parameter, a buffer or another module; only the
-- order of names is recorded when a field is assigned, what a name is, is decided when modules are walked.

local core = require "orepa.core"
local grouped = require("orepa.columns").grouped
local calls = require "orepa.nn.calls"
local checks = require "orepa.checks"
local document = require "orepa.document"
local with = require("orepa.options").with
local state = require "orepa.state"

local ORDER, BUFFERS, WRAPPED = {}, {}, {} -- keys of an instance's private fields
local parameters = setmetatable({}, { __mode = "k" }) -- tensors that nn.Parameter made

local Module = { class_name = "Module" }
local Instance = {} -- the metatable of each class' instances, filled by `extend`

-- ---- classes ----

local function record(self, name, value)
  if value == nil then return end
  local order = self[ORDER]
  if type(name) == "string" and not order[name] then
    order[#order + 1] = name
    order[name] = true
  end
  rawset(self, name, value)
end

local function construct(class, ...)
  local self = setmetatable({ [ORDER] = {}, [BUFFERS] = {}, training = true }, class[Instance])
  self:init(...)
  return self
end

function Module:extend(name)
  local class = setmetatable({ class_name = name }, { __index = self, __call = construct })
  class[Instance] = {
    __index = class, __newindex = record, __call = calls.call, __name = name,
    __tostring = function(module) return module:describe() end,
  }
  return class
end

function Module.init(_) end

function Module:forward()
  core.fail(("%s has no forward"):format(self.class_name))
end

local function is_module(value)
  return type(value) == "table" and rawget(value, ORDER) ~= nil
end

local function need_module(where, value)
  if not is_module(value) then core.fail(("%s: a module expected, got %s"):format(where, type(value))) end
end

-- ---- walking ----

local function check_plain(self, name, value)
  for _, entry in pairs(value) do
    if is_module(entry) then
      core.fail(("%s: field '%s' is a plain table that holds modules; make it an nn.ModuleList or nn.ModuleDict"):format(
        self.class_name, name))
    end
  end
end

-- Calls visit(name, value, kind) for the fields of one module, in order; kind is "module", "parameter" or "buffer".
local function each_field(self, visit)
  for _, name in ipairs(self[ORDER]) do
    local value = rawget(self, name)
    if is_module(value) then
      visit(name, value, "module")
    elseif type(value) == "table" then
      check_plain(self, name, value)
    elseif core.is_tensor(value) then
      if self[BUFFERS][name] then
        visit(name, value, "buffer")
      elseif parameters[value] then
        visit(name, value, "parameter")
      end
    end
  end
end

-- A module's children may stand elsewhere than in its fields (ModuleList).
function Module:each(visit)
  each_field(self, visit)
end

-- What a module wraps (nn.checkpoint) is called "" and has the same path.
local function join(prefix, name)
  if name == "" then return prefix end
  return prefix == "" and name or prefix .. "." .. name
end

local function walk(module, prefix, seen, visit)
  if seen[module] then return end
  seen[module] = true
  visit(prefix, module)
  module:each(function(name, value, kind)
    if kind == "module" then walk(value, join(prefix, name), seen, visit) end
  end)
end

local function iterator(list)
  local k = 0
  return function()
    k = k + 1
    if list[k] then return list[k][1], list[k][2] end
  end
end

-- {path, value, owner, name} of all fields of a kind; a tensor that is shared counts once.
local function collect(self, wanted)
  local list, seen = {}, {}
  walk(self, "", {}, function(prefix, module)
    module:each(function(name, value, kind)
      if kind == wanted and not seen[value] then
        seen[value] = true
        list[#list + 1] = { join(prefix, name), value, module, name }
      end
    end)
  end)
  return list
end

function Module:named_modules()
  local list = {}
  walk(self, "", {}, function(prefix, module) list[#list + 1] = { prefix, module } end)
  return iterator(list)
end

function Module:named_parameters()
  return iterator(collect(self, "parameter"))
end

-- Constants are left out: they follow from the module's definition.
function Module:named_buffers()
  local list = {}
  for _, entry in ipairs(collect(self, "buffer")) do
    if entry[3][BUFFERS][entry[4]] ~= "constant" then list[#list + 1] = entry end
  end
  return iterator(list)
end

function Module:parameters()
  local list = {}
  for k, entry in ipairs(collect(self, "parameter")) do list[k] = entry[2] end
  return list
end

-- ---- fields ----

local function Parameter(t)
  checks.tensor("Parameter", t)
  t:requires_grad_()
  parameters[t] = true
  return t
end

-- A constant is a buffer that follows from the module's definition: it is saved only if a file replaced it.
function Module:register_buffer(name, t, options)
  self[BUFFERS][name] = options and options.constant and "constant" or true
  self[name] = t
end

function Module:get(path)
  for name, module in self:named_modules() do
    if name == path then return module end
  end
  for _, kind in ipairs { "parameter", "buffer" } do
    for _, entry in ipairs(collect(self, kind)) do
      if entry[1] == path then return entry[2] end
    end
  end
  core.fail(("%s has nothing at '%s'"):format(self.class_name, path))
end

-- The module that holds the field at `path`, and the field's name there (which may have dots in it).
local function owner_of(self, path)
  local owner, field
  walk(self, "", {}, function(prefix, module)
    module:each(function(name, _, kind)
      if kind == "module" and name ~= "" and join(prefix, name) == path then owner, field = module, name end
    end)
  end)
  return owner, field
end

function Module:replace(path, module)
  local owner, field = owner_of(self, path)
  if not owner then core.fail(("%s has no module at '%s'"):format(self.class_name, path)) end
  need_module("replace", module)
  owner:set_child(field, module)
  return self
end

function Module:set_child(name, module)
  self[name] = module
end

-- Removes a field of this module, parameter or module.
function Module:remove(name)
  local order = self[ORDER]
  for k, other in ipairs(order) do
    if other == name then table.remove(order, k) break end
  end
  order[name] = nil
  self[BUFFERS][name] = nil
  rawset(self, name, nil)
end

-- ---- copies ----

local function copied_tensor(t, copies)
  if not copies[t] then
    local copy = t:detach():clone()
    if parameters[t] then Parameter(copy):requires_grad_(t.requires_grad) end
    copies[t] = copy
  end
  return copies[t]
end

-- `copies` holds what was copied, so that what is shared is shared again.
local function copied(module, copies)
  if copies[module] then return copies[module] end
  local copy = setmetatable({}, getmetatable(module))
  copies[module] = copy
  for key, value in next, module do
    if key == ORDER or key == BUFFERS or key == "changes" then
      value = with(value, {})
    elseif is_module(value) then
      value = copied(value, copies)
    elseif core.is_tensor(value) then
      value = copied_tensor(value, copies)
    end
    if key ~= calls.HOOKS then rawset(copy, key, value) end
  end
  return copy
end

function Module:clone()
  return copied(self, {})
end

-- ---- modes, devices ----

function Module:train(on)
  for _, module in self:named_modules() do
    rawset(module, "training", on ~= false)
    module:changed()
  end
  return self
end

function Module:eval()
  return self:train(false)
end

-- Called when a module's mode, place or weights were changed from outside.
function Module.changed(_) end

function Module:to(kind)
  local moved = core.zeros({ 0 }):to(kind) -- an error if it is neither a type nor a device
  for _, module in self:named_modules() do
    module:each(function(_, value, what)
      if what ~= "module" then value:move_(value.dtype:find "float" and kind or moved.device) end
    end)
    module:changed()
  end
  return self
end

function Module:zero_grad()
  for _, p in self:named_parameters() do p.grad = nil end
end

-- What a network has become since it was made, in order, so that a file of it can tell.
local function note(self, change)
  local list = rawget(self, "changes") or {}
  list[#list + 1] = change
  rawset(self, "changes", list)
end

function Module:deploy()
  local blocks = {}
  for _, module in self:named_modules() do
    if module ~= self and module.deploy ~= Module.deploy then blocks[#blocks + 1] = module end
  end
  for _, block in ipairs(blocks) do block:deploy() end
  if #blocks > 0 then note(self, { "deploy" }) end
  return self:eval()
end

Module.register_forward_hook = calls.register_forward_hook

-- ---- state ----

-- Entries {name, tensor, kind} of all that a state dict may hold; kind is "parameter", "buffer" or "constant".
local function state_entries(self)
  local list = {}
  walk(self, "", {}, function(prefix, module)
    module:each(function(name, value, kind)
      if kind ~= "module" then
        local constant = kind == "buffer" and module[BUFFERS][name] == "constant"
        list[#list + 1] = { join(prefix, name), value, constant and "constant" or kind, module, name }
      end
    end)
  end)
  return list
end

function Module:state_dict(options)
  local tensors, names = {}, {}
  for _, entry in ipairs(state_entries(self)) do
    local name, t, kind = entry[1], entry[2], entry[3]
    if kind ~= "constant" or (options and options.constants and not name:find "~") then
      tensors[name] = t
      names[#names + 1] = name
    end
  end
  return tensors, names
end

local CONSTANT_TOLERANCE = 1e-5

-- A constant in a file that differs from its definition replaces it, and is saved from then on.
local function load_constant(entry, t)
  local difference = (t:to("float32") - entry[2]:to("float32")):abs():max():item()
  if difference <= CONSTANT_TOLERANCE then return end
  io.stderr:write(("orepa: warning: the constant '%s' in this file differs from its definition by %.3g and replaces it\n"):format(
    entry[1], difference))
  entry[2]:copy_(t)
  entry[4][BUFFERS][entry[5]] = true
end

function Module:load_state_dict(tensors, options)
  local strict = not options or options.strict ~= false
  local entries = state_entries(self)
  local missing, unexpected, wrong, fitting = state.compare(entries, tensors)
  if #wrong > 0 or (strict and #missing + #unexpected > 0) or (fitting == 0 and #entries > 0) then
    state.fail(self, tensors, missing, unexpected, wrong, fitting)
  end
  core.no_grad(function()
    for _, entry in ipairs(entries) do
      local t = tensors[entry[1]]
      if t and entry[3] == "constant" then
        load_constant(entry, t)
      elseif t then
        entry[2]:copy_(t)
      end
    end
  end)
  for _, module in self:named_modules() do module:changed() end
  return missing, unexpected
end

-- ---- as text ----

-- What a module says of itself beside its name: "3 -> 64, 7x7".
function Module.extra(_) return "" end

function Module:describe(indent)
  indent = indent or ""
  local count = 0
  for _, p in self:named_parameters() do count = count + p:count() end
  local head, extra = self.class_name, self:extra()
  if extra ~= "" then head = head .. " " .. extra end
  if count > 0 then head = ("%s  (%s parameters)"):format(head, grouped(count)) end
  local lines = { head }
  self:each(function(name, child, kind)
    if kind == "module" then
      lines[#lines + 1] = ("%s  %s: %s"):format(indent, name, child:describe(indent .. "  "))
    end
  end)
  return table.concat(lines, "\n")
end

-- ---- what containers and blocks ask ----

local internal = {
  is_module = is_module,
  need_module = need_module,
  join = join,
  note = note,
  observe = calls.observe,
  -- Whether a buffer still is what the module's definition says.
  is_constant = function(module, name) return module[BUFFERS][name] == "constant" end,
  Parameter = Parameter,
  -- Whether a handle that one of the library's layers made and another takes may be released: no hook saw it, and neither
  -- is a class of the user's.
  is_library = function(module)
    while rawget(module, WRAPPED) do module = rawget(module, WRAPPED) end
    return rawget(getmetatable(module).__index, "library") == true
  end,
  WRAPPED = WRAPPED, -- the key of what a module wraps
  no_hooks = calls.no_hooks,
  -- Drops a handle that only the caller saw.
  done_with = function(t)
    if calls.no_hooks() then t:release() end
  end,
  -- Parameters that a block no longer has, and why, so that an optimizer that still holds them can say so.
  gone = setmetatable({}, { __mode = "k" }),
}

document("nn.Parameter", [[
  nn.Parameter(t) -> t
  Makes a tensor a parameter: a field of a module that holds it is trained, saved and moved.
  > nn.Parameter(orepa.zeros(3))]])
document("nn.Module", [[
  nn.Module:extend(name) -> class
  A class of modules. `init` gets the constructor's arguments and assigns fields; `forward` computes.
  > local Twice = nn.Module:extend("Twice"); function Twice:forward(x) return x * 2 end; return Twice()(orepa.ones(2))]])

local small = "nn.Sequential(nn.Linear{in_features = 2, out_features = 2}, nn.ReLU())"
for name, text in pairs {
  init = { "m:init(...)", "What a class does with its constructor's arguments: it assigns fields.",
    'local M = nn.Module:extend("M"); function M:init(n) self.n = n end; return M(3).n' },
  forward = { "m:forward(...) -> ...", "What a class computes; m(...) calls it, and forward hooks after it.",
    "SMALL:forward(orepa.ones(1, 2))" },
  parameters = { "m:parameters() -> list", "The parameters, each once, in order of assignment.", "#SMALL:parameters()" },
  named_parameters = { "m:named_parameters() -> iterator", "Path and tensor of each parameter.",
    "for name, p in SMALL:named_parameters() do assert(name and p.requires_grad) end" },
  named_buffers = { "m:named_buffers() -> iterator", "Path and tensor of each buffer, constants left out.",
    "for name, b in nn.BatchNorm2d(2):named_buffers() do assert(name and b) end" },
  named_modules = { "m:named_modules() -> iterator", "Path and module of m itself (path \"\") and of all below, each once.",
    "for path, m in SMALL:named_modules() do assert(path and m) end" },
  each = { "m:each(visit)", "Calls visit(name, value, kind) for the fields of this module alone; kind is \"module\", "
    .. "\"parameter\" or \"buffer\".", "SMALL:each(print)" },
  register_buffer = { "m:register_buffer(name, t, {constant=})", "A tensor that is saved and moved, not trained. A constant "
    .. "follows from the definition and is saved only if a file replaced it.", 'SMALL:register_buffer("seen", orepa.zeros(1))' },
  get = { "m:get(path) -> module or tensor", "What is at a path: a module, a parameter or a buffer.", 'SMALL:get "0.weight"' },
  replace = { "m:replace(path, module) -> m", "Puts another module at a path.", 'SMALL:replace("1", nn.ReLU())' },
  set_child = { "m:set_child(name, module)", "How `replace` writes a child; containers have their own.",
    'SMALL:set_child("1", nn.ReLU())' },
  remove = { "m:remove(name)", "Takes a field away: a parameter, a buffer or a module.", 'SMALL:get("0"):remove "bias"' },
  train = { "m:train(on) -> m", "Puts all modules into training mode; false: into evaluation mode.", "SMALL:train()" },
  eval = { "m:eval() -> m", "Puts all modules into evaluation mode.", "SMALL:eval()" },
  clone = { "m:clone() -> m", "A copy with tensors of its own, without gradients and hooks. Tables in fields are shared, and "
    .. "what the module shares with itself, the copy does too.", "SMALL:clone()" },
  changed = { "m:changed()", "Called when mode, place or weights were changed from outside; blocks drop what they kept.",
    "SMALL:changed()" },
  to = { "m:to(type or device) -> m", "Converts or moves parameters and buffers in place; a type goes to floats alone.",
    'SMALL:to "float64"' },
  zero_grad = { "m:zero_grad()", "Takes all gradients away.", "SMALL:zero_grad()" },
  deploy = { "m:deploy() -> m", "Every block becomes one convolution with bias, in evaluation mode; twice changes nothing.",
    "nn.OREPA{in_channels = 2, out_channels = 2, kernel_size = 3}:deploy()" },
  register_forward_hook = { "m:register_forward_hook(f) -> hook", "Calls f(m, inputs, outputs...) after each forward until "
    .. "hook.remove().", "SMALL:register_forward_hook(function(m, inputs, y) print(y) end).remove()" },
  state_dict = { "m:state_dict({constants=}) -> tensors, names", "All that is saved: a table from paths to tensors, and the "
    .. "paths in order.", "SMALL:state_dict()" },
  load_state_dict = { "m:load_state_dict(tensors, {strict=}) -> missing, unexpected", "Writes tensors into the module's own. A "
    .. "wrong shape is always an error, a missing or unexpected name if strict (the default), and so is loading nothing. The "
    .. "error lists all names; counts of batches may be missing all together.",
    'SMALL:load_state_dict({["0.bias"] = orepa.ones(2)}, {strict = false})' },
  extra = { "m:extra() -> string", "What a module says of itself in print, beside its name.", "nn.BatchNorm2d(8):extra()" },
  describe = { "m:describe(indent) -> string", "The module as a tree with counts of parameters; tostring(m) calls it.",
    "SMALL:describe()" },
} do
  document("m:" .. name, ("%s\n%s\n> %s"):format(text[1], text[2], (text[3]:gsub("SMALL", (small:gsub("%%", "%%%%"))))))
end

-- A function that makes classes of the library's and lists them.
function internal.lister(classes)
  return function(name)
    local class = Module:extend(name)
    class.library = true
    classes[name] = class
    return class
  end
end

Module[Instance] = {}
return { Module = Module, internal = internal }
