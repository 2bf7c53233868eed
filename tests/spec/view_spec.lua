-- The live view of training: bars, what a terminal shows, and lines elsewhere.

local orepa = require "orepa"
local view = require "orepa.view"
local process = require "tests.spec.process"
local terminal = require "tests.spec.terminal"
local fails = require "tests.spec.fails"
local nn = orepa.nn

local DIGITS = { "0", "1", "2", "3" }

describe("bars", function()
  it("go from the smallest to the largest", function()
    assert.equal("0123", view.bars({ 1, 2, 3, 4 }, DIGITS))
    assert.equal("3030", view.bars({ 5, -5, 5, -5 }, DIGITS))
    assert.equal("000", view.bars({ 7, 7, 7 }, DIGITS))
    assert.equal("", view.bars({}, DIGITS))
  end)

  it("are means of pairs where there are more than a line has", function()
    local numbers = {}
    for k = 1, 64 do numbers[k] = k % 2 end
    assert.equal(("0"):rep(32), view.bars(numbers, DIGITS))
    for k = 1, 64 do numbers[k] = k <= 32 and 0 or 1 end
    assert.equal(("0"):rep(16) .. ("3"):rep(16), view.bars(numbers, DIGITS))
    table.insert(numbers, 1)
    assert.equal(32, #view.bars(numbers, DIGITS))
  end)
end)

-- A file that keeps what is written to it.
local function sheet()
  local s = { text = "" }
  function s:write(...) self.text = self.text .. table.concat({ ... }) end
  function s.flush() end
  return s
end

describe("a view", function()
  it("tells the whole of a long run, the last values exactly, and nothing of what is not finite", function()
    local v = view.open(sheet())
    v.levels = DIGITS
    for k = 1, 100000 do v:add("loss", k) end
    v:add("rate", 0.5)
    v:add("rate", 0 / 0)
    local lines = v:text("title", 200)
    assert.equal("title", lines[1])
    local value, bars = lines[2]:match "^  loss  (%S+) +(%d+)$"
    assert.equal("1e+05", value)
    assert(#bars > 16 and #bars <= 32)
    assert(bars:find "^0+1+2+3+$")
    assert(lines[3]:find "^  rate  %-?nan +0$")
  end)

  it("is cut to the terminal's width, between characters", function()
    local v = view.open(sheet())
    v.levels = { "▁", "█" }
    for k = 1, 20 do v:add("x", k) end
    for columns = 5, 30 do
      for _, line in ipairs(v:text("a title that is long", columns)) do assert(utf8.len(line) < columns) end
    end
  end)

  it("is drawn over, and taken away", function()
    local s = sheet()
    local v = view.open(s)
    v:add("x", 1)
    v:draw(function() return "one" end)
    v.drawn = -math.huge
    v:draw(function() return "two" end)
    v:clear()
    v:clear()
    assert(s.text:find "^\rone\27%[K\n  x  1[^\n]*\n\27%[2A\rtwo\27%[K\n[^\n]*\n\27%[2A\r\27%[J$")
  end)
end)

describe("orepa.watch", function()
  local net = nn.Linear { in_features = 2, out_features = 1 }

  it("writes a line every so many steps where there is no terminal", function()
    local s = sheet()
    local live = orepa.watch(net, { every = 2, log = s })
    net.weight.grad, net.bias.grad = orepa.tensor { { 3, 4 } }, orepa.zeros(1)
    for step = 1, 5 do live:step { loss = step / 2, rate = 0.1 } end
    local first, second, rest = s.text:match "^([^\n]*)\n([^\n]*)\n(.*)$"
    assert(first:find "^step 2  loss 1  rate 0.1  gradient 5  [%d.]+ steps/s$")
    assert(second:find "^step 4  loss 2  ")
    assert.equal("", rest)
  end)

  it("refuses what it can't show", function()
    fails("a module expected, got number", orepa.watch, 3)
    fails("every is 0", orepa.watch, net, { every = 0 })
    local live = orepa.watch(net)
    fails("loss is a string, a number expected", live.step, live, { loss = "x" })
    fails("a table of numbers by name expected", live.step, live, 3)
  end)
end)

describe("in a terminal", function()
  local SCRIPT = [[
    local orepa = require "orepa"
    local nn, data = orepa.nn, orepa.data
    local set = data.images{images = orepa.rand(600, 1, 4, 4), labels = orepa.zeros({600}, {dtype = "int64"}), classes = 2}
    local Net = nn.Module:extend "Net"
    function Net:init() self.body = nn.Linear{in_features = 16, out_features = 2} end
    function Net:forward(x) return self.body(x:flatten(2)) end
    local net = Net()
    local optimizer = orepa.optim.SGD(net:parameters(), {lr = 0.1})
    local function wait()
      local clock = orepa.clock()
      while orepa.clock() < clock + 0.11 do end
    end
    if arg[1] == "watch" then
      local live = orepa.watch(net)
      for step = 1, 3 do
        wait()
        live:step{loss = step}
      end
    else
      orepa.train.fit{net = net, optimizer = optimizer, epochs = 2, loader = data.loader{dataset = set, batch_size = 1},
        schedule = function(step)
          if step % 600 < 3 then wait() end
          return 1 / step
        end}
    end
    print "over"
  ]]
  local folder, t
  before_each(function()
    folder = process.folder()
    process.write(folder .. "/script.lua", SCRIPT)
  end)
  after_each(function()
    t:close()
    process.remove(folder)
  end)

  local function run(...)
    t = terminal.open({ folder .. "/script.lua", ... }, folder, { LC_ALL = "C.UTF-8", NO_PROGRESS = "" })
    return t:expect "over"
  end

  it("train.fit shows numbers and bars, which give way to a line for each epoch", function()
    local shown = run()
    assert(shown:find "epoch 1/2 %[=* *%] %d+/600  accuracy [%d.]+ %%")
    for _, name in ipairs { "loss", "rate", "gradient", "images/s" } do assert(shown:find("  " .. name, 1, true), name) end
    assert(shown:find("▁", 1, true))
    assert(shown:find "\27%[5A\r\27%[Jepoch 1/2  loss")
    assert(shown:find "\27%[5A\r\27%[Jepoch 2/2  loss [^\27]*over$")
  end)

  it("orepa.watch shows those of a loop", function()
    local shown = run "watch"
    assert(shown:find "step 1  [%d.]+ steps/s\27%[K\r\n  loss      1 +▁\27%[K\r\n  gradient  0 +▁\27%[K")
    assert(shown:find "\27%[3A\rstep 3  [%d.]+ steps/s\27%[K\r\n  loss      3 +▁▅█\27%[K")
  end)
end)
