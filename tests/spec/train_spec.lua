-- The training loop: that it learns, what it prints, exact evaluation, where it stops, and modes.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F, optim, data, train = orepa.nn, orepa.F, orepa.optim, orepa.data, orepa.train

-- What was written, instead of standard output.
local function new_log()
  local log = { text = "" }
  function log:write(...) self.text = self.text .. table.concat({ ... }) end
  function log.flush() end
  return log
end

-- Images of 4x4: class 0 is bright on the left, class 1 on the right, class 2 nowhere.
local function dataset(count)
  orepa.manual_seed(11)
  local images, labels = orepa.rand(count, 4, 4) * 0.2, {}
  for k = 1, count do
    labels[k] = k % 3
    if labels[k] < 2 then
      local half = images[k]:slice(2, labels[k] == 0 and 1 or 3, labels[k] == 0 and 2 or 4)
      half:add_(1)
    end
  end
  return data.images { images = images, labels = orepa.tensor(labels, { dtype = "int64" }), classes = 3 }
end

local Net = nn.Module:extend("Net")
function Net:init()
  self.norm = nn.BatchNorm2d(1)
  self.head = nn.Linear { in_features = 16, out_features = 3 }
end
function Net:forward(x) return self.head(self.norm(x):flatten(2)) end

local function setup_run(o)
  orepa.manual_seed(3)
  local net = Net()
  local run = { net = net, epochs = 1, log = new_log(), loader = data.loader { dataset = dataset(40), batch_size = 16,
    shuffle = true, seed = 1 }, optimizer = optim.SGD(optim.param_groups(net), { lr = 0.1, momentum = 0.9 }) }
  for key, value in pairs(o or {}) do run[key] = value end
  return run, net
end

