-- calls: what m(...) does: its class' forward, the hooks after it, and whoever observes all calls.

local core = require "orepa.core"

local HOOKS = {} -- the key of a module's hooks
local hooks = 0 -- registered anywhere
local around -- what every call goes through while calls are observed

local calls = { HOOKS = HOOKS }

local function plain_call(self, ...)
  local list = rawget(self, HOOKS)
  if not list or #list == 0 then return self:forward(...) end
  local outputs = table.pack(self:forward(...))
  for _, hook in ipairs(list) do
    hook(self, table.pack(...), table.unpack(outputs, 1, outputs.n))
  end
  return table.unpack(outputs, 1, outputs.n)
end

function calls.call(self, ...)
  if around then return around(plain_call, self, ...) end
  return plain_call(self, ...)
end

-- Every call of a module becomes f(call, module, ...), which calls call(module, ...), until the guard is closed.
function calls.observe(f)
  local was = around
  around = f
  return setmetatable({}, { __close = function() around = was end })
end

function calls.register_forward_hook(self, f)
  if type(f) ~= "function" then core.fail(("register_forward_hook: a function expected, got %s"):format(type(f))) end
  if not rawget(self, HOOKS) then rawset(self, HOOKS, {}) end
  local list = self[HOOKS]
  list[#list + 1] = f
  hooks = hooks + 1
  return { remove = function()
    for k, other in ipairs(list) do
      if other == f then table.remove(list, k) hooks = hooks - 1 return end
    end
  end }
end

function calls.no_hooks() return hooks == 0 end

return calls
