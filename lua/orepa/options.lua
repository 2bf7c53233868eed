-- options(where, given, known): checks named options. `known` maps each name to its default, or to options.required or
-- options.optional; an unknown or missing one is an error that names it. Gives a new table with defaults filled in.

local core = require "orepa.core"

local options = { required = {}, optional = {} }

-- A copy of a table with some more in it.
function options.with(given, more)
  local all = {}
  for key, value in pairs(given) do all[key] = value end
  for key, value in pairs(more) do all[key] = value end
  return all
end

-- The keys of a table, sorted.
function options.names(known)
  local list = {}
  for name in pairs(known) do list[#list + 1] = name end
  table.sort(list)
  return list
end
local names = options.names

return setmetatable(options, { __call = function(_, where, given, known)
  if given == nil then given = {} end
  if type(given) ~= "table" then
    core.fail(("%s: a table of options expected, got %s"):format(where, type(given)))
  end
  local result = {}
  for name, value in pairs(given) do
    if known[name] == nil then
      core.fail(("%s: unknown option '%s' (there are %s)"):format(where, tostring(name), table.concat(names(known), " ")))
    end
    result[name] = value
  end
  for _, name in ipairs(names(known)) do
    local default = known[name]
    if result[name] == nil then
      if default == options.required then
        core.fail(("%s: option '%s' is missing"):format(where, name))
      elseif default ~= options.optional then
        result[name] = default
      end
    end
  end
  return result
end })
