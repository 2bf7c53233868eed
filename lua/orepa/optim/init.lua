-- optim: optimizers, groups of their parameters, schedules of their rate, clipping of gradients.

local optim = {}
for _, room in ipairs { "groups", "sgd", "adaptive", "schedules", "clip" } do
  for name, f in pairs(require("orepa.optim." .. room)) do optim[name] = f end
end

return optim
