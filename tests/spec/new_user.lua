-- A new user's first script: a network of one's own, with a block described by oneself, trains, is deployed, and stays the same.
local orepa = require "orepa"
local nn, L, data = orepa.nn, orepa.reparam, orepa.data
orepa.manual_seed(1)
local function block(i, o)
  return nn.ReparamBlock { in_channels = i, out_channels = o, kernel_size = 3, act = "relu", branches = {
    { name = "plain", L.conv { 3 } }, { name = "smooth", scale = 0.5, L.conv { 1 }, L.average { 3 } } } }
end
local Net = nn.Module:extend("Net")
function Net:init()
  self.body = nn.Sequential(block(1, 8), block(8, 8), nn.AdaptiveAvgPool2d(1))
  self.head = nn.Linear { in_features = 8, out_features = 2 }
end
function Net:forward(x) return self.head(self.body(x):flatten(2)) end
local images, labels = orepa.rand(64, 8, 8), orepa.zeros({ 64 }, { dtype = "int64" })
for k = 1, 64, 2 do images[k], labels[k] = images[k] * orepa.arange(0, 1, 1 / 7), 1 end
local net = Net()
orepa.train.fit { net = net, epochs = 10, loader = data.loader { batch_size = 16, shuffle = true,
  dataset = data.images { images = images, labels = labels, classes = 2 } },
  optimizer = orepa.optim.SGD(orepa.optim.param_groups(net), { lr = 0.1, momentum = 0.9 }) }
local x = images:reshape(64, 1, 8, 8)
local before = net:eval()(x)
print(("accuracy %.2f, difference %.1e"):format(before:argmax(2):eq(labels):to("float32"):mean():item(),
  (net:deploy()(x) - before):abs():max():item()))
