-- check_gradient(f, sizes...): the slope of sum(f(x) * dy) by central differences, against backward, in float64.

local assert = require "luassert"
local orepa = require "orepa"

return function(f, ...)
  local numbers = orepa.arange(1, orepa.ones(...):count()):reshape(...) * 0.3
  local x = numbers:to { dtype = "float64", device = "ref" }:requires_grad_()
  local y = f(x)
  local dy = (orepa.arange(1, y:count()) * 0.7 - 2):reshape(y.shape):to { dtype = "float64", device = "ref" }
  y:backward(dy)
  local found = x.grad:reshape(-1)
  for k = 1, x:count() do
    local function at(step)
      local moved = x:detach():clone():reshape(-1)
      moved[k] = moved[k] + step
      return (f(moved:reshape(x.shape)) * dy):sum():item()
    end
    assert.near((at(1e-6) - at(-1e-6)) / 2e-6, found[k]:item(), 1e-6)
  end
end
