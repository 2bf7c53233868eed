-- What the networks here have in common: stages one after the other, the mean over the last map, and a linear layer.

local orepa = require "orepa"
local nn, F = orepa.nn, orepa.F

local Classifier = nn.Module:extend("Classifier")

-- Options that have a value for each of the four stages.
function Classifier.need_four(network, o, ...)
  for _, name in ipairs { ... } do
    if type(o[name]) ~= "table" or #o[name] ~= 4 then orepa.fail(("%s: %s is a list of four numbers"):format(network, name)) end
  end
end

-- To be called at the end of `init`: `channels` leave the last stage; o has classes and deploy.
function Classifier:finish(channels, o)
  self.linear = nn.Linear { in_features = channels, out_features = o.classes }
  if o.deploy then self:deploy() end
end

-- From stage `first` on: fields stage0 ... stage4.
function Classifier:classify(x, first)
  for k = first, 4 do x = self["stage" .. k](x) end
  return self.linear(F.adaptive_avg_pool2d(x):flatten(2))
end

function Classifier:forward(x)
  return self:classify(x, 0)
end

return Classifier
