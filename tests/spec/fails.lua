-- For specs: the call must end with an error whose message matches the pattern; gives the message.

local assert = require "luassert"

return function(pattern, f, ...)
  local ok, message = pcall(f, ...)
  assert(not ok, "no error")
  assert.matches(pattern, message)
  return message
end
