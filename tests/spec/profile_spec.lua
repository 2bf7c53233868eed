-- orepa.profile: what is counted and whose it is, what an error leaves, and the trace in Chrome's format.

local orepa = require "orepa"
local cjson = require "cjson"
local lfs = require "lfs"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"
local nn, F, optim = orepa.nn, orepa.F, orepa.optim

local function row_of(list, fields)
  for _, row in ipairs(list) do
    local fits = true
    for name, value in pairs(fields) do fits = fits and row[name] == value end
    if fits then return row end
  end
end

local function op(p, name, pass)
  return row_of(p.ops, { name = name, pass = pass or "forward" })
end

local function module_at(p, path, root)
  return row_of(p.modules, { path = path, root = root })
end

local function block(more)
  local o = { in_channels = 4, out_channels = 4, kernel_size = 3, act = "relu" }
  for name, value in pairs(more or {}) do o[name] = value end
  return nn.OREPA(o)
end

describe("a profile", function()
  it("has the ops of a step, forward and backward", function()
    local net, x = nn.Sequential(block(), block()), orepa.rand(2, 4, 8, 8)
    local p = orepa.profile(function() net(x):sum():backward() end)
    for _, name in ipairs { "squeeze", "conv2d", "batch_norm", "relu" } do
      assert.equal(2, op(p, name).calls, name)
      assert.equal(2, op(p, name, "backward").calls, name)
    end
    assert.equal(1, op(p, "sum").calls)
    assert.equal(1, op(p, "sum", "backward").calls)
    assert.equal(1, op(p, "backward", "backward").calls)
    local map = 4 * 2 * 4 * 8 * 8
    assert.equal(2 * map, op(p, "conv2d").bytes)
    assert.equal(0, op(p, "conv2d", "backward").bytes)
    local macs = 2 * 4 * 8 * 8 * 4 * 9
    assert.equal(2 * macs, op(p, "conv2d").macs)
    assert.equal(3 * macs, op(p, "conv2d", "backward").macs) -- the first has no input gradient
    assert.is_true(op(p, "squeeze").macs > 0 and op(p, "squeeze", "backward").macs > op(p, "squeeze").macs)
    assert.is_true(p.peak >= 2 * map)
    assert.equal(0, p.lost)
  end)

  it("has times that fit into each other", function()
    local net, x = nn.Sequential(block(), nn.Sequential(block())), orepa.rand(2, 4, 8, 8)
    local p = orepa.profile(function() net(x):sum():backward() end)
    local own, kernels, last = 0, 0, math.huge
    for _, row in ipairs(p.ops) do
      assert.is_true(row.self >= 0 and row.self <= row.seconds and row.seconds <= p.seconds, row.name)
      assert.is_true(row.self <= last)
      own, last = own + row.self, row.self
    end
    for _, row in ipairs(p.kernels) do kernels = kernels + row.seconds end
    assert.is_true(kernels < own and own < p.seconds)
    assert.is_true(math.abs(own + p.rest - p.seconds) < 1e-9 and p.rest > 0)
    local backward = op(p, "backward", "backward")
    assert.is_true(backward.self < backward.seconds)
    local whole, parts = module_at(p, ""), 0
    for _, row in ipairs(p.modules) do
      assert.is_true(row.forward > 0 and row.backward > 0 and row.self <= row.seconds)
      assert.equal(row.forward + row.backward, row.seconds)
      parts = parts + row.self
    end
    assert.is_true(math.abs(parts - whole.seconds) < 1e-9)
    assert.equal(whole, p.modules[1])
  end)

  it("knows whose nodes a backward pass goes through", function()
    local Net = nn.Module:extend("Net")
    function Net:init()
      self.conv = nn.Conv2d { in_channels = 2, out_channels = 3, kernel_size = 1 }
      self.head = nn.Sequential(nn.Linear { in_features = 3, out_features = 5 }, nn.Tanh())
    end
    function Net:forward(x) return self.head(F.adaptive_avg_pool2d(self.conv(x)):flatten(2)) * 2 end
    local net, x = Net(), orepa.rand(7, 2, 4, 4)
    local loss
    local p = orepa.profile(function() loss = net(x):sum(); loss:backward() end)
    local conv, linear = 7 * 16 * 2 * 3, 7 * 3 * 5
    assert.equal(2 * conv, module_at(p, "conv").macs)
    assert.equal(3 * linear, module_at(p, "head.0").macs)
    assert.equal(3 * linear, module_at(p, "head").macs)
    assert.equal(2 * conv + 3 * linear, module_at(p, "").macs)
    assert.is_true(module_at(p, "head").backward > module_at(p, "head.1").backward)
    assert.same({ "Net", "Conv2d", "Sequential" },
      { module_at(p, "").type, module_at(p, "conv").type, module_at(p, "head").type })
    assert.is_true(module_at(p, "").backward < op(p, "backward", "backward").seconds)
  end)

  it("leaves a graph that was made before to nobody", function()
    local net = nn.Linear { in_features = 2, out_features = 2 }
    local y = net(orepa.ones(1, 2)):sum()
    local p = orepa.profile(function() net(orepa.ones(1, 2)); y:backward() end)
    assert.equal(0, module_at(p, "").backward)
    assert.equal(1, op(p, "matmul", "backward").calls)
  end)

  it("sees a checkpoint's second forward pass in the module's backward", function()
    local inner = nn.Sequential(nn.Linear { in_features = 3, out_features = 4 }, nn.Tanh())
    local net = nn.Sequential(nn.checkpoint(inner))
    local x = orepa.rand(5, 3):requires_grad_()
    local p = orepa.profile(function() net(x):sum():backward() end)
    local linear = row_of(p.modules, { type = "Linear" })
    assert.equal("0.0", linear.path)
    assert.equal(1, linear.calls)
    assert.equal(4 * 5 * 3 * 4, linear.macs) -- forward twice, and both gradients
    assert.equal(linear.macs, module_at(p, "").macs)
    assert.equal(2, op(p, "linear").calls)
    assert.is_true(op(p, "checkpoint", "backward").self < op(p, "checkpoint", "backward").seconds)
  end)

  it("tells networks apart by name", function()
    local function net() return nn.Sequential(nn.Tanh()) end
    local teacher, student, head = net(), net(), nn.Tanh()
    local p = orepa.profile(function() head(student(teacher(orepa.ones(2)))) end)
    for _, root in ipairs { "Sequential", "Sequential (2)", "Tanh" } do assert(module_at(p, "", root), root) end
    assert(module_at(p, "0", "Sequential") and module_at(p, "0", "Sequential (2)"))
    assert(p:text "modules":find("Sequential (2): 0", 1, true))
  end)

  it("counts a module inside itself once", function()
    local Nest = nn.Module:extend("Nest")
    function Nest:init() self.linear = nn.Linear { in_features = 3, out_features = 3, bias = false } end
    function Nest:forward(x, depth) return depth == 0 and x or self(self.linear(x), depth - 1) end
    local net = Nest()
    local p = orepa.profile(function() net(orepa.rand(2, 3), 4):sum():backward() end)
    local row, linear = module_at(p, ""), module_at(p, "linear")
    assert.same({ 5, 4 }, { row.calls, linear.calls })
    assert.equal(2 * 9 * (4 + 4 + 3), linear.macs)
    assert.equal(linear.macs, row.macs)
    assert.is_true(linear.seconds < row.seconds and row.seconds < p.seconds)
  end)

  it("keeps no network", function()
    local net = block()
    local p = orepa.profile(function() net(orepa.rand(1, 4, 8, 8)) end)
    local weak = setmetatable({ net }, { __mode = "v" })
    net = nil -- luacheck: ignore
    collectgarbage()
    assert.is_nil(weak[1])
    assert.equal("OREPA", p.modules[1].type)
  end)

  it("names ops as Lua does, whoever holds them", function()
    local add, x = F.relu, orepa.arange(4)
    local p = orepa.profile(function()
      x:mul_(2)
      x:reshape(1, 4):squeeze()
      return { add(x), x + 1, -x, x[2], x:exp(), F.cross_entropy(orepa.ones(2, 3), orepa.zeros({ 2 }, { dtype = "int64" })) }
    end)
    for _, name in ipairs { "relu", "add", "neg", "index", "exp", "cross_entropy", "mul_", "squeeze dimensions", "reshape" } do
      assert.equal(1, (op(p, name) or {}).calls, name)
    end
    assert.is_nil(op(p, "squeeze"))
  end)

  it("has the optimizer's step, and kernels by geometry", function()
    local net = block()
    local opt = optim.SGD(net:parameters(), { lr = 0.1, momentum = 0.9 })
    local p = orepa.profile(function()
      opt:zero_grad()
      net(orepa.rand(1, 4, 6, 6)):sum():backward()
      opt:step()
    end)
    assert.equal(1, op(p, "sgd_step").calls)
    local kernel = row_of(p.kernels, { name = "conv_backward_weight" })
    assert.equal("3x3, 4 -> 4, 6x6", kernel.detail)
    assert.equal("conv2d's weight gradient", kernel.op)
    assert.equal(36 * 4 * 4 * 9, kernel.macs)
  end)

  it("gives what f returns, after warming up", function()
    local calls = 0
    local p, a, b, c = orepa.profile(function()
      calls = calls + 1
      return calls, nil, orepa.ones(2):sum():item()
    end, { warm_up = 2, rows = 1 })
    assert.same({ 3, 2 }, { a, c })
    assert.is_nil(b)
    assert.equal(1, op(p, "sum").calls)
    assert.matches(("%%.%%.%%. and %d more"):format(#p.ops - 1), tostring(p))
  end)

  it("says all that in two tables", function()
    local net = nn.Sequential(block())
    local p = orepa.profile(function() net(orepa.rand(2, 4, 8, 8)):sum():backward() end)
    local text = tostring(p)
    assert.matches("^[%d.]+ ms, of which [%d.]+ ms outside of ops; at most [%d.]+ %a+ live\n\nop +pass +calls +self ms", text)
    assert.matches("\nconv2d +backward +1 +[%d.]+ +[%d.]+ ", text)
    assert.matches("\nmodule +type +calls +total ms", text)
    assert.matches("\n0 +OREPA +1 ", text)
    assert.matches("^kernel +of +geometry", p:text "kernels")
    local _, lines = p:text("ops", { rows = 2 }):gsub("\n", "")
    assert.equal(3, lines) -- and the first, with the heads
    assert.matches("^0%.%d+ ms", tostring(orepa.profile(function() end)))
  end)

  it("checks what it gets", function()
    fails("a function expected, got nil", orepa.profile)
    fails("unknown option 'repeats'", orepa.profile, print, { repeats = 1 })
    fails("rows is 0", orepa.profile, print, { rows = 0 })
    fails("warm_up is %-1", orepa.profile, print, { warm_up = -1 })
    local p = orepa.profile(function() end)
    fails("there is no table 'op'", p.text, p, "op")
    fails("unknown option 'row'", p.text, p, "ops", { row = 1 })
    fails("a path expected", p.save, p)
  end)
end)

describe("an error in a profile", function()
  it("goes on as it is, and ends the profile", function()
    local mark = {}
    local net = nn.Sequential(nn.Tanh())
    local ok, raised = pcall(orepa.profile, function()
      net(orepa.ones(2))
      error(mark)
    end)
    assert.same({ false, mark }, { ok, raised })
    assert.equal(mark, raised)
    local message = fails("boom", orepa.profile, function() error "boom" end)
    assert.matches("^[^\n]*profile_spec.lua:%d+: boom$", message)
    local p = orepa.profile(function() net(orepa.ones(2)) end)
    assert.equal(1, op(p, "tanh").calls)
  end)

  it("leaves calls of modules unobserved", function()
    local call = require("orepa.nn.calls").call
    local function observer()
      for k = 1, 10 do
        local name, value = debug.getupvalue(call, k)
        if name == "around" then return value end
      end
      error "no such variable"
    end
    orepa.profile(function() assert.is_function(observer()) end)
    assert.is_nil(observer())
    pcall(orepa.profile, error)
    assert.is_nil(observer())
  end)

  it("keeps the lines that led to it", function()
    local function deep() error "here" end
    local _, text = xpcall(orepa.profile, debug.traceback, function() deep() end)
    assert.matches("in upvalue 'deep'", text)
  end)

  it("is met by a profile inside, which is none", function()
    fails("under way already, and they do not nest", orepa.profile, function() orepa.profile(function() end) end)
    local p = orepa.profile(function()
      assert.is_false(pcall(orepa.profile, function() end))
      return orepa.ones(2):sum()
    end)
    assert.equal(1, op(p, "sum").calls)
  end)

  it("that is caught in f ends the modules that it left", function()
    local Broken = nn.Module:extend "Broken"
    function Broken.forward() return orepa.ones(2):reshape(3) end
    local net, after = nn.Sequential(Broken()), nn.Tanh()
    local p = orepa.profile(function()
      assert.is_false(pcall(net, orepa.ones(2)))
      after(orepa.ones(2))
    end)
    assert.equal("Tanh", row_of(p.modules, { type = "Tanh" }).root)
    assert.is_true(row_of(p.modules, { type = "Tanh" }).seconds > 0)
    assert.equal(1, op(p, "reshape").calls)
  end)

  it("in an op's arguments leaves no op open", function()
    local t = orepa.arange(3)
    local p = orepa.profile(function()
      assert.is_false(pcall(t.masked_fill, t, t:gt(1), "x"))
      assert.is_false(pcall(t.masked_fill, t, t, 0))
      return t:exp():masked_fill(t:gt(1), 0)
    end)
    assert.equal(1, op(p, "masked_fill").calls)
    for _, row in ipairs(p.ops) do assert.equal(row.seconds, row.self) end
  end)

  it("is a yield out of it; coroutines inside are right", function()
    local co = coroutine.wrap(function() return pcall(orepa.profile, function() coroutine.yield(1) end) end)
    local ok, message = co()
    assert.is_false(ok)
    assert.matches("yield", message)
    local Slow = nn.Module:extend "Slow"
    function Slow.forward(_, x)
      coroutine.yield()
      return x:tanh()
    end
    local first, second = Slow(), Slow()
    local p = orepa.profile(function()
      local a, b = coroutine.wrap(function() first(orepa.ones(2)) end), coroutine.wrap(function() second(orepa.ones(2)) end)
      a() b() a() b()
    end)
    assert.equal(2, op(p, "tanh").calls)
    assert.equal(2, #p.modules)
  end)

  it("leaves no memory in use", function()
    local net = block()
    local function once()
      pcall(orepa.profile, function() net(orepa.rand(1, 4, 8, 8)):sum():backward(); error "boom" end)
      orepa.profile(function() net(orepa.rand(1, 4, 8, 8)):sum():backward() end)
      net:zero_grad()
      collectgarbage()
      collectgarbage()
      return orepa.memory().live
    end
    local live = once()
    for _ = 1, 3 do assert.equal(live, once()) end
  end)
end)

-- ---- Chrome's format ----

-- The events of a file that have a duration, each with `around`, the one that it is in; all must be inside each other or apart.
local function read_trace(path)
  local spans, open = {}, {}
  for _, e in ipairs(cjson.decode(process.read(path)).traceEvents) do
    if e.ph == "X" then
      e.from, e.to = math.floor(e.ts * 1000 + 0.5), math.floor((e.ts + e.dur) * 1000 + 0.5)
      while #open > 0 and open[#open].to <= e.from do table.remove(open) end
      e.around = open[#open]
      if e.around then assert(e.around.from <= e.from and e.to <= e.around.to, e.name .. " leaves " .. e.around.name) end
      spans[#spans + 1], open[#open + 1] = e, e
    end
  end
  return spans
end

local function span_of(spans, cat, name)
  return row_of(spans, { cat = cat, name = name }) or error(("no %s '%s'"):format(cat, name))
end

local function is_inside(e, cat, name)
  while e do
    if e.cat == cat and e.name == name then return true end
    e = e.around
  end
  return false
end

describe("a saved profile", function()
  local folder
  before_each(function() folder = process.folder() end)
  after_each(function() process.remove(folder) end)

  it("is a trace in Chrome's format, nested as things ran", function()
    local net = nn.Sequential(block(), nn.ModuleDict { ['a "name"'] = nn.Tanh() }:get 'a "name"')
    local p = orepa.profile(function() net(orepa.rand(2, 4, 8, 8)):sum():backward() end)
    local path = folder .. "/trace.json"
    assert.equal(p, p:save(path))
    local spans = read_trace(path)
    for _, name in ipairs { "squeeze", "conv2d", "batch_norm" } do
      assert.is_true(is_inside(span_of(spans, "op", name), "module", "0"), name)
      assert.is_true(is_inside(span_of(spans, "backward", name .. " backward"), "op", "backward"), name)
    end
    assert.is_true(is_inside(span_of(spans, "module", "0"), "module", "Sequential"))
    assert.is_true(is_inside(span_of(spans, "module", "0.bn"), "module", "0"))
    assert.equal("OREPA", span_of(spans, "module", "0").args.type)
    local kernel = span_of(spans, "kernel", "conv_backward_weight")
    assert.equal("conv2d backward", kernel.around.name)
    assert.equal(2 * 4 * 64 * 36, kernel.args["multiply-adds"])
    assert.equal("3x3, 4 -> 4, 8x8", kernel.args.geometry)
    assert.is_nil(span_of(spans, "op", "backward").around)
    assert.equal(4 * 2 * 4 * 64, span_of(spans, "op", "conv2d").args["result bytes"])
  end)

  it("has times of the profile, and the live bytes", function()
    local p = orepa.profile(function() return orepa.ones(1000):sum() end)
    local path = folder .. "/trace.json"
    p:save(path)
    local last, most = 0, 0
    for _, e in ipairs(cjson.decode(process.read(path)).traceEvents) do
      if e.ph == "X" then
        assert.is_true(e.ts >= 0 and e.dur >= 0 and e.ts + e.dur <= 1e6 * p.seconds + 1)
        assert.is_true(e.ts >= last)
        last = e.ts
      elseif e.ph == "C" then
        most = math.max(most, e.args.bytes)
      end
      assert.equal(1, e.pid)
    end
    assert.is_true(most >= 4000 and most <= p.peak)
  end)

  it("replaces a file as a whole, or says why not", function()
    local p, path = orepa.profile(function() return orepa.ones(2) end), folder .. "/trace.json"
    process.write(path, "old")
    p:save(path)
    assert(cjson.decode(process.read(path)))
    fails("no such folder/x: no file can be made", p.save, p, folder .. "/no such folder/x")
    fails("is a folder", p.save, p, folder)
    local count = 0
    for name in lfs.dir(folder) do count = count + (name:find "^%.+$" and 0 or 1) end
    assert.equal(1, count)
  end)
end)

describe("a script", function()
  it("profiles train.fit", function()
    local folder = process.folder()
    local text = process.run_text([[
      local orepa = require "orepa"
      local nn, optim, data = orepa.nn, orepa.optim, orepa.data
      local images = data.images { images = orepa.rand(8, 4, 4):multiply_add(255, 0):to "uint8",
        labels = orepa.zeros({ 8 }, { dtype = "int64" }), classes = 2 }
      local net = nn.Sequential(nn.OREPA { in_channels = 1, out_channels = 2, kernel_size = 3 }, nn.Flatten(),
        nn.Linear { in_features = 32, out_features = 2 })
      local p, history = orepa.profile(function()
        return orepa.train.fit { net = net, optimizer = optim.SGD(net:parameters(), { lr = 0.1 }), epochs = 1,
          loader = data.loader { dataset = images, batch_size = 4 } }
      end)
      for _, row in ipairs(p.ops) do print("op", row.name, row.pass, row.calls) end
      for _, row in ipairs(p.modules) do print("module", row.path, row.calls) end
      p:save(arg[1])
      print(p)]], { folder .. "/trace.json" })
    assert.is_true(#read_trace(folder .. "/trace.json") > 50)
    process.remove(folder)
    for _, line in ipairs { "op\tsqueeze\tforward\t2", "op\tsqueeze\tbackward\t2", "op\tsgd_step\tforward\t2",
      "op\tbackward\tbackward\t2", "module\t2\t2", "module\t\t2" } do
      assert(text:find("\n" .. line .. "\n", 1, true), line .. "\n" .. text)
    end
  end)
end)
