-- The end of a program with everything still alive: graphs, hooks, functions, networks, guards. Whatever is collected first, it
-- ends as it would without.

local process = require "tests.spec.process"

-- Leaves objects of all kinds behind, in globals and nowhere; `how` it ends is an argument.
local script = [[
local orepa = require "orepa"
local nn, F = orepa.nn, orepa.F
local how, shuffle = ..., tonumber((select(2, ...)))
math.randomseed(shuffle)
local function double()
  return orepa.Function { name = "double", forward = function(ctx, x)
    local y = x * 2
    ctx:save(x, y)
    ctx.y, ctx.x = y, x
    return y, y + 1
  end, backward = function(ctx, dy, dz) return dy * 2 + dz * 2 end }
end
local makers = {
  function() return orepa.ones(3):requires_grad_() end,
  function()
    local x = orepa.ones(3):requires_grad_()
    local hook = x:register_hook(function(g) return x and g * 2 end)
    return { x, hook }
  end,
  function()
    local x = orepa.ones(3):requires_grad_()
    local h = (x * 2):retain_grad()
    h:register_hook(function(g) return h and g end) -- holds itself
    return (h * h):sum()
  end,
  function() return { double()(orepa.ones(3):requires_grad_()) } end,
  function()
    local op, x = double(), orepa.ones(4):requires_grad_()
    local y, z = op(x)
    y:sum():backward({ retain_graph = true })
    return { op, z }
  end,
  function()
    local op, y = double(), nil
    coroutine.wrap(function()
      y = op(orepa.ones(4):requires_grad_())
      y:register_hook(function() return y end)
    end)()
    return y
  end,
  function()
    local co = coroutine.create(function()
      local x = double()(orepa.ones(4):requires_grad_())
      local _ <close> = orepa.detect_anomaly { nan_only = true }
      coroutine.yield(x)
    end)
    local _, x = coroutine.resume(co)
    return { co, x }
  end,
  function()
    local x = orepa.ones(2):requires_grad_()
    return orepa.checkpoint(function(t) return double()(t) end, x)
  end,
  function()
    local net = nn.Sequential(nn.OREPA { in_channels = 2, out_channels = 2, kernel_size = 3 }, nn.BatchNorm2d(2),
      nn.checkpoint(nn.ReLU()))
    local y = net(orepa.ones(2, 2, 4, 4))
    for _, p in ipairs(net:parameters()) do p:register_hook(function(g) return net and g end) end
    y:register_hook(function(g) return y and g end)
    if math.random() < 0.5 then y:sum():backward() end
    return { net, y, orepa.optim.SGD(net:parameters(), { lr = 0.1, momentum = 0.9 }) }
  end,
  function()
    local x = orepa.ones(2):requires_grad_()
    local h = double()(x)
    h:register_hook(error)
    pcall(h.backward, h, orepa.ones(2))
    return setmetatable({ h }, { __gc = function(self) self[1]:register_hook(print) end }) -- refused, at the end
  end,
  function() return F.relu(nn.BatchNorm2d(2)(orepa.ones(2, 2, 3, 3))) end, -- a map that waits
}
kept = {}
if how == "backward" then -- a whole pass, when the state is closed
  for k = 1, 5 do
    local y = double()(orepa.ones(2):requires_grad_()):sum()
    kept[-k] = setmetatable({}, { __gc = function() y:backward() end })
  end
end
for k = 1, 60 do
  local made = makers[math.random(#makers)]()
  if math.random() < 0.7 then kept[math.random(40)] = made end
  if math.random() < 0.1 then collectgarbage(math.random() < 0.5 and "step" or "collect") end
end
local seen = orepa.ones(1):requires_grad_()
if how == "exit" then os.exit(true, true) end
if how == "exit 3" then os.exit(3, true) end
if how == "error" then error "the end" end
if how == "error in a callback" then
  local h = seen * 2
  h:register_hook(function() error "the end" end)
  h:sum():backward()
end
if how == "exit in a callback" then
  local h = seen * 2
  h:register_hook(function() os.exit(4, true) end)
  h:sum():backward()
end
if how == "exit in a function" then
  orepa.Function { forward = function() os.exit(5, true) end, backward = print }(seen)
end
if how == "exit in a coroutine" then coroutine.wrap(function() os.exit(6, true) end)() end
]]

describe("a program", function()
  local path
  setup(function()
    path = os.tmpname()
    process.write(path, script)
  end)
  teardown(function() os.remove(path) end)

  local ends = {
    { "return", 0 }, { "exit", 0 }, { "exit 3", 3 }, { "error", 1, "the end" }, { "error in a callback", 1, "the end" },
    { "exit in a callback", 4 }, { "exit in a function", 5 }, { "exit in a coroutine", 6 },
  }
  it("ends well when finalizers go backward", function()
    -- What is made while a state is closed, Lua doesn't finalize: that is lost with the process.
    local output, code = process.run({ path, "backward", 1 }, nil, { ASAN_OPTIONS = "detect_leaks=0" })
    assert.equal(0, code, output)
    assert.equal("", output)
  end)

  for k, case in ipairs(ends) do
    local how, code, words = table.unpack(case)
    it(("ends well with everything alive: by %s"):format(how), function()
      for seed = k, k + 16, 8 do
        local output, found = process.run({ path, how, seed })
        assert.equal(code, found, output)
        assert.is_truthy(not words and output == "" or words and output:find(words, 1, true), output)
      end
    end)
  end
end)
