-- What functions of tensors in Lua check of their arguments, and how a tensor is named in a message.

local core = require "orepa.core"

local checks = {}

-- "float32 2x3"
function checks.text_of(t)
  return t.dtype .. " " .. (#t.shape == 0 and "scalar" or table.concat(t.shape, "x"))
end

function checks.tensor(where, x)
  if not core.is_tensor(x) then core.fail(("%s: a tensor expected, got %s"):format(where, type(x))) end
  return x
end

function checks.floats(where, x)
  if not checks.tensor(where, x).dtype:find "float" then
    core.fail(("%s: floats expected, got %s; convert it with to()"):format(where, x.dtype))
  end
  return x
end

-- What is computed with: short floats as float32.
function checks.wide(x)
  return (x.dtype == "bfloat16" or x.dtype == "float16") and x:to "float32" or x
end

return checks
