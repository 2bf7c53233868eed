-- Loaders on the main thread: datasets in Lua, what becomes of their samples, and threads that prepare images.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local loading = require "tests.spec.loading"
local process = require "tests.spec.process"
local data, batches = orepa.data, loading.batches

local function int64(values) return { dtype = "int64", values = values } end
local function float32(values) return { dtype = "float32", values = values } end

describe("a dataset in a table", function()
  it("gives batches of what its samples are", function()
    local set = { size = 3, factor = 10, get = function(self, i)
      return orepa.full({ 2 }, self.factor * i), i, i / 2, "s" .. i, i > 1, { box = { i, -i }, name = "n" .. i }
    end }
    local got = batches(data.loader { dataset = set, batch_size = 2 }, 1)
    assert.same({
      { n = 6, float32 { { 10, 10 }, { 20, 20 } }, int64 { 1, 2 }, float32 { 0.5, 1 }, { "s1", "s2" },
        { dtype = "bool", values = { false, true } }, { box = { int64 { 1, 2 }, int64 { -1, -2 } }, name = { "n1", "n2" } } },
      { n = 6, float32 { { 30, 30 } }, int64 { 3 }, float32 { 1.5 }, { "s3" }, { dtype = "bool", values = { true } },
        { box = { int64 { 3 }, int64 { -3 } }, name = { "n3" } } },
    }, got)
  end)

  it("may be an object; its size, options and loader's numbers are as for images", function()
    local Set = {}
    Set.__index = Set
    function Set:get(i) return self.first + i end
    local loader = data.loader { dataset = setmetatable({ size = 7, first = 100 }, Set), batch_size = 3, drop_last = true }
    assert.same({ 7, 2, 2 }, { loader.size, loader.batches, #loader })
    assert.same({ { n = 1, int64 { 101, 102, 103 } }, { n = 1, int64 { 104, 105, 106 } } }, batches(loader, 1))
    assert.same({}, batches(data.loader { dataset = { size = 0, get = Set.get }, batch_size = 3 }, 1))
    for x in data.loader({ dataset = setmetatable({ size = 1, first = 0 }, Set), batch_size = 3, device = "ref" }):epoch(1) do
      assert.equal("ref", x.device)
    end
  end)

  it("is visited in an order of seed and epoch alone", function()
    local set = { size = 20, get = function(_, i) return i end }
    local function order(seed, epoch, batch_size)
      local list = {}
      for labels in data.loader({ dataset = set, batch_size = batch_size or 6, shuffle = true, seed = seed }):epoch(epoch) do
        for _, i in ipairs(labels:tolist()) do list[#list + 1] = i end
      end
      return list
    end
    local first = order(1, 1)
    assert.same(first, order(1, 1, 7))
    assert.not_same(first, order(1, 2))
    assert.not_same(first, order(2, 1))
    local images = data.images { images = orepa.zeros(20, 1, 1), labels = orepa.arange(20):to("int64"), classes = 20 }
    local list = {} -- the order is that of images
    for _, labels in data.loader({ dataset = images, batch_size = 20, shuffle = true, seed = 1 }):epoch(1) do
      for _, label in ipairs(labels:tolist()) do list[#list + 1] = label end
    end
    assert.same(first, list)
  end)

  it("draws for a sample what follows from seed, epoch and position, and disturbs nobody", function()
    local set = { size = 6, get = function() return orepa.rand(2), math.random(), math.random(1 << 40) end }
    local function drawn(o)
      o.dataset = set
      return batches(data.loader(o), 3)
    end
    orepa.manual_seed(7)
    local wanted = { math.random(), math.random(), orepa.rand(1):item() }
    orepa.manual_seed(7)
    local found = { math.random() }
    local first = drawn { batch_size = 1 }
    found[2], found[3] = math.random(), orepa.rand(1):item()
    assert.same(wanted, found)
    assert.same(first, drawn { batch_size = 1 })
    assert.not_same(first, drawn { batch_size = 1, seed = 1 })
    assert.not_same(first[1], first[2])
    assert.same(first[2][2].values[1], drawn({ batch_size = 4 })[1][2].values[2])
  end)

  it("records no graph", function()
    local w = orepa.ones(2):requires_grad_()
    for x in data.loader({ dataset = { size = 2, get = function() return w * 2 end }, batch_size = 2 }):epoch(1) do
      assert.is_false(x.requires_grad)
    end
    assert.is_true((w * 2).requires_grad)
  end)

  it("may be divided", function()
    local set = { size = 5, get = function(_, i) return i end }
    assert.same({ { n = 1, int64 { 3, 4 } } }, batches(data.loader { dataset = data.part(set, 3, 4), batch_size = 4 }, 1))
    fails("data.part: samples 4 to 6 of 5", data.part, set, 4, 6)
    assert.equal(0, data.part(set, 1, 0).size)
  end)

  it("whose samples don't fit says which", function()
    local function first(get, o)
      o = o or {}
      o.dataset, o.batch_size = { size = 4, get = get }, 4
      return data.loader(o):epoch(1)()
    end
    fails("sample 2: value 1 is float32 2, but float32 1 in sample 1", first, function(_, i) return orepa.ones(i) end)
    fails("sample 3: value 1 is a string, but a number in sample 1", first, function(_, i) return i > 2 and "x" or i end)
    fails("sample 2: 2 values, but 1 in sample 1", first, function(_, i) return table.unpack({ 1, 2 }, 1, math.min(i, 2)) end)
    fails('sample 2: value 1%["a"%] is a nil, but a number', first,
      function(_, i) return { [i == 1 and "a" or "b"] = 1 } end)
    fails("sample 4: value 1 has 4 entries, but 3 in sample 1", first, function(_, i) return { 1, 2, 3, i == 4 and 4 or nil } end)
    fails("sample 1: value 2 is a function; samples are made of", first, function() return 1, print end)
    fails("sample 1: value 1 is a userdata", first, function() return io.stdout end)
    fails("sample 1: get gave nil", first, function() end)
    fails("sample 2: .*loader_spec.lua:%d+: no such thing", first,
      function(_, i) return i == 2 and error "no such thing" or i end)
    fails("sample 1: attempt to yield", coroutine.wrap(function() return first(function() coroutine.yield(1) end) end))
  end)

  it("is put together by a collate function", function()
    local set = { size = 3, get = function(_, i) return orepa.ones(i), i end }
    local function lengths(samples)
      local list = {}
      for k, s in ipairs(samples) do list[k] = s[1].shape[1] + 10 * s[2] end
      return list, samples[1].n
    end
    local got = batches(data.loader { dataset = set, batch_size = 2, collate = lengths }, 1)
    assert.same({ { n = 2, { 11, 22 }, 2 }, { n = 2, { 33 }, 2 } }, got)
    fails("batch 2: .*: not this one", batches, data.loader { dataset = set, batch_size = 2,
      collate = function(s) return #s == 2 and 1 or error "not this one" end }, 1)
    fails("batch 1: collate gave nil", batches, data.loader { dataset = set, batch_size = 2, collate = function() end }, 1)
  end)

  it("trains a network as images do", function()
    local nn, optim = orepa.nn, orepa.optim
    local Net = nn.Module:extend("Net")
    function Net:init() self.linear = nn.Linear { in_features = 2, out_features = 2 } end
    function Net:forward(x) return self.linear(x) end
    local set = { size = 32, get = function(_, i) return orepa.tensor { i % 2, 1 - i % 2 }, i % 2 end }
    local net = Net()
    local history = orepa.train.fit { net = net, optimizer = optim.SGD(net:parameters(), { lr = 1 }), epochs = 5,
      loader = data.loader { dataset = set, batch_size = 8, shuffle = true },
      log = { write = function() end, flush = function() end } }
    assert.equal(1, history[5].accuracy)
  end)
end)

-- ---- images ----

describe("threads for images", function()
  it("change no batch", function()
    orepa.manual_seed(1)
    local set = data.images { images = orepa.rand(50, 3, 9, 7):mul(255):to("uint8"), labels = orepa.arange(50):to("int64"),
      classes = 50 }
    for _, o in ipairs { {}, { shuffle = true, augment = true, flip = true, padding = 2, crop = { 9, 7 } },
      { mean = { 0.1, 0.2, 0.3 }, deviation = { 1, 2, 3 }, drop_last = true, shuffle = true } } do
      o.dataset, o.batch_size, o.seed, o.workers = set, 8, 9, 0
      local wanted = batches(data.loader(o), 2)
      for count = 1, 3 do
        o.workers, o.prefetch = count, 4 - count
        assert.same(wanted, batches(data.loader(o), 2))
        o.prefetch = nil
      end
      o.workers = nil
      assert.same(wanted, batches(data.loader(o), 2))
    end
  end)

  it("where memory runs out, batches are made without", function()
    local text = process.run_text([[
local orepa = require "orepa"
local set = orepa.data.images{images = orepa.zeros(64, 256, 256), labels = orepa.zeros({64}, {dtype = "int64"}), classes = 1}
orepa.empty_cache()
orepa.set_memory_limit(orepa.memory().live + (24 << 20))
collectgarbage "stop"
local count = 0
for epoch = 1, 4 do -- of 64 MiB, none of it released
  for x in orepa.data.loader{dataset = set, batch_size = 16}:epoch(epoch) do count = count + x.shape[1] end -- 4 MiB each
end
print(count)]])
    assert.equal("256\n", text)
  end)
end)
