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
  A list of modules, indexed from 1, named from 0; `list:add(m)` appends.
  > nn.ModuleList{nn.ReLU(), nn.ReLU()}]])
document("list:add", [[
  list:add(module) -> list
  Appends a module to an nn.ModuleList or nn.Sequential.
  > nn.Sequential():add(nn.ReLU())]])
document("nn.Sequential", [[
  nn.Sequential(modules...) -> module
  Applies modules one after another; `seq:add(m)` appends.
  > nn.Sequential(nn.Linear{in_features = 4, out_features = 2}, nn.ReLU())(orepa.ones(3, 4))]])
document("nn.ModuleDict", [[
  nn.ModuleDict{name = module, ...} -> module
  Modules by name; those given at once are ordered by name.
  > nn.ModuleDict{head = nn.ReLU()}]])

return { ModuleList = ModuleList, Sequential = Sequential, ModuleDict = ModuleDict }
