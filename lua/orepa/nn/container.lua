-- Containers: Sequential, ModuleList, ModuleDict. Children are named from 0 in a list, as in the checkpoints of others.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local Module, internal = module.Module, module.internal

local function check_child(where, child, name)
  if not internal.is_module(child) then
    core.fail(("%s: item %s is a %s, not a module"):format(where, name, type(child)))
  end
end

-- ---- ModuleList: list[1] is named "0" ----

local ModuleList = Module:extend("ModuleList")

function ModuleList:init(children)
  for _, child in ipairs(children or {}) do self:add(child) end
end

function ModuleList:add(child)
  check_child(self.class_name, child, #self + 1)
  rawset(self, #self + 1, child)
  return self
end

-- A position of an item, which counts from 1 or from the end, or one behind the last if `more` is 1.
local function position(self, where, k, more)
  local n = #self + more
  local p = type(k) == "number" and math.tointeger(k)
  if p and p < 0 then p = n + 1 + p end
  if not p or p < 1 or p > n then
    core.fail(("%s: position %s; there are %d items"):format(where, tostring(k), #self))
  end
  return p
end

-- Items from k on move up.
function ModuleList:insert(k, child)
  k = position(self, "insert", k, 1)
  check_child(self.class_name, child, k)
  for p = #self, k, -1 do rawset(self, p + 1, self[p]) end
  rawset(self, k, child)
  return self
end

-- The item at a position; what is at a path.
function ModuleList:get(at)
  if type(at) ~= "number" then return Module.get(self, at) end
  return self[position(self, "get", at, 0)]
end

-- Items behind a position move down; a field goes by its name.
function ModuleList:remove(at)
  if type(at) ~= "number" then return Module.remove(self, at) end
  local k = position(self, "remove", at, 0)
  local child = self[k]
  for p = k, #self do rawset(self, p, self[p + 1]) end
  return child
end

-- A class that extends a list may have fields too.
function ModuleList:each(visit)
  for k, child in ipairs(self) do visit(tostring(k - 1), child, "module") end
  Module.each(self, visit)
end

function ModuleList:set_child(name, child)
  local k = tonumber(name)
  if not k then return Module.set_child(self, name, child) end
  rawset(self, math.tointeger(k) + 1, child)
end

-- ---- Sequential ----

local Sequential = ModuleList:extend("Sequential")
Sequential.library = true

function Sequential:init(...)
  for k = 1, select("#", ...) do self:add((select(k, ...))) end -- a nil in between is an error
end

-- The handle of an intermediate goes as soon as the next layer has taken it, where nobody else can have kept it.
function Sequential:forward(x)
  local input, maker = x, nil
  for _, layer in ipairs(self) do
    local y = layer(x)
    if maker and x ~= input and x ~= y and internal.is_library(maker) and internal.is_library(layer)
      and internal.no_hooks() then
      x:release()
    end
    x, maker = y, layer
  end
  return x
end

-- ---- ModuleDict ----

local ModuleDict = Module:extend("ModuleDict")

function ModuleDict:init(children)
  local names = {}
  for name, child in pairs(children or {}) do
    check_child("ModuleDict", child, tostring(name))
    names[#names + 1] = name
  end
  table.sort(names)
  for _, name in ipairs(names) do self[name] = children[name] end
end

document("nn.ModuleList", [[
  nn.ModuleList{modules...} -> module
  A list of modules, named from 0: list[1] is the first, #list their number, ipairs goes through them; `list:add(m)` appends.
  > nn.ModuleList{nn.ReLU(), nn.ReLU()}]])
document("list:add", [[
  list:add(module) -> list
  Appends a module to an nn.ModuleList or nn.Sequential.
  > nn.Sequential():add(nn.ReLU())]])
document("list:insert", [[
  list:insert(position, module) -> list
  Puts a module before the one at a position, which counts from 1; -1 is behind the last.
  > nn.Sequential(nn.ReLU()):insert(1, nn.Flatten())]])
document("list:get", [[
  list:get(position) -> module
  The module at a position, which counts from 1; -1 is the last. list[k] is the same for those that there are. A path, as in
  m:get, finds what is there.
  > nn.Sequential(nn.ReLU(), nn.Tanh()):get(-1)]])
document("list:remove", [[
  list:remove(position) -> module
  Takes out the module at a position; those behind it move down. A name takes away a field, as m:remove does.
  > nn.Sequential(nn.ReLU(), nn.Tanh()):remove(1)]])
document("nn.Sequential", [[
  nn.Sequential(modules...) -> module
  Applies modules one after another; seq[1] is the first, `seq:add(m)` appends.
  > nn.Sequential(nn.Linear{in_features = 4, out_features = 2}, nn.ReLU())(orepa.ones(3, 4))]])
document("nn.ModuleDict", [[
  nn.ModuleDict{name = module, ...} -> module
  Modules by name; those given at once are ordered by name.
  > nn.ModuleDict{head = nn.ReLU()}]])

return { ModuleList = ModuleList, Sequential = Sequential, ModuleDict = ModuleDict }
