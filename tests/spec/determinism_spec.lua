-- The same seed gives the same bits, whatever the memory held before and at any number of threads; memory is flat.

local orepa = require "orepa"
local models = require "orepa.models"
local process = require "tests.spec.process"
local nn, F, optim = orepa.nn, orepa.F, orepa.optim

-- ---- training ----

local STEPS = 5

-- Trains a small network; gives the losses, then all numbers of its state, as hexadecimal text. Other processes run this
-- text, too.
local run_text = [[
local orepa = require "orepa"
local models = require "orepa.models"
local seed, steps, threads, residual = ...
orepa.set_threads(threads)
orepa.manual_seed(seed)
local net = models.create("resnet", { num_blocks = { 1, 1, 1, 1 }, residual = residual, width = 0.125, reparam = "orepa",
  classes = 5 })
local opt = orepa.optim.SGD(orepa.optim.param_groups(net), { lr = 0.1, momentum = 0.9, weight_decay = 1e-4 })
local labels = orepa.tensor({ 0, 1, 2, 3, 4, 0 }, { dtype = "int64" })
local lines = {}
for _ = 1, steps do
  local loss = orepa.F.cross_entropy(net(orepa.randn(6, 3, 35, 33)), labels)
  opt:zero_grad()
  loss:backward()
  opt:step()
  lines[#lines + 1] = ("%a"):format(loss:item())
end
local state, names = net:state_dict()
for _, name in ipairs(names) do
  for _, value in ipairs(state[name]:to("float64"):reshape(-1):tolist()) do lines[#lines + 1] = ("%a"):format(value) end
end
return lines
]]

local function run(seed, threads, residual)
  local before = orepa.threads()
  local lines = assert(load(run_text))(seed, STEPS, threads, residual)
  orepa.set_threads(before)
  return lines
end

local function run_elsewhere(seed, threads, residual)
  local text = ([[
    local function run(...) %s end
    print(table.concat(run(%d, %d, %d, %q), "\n"))]]):format(run_text, seed, STEPS, threads, residual)
  local lines = {}
  for line in process.run_text(text):gmatch "[^\n]+" do lines[#lines + 1] = line end
  return lines
end

local function same_lines(got, wanted)
  assert(#wanted > 1000)
  assert.equal(#wanted, #got)
  for k, line in ipairs(wanted) do
    if got[k] ~= line then
      error(("%s %d is %s, not %s"):format(k <= STEPS and "loss" or "number", k <= STEPS and k or k - STEPS, got[k], line))
    end
  end
end

-- Leaves freed memory full of NaN behind, in blocks of many sizes.
local function spoil_memory()
  local list = {}
  for k = 1, 400 do list[k] = orepa.full({ k * k }, 0 / 0) end
  for _, t in ipairs(list) do t:release() end
end

for _, residual in ipairs { "basic", "bottleneck" } do
  describe("the same seed, blocks " .. residual, function()
    local first
    lazy_setup(function() first = run(1, 2, residual) end)
    lazy_teardown(function() first = nil end) -- a heap of 50 MB is slow to collect in the specs after this one

    it("gives the same bits again in one process, whatever freed memory holds", function()
      spoil_memory()
      same_lines(run(1, 2, residual), first)
      orepa.empty_cache()
      same_lines(run(1, 2, residual), first)
    end)

    it("gives the same bits in two other processes", function()
      same_lines(run_elsewhere(1, 2, residual), first)
      same_lines(run_elsewhere(1, 2, residual), first)
    end)

    it("gives the same bits again with one thread and with three", function()
      for _, threads in ipairs { 1, 3 } do same_lines(run(1, threads, residual), run(1, threads, residual)) end
    end)

    it("matters: another one gives other numbers", function()
      local other, same = run(2, 2, residual), 0
      for k = 1, STEPS do same = same + (other[k] == first[k] and 1 or 0) end
      assert.equal(0, same)
    end)
  end)
end

-- ---- threads ----

-- Collects the results of kernels that promise the same bits at any number of threads: all but convolutions.
local function collector()
  local list = {}
  return list, function(...)
    for _, t in ipairs { ... } do list[#list + 1] = t:detach():clone() end
  end
end

local kernels = {}

for _, o in ipairs { { 64, 64, 3, 1 }, { 48, 96, 3, 2 }, { 40, 40, 5, 8 } } do
  for _, fused in ipairs { true, false } do
    local name = ("squeezing %d -> %d, %dx%d, %d groups, %s"):format(o[1], o[2], o[3], o[3], o[4],
      fused and "fused" or "leaf by leaf")
    kernels[name] = function(add)
      local block = nn.OREPA { in_channels = o[1], out_channels = o[2], kernel_size = o[3], groups = o[4] }:set_fused(fused)
      orepa.no_grad(function() block.vector:copy_(orepa.rand(block.vector.shape)) end)
      local w = block:squeezed_weight()
      w:backward(orepa.randn(w.shape))
      add(w)
      for name_of, p in block:named_parameters() do
        if not name_of:find "^bn" then add(p.grad) end
      end
    end
  end
end

kernels["squeezing the stem"] = function(add)
  local block = nn.OREPALargeConv { in_channels = 3, out_channels = 32, kernel_size = 7 }
  local w = block:squeezed_weight()
  w:backward(orepa.randn(w.shape))
  add(w)
  for name, p in block:named_parameters() do
    if not name:find "^bn" then add(p.grad) end
  end
end

local function map()
  return orepa.randn(7, 33, 29, 31):requires_grad_()
end

kernels["a norm"] = function(add)
  local bn, x = nn.BatchNorm2d(33), map()
  local y = F.relu(bn(x))
  y:backward(orepa.randn(y.shape))
  add(y, x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var)
end

kernels.pooling = function(add)
  local x = map()
  local y, z = F.max_pool2d(x, { kernel_size = 3, stride = 2, padding = 1 }), F.adaptive_avg_pool2d(x, { output_size = 3 })
  y:backward(orepa.randn(y.shape))
  z:backward(orepa.randn(z.shape))
  add(y, z, x.grad)
end

kernels["a loss"] = function(add)
  local labels = {}
  for k = 1, 3000 do labels[k] = k % 50 end
  local logits = orepa.randn(3000, 50):requires_grad_()
  local loss = F.cross_entropy(logits, orepa.tensor(labels, { dtype = "int64" }), { label_smoothing = 0.1 })
  loss:backward()
  add(loss, logits.grad, F.softmax(logits, 1))
end

kernels["reductions and element-wise functions"] = function(add)
  local x = map():detach()
  add(x:sum(), x:mean(1, 3, 4), x:sum(2), x:max(), x:argmax(2), (x * x + 1):sqrt():log(), x:exp(), x:permute(4, 3, 2, 1):sum(1))
end

kernels["an optimizer's step"] = function(add)
  local p = nn.Parameter(orepa.randn(100003))
  local opt = optim.SGD({ p }, { lr = 0.1, momentum = 0.9, weight_decay = 0.01 })
  for _ = 1, 2 do
    p.grad = orepa.randn(p.shape)
    opt:step()
  end
  add(p, orepa.tensor((opt:gradient_norm())))
end

describe("the bits at 2, 3, 4 and 7 threads are those at one:", function()
  local before = orepa.threads()
  after_each(function() orepa.set_threads(before) end)

  for name, kernel in pairs(kernels) do
    it(name, function()
      local function results(threads)
        orepa.set_threads(threads)
        orepa.manual_seed(3)
        local list, add = collector()
        kernel(add)
        return list
      end
      local one = results(1)
      assert(#one > 0)
      for _, threads in ipairs { 2, 3, 4, 7 } do
        for k, t in ipairs(results(threads)) do
          assert(t:eq(one[k]):all():item(), ("result %d differs at %d threads"):format(k, threads))
        end
      end
    end)
  end
end)

-- ---- memory ----

-- In a process of its own, so that nothing else makes garbage: prints what is held and its peak for each of many passes after
-- a warm-up, and what lives at the ends.
local memory_text = [[
local orepa = require "orepa"
local nn = orepa.nn
orepa.set_threads(1)
orepa.manual_seed(1)
local body = nn.Sequential(
  nn.OREPALargeConv { in_channels = 3, out_channels = 8, kernel_size = 5, stride = 2, act = "relu" },
  nn.OREPA { in_channels = 8, out_channels = 8, kernel_size = 3, act = "relu" }, nn.MaxPool2d(2),
  nn.OREPA1x1 { in_channels = 8, out_channels = 12 }, nn.AdaptiveAvgPool2d(1))
local linear = nn.Linear { in_features = 12, out_features = 5 }
local net = nn.ModuleList { body, linear }
function net.run(x) return linear(body(x):flatten(2)) end
local opt = orepa.optim.SGD(orepa.optim.param_groups(net), { lr = 0.01, momentum = 0.9 })
local x, labels = orepa.randn(4, 3, 20, 20), orepa.tensor({ 0, 1, 2, 3 }, { dtype = "int64" })
local function train()
  net:train()
  local loss = orepa.F.cross_entropy(net.run(x), labels)
  opt:zero_grad()
  loss:backward()
  opt:step()
end
local function evaluate()
  net:eval()
  orepa.no_grad(function() return orepa.F.cross_entropy(net.run(x), labels):item() end)
end
local function report(what)
  local m = orepa.memory()
  print(("%s %d %d"):format(what, m.live + m.cached, m.peak))
end
local function living()
  net:train() -- drops folded kernels
  collectgarbage()
  collectgarbage()
  print(("living %d"):format(orepa.memory().live))
end
for _ = 1, 300 do train() end
for _ = 1, 300 do evaluate() end
living()
for _ = 1, 300 do train() report "training" end
for _ = 1, 300 do evaluate() report "evaluation" end
living()
]]

describe("memory", function()
  it("is flat after a warm-up over 300 training steps and 300 evaluations without explicit collection", function()
    local lists = {}
    for what, numbers in process.run_text(memory_text):gmatch "(%a+) ([%d ]+)\n" do
      lists[what] = lists[what] or {}
      table.insert(lists[what], numbers)
    end
    assert.equal(2, #lists.living)
    assert.equal(lists.living[1], lists.living[2])
    local first_held, first_peak = lists.training[1]:match "(%d+) (%d+)"
    for _, what in ipairs { "training", "evaluation" } do
      assert.equal(300, #lists[what])
      for k, numbers in ipairs(lists[what]) do -- when the collector runs may move them a little
        local held, peak = numbers:match "(%d+) (%d+)"
        assert(held / first_held < 1.05 and peak / first_peak < 1.05,
          ("%s %d: %d held, %d peak; %d and %d at first"):format(what, k, held, peak, first_held, first_peak))
      end
    end
  end)

  it("of a graph and its gradients goes when the last handle does", function()
    orepa.manual_seed(1)
    local net = models.create("resnet", { num_blocks = { 1, 1, 1, 1 }, residual = "bottleneck", width = 0.0625,
      reparam = "orepa", classes = 5 })
    local x = orepa.randn(2, 3, 33, 33)
    local function living()
      collectgarbage()
      collectgarbage()
      return orepa.memory().live
    end
    F.cross_entropy(net(x), orepa.tensor({ 0, 1 }, { dtype = "int64" })):backward() -- makes what is made once
    net:zero_grad()
    local before = living()
    for _ = 1, 3 do
      local y = net(x)
      assert(orepa.memory().live > before)
      y:sum():backward()
      net:zero_grad()
    end
    net(x) -- a graph without a backward pass
    assert.equal(before, living())
  end)
end)
