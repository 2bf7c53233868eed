-- document(name, text): one table for all documentation. The text's first line is the signature; lines that start with "> "
-- are an example, which a test runs.

local core = require "orepa.core"

return function(name, text)
  core.documentation[name] = text:gsub("^%s+", ""):gsub("\n%s+", "\n")
end
