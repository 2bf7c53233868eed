-- The prompt as somebody sees it who sits at a terminal: lines, keys, pasted pieces, history, and Ctrl-C.

local process = require "tests.spec.process"
local terminal = require "tests.spec.terminal"

local CTRL_C, CTRL_D, UP = "\3", "\4", "\27[A"

local folder, t

local function open(arguments, environment)
  t = terminal.open(arguments, folder, environment)
  return t:prompt()
end

local function leave()
  t:type(CTRL_D)
  local _, code = t:finish()
  return code
end

before_each(function() folder = process.folder() end)
after_each(function()
  if t then t:close() end
  process.remove(folder)
end)

describe("at the prompt", function()
  it("lines are evaluated, and the terminal is as before at the end", function()
    assert(open():find "^orepa %d")
    assert.equal("2\n", (t:ask "1 + 1"))
    assert.is_false(t:mode().echo)
    assert.same({ "", ">> " }, { t:ask "for i = 1, 2 do" })
    assert.same({ "", ">> " }, { t:ask "  print(i)" })
    assert.same({ "1\n2\n", "> " }, { t:ask "end" })
    assert.equal("stdin:1: attempt to index a nil value (global 'nothing')\n", (t:ask "nothing.at_all"))
    assert.equal(0, leave())
    assert.same({ canonical = true, echo = true }, t:mode())
  end)

  it("Tab completes, or shows what there is", function()
    open()
    assert(t:ask "orepa.manual_s\t(1)" == "")
    t:type "orepa.set_\t"
    assert(t:expect "set_threads":find "set_conv_accuracy")
    assert.equal("", (t:ask "threads(1)"))
    assert.equal("1\n", (t:ask "orepa.threads()"))
  end)

  it("a pasted piece is one", function()
    open()
    t:type "\27[200~for i = 1, 2 do\n  print(i)\n\n  print(-i)\nend\n\27[201~"
    assert.equal("\n1\n-1\n2\n-2\n", (t:answer()))
    t:type "\27[200~1 + \27[201~\27[200~41\27[201~"
    assert.equal("42\n", (t:ask ""))
  end)

  it("what was typed is there again in the next session", function()
    open()
    t:ask "x = 'first\\n'"
    t:ask "do"
    t:ask "  y = 2"
    t:ask "end"
    assert.equal(0, leave())
    t:close()
    open()
    assert.equal("", (t:ask(UP)))
    assert.equal("2\n", (t:ask "y"))
    assert.equal('"first\\n"\n', (t:ask(UP .. UP .. UP .. " return x")))
  end)

  it("colours are for terminals that may have them", function()
    open()
    t:ask "error 'plain'"
    t:close()
    open({}, { NO_COLOR = "" })
    t:type "error 'red'\r"
    assert(t:expect "stdin:1: red":find "\27%[31m")
  end)

  it("-i goes on after a script, with what it made", function()
    process.write(folder .. "/a.lua", "made = 7\n")
    open { "-i", folder .. "/a.lua" }
    assert.equal("7\n", (t:ask "made"))
  end)
end)

