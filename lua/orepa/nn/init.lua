-- nn: modules, containers, layers, blocks.

local module = require "orepa.nn.module"

local nn = { Module = module.Module, Parameter = module.internal.Parameter }
for _, room in ipairs { "container", "layers", "norms", "functions", "losses", "initial", "block", "named_blocks", "kinds",
  "linearize", "expand", "checkpoint", "summary" } do
  for name, value in pairs(require("orepa.nn." .. room)) do nn[name] = value end
end

return nn
