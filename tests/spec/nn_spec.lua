-- Modules: how fields become parameters, buffers and children, under which names; containers; states; hooks; printing; layers.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function names_of(iterator)
  local names = {}
  for name in iterator do names[#names + 1] = name end
  return names
end

local function linear(i, o) return nn.Linear { in_features = i, out_features = o } end
local function set(t, values) orepa.no_grad(function() t:copy_(orepa.tensor(values)) end) end

local function near(wanted, got)
  local a, b = orepa.tensor(wanted):flatten():tolist(), got:flatten():tolist()
  assert.equal(#a, #b)
  for k, v in ipairs(a) do assert.near(v, b[k], 1e-5) end
end

describe("a class of modules", function()
  local Net = nn.Module:extend("Net")
  function Net:init(width, deep)
    self.second = linear(2, width)
    self.gain = nn.Parameter(orepa.ones(width))
    self.first = linear(width, 1)
    self.count = 3
    self:register_buffer("seen", orepa.zeros(1))
    if deep then self.inner = Net(width) end
  end
  function Net:forward(x) return self.first(self.second(x) * self.gain) end

  it("gets its constructor's arguments, and computes by call or by forward", function()
    local net, x = Net(4), orepa.ones(3, 2)
    assert.same({ 3, 1 }, net(x).shape)
    assert.same(net:forward(x):tolist(), net(x):tolist())
    assert.equal(3, net.count)
  end)

  it("names parameters as PyTorch does: a module's own first, in order of assignment", function()
    assert.same({ "gain", "second.weight", "second.bias", "first.weight", "first.bias", "inner.gain", "inner.second.weight",
      "inner.second.bias", "inner.first.weight", "inner.first.bias" }, names_of(Net(4, true):named_parameters()))
    assert.same({ "seen", "inner.seen" }, names_of(Net(4, true):named_buffers()))
    assert.same({ "", "second", "first" }, names_of(Net(4):named_modules()))
    assert.equal(5, #Net(4):parameters())
  end)

  it("can be extended again, without a forward it says so", function()
    local Wide = Net:extend("Wide")
    function Wide:init() Net.init(self, 16) end
    assert.same({ 3, 1 }, Wide()(orepa.ones(3, 2)).shape)
    assert.matches("^Wide ", tostring(Wide()))
    fails("Empty has no forward", function() nn.Module:extend("Empty")()() end)
  end)

  it("lets fields be assigned late, replaced and set to nil", function()
    local net = Net(4)
    net.extra_layer = nn.ReLU()
    net.first = linear(4, 7)
    net.gain = nil
    assert.same({ "second.weight", "second.bias", "first.weight", "first.bias" }, names_of(net:named_parameters()))
    assert.same({ 7, 4 }, net.first.weight.shape)
    assert.same({ "", "second", "first", "extra_layer" }, names_of(net:named_modules()))
  end)

  it("counts a shared module or parameter once", function()
    local shared = linear(2, 2)
    local net = nn.Sequential(shared, nn.ReLU(), shared)
    assert.same({ "0.weight", "0.bias" }, names_of(net:named_parameters()))
    assert.same({ "", "0", "1" }, names_of(net:named_modules()))
    local tied = nn.Sequential(linear(2, 2), linear(2, 2))
    tied[2].weight = tied[1].weight
    assert.equal(3, #tied:parameters())
  end)

  it("takes no plain table of modules, and names the field", function()
    local Bad = nn.Module:extend("Bad")
    function Bad:init() self.layers = { nn.ReLU(), nn.ReLU() } end
    local bad = Bad()
    for _, method in ipairs { "parameters", "state_dict", "train", "named_modules" } do
      fails("Bad: field 'layers' is a plain table that holds modules; make it an nn.ModuleList or nn.ModuleDict",
        bad[method], bad)
    end
    local Good = nn.Module:extend("Good")
    function Good:init() self.sizes = { 1, 2 } end
    assert.same({}, Good():parameters())
  end)

  it("takes tensors as parameters and nothing else", function()
    fails("a tensor expected, got number", nn.Parameter, 1)
    fails("int64", nn.Parameter, orepa.ones({ 1 }, { dtype = "int64" }))
    local p = orepa.ones(1)
    assert.is_true(nn.Parameter(p) == p)
    assert.is_true(p.requires_grad)
  end)
end)

describe("containers", function()
  it("are indexed from 1 and named from 0", function()
    local seq = nn.Sequential(linear(2, 3), nn.ReLU(), linear(3, 1))
    assert.equal(3, #seq)
    assert.same({ 3, 2 }, seq[1].weight.shape)
    assert.same({ "", "0", "1", "2" }, names_of(seq:named_modules()))
    assert.same({ 5, 1 }, seq(orepa.ones(5, 2)).shape)
    assert.equal(seq, seq:add(nn.ReLU()))
    assert.equal(4, #seq)
  end)

  it("of an empty Sequential give the input back", function()
    local x = orepa.ones(2)
    assert.is_true(nn.Sequential()(x) == x)
  end)

  it("ModuleList and ModuleDict hold modules by number and by name", function()
    local list = nn.ModuleList { linear(1, 2), linear(2, 3) }
    assert.same({ "0.weight", "0.bias", "1.weight", "1.bias" }, names_of(list:named_parameters()))
    local dict = nn.ModuleDict { b = nn.ReLU(), a = linear(1, 1) }
    assert.same({ "", "a", "b" }, names_of(dict:named_modules()))
    assert.same({ 4, 1 }, dict.a(orepa.ones(4, 1)).shape)
    dict.c = linear(1, 1)
    assert.same({ "", "a", "b", "c" }, names_of(dict:named_modules()))
  end)

  it("take modules alone; a hole is an error too", function()
    fails("Sequential: item 2 is a number, not a module", nn.Sequential, nn.ReLU(), 5)
    fails("Sequential: item 1 is a table, not a module", nn.Sequential, { nn.ReLU() })
    fails("Sequential: item 2 is a nil, not a module", nn.Sequential, nn.ReLU(), nil, nn.ReLU())
    fails("ModuleDict: item a is a string, not a module", nn.ModuleDict, { a = "x" })
    fails("ModuleList: item 1 is a function, not a module", nn.ModuleList, { print })
  end)

  it("keep parameters and modules that a class adds to them", function()
    local Net = nn.Sequential:extend("Net")
    function Net:init()
      nn.Sequential.init(self, linear(2, 2), nn.ReLU())
      self.gain = nn.Parameter(orepa.ones(1))
      self.head = linear(2, 1)
    end
    function Net:forward(x) return self.head(nn.Sequential.forward(self, x) * self.gain) end
    local net = Net()
    assert.same({ 3, 1 }, net(orepa.ones(3, 2)).shape)
    local names = names_of(net:named_parameters())
    table.sort(names)
    assert.same({ "0.bias", "0.weight", "gain", "head.bias", "head.weight" }, names)
    net:replace("head", linear(2, 5))
    net:replace("0", nn.ReLU())
    assert.same({ 3, 5 }, net(orepa.ones(3, 2)).shape)
  end)
end)

describe("get and replace", function()
  local net = nn.Sequential(nn.ModuleDict { conv = nn.Conv2d { in_channels = 1, out_channels = 2, kernel_size = 3 } },
    nn.BatchNorm2d(2))

  it("find modules, parameters and buffers by path", function()
    assert.equal(net, net:get "")
    assert.equal(net[1].conv, net:get "0.conv")
    assert.is_true(net:get "0.conv.weight" == net[1].conv.weight)
    assert.is_true(net:get "1.running_mean" == net[2].running_mean)
    fails("Sequential has nothing at '0.nothing'", net.get, net, "0.nothing")
  end)

  it("put another module at a path", function()
    local conv = nn.Conv2d { in_channels = 1, out_channels = 4, kernel_size = 1, bias = false }
    assert.equal(net, net:replace("0.conv", conv):replace("1", nn.BatchNorm2d(4)))
    assert.same({ 2, 4, 5, 5 }, net[2](net[1].conv(orepa.ones(2, 1, 5, 5))).shape)
    assert.same({ "0.conv.weight", "1.weight", "1.bias" }, names_of(net:named_parameters()))
    fails("has no module at '3'", net.replace, net, "3", conv)
    fails("has no module at '0.conv.weight'", net.replace, net, "0.conv.weight", conv)
    fails("a module expected, got nil", net.replace, net, "1")
  end)
end)

describe("modes", function()
  it("are one flag a module", function()
    local net = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.ReLU()))
    assert.equal(net, net:eval())
    for _, m in net:named_modules() do assert.is_false(m.training) end
    net[2]:train()
    assert.is_false(net.training)
    assert.is_true(net[2][1].training)
    assert.equal(net, net:train())
    for _, m in net:named_modules() do assert.is_true(m.training) end
    assert.is_false(net:train(false)[1].training)
  end)
end)

describe("to", function()
  it("moves and converts in place: who holds a tensor sees it", function()
    local net = nn.Sequential(linear(2, 2), nn.BatchNorm2d(2))
    local weight = net[1].weight
    assert.equal(net, net:to("ref"))
    assert.equal("ref", weight.device)
    assert.equal("ref", net[2].num_batches_tracked.device)
    net:to("float64")
    assert.equal("float64", weight.dtype)
    assert.equal("float64", net[2].running_var.dtype)
    assert.equal("int64", net[2].num_batches_tracked.dtype)
    assert.is_true(weight.requires_grad)
    net:to { dtype = "float32", device = "cpu" }
    assert.same({ "cpu", "float32" }, { weight.device, weight.dtype })
    assert.same({ "cpu", "int64" }, { net[2].num_batches_tracked.device, net[2].num_batches_tracked.dtype })
    fails("requires a gradient can't become int64", net.to, net, "int64")
    assert.equal(6, #net:to("float32"):to("cpu"):parameters() + 2)
    fails("neither a type nor a device", net.to, net, "gpu9")
    fails("neither a type nor a device", net.to, nn.ReLU(), "gpu9")
  end)
end)

describe("states", function()
  local function net() return nn.Sequential(linear(2, 3), nn.BatchNorm2d(3)) end
  local NAMES = { "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked" }

  it("have all parameters and buffers, in order", function()
    local tensors, names = net():state_dict()
    assert.same(NAMES, names)
    assert.same({}, tensors["1.num_batches_tracked"].shape)
  end)

  it("load into the module's own tensors", function()
    local a, b = net(), net()
    local weight = b[1].weight
    local missing, unexpected = b:load_state_dict(a:state_dict())
    assert.same({}, missing)
    assert.same({}, unexpected)
    assert.same(a[1].weight:tolist(), weight:tolist())
    assert.is_true(b[1].weight == weight)
    assert.is_true(weight.requires_grad)
  end)

  it("that lack names or have others are an error, unless strict is off", function()
    local m = net()
    local before = m[1].weight:tolist()
    local state = net():state_dict()
    state["1.bias"], state["2.weight"] = nil, orepa.ones(1)
    fails("missing: 1.bias\n  unexpected: 2.weight", m.load_state_dict, m, state)
    assert.same(before, m[1].weight:tolist())
    local missing, unexpected = m:load_state_dict(state, { strict = false })
    assert.same({ "1.bias" }, missing)
    assert.same({ "2.weight" }, unexpected)
    assert.same(state["0.weight"]:tolist(), m[1].weight:tolist())
  end)

  it("of another shape are an error even if strict is off, and nothing is written", function()
    local m, state = net(), net():state_dict()
    state["0.weight"] = orepa.ones(3, 4)
    local before = m[1].bias:tolist()
    for _, options in ipairs { { strict = false }, { strict = true } } do
      fails("of another shape: 0.weight is 3x2, the file has 3x4", m.load_state_dict, m, state, options)
    end
    assert.same(before, m[1].bias:tolist())
    state["0.weight"] = 5
    fails("0.weight", m.load_state_dict, m, state)
    fails("a table of tensors expected", m.load_state_dict, m, nil)
  end)
end)

describe("forward hooks", function()
  it("see inputs and outputs, in order, until removed", function()
    local net, seen = nn.Sequential(linear(2, 3), nn.ReLU(), linear(3, 1)), {}
    local hook = net[2]:register_forward_hook(function(m, inputs, y)
      seen[#seen + 1] = { m, inputs[1], y }
    end)
    local x = orepa.ones(4, 2)
    net(x)
    assert.equal(net[2], seen[1][1])
    assert.same(F.relu(seen[1][2]):tolist(), seen[1][3]:tolist()) -- nothing was released under the hook
    hook.remove()
    net(x)
    assert.equal(1, #seen)
    fails("a function expected, got nil", net.register_forward_hook, net)
  end)
end)

describe("printing", function()
  it("is a tree with options and counts", function()
    local net = nn.Sequential(
      nn.Conv2d { in_channels = 3, out_channels = 64, kernel_size = 7, stride = 2, padding = 3, bias = false },
      nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d { kernel_size = 3, stride = 2, padding = 1 },
      nn.Sequential(nn.OREPA { in_channels = 64, out_channels = 64, kernel_size = 3, act = "relu" }), nn.AdaptiveAvgPool2d(1),
      nn.ModuleDict { head = linear(64, 10) })
    assert.equal([[
Sequential  (138,186 parameters)
  0: Conv2d 3 -> 64, 7x7, stride 2x2, padding 3x3  (9,408 parameters)
  1: BatchNorm2d 64  (128 parameters)
  2: ReLU
  3: MaxPool2d 3x3, stride 2x2, padding 1x1
  4: Sequential  (128,000 parameters)
    0: OREPA 64 -> 64, 3x3, relu, branches origin avg pfir 1x1_kxk 1x1 dw_pw  (128,000 parameters)
      bn: BatchNorm2d 64  (128 parameters)
  5: AdaptiveAvgPool2d to 1x1
  6: ModuleDict  (650 parameters)
    head: Linear 64 -> 10  (650 parameters)]], tostring(net))
    net:deploy()
    assert.matches("0: OREPA 64 %-> 64, 3x3, relu, deployed  %(36,928 parameters%)", tostring(net))
  end)
end)

describe("options", function()
  it("that are unknown or missing are errors with their names", function()
    fails("Conv2d: option 'out_channels' is missing", nn.Conv2d, { in_channels = 1, kernel_size = 3 })
    fails("Conv2d: unknown option 'kernel' %(there are bias dilation groups", nn.Conv2d, { in_channels = 1, out_channels = 1,
      kernel = 3 })
    fails("Linear: a table of options expected, got number", nn.Linear, 3)
    fails("BatchNorm2d: option 'num_features' is missing", nn.BatchNorm2d, {})
    fails("MaxPool2d: option 'kernel_size' is missing", nn.MaxPool2d)
    fails("Conv2d: 3 groups don't divide 4 %-> 6 channels", nn.Conv2d, { in_channels = 4, out_channels = 6, kernel_size = 1,
      groups = 3 })
    fails("OREPA: unknown option 'pad'", nn.OREPA, { in_channels = 1, out_channels = 1, kernel_size = 3, pad = 1 })
    fails("OREPA: option 'kernel_size' is missing", nn.OREPA, { in_channels = 1, out_channels = 1 })
    fails("OREPA1x1: groups is 2, this block has 1", nn.OREPA1x1, { in_channels = 2, out_channels = 2, groups = 2 })
  end)

  it("of the wrong kind are errors with their names, never an error inside the library", function()
    local good = { Conv2d = { in_channels = 2, out_channels = 2, kernel_size = 3, groups = 1 },
      Linear = { in_features = 2, out_features = 2 }, BatchNorm2d = { num_features = 2 },
      OREPA = { in_channels = 2, out_channels = 2, kernel_size = 3, groups = 1 },
      OREPA1x1 = { in_channels = 2, out_channels = 2 },
      OREPALargeConv = { in_channels = 2, out_channels = 2, kernel_size = 5 },
      OREPALargeConvBase = { in_channels = 2, out_channels = 2, kernel_size = 5 },
      ConvBN = { in_channels = 2, out_channels = 2, kernel_size = 3, groups = 1 } }
    for class, options in pairs(good) do
      for name in pairs(options) do
        for _, wrong in ipairs { "x", {}, 0, -1, 1.5, true, 0 / 0 } do
          local given = {}
          for key, value in pairs(options) do given[key] = value end
          given[name] = wrong
          local ok, message = pcall(nn[class], given)
          assert(not ok, ("%s takes %s = %s"):format(class, name, tostring(wrong)))
          assert(message:find(name, 1, true) and not message:find("attempt to", 1, true), message)
        end
      end
      for _, wrong in ipairs { "x", true, print } do fails("a table of options expected", nn[class], wrong) end
      fails(class .. ": ", nn[class])
    end
  end)
end)

describe("layers", function()
  it("Linear: x times the transposed weight, plus bias", function()
    local layer = linear(2, 3)
    set(layer.weight, { { 1, 2 }, { 3, 4 }, { 5, 6 } })
    set(layer.bias, { 10, 20, 30 })
    near({ { 10 + 1 - 2, 20 + 3 - 4, 30 + 5 - 6 } }, layer(orepa.tensor { { 1, -1 } }))
    assert.is_nil(nn.Linear({ in_features = 2, out_features = 3, bias = false }).bias)
  end)

  it("Conv2d: a window's products, with stride, padding and groups", function()
    local layer = nn.Conv2d { in_channels = 1, out_channels = 1, kernel_size = 2, stride = 2, padding = 1 }
    set(layer.weight, { { { { 1, 2 }, { 3, 4 } } } })
    set(layer.bias, { 0.5 })
    near({ 4 * 1 + 0.5, 3 * 2 + 4 * 3 + 0.5, 2 * 4 + 4 * 7 + 0.5, 5 + 2 * 6 + 3 * 8 + 4 * 9 + 0.5 },
      layer(orepa.arange(9):reshape(1, 1, 3, 3)))
    local grouped = nn.Conv2d { in_channels = 2, out_channels = 2, kernel_size = { 1, 2 }, groups = 2, bias = false }
    set(grouped.weight, { { { { 1, -1 } } }, { { { 2, 1 } } } })
    near({ -1, 2 * 3 + 4 }, grouped(orepa.arange(4):reshape(1, 2, 1, 2)))
  end)

  it("Conv2d and Linear start uniform within one over the root of the inputs", function()
    orepa.manual_seed(1)
    local conv = nn.Conv2d { in_channels = 8, out_channels = 16, kernel_size = 3, groups = 2 }
    local bound = 1 / math.sqrt(4 * 9)
    for _, p in ipairs(conv:parameters()) do assert.is_true(p:abs():max():item() <= bound) end
    assert.is_true(conv.weight:abs():max():item() > 0.95 * bound)
    assert.near(0, conv.weight:mean():item(), 0.1 * bound)
  end)

  it("BatchNorm2d: by the batch in training, by running statistics in evaluation", function()
    local norm = nn.BatchNorm2d { num_features = 1, eps = 0, momentum = 0.5 }
    set(norm.weight, { 2 })
    set(norm.bias, { 1 })
    local x = orepa.tensor({ 1, 3 }):reshape(2, 1, 1, 1)
    near({ -1, 3 }, norm(x))
    near({ 1 }, norm.running_mean) -- half of 2
    near({ 0.5 + 0.5 * 2 }, norm.running_var) -- the unbiased variance
    assert.equal(1, norm.num_batches_tracked:item())
    norm:eval()
    near({ 1, 1 + 2 * 2 / math.sqrt(1.5) }, norm(x))
    assert.equal(1, norm.num_batches_tracked:item())
    local scale, shift = norm:fold()
    near({ 2 / math.sqrt(1.5) }, scale)
    near({ 1 - 2 / math.sqrt(1.5) }, shift)
  end)

  it("BatchNorm2d without affine or statistics", function()
    local norm = nn.BatchNorm2d { num_features = 1, eps = 0, affine = false, track_running_stats = false }
    assert.same({}, norm:parameters())
    near({ -1, 1 }, norm:eval()(orepa.tensor({ 1, 3 }):reshape(2, 1, 1, 1)))
    fails("can't be folded", norm.fold, norm)
  end)

  it("pools: the largest or the mean of a window", function()
    local x = orepa.arange(16):reshape(1, 1, 4, 4)
    near({ 6, 8, 14, 16 }, nn.MaxPool2d(2)(x))
    near({ 3.5, 5.5, 11.5, 13.5 }, nn.AvgPool2d(2)(x))
    near({ 1, 3, 9, 11 }, nn.MaxPool2d { kernel_size = 1, stride = 2 }(x))
    near({ 6, 7, 8, 10, 11, 12, 14, 15, 16 }, nn.MaxPool2d { kernel_size = 2, stride = 1 }(x))
    near({ 1, 4 / 3 }, nn.AvgPool2d { kernel_size = { 1, 3 }, padding = { 0, 1 }, stride = { 1, 2 } }(orepa.tensor({ 1, 2, 2 })
      :reshape(1, 1, 1, 3)))
    near({ 8.5 }, nn.AdaptiveAvgPool2d(1)(x))
    near({ 8, 16 }, nn.AdaptiveMaxPool2d { output_size = { 2, 1 } }(x))
    near({ 0, 2 }, nn.ReLU()(orepa.tensor { -1, 2 }))
  end)
end)

describe("deploying", function()
  it("replaces each block, also one of a class that extends it, and twice changes nothing", function()
    local Mine = nn.ReparamBlock:extend("Mine")
    local L = orepa.reparam
    function Mine:init(c)
      nn.ReparamBlock.init(self, { in_channels = c, out_channels = c, kernel_size = 3, branches = { { L.conv { 3 } },
        { L.conv { 1 } } } })
    end
    orepa.manual_seed(2)
    local net = nn.Sequential(nn.OREPA { in_channels = 2, out_channels = 4, kernel_size = 3 }, Mine(4))
    local x = orepa.randn(2, 2, 5, 5)
    net(x)
    local before = net:eval()(x)
    assert.equal(net, net:deploy())
    assert.equal(4, #net:parameters())
    local difference = (net(x) - before):abs():max():item()
    assert(difference < 1e-5, difference)
    local names = names_of(net:named_parameters())
    net:deploy()
    assert.same(names, names_of(net:named_parameters()))
    fails("the branches went when the block was deployed", net[1].squeezed_weight, net[1])
  end)
end)

describe("F.batch_norm's less_zero", function()
  local function fresh()
    orepa.manual_seed(7)
    local o = { weight = orepa.rand(3):requires_grad_(), bias = orepa.randn(3):requires_grad_(), running_mean = orepa.randn(3),
      running_var = orepa.rand(3) + 0.5 }
    return orepa.randn(2, 3, 4, 5):requires_grad_(), orepa.randn(2, 3, 4, 5), o
  end

  -- The map and all gradients, of x, weight and bias.
  local function results(training, less_zero, run)
    local x, dy, o = fresh()
    o.training, o.less_zero = training, less_zero
    local y = run(function(t) return F.batch_norm(t, o) end, x)
    y:backward(dy)
    return y:detach(), o, { x.grad, o.weight.grad, o.bias.grad, o.running_mean, o.running_var }
  end

  local function call(f, x) return f(x) end

  it("takes off what the running statistics, updated, make of zero, with the same gradients", function()
    for _, training in ipairs { true, false } do
      local plain, o, others = results(training, false, call)
      local zero = orepa.no_grad(function() return o.bias - o.running_mean * o.weight * (o.running_var + 1e-5) ^ -0.5 end)
      assert(zero:abs():max():item() > 0.1)
      for _, run in ipairs { call, orepa.checkpoint } do
        local less, _, same = results(training, true, run)
        near((plain - zero:reshape(1, -1, 1, 1)):flatten():tolist(), less)
        for k, t in ipairs(others) do near(t:flatten():tolist(), same[k]) end
      end
    end
  end)

  it("needs running statistics", function()
    fails("batch_norm: less_zero needs running statistics", F.batch_norm, orepa.ones(2, 3), { training = true, less_zero = true })
  end)
end)