describe("train.fit", function()
  it("learns what can be separated, and says how it went", function()
    local valid, seen, rates = data.loader { dataset = dataset(15), batch_size = 4 }, {}, {}
    local run = setup_run { epochs = 20, valid = valid, on_epoch = function(r) seen[#seen + 1] = r end,
      schedule = function(step)
        rates[#rates + 1] = step
        return 0.1
      end }
    local history = train.fit(run)
    assert.equal(20, #history)
    assert.same(history, seen)
    assert.equal(1, history[20].accuracy)
    assert.equal(1, history[20].valid.accuracy)
    assert.is_true(history[20].loss < history[1].loss)
    assert.same({ 20, 40, 15, 0.1 }, { history[20].epoch, history[20].images, history[20].valid.images, history[20].rate })
    assert.equal(60, #rates)
    for k, step in ipairs(rates) do assert.equal(k, step) end
  end)

  it("writes one plain line an epoch where there is no terminal", function()
    local run = setup_run { epochs = 2, valid = data.loader { dataset = dataset(6), batch_size = 4 } }
    train.fit(run)
    local lines = {}
    for line in run.log.text:gmatch "[^\n]+" do lines[#lines + 1] = line end
    assert.equal(2, #lines)
    for k, line in ipairs(lines) do
      assert.matches(("^epoch %d/2  loss %%d+%%.%%d+  accuracy [%%d.]+ %%%%  %%d+ images/s  %%d+s  |  held out: loss [%%d.]+  "
        .. "accuracy [%%d.]+ %%%%$"):format(k), line)
    end
    assert.is_nil(run.log.text:find "%c" and run.log.text:find "[\r\27]")
  end)

  it("gives the same bits for the same seed", function()
    local function weights()
      local run, net = setup_run { epochs = 3 }
      train.fit(run)
      return net.head.weight:tolist()
    end
    assert.same(weights(), weights())
  end)

  it("keeps to the mean over samples, whatever the sizes of batches", function()
    local run, net = setup_run()
    run.optimizer.lr = 0
    net.norm = nn.Sequential() -- nothing that depends on the batch
    local together = train.fit(run)[1].loss
    run.loader = data.loader { dataset = dataset(40), batch_size = 40 }
    assert.near(together, train.fit(run)[1].loss, 1e-6)
  end)

  it("uses a loss of one's own", function()
    local called = 0
    local run = setup_run { loss = function(logits, labels)
      called = called + 1
      return F.cross_entropy(logits, labels, { label_smoothing = 0.1 })
    end }
    train.fit(run)
    assert.equal(3, called)
  end)

  it("stops at a loss that is not finite, before it changes anything", function()
    for _, bad in ipairs { 0 / 0, 1 / 0 } do
      local step, before, net = 0, nil, nil
      local run
      run, net = setup_run { loss = function(logits, labels)
        step = step + 1
        if step < 3 then return F.cross_entropy(logits, labels) end
        before = net.head.weight:tolist()
        return F.cross_entropy(logits, labels) * bad
      end }
      fails("the loss is %-?%a+ in epoch 1, step 3 %(rate 0.1%)", train.fit, run)
      assert.same(before, net.head.weight:tolist())
    end
  end)

  it("stops at a gradient that is not finite, naming step and parameter, before it changes anything", function()
    local step, before, net = 0, nil, nil
    local run
    run, net = setup_run { epochs = 2, loss = function(logits, labels)
      step = step + 1
      local loss = F.cross_entropy(logits, labels)
      if step < 5 then return loss end
      before = net.head.bias:tolist()
      return loss + (net.head.bias * 0):sqrt():sum() -- 0, but its slope is not finite
    end }
    fails("the gradient of 'head.bias' is not finite in epoch 2, step 2", train.fit, run)
    assert.same(before, net.head.bias:tolist())
  end)

  it("checks its options", function()
    fails("train.fit: option 'epochs' is missing", train.fit, {})
    fails("train.fit: unknown option 'model'", train.fit, { model = 1 })
    fails("train.fit: a table of options expected", train.fit, 1)
  end)
end)

describe("train.evaluate", function()
  it("is exact over batches of unequal size", function()
    local run, net = setup_run()
    train.fit(run)
    local set = dataset(13)
    local whole = train.evaluate(net, data.loader { dataset = set, batch_size = 13 })
    for _, batch_size in ipairs { 1, 5, 12 } do
      local parts = train.evaluate(net, data.loader { dataset = set, batch_size = batch_size })
      assert.near(whole.loss, parts.loss, 1e-6)
      assert.equal(whole.accuracy, parts.accuracy)
      assert.equal(13, parts.images)
    end
  end)

  it("gives each module its own mode back, after an error too", function()
    local net = Net()
    net.norm:eval()
    local modes = {}
    net.head.forward = function(self, x)
      modes[#modes + 1] = self.training
      return Net.forward and F.linear(x, self.weight, self.bias)
    end
    train.evaluate(net, data.loader { dataset = dataset(3), batch_size = 3 })
    assert.same({ false }, modes)
    assert.same({ true, false, true }, { net.training, net.norm.training, net.head.training })
    net.head.forward = function() error "broken" end
    fails("broken", train.evaluate, net, data.loader { dataset = dataset(3), batch_size = 3 })
    assert.same({ true, false, true }, { net.training, net.norm.training, net.head.training })
    assert.is_true(orepa.is_grad_enabled())
  end)

  it("changes no statistics and leaves no gradients", function()
    local net = Net()
    local before = net.norm.running_mean:tolist()
    train.evaluate(net, data.loader { dataset = dataset(6), batch_size = 3 })
    assert.same(before, net.norm.running_mean:tolist())
    assert.is_nil(net.head.weight.grad)
  end)

  it("of labels out of range is an error", function()
    local set = data.images { images = orepa.zeros(2, 4, 4), labels = orepa.tensor({ 0, 7 }, { dtype = "int64" }), classes = 3 }
    fails("7", train.evaluate, Net(), data.loader { dataset = set, batch_size = 2 })
  end)
end)
