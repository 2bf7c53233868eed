-- Loaders with threads: what workers do, how they fail, and how all of it ends.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local loading = require "tests.spec.loading"
local process = require "tests.spec.process"
local data, batches, module, threads = orepa.data, loading.batches, loading.module, loading.threads

local finish
setup(function() finish = loading.begin() end)
teardown(function() finish() end)

local RANDOM = [[
local orepa = require "orepa"
return { size = 11, get = function(self, i)
  return orepa.randn(2, 3):add(i), i, "s" .. i, { math.random(), i % 2 == 0, extra = math.random(1000) }
end }]]

describe("workers", function()
  it("change no batch", function()
    local name = module("drawing", RANDOM)
    for _, shuffle in ipairs { false, true } do
      local wanted = batches(data.loader { dataset = name, batch_size = 3, workers = 0, shuffle = shuffle, seed = 4 }, 2)
      for count = 1, 3 do
        local loader <close> = data.loader { dataset = name, batch_size = 3, workers = count, prefetch = count, shuffle = shuffle,
          seed = 4 }
        assert.same({ 11, 4 }, { loader.size, loader.batches })
        local other = batches(loader, 1)
        assert.same(wanted, batches(loader, 2))
        assert.not_same(wanted, other)
      end
    end
  end)

  it("leave the main thread's random numbers alone", function()
    orepa.manual_seed(3)
    local state, wanted = orepa.rng_state(), math.random()
    orepa.manual_seed(3)
    batches(data.loader { dataset = module("drawing", RANDOM), batch_size = 3 }, 1)
    assert.same(state, orepa.rng_state())
    assert.equal(wanted, math.random())
  end)

  it("have a state each, which lives from epoch to epoch", function()
    local name = module("counting", [[
local loaded, count = tostring({}), 0
return { size = 8, get = function() count = count + 1; return loaded, count, package.path end }]])
    local loader <close> = data.loader { dataset = name, batch_size = 1, workers = 2 }
    local seen, most = {}, 0
    for epoch = 1, 3 do
      for state, count, where in loader:epoch(epoch) do
        seen[state[1]] = true
        most = math.max(most, count:item())
        assert.equal(package.path, where[1])
      end
    end
    local states = 0
    for _ in pairs(seen) do states = states + 1 end
    assert.is_true(states <= 2 and most >= 12)
  end)

  it("run kernels alone, and record no graph", function()
    local name = module("alone", [[
local orepa = require "orepa"
return { size = 4, get = function()
  local x = orepa.ones(3):requires_grad_()
  local set, message = pcall(orepa.set_threads, 2)
  local held, why = pcall(orepa.hold_interrupt)
  return orepa.threads(), orepa.is_grad_enabled(), (x * 2).requires_grad, set or held, message .. why
end }]])
    for threads_, enabled, required, allowed, message in data.loader({ dataset = name, batch_size = 4 }):epoch(1) do
      assert.same({ 1, 1, 1, 1 }, threads_:tolist())
      for _, t in ipairs { enabled, required, allowed } do assert.is_false(t:any():item()) end
      assert.matches("set_threads: .*hold_interrupt: ", message[1])
    end
  end)

  it("compute what the main thread computes", function()
    local name = module("network", [[
local orepa = require "orepa"
return { size = 3, get = function(self, i)
  local x, w = orepa.randn(1, 8, 12, 12), orepa.randn(8, 8, 3, 3)
  return orepa.F.conv2d(x, w, nil, {padding = 1}), orepa.F.softmax(orepa.F.relu(x), 2),
    w:reshape(8, 72):matmul(w:reshape(72, 8)), x:argmax(2)
end }]])
    local wanted = batches(data.loader { dataset = name, batch_size = 1, workers = 0 }, 1)
    local loader <close> = data.loader { dataset = name, batch_size = 1, workers = 2 }
    local got = batches(loader, 1)
    local function near(a, b)
      if type(a) == "number" then
        assert.near(a, b, 1e-4)
      else
        for k in pairs(a) do
          if type(a[k]) ~= "string" then near(a[k], b[k]) end
        end
      end
    end
    near(wanted, got)
  end)

  it("get options, and share the memory of tensors", function()
    local name = module("given", [[
return function(o)
  return { size = o.count, get = function(self, i)
    if i == 2 then return o.table, pcall(o.table.fill_, o.table, 1) end
    return o.table, o.nested.deep[2] == "x", "fine"
  end }
end]])
    local table_ = orepa.arange(4)
    local live = orepa.memory().live
    local loader <close> = data.loader { dataset = name, batch_size = 1, dataset_options = { count = 2, table = table_,
      nested = { deep = { 1, "x" } } }, collate = function(s) return table.unpack(s[1]) end }
    assert.is_true(orepa.memory().live - live < 4096)
    local list = {}
    for t, ok, message in loader:epoch(1) do list[#list + 1] = { t, ok, message } end
    assert.same({ { 1, 2, 3, 4 }, true, "fine" }, { list[1][1]:tolist(), list[1][2], list[1][3] })
    assert.is_false(list[2][2])
    assert.matches("may not write to a tensor that another thread has", list[2][3])
    table_:fill_(5)
    assert.same({ 5, 5, 5, 5 }, list[1][1]:tolist())
  end)

  it("put samples together by a module's function, or leave that to the main thread", function()
    module("varied", [[
local orepa = require "orepa"
return { size = 5, get = function(self, i) return orepa.ones(i), { i, name = "n" .. i } end }]])
    local text = [[
return function(samples)
  local sizes, names = {}, {}
  for k, s in ipairs(samples) do sizes[k], names[k] = s[1].shape[1], s[2].name end
  return sizes, names, math.random(), samples[1].n
end]]
    local wanted = batches(data.loader { dataset = "varied", batch_size = 2, workers = 0, collate = load(text)() }, 1)
    assert.same({ { 1, 2 }, { "n1", "n2" } }, { wanted[1][1], wanted[1][2] })
    for _, collate in ipairs { module("lengths", text), load(text)() } do
      for count = 0, 2 do
        local loader <close> = data.loader { dataset = "varied", batch_size = 2, workers = count, collate = collate }
        assert.same(wanted, batches(loader, 1))
      end
    end
  end)

  it("let every kind of value through, and nothing else", function()
    local name = module("values", [[
local values = {
  function() return math.mininteger, 1e308, -0.0, "\0zero\0", true end,
  function() return { [1.5] = "a", [true] = { {} }, x = { 1, 2, { y = "z" } } } end,
  function() return 1, nil, 3 end,
  function() return print end,
  function() return 1, { a = { 5, coroutine.create(print) } } end,
  function() return setmetatable({}, {}) end,
  function() local t = {}; t[1] = t; return t end,
  function() return { [print] = 1 } end,
  function() return io.stdout end,
  function() local t = require("orepa").ones(1); t:release(); return t end,
}
return { size = #values, get = function(self, i) return values[i]() end }]])
    local loader <close> = data.loader { dataset = name, batch_size = 1, workers = 1, prefetch = 1, collate = function(s)
      return table.unpack(s[1], 1, s[1].n)
    end }
    local next_batch = loader:epoch(1)
    assert.same({ math.mininteger, 1e308, -0.0, "\0zero\0", true }, { next_batch() })
    assert.same({ [1.5] = "a", [true] = { {} }, x = { 1, 2, { y = "z" } } }, next_batch())
    assert.same({ n = 3, 1, nil, 3 }, table.pack(next_batch()))
    module("one_of", [[
return function(o)
  local d = require(o.name)
  return { size = 1, get = function() return d:get(o.i) end }
end]])
    for i, pattern in pairs { [4] = "value 1: a function; only tensors, numbers", [5] = "value 2%.a%[2%]: a thread",
      [6] = "a metatable", [7] = "nested too deep", [8] = "a key that is neither", [9] = "value 1: a userdata",
      [10] = "a tensor that was released" } do
      local part <close> = data.loader { dataset = "one_of", dataset_options = { name = name, i = i }, batch_size = 1,
        collate = function() return 1 end }
      fails("sample 1: .*" .. pattern, part:epoch(1))
    end
  end)

  it("make the pictures of orepa.datasets.shapes", function()
    local function pictures(count, epoch)
      local loader <close> = data.loader { dataset = "orepa.datasets.shapes", dataset_options = { size = 7, side = 9 },
        batch_size = 7, workers = count }
      return batches(loader, epoch)[1]
    end
    local one = pictures(1, 1)
    assert.same({ 1, 2, 0, 1, 2, 0, 1 }, one[2].values)
    assert.same({ 7, 1, 9, 9 }, orepa.tensor(one[1].values).shape)
    assert.same(one, pictures(0, 1))
    assert.same(one, pictures(2, 1))
    assert.not_same(one, pictures(1, 2))
    fails("shapes: side is 3", data.loader, { dataset = "orepa.datasets.shapes", dataset_options = { side = 3 }, batch_size = 1 })
  end)

  it("may use a tensor again for the next sample", function()
    local name = module("again", [[
local orepa = require "orepa"
local buffer = orepa.zeros(3)
return { size = 4, get = function(_, i) return buffer:fill_(i) end }]])
    for _, batch_size in ipairs { 1, 4 } do
      local loader <close> = data.loader { dataset = name, batch_size = batch_size }
      local sum = 0
      for x in loader:epoch(1) do sum = sum + x:sum():item() end
      assert.equal(batch_size == 1 and 30 or 48, sum) -- within a batch it is one tensor
    end
  end)

  it("keep memory flat", function()
    local name = module("large", [[
local orepa = require "orepa"
return { size = 400, get = function(self, i) return orepa.full({ 1 << 16 }, i) end }]]) -- 256 KiB each
    local text = process.run_text(([[
package.path = %q
local orepa = require "orepa"
local loader <close> = orepa.data.loader{dataset = %q, batch_size = 8, workers = 2}
for epoch = 1, 3 do
  for x in loader:epoch(epoch) do assert(x.shape[1] == 8) end
end
print(orepa.memory().peak)]]):format(package.path, name))
    assert(tonumber(text) < 160 << 20, text) -- all there were: 300 MiB
  end)
end)

describe("failures of workers", function()
  local function open(text, o)
    o = o or {}
    o.dataset, o.batch_size = module("failing", text), o.batch_size or 2
    return data.loader(o)
  end

  it("in loading are raised where the loader is made", function()
    fails("module 'no.such.module' not found", data.loader, { dataset = "no.such.module", batch_size = 1 })
    fails("failing.lua:1: broken", open, "error 'broken'")
    fails("failing.lua:1:.*expected", open, "return {")
    fails("the module 'failing' gives a number, not a dataset", open, "return 5")
    fails("the module 'failing' gives a table, not a dataset", open, "return {size = 1}")
    fails("its size is 1.5, an integer from 0 expected", open, "return {size = 1.5, get = print}")
    fails("the module 'failing' gives a table, not a function that takes options", open, "return {size = 1, get = print}",
      { dataset_options = {} })
    fails("has %d samples in worker 1 and %d in worker 2", open,
      ("local f = io.open(%q, 'a'); f:write 'x'; f:close(); return {size = #io.open(%q):read 'a', get = print}")
        :format(loading.folder .. "/count", loading.folder .. "/count"), { workers = 2 })
    fails("collate: the module 'string' gives a table, not a function", open, "return {size = 1, get = print}",
      { collate = "string" })
    fails("dataset_options: .*a function", open, "return function() end", { dataset_options = { print } })
    for count = 0, 1 do fails("failing.lua:1: broken", open, "error 'broken'", { workers = count }) end
  end)

  it("in a sample are raised where its batch is taken, with its position", function()
    for count = 0, 3 do
      local loader <close> = open("return {size = 9, get = function(_, i) if i == 6 then error 'bad image' end return i end}",
        { workers = count })
      local taken = 0
      fails("workers_spec.lua:%d+: data.loader: sample 6: .*failing.lua:1: bad image", function()
        for _ in loader:epoch(1) do taken = taken + 1 end
      end)
      assert.equal(2, taken)
    end
  end)

  it("leave the loader as it was", function()
    local loader <close> = open("return {size = 4, get = function(_, i) if i == 3 then error({}) end return i end}")
    for _ = 1, 2 do
      local next_batch = loader:epoch(1)
      assert.same({ 1, 2 }, next_batch():tolist())
      fails("sample 3: table", next_batch)
      assert.is_nil(next_batch())
    end
  end)

  it("that would end the program end a sample", function()
    fails("sample 1: .*os.exit: a worker of a loader can't end the program",
      open("return {size = 1, get = function() os.exit(3) end}"):epoch(1))
    fails("sample 1: .*can't open another", open("local orepa = require 'orepa'; return {size = 1, get = function() " ..
      "return orepa.data.loader{dataset = 'failing', batch_size = 1, workers = 1} end}"):epoch(1))
  end)

  it("are options of the wrong kind", function()
    local set = { size = 1, get = print }
    fails("got number", data.loader, { dataset = 5, batch_size = 1 })
    fails("got table", data.loader, { dataset = { size = 1 }, batch_size = 1 })
    fails("size is nil", data.loader, { dataset = { get = print }, batch_size = 1 })
    fails("a dataset in a table runs on the main thread", data.loader, { dataset = set, batch_size = 1, workers = 2 })
    fails("workers is %-1, an integer of at least 0", data.loader, { dataset = set, batch_size = 1, workers = -1 })
    fails("prefetch is 0", data.loader, { dataset = "failing", batch_size = 1, workers = 1, prefetch = 0 })
    fails("prefetch is what workers make ahead", data.loader, { dataset = set, batch_size = 1, prefetch = 2 })
    fails("option 'padding' is for images in memory", data.loader, { dataset = set, batch_size = 1, padding = 2 })
    fails("dataset_options are for a dataset that is named", data.loader, { dataset = set, batch_size = 1, dataset_options = {} })
    fails("collate: a function or the name of a module", data.loader, { dataset = set, batch_size = 1, collate = 5 })
    local images = data.images { images = orepa.zeros(1, 1, 1), labels = orepa.zeros({ 1 }, { dtype = "int64" }), classes = 1 }
    fails("option 'collate' is for datasets in Lua", data.loader, { dataset = images, batch_size = 1, collate = print })
    fails("threads, not 2147483647", function() data.loader({ dataset = images, batch_size = 1, workers = 1 << 40 }):epoch(1) end)
    fails("epoch is nil", function() data.loader({ dataset = set, batch_size = 1 }):epoch() end)
  end)
end)

-- ---- endings ----

local SLOW = [[
local orepa = require "orepa"
return { size = 1000, get = function(self, i) return orepa.full({ 100 }, i) end }]]
local STUCK = {
  loop = "return { size = 4, get = function(self, i) if i > 1 then while true do end end return i end }",
  caught = "return { size = 4, get = function(self, i) if i > 1 then while true do pcall(error, 1) end end return i end }",
  coroutine = [[return { size = 4, get = function(self, i)
    if i > 1 then coroutine.wrap(function() while true do end end)() end
    return i
  end }]],
  resumed = [[return { size = 4, get = function(self, i)
    local co = coroutine.create(function() while true do coroutine.yield() end end)
    while i > 1 do pcall(coroutine.resume, co) end
    return i
  end }]],
}

describe("the end of an epoch", function()
  local before
  before_each(function() before = threads() end)

  it("by break, an error or close joins the threads", function()
    local images = data.images { images = orepa.zeros(100, 4, 4), labels = orepa.zeros({ 100 }, { dtype = "int64" }),
      classes = 1 }
    for _, dataset in ipairs { module("slow", SLOW), images } do
      local loader = data.loader { dataset = dataset, batch_size = 2, workers = 3 }
      for _ in loader:epoch(1) do -- luacheck: ignore 512
        assert.is_true(threads() > before)
        break
      end
      assert.equal(before, threads())
      fails("stops here", function()
        for _ in loader:epoch(1) do error "stops here" end
      end)
      assert.equal(before, threads())
      local next_batch = loader:epoch(1)
      next_batch()
      assert.is_true(threads() > before)
      loader:close()
      assert.equal(before, threads())
      fails("it was closed", next_batch)
      fails("it was closed", loader.epoch, loader, 1)
      loader:close()
    end
  end)

  it("by a scope or the collector joins them too", function()
    do
      local loader <close> = data.loader { dataset = module("slow", SLOW), batch_size = 2, workers = 2 }
      local first, second = loader:epoch(1), loader:epoch(2) -- two at a time have workers of their own
      assert.same(first():tolist(), second():tolist())
      assert.equal(before + 4, threads())
    end
    assert.equal(before, threads())
    local function forgotten()
      data.loader({ dataset = "slow", batch_size = 2, workers = 2 }):epoch(1)()
    end
    forgotten()
    assert.equal(before, threads())
  end)

  it("keeps workers only where it was reached", function()
    local loader <close> = data.loader { dataset = module("slow", SLOW), batch_size = 500, workers = 2 }
    assert.equal(before + 2, threads())
    batches(loader, 1)
    assert.equal(before + 2, threads())
  end)

  for name, text in pairs(STUCK) do
    it(("stops a sample without end (%s)"):format(name), function()
      local loader = data.loader { dataset = module("stuck", text), batch_size = 1, workers = 2 }
      for x in loader:epoch(1) do -- luacheck: ignore 512
        assert.equal(1, x:item())
        break
      end
      assert.equal(before, threads())
      loader:close()
      loader = nil -- luacheck: ignore
      assert.equal(before, threads())
    end)
  end

  it("stops a sample that waits for a pipe", function()
    os.execute(("mkfifo '%s/pipe'"):format(loading.folder))
    local name = module("waiting", ("return { size = 4, get = function(_, i) if i > 1 then io.open(%q) end return i end }")
      :format(loading.folder .. "/pipe"))
    local loader <close> = data.loader { dataset = name, batch_size = 1, workers = 2 }
    local next_batch = loader:epoch(1)
    assert.equal(1, next_batch():item())
    loader:close()
    assert.equal(before, threads())
  end)

  it("stops a module that never loads", function()
    local text = process.run_text(([[
package.path = %q
local orepa = require "orepa"
local handle = orepa.loading.open_workers(2, 2, {dataset = "endless", batch_size = 1})
assert(handle:ready(0.2) == false)
handle:close()
print("closed")]]):format(package.path), {}, { _ = module("endless", "while true do end") })
    assert.equal("closed\n", text)
  end)
end)

describe("the end of the program", function()
  local ENDINGS = { ["falls off the end"] = "", ["os.exit"] = "os.exit(0)", ["os.exit that closes"] = "os.exit(0, true)",
    ["an error"] = "error 'on purpose'" }
  for how, last in pairs(ENDINGS) do
    for _, dataset in ipairs { "slow", "stuck" } do
      it(("in mid-epoch joins the workers (%s, %s)"):format(how, dataset), function()
        module("slow", SLOW)
        module("stuck", STUCK.loop)
        local script = module("script", ([[
package.path = %q
local orepa = require "orepa"
local loader = orepa.data.loader{dataset = %q, batch_size = 1, workers = 2}
local images = orepa.data.images{images = orepa.zeros(100, 4, 4), labels = orepa.zeros({100}, {dtype = "int64"}), classes = 1}
local others = orepa.data.loader{dataset = images, batch_size = 2, workers = 2}
for x in others:epoch(1) do
  for y in loader:epoch(1) do
    print("one")
    io.stdout:flush()
    %s
    goto out
  end
end
::out::]]):format(package.path, dataset, last))
        local text, code = process.run { ("%s/%s.lua"):format(loading.folder, script) }
        assert(text:find("^one\n"), text)
        if how == "an error" then
          assert(code == 1 and text:find("on purpose", 1, true), text)
        else
          assert.same({ "one\n", 0 }, { text, code })
        end
      end)
    end
  end

  it("under lua5.4 is the same", function()
    local lua = io.popen("command -v lua5.4"):read "l"
    if not lua or os.getenv "ASAN_OPTIONS" then return end -- such a library wants a program that was built with it
    module("slow", SLOW)
    module("stuck", STUCK.coroutine)
    local script = module("script", ([[
package.path, package.cpath = %q, %q
local orepa = require "orepa"
for _, dataset in ipairs { "slow", "stuck" } do
  local loader = orepa.data.loader{dataset = dataset, batch_size = 1, workers = 2}
  for x in loader:epoch(1) do print(x:sum():item()) break end
end
local loader = orepa.data.loader{dataset = "stuck", batch_size = 1}
loader:epoch(1)()
os.exit(7)]]):format(package.path, package.cpath))
    local pipe = io.popen(("OMP_WAIT_POLICY=passive %s '%s/%s.lua' 2>&1"):format(lua, loading.folder, script))
    local text = pipe:read "a"
    local _, _, code = pipe:close()
    assert.same({ "100.0\n1\n", 7 }, { text, code })
  end)
end)

describe("Ctrl-C", function()
  local terminal = require "tests.spec.terminal"
  local t
  after_each(function() t:close() end)

  it("at the prompt stops a wait for a batch, and everything is still there", function()
    module("stuck", STUCK.loop)
    t = terminal.open({}, loading.folder)
    t:prompt()
    t:ask(("package.path = %q"):format(package.path))
    t:ask "loader = orepa.data.loader{dataset = 'stuck', batch_size = 1, workers = 2}; seen = 0"
    t:type "for x in loader:epoch(1) do seen = seen + 1; io.write('batch\\n'); io.flush() end\r"
    t:expect "batch\r?\n"
    t:type "\3"
    assert.equal("^Cinterrupted\n", (t:prompt():match "[^\n]*\n$"))
    assert.equal("1\n", (t:ask "seen"))
    t:ask "for x in loader:epoch(1) do seen = seen + 1; break end"
    assert.equal("2\n", (t:ask "seen"))
    t:ask "collectgarbage(); collectgarbage()"
    t:type "\4"
    local _, code = t:finish()
    assert.equal(0, code)
  end)
end)