describe("a recorded session", function()
  -- Lines that begin with a prompt were typed; what follows is the answer.
  local function recorded()
    local steps = {}
    for line in io.lines(process.root .. "/tests/spec/recorded_session.txt") do
      local prompt, typed = line:match "^(>>? )(.*)$"
      if prompt then
        steps[#steps + 1] = { prompt = prompt, typed = typed, answer = "" }
      else
        steps[#steps].answer = steps[#steps].answer .. line .. "\n"
      end
    end
    return steps
  end

  it("gets the same answers again", function()
    local steps = recorded()
    assert(#steps > 60)
    local _, prompt = open()
    for k, step in ipairs(steps) do
      assert.equal(step.prompt, prompt, ("before '%s'"):format(step.typed))
      local answer
      answer, prompt = t:ask(step.typed)
      assert.equal(step.answer, answer, ("to '%s', number %d"):format(step.typed, k))
    end
  end)
end)

describe("Ctrl-C", function()
  local function stops(line)
    t:type("print('star' .. 'ted') " .. line .. "\r")
    t:expect "started"
    t:type(CTRL_C)
    assert.equal("^Cinterrupted\n", (t:prompt():match "[^\n]*\n$"), line)
    assert.equal('"still here"\n', (t:ask "kept"))
  end

  it("gives up a line, and a piece of several", function()
    open()
    t:type("1 + 1" .. CTRL_C)
    t:answer()
    assert.equal("3\n", (t:ask "3"))
    assert.same({ "", ">> " }, { t:ask "f(" })
    t:type(CTRL_C)
    t:answer()
    assert.equal("4\n", (t:ask "4"))
  end)

  it("stops what runs: a loop, one that catches errors, one in a coroutine, ops", function()
    open()
    t:ask "kept = 'still here'"
    stops "while true do end"
    stops "while true do pcall(function() while true do end end) end"
    stops "coroutine.wrap(function() while true do end end)()"
    stops "coroutine.wrap(function() coroutine.wrap(function() while true do pcall(error) end end)() end)()"
    stops "local c = coroutine.create(function() while true do end end) while true do coroutine.resume(c) end"
    stops "while true do orepa.ones(100):sum() end"
    stops "local s = ('a'):rep(30) while true do s:find(('a?'):rep(8) .. ('a'):rep(8)) end"
    assert.equal("a: 1\n", (t:ask "print('a: ' .. select(2, coroutine.resume(coroutine.create(function() return 1 end))))"))
  end)

  it("stops a backward pass between two ops, after which another one runs", function()
    open()
    t:ask "kept = 'still here'"
    t:ask "w = orepa.ones(300, 300):requires_grad_()"
    t:ask "function long() local y = w for i = 1, 3000 do y = y:matmul(w) * 1e-3 end return y:sum() end"
    t:ask "y = long() ; print 'made'"
    stops "y:backward()"
    assert.equal("1.0\n", (t:ask "v = orepa.ones(1):requires_grad_() ; v:sum():backward() ; return v.grad:item()"))
  end)

  it("twice leaves, with 130 and the terminal as before, what cannot be stopped", function()
    open()
    local rest, code
    repeat -- until Ctrl-C doesn't come just before what can't be stopped
      t:type "print('star' .. 'ted') ; ('a'):rep(1000):find(('a*'):rep(50) .. 'b')\r"
      t:expect "started"
      rest, code = t:insist(CTRL_C)
      t.unread = rest or ""
    until rest
    assert.equal(130, code)
    assert.same({ canonical = true, echo = true }, t:mode())
  end)
end)

describe("Ctrl-C in training", function()
  local SCRIPT = [[
    local orepa = require "orepa"
    local nn, data, train = orepa.nn, orepa.data, orepa.train
    local set = data.images{images = orepa.rand(4000, 1, 4, 4), labels = orepa.zeros({4000}, {dtype = "int64"}), classes = 2}
    local Net = nn.Module:extend "Net"
    function Net:init() self.body = nn.Linear{in_features = 16, out_features = 2} end
    function Net:forward(x) return self.body(x:flatten(2)) end
    local net = Net()
    local steps = 0
    local history = train.fit{net = net, optimizer = orepa.optim.SGD(net:parameters(), {lr = 0.1}), epochs = 1000,
      loader = data.loader{dataset = set, batch_size = 1},
      schedule = function() steps = steps + 1 if steps == 10 then print "under way" end return 0.1 end,
      on_epoch = function(result) print(("saved after %d of %d images"):format(result.images, set.size)) end}
    print(#history, history.interrupted)
    if arg[1] == "deaf" then print "deaf" for _ = 1, 1e12 do end end
  ]]

  local function train(...)
    process.write(folder .. "/train.lua", SCRIPT)
    t = terminal.open({ folder .. "/train.lua", ... }, folder, { NO_PROGRESS = "1" })
    t:expect "under way"
    t:type(CTRL_C)
  end

  it("ends the epoch after its step, and what the script does then is done", function()
    train()
    local shown, code = t:finish()
    assert(tonumber(shown:match "saved after (%d+) of 4000 images") < 4000)
    assert(shown:find "epoch 1/1000, interrupted after step %d+ of 4000  loss", shown)
    assert(shown:find "1\ttrue\n$")
    assert.equal(0, code)
  end)

  it("is what it was when training is over", function()
    train "deaf"
    t:expect "deaf\r\n"
    t:type(CTRL_C)
    local _, code = t:finish()
    assert.equal(128 + 2, code)
  end)

  it("ends training at the prompt, where all is still there", function()
    process.write(folder .. "/train.lua", SCRIPT)
    open({}, { NO_PROGRESS = "1" })
    t:type(("arg = {} dofile '%s/train.lua'\r"):format(folder))
    t:expect "under way"
    t:type(CTRL_C)
    assert((t:prompt()):find "1\ttrue\n$")
    t:type "while true do end\r"
    t:expect "\27%[%?2004l"
    t:type(CTRL_C)
    assert.equal("^Cinterrupted\n", (t:prompt()))
  end)
end)
