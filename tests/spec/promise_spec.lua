-- Norms that wait: a script can't tell. Whole networks, hooks and writes give the same bits with OREPA_DEFER=0.

local process = require "tests.spec.process"

-- Runs a text in the program, deferring or not; the text saves a table of tensors at the path that it is given. Gives the
-- file, in which every bit counts.
local function run(text, defer, ...)
  local path = os.tmpname()
  process.run_text(text, { path, ... }, { OREPA_DEFER = defer, OREPA_BFLOAT16 = "1" })
  local bytes = process.read(path)
  os.remove(path)
  return bytes
end

local function is_same_either_way(text, ...)
  local deferred = run(text, "1", ...)
  assert.is_true(#deferred > 100)
  assert.is_true(deferred == run(text, "0", ...), "OREPA_DEFER=0 gives other bits")
  return deferred
end

-- Two training steps; all parameters, gradients and running statistics.
local training = [[
local orepa = require "orepa"
local path, residual, reparam, precision = ...
orepa.manual_seed(5)
local net = require "orepa.models".create("resnet", { num_blocks = { 2, 1, 1, 1 }, width = 0.125, classes = 5,
  residual = residual, reparam = reparam })
local opt = orepa.optim.SGD(orepa.optim.param_groups(net), { lr = 0.1, momentum = 0.9, weight_decay = 1e-4 })
local labels = orepa.tensor({ 0, 1, 2, 3 }, { dtype = "int64" })
local x = orepa.randn(4, 3, 37, 35)
local tensors = {}
local _ <close> = orepa.autocast(precision)
for step = 1, 2 do
  local logits = net(x)
  local loss = orepa.F.cross_entropy(logits, labels)
  opt:zero_grad()
  loss:backward()
  for name, p in net:named_parameters() do tensors[("%d.grad.%s"):format(step, name)] = p.grad:clone() end
  tensors[step .. ".logits"] = logits:detach()
  opt:step()
end
for name, value in pairs((net:state_dict())) do tensors[name] = value end
net:eval()
tensors.evaluated = net(x):detach()
orepa.save(path, tensors)
]]

describe("a norm that waits", function()
  it("trains a network to the same bits", function()
    is_same_either_way(training, "basic", "none", "float32")
    is_same_either_way(training, "bottleneck", "orepa", "float32")
  end)

  it("does so in bfloat16", function()
    local short = is_same_either_way(training, "basic", "orepa", "bfloat16")
    assert.is_false(short == run(training, "1", "basic", "orepa", "float32"))
  end)

  -- Hooks see each layer's result before the next layer takes it; `later` looks at maps after that.
  it("shows hooks what they always saw, and hooks change nothing", function()
    local text = [[
local orepa = require "orepa"
local nn = orepa.nn
local path, how, shown = ...
orepa.manual_seed(3)
local Block = nn.Module:extend("Block")
function Block:init()
  self.conv1 = nn.Conv2d { in_channels = 4, out_channels = 4, kernel_size = 3, padding = 1 }
  self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
  self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
  self.pool = nn.MaxPool2d { kernel_size = 3, stride = 2, padding = 1 }
end
local seen = {}
function Block:forward(x)
  local y = self.relu1(self.bn1(self.conv1(x)))
  local kept = { y }
  local sum = self.bn2(self.conv1(y)) + self.bn3(x)
  kept[2] = sum
  local z = self.relu2(sum)
  kept[3] = z
  local result = self.pool(z + y)
  if how == "later" then for k, t in ipairs(kept) do seen["kept" .. k] = t:clone() end end
  return result
end
local net = Block()
if how == "hooked" then
  for name, module in net:named_modules() do
    if name ~= "" then
      module:register_forward_hook(function(_, _, out) seen[#seen + 1] = out:detach():clone() end)
    end
  end
end
local x = orepa.randn(3, 4, 9, 7):requires_grad_()
local y = net(x)
y:backward(orepa.randn(y.shape))
local tensors = {}
if shown == "shown" then
  for key, t in pairs(seen) do tensors["seen." .. key] = t:detach() end
end
tensors.y, tensors.dx = y:detach(), x.grad
for name, p in net:named_parameters() do tensors[name] = p.grad end
for name, b in net:named_buffers() do tensors[name] = b end
orepa.save(path, tensors)
]]
    is_same_either_way(text, "hooked", "shown")
    is_same_either_way(text, "later", "shown")
    local plain = is_same_either_way(text, "plain", "not")
    assert.is_true(plain == run(text, "1", "hooked", "not"))
    assert.is_true(plain == run(text, "1", "later", "not"))
  end)

  it("is what it was before a write to its input", function()
    is_same_either_way [[
local orepa = require "orepa"
local F = orepa.F
local path = ...
orepa.manual_seed(4)
local x = orepa.randn(2, 3, 5, 5)
local tensors = {}
orepa.no_grad(function()
  local bn = orepa.nn.BatchNorm2d(3)
  local r = orepa.randn(2, 3, 5, 5)
  local y = bn(x)
  local z = F.relu(y + r)
  x:zero_()
  r:mul_(2)
  bn.weight:fill_(7)
  tensors.z, tensors.y, tensors.x, tensors.r = z, y, x, r
  local w = F.relu(bn(r))
  w:add_(1)
  w[1][2] = 5
  tensors.w = w
end)
orepa.save(path, tensors)
]]
  end)
end)
