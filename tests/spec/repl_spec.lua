-- The prompt: what it shows, when a piece is whole, names that it completes, help, and the loop, with a terminal made of tables
-- and through a pipe.

local orepa = require "orepa"
local repl = require "orepa.repl"
local process = require "tests.spec.process"

repl.globals()

describe("a value", function()
  local function shows(text, value) assert.equal(text, repl.show(value)) end

  it("is shown readably", function()
    shows("nil", nil)
    shows("true", true)
    shows("3", 3)
    shows("3.0", 3.0)
    shows('"a \\"b\\"\\n\\tc\\0"', 'a "b"\n\tc\0')
    shows("{}", {})
    shows("{1, 2, {3}}", { 1, 2, { 3 } })
    shows('{1, [true] = 3, b = 2, ["end"] = 4, ["x y"] = 5}', { 1, b = 2, [true] = 3, ["end"] = 4, ["x y"] = 5 })
    shows("9007199254740993", orepa.tensor({ 9007199254740993 }, { dtype = "int64" }):tolist()[1])
    shows("{{1, 2},\n {3, 4}}  (float32 2x2 on cpu)", orepa.tensor { { 1, 2 }, { 3, 4 } })
    shows("Sequential\n  0: ReLU", orepa.nn.Sequential(orepa.nn.ReLU()))
  end)

  it("is shown where it holds itself, is deep, long or wide", function()
    local t = { 1 }
    t.self = t
    shows("{1, self = <the table around>}", t)
    local twice = { {} }
    twice[2] = twice[1]
    shows("{{}, {}}", twice)
    local deep = {}
    for _ = 1, 100 do deep = { deep } end
    assert(repl.show(deep):find("{...}", 1, true))
    local long = {}
    for k = 1, 1000 do long[k] = k end
    assert(repl.show(long):find("... 940 more", 1, true))
    local many = {}
    for k = 1, 1000 do many["k" .. k] = k end
    assert(repl.show(many):find("... 940 more", 1, true))
    shows("{\n  " .. ('"%s"'):format(("x"):rep(50)) .. ",\n  " .. ('"%s"'):format(("y"):rep(50)) .. "\n}",
      { ("x"):rep(50), ("y"):rep(50) })
  end)

  it("is shown whatever its metatable does", function()
    shows("me", setmetatable({}, { __tostring = function() return "me" end }))
    assert(repl.show(setmetatable({}, { __tostring = function() error "no" end })):find("__tostring fails", 1, true))
    assert(repl.show(setmetatable({}, { __tostring = function() return {} end })):find("__tostring fails", 1, true))
    shows("{1}", setmetatable({ 1 }, { __index = function() error "no" end, __metatable = "hidden" }))
    shows("{1}", setmetatable({ 1 }, { __pairs = function() error "no" end, __len = function() error "no" end }))
  end)
end)

describe("a piece", function()
  it("is an expression, or statements", function()
    assert.equal(3, repl.compile("1 + 2")())
    assert.equal(3, repl.compile("= 1 + 2")())
    assert.same({ 1, 2 }, { repl.compile("1, 2")() })
    assert.same({}, { repl.compile("do local x = 3 end")() })
    assert.equal(3, repl.compile("1 + 2 -- three")())
    assert.equal(2, select("#", repl.compile("nil, nil")()))
    assert.is_nil(repl.compile("1) + (2"))
  end)

  it("goes on where it only ends too early", function()
    for _, text in ipairs { "for i = 1, 2 do", "f(", "x = {", "1 +", "[[ a", "function f()", "if x then y() else", "x =" } do
      local f, why = repl.compile(text)
      assert.is_nil(f)
      assert.equal("more", why, text)
    end
    for _, text in ipairs { "x = = 1", "end", ")" } do
      local f, why = repl.compile(text)
      assert.is_nil(f)
      assert(why:find "^stdin:1: ", why)
    end
  end)
end)

describe("Tab", function()
  local function completes(text, begin, first, last)
    local there, list = repl.complete(text)
    assert.equal(begin, there)
    assert.equal(first, list[1])
    assert.equal(last, list[#list])
  end

  it("completes names", function()
    completes("orepa.manual_s", "manual_s", "manual_seed", "manual_seed")
    completes("y = nn.Conv2", "Conv2", "Conv2d", "Conv2d")
    completes("string.fo", "fo", "format", "format")
    completes("whi", "whi", "while", "while")
    completes("nowhere.at.al", "al", nil, nil)
    rawset(_G, "some_tensor", orepa.ones(2))
    completes("some_tensor.requires_gra", "requires_gra", "requires_grad", "requires_grad_")
    completes("some_tensor:requires_gra", "requires_gra", "requires_grad_", "requires_grad_")
    rawset(_G, "some_tensor", nil)
  end)

  it("completes options of a constructor, and paths in a string", function()
    completes("nn.Conv2d{kernel", "kernel", "kernel_size = ", "kernel_size = ")
    completes("nn.Conv2d{in_channels = f(2), out_ch", "out_ch", "out_channels = ", "out_channels = ")
    local folder = process.folder()
    process.write(folder .. "/weights.safetensors", "")
    assert(os.execute(("mkdir '%s/checkpoints'"):format(folder)))
    completes(('orepa.load("%s/w'):format(folder), "w", "weights.safetensors", "weights.safetensors")
    completes(("x = '%s/c"):format(folder), "c", "checkpoints/", "checkpoints/")
    completes('x = "a" .. stri', "stri", "string", "string")
    completes("'/nowhere/at/all/x", "x", nil, nil)
    process.remove(folder)
  end)
end)

describe("help", function()
  it("knows values, names and words", function()
    assert(repl.help():find("help(nn.Conv2d)", 1, true))
    assert(repl.help(orepa.nn.Conv2d):find "^nn.Conv2d{")
    assert(repl.help(orepa.ones):find "^ones%(")
    assert(repl.help(orepa.ones(1).sum):find "sum%(")
    assert(repl.help("nn.OREPA"):find "^nn.OREPA{")
    assert(repl.help("conv"):find("F.conv2d", 1, true) or repl.help("conv"):find("conv2d(", 1, true))
    assert(repl.help("no such thing"):find "nothing is said")
    assert(repl.help(3):find "nothing is said")
  end)
end)

-- ---- the loop ----

local function session(lines)
  local out, remembered, k = {}, {}, 0
  local function say(text) out[#out + 1] = text end
  local whole = repl.run {
    read = function(prompt)
      k = k + 1
      say(prompt)
      if lines[k] == false then return nil, "interrupted" end
      return lines[k]
    end,
    write = say, complain = say, remember = function(piece) remembered[#remembered + 1] = piece end,
    call = function(f) return f() end,
  }
  return table.concat(out), whole, remembered
end

describe("the loop", function()
  it("shows values, goes on over lines, and survives errors", function()
    local text, whole, remembered = session { "1 + 1", "", "for i = 1, 2 do", "end", "nil", "nil, 2", "error 'oops'", "1 +",
      "2", "'on'" }
    assert.equal(false, whole)
    assert(text:find "^> 2\n> > >> > > nil\n2\n> stdin:1: oops\n")
    assert(text:find "> >> 3\n")
    assert(text:find "\"on\"\n> $")
    assert.same({ "1 + 1", "for i = 1, 2 do\nend", "nil", "nil, 2", "error 'oops'", "1 +\n2", "'on'" }, remembered)
  end)

  it("gives up a piece at an interruption, and says at the end what was unfinished", function()
    assert.equal("> >> > 3\n> ", (session { "f(", false, "3" }))
    local text, whole = session { "f(" }
    assert(text:find "near <eof>")
    assert.equal(false, whole)
  end)

  it("says once what becomes of a local", function()
    local text = session { "local a_name = 1", "local other = 2", "local function f() end" }
    assert.equal("> a local ends with its line: write 'a_name = ...' to keep it\n> > > ", text)
  end)

  it("shows where an error was, and not the prompt's own calls", function()
    local text = session { "function at_fault() error('here') end", "at_fault()" }
    assert(text:find "stdin:1: here\nstack traceback:")
    assert(text:find "in function 'at_fault'\n\tstdin:1: in main chunk\n> $")
    assert(not text:find "xpcall")
    rawset(_G, "at_fault", nil)
  end)

  it("shows an error of the library's at the line that called it, without the library's own calls", function()
    local text = session { "nn.Conv2d{in_chanels = 3}", "nn.Sequential(nn.ReLU())(3)",
      "function deep() return deep() + 1 end", "deep()" }
    assert(text:find "^> stdin:1: Conv2d: unknown option 'in_chanels'[^\n]*\n> stdin:1: [^\n]*\n> > stdin:1: stack overflow")
    assert(#text < 20000)
    rawset(_G, "deep", nil)
  end)
end)

describe("a pipe", function()
  local function pipe(text)
    local path = os.tmpname()
    process.write(path, text)
    local stream <close> = assert(io.popen(("'%s' <'%s' 2>&1"):format(process.program, path)))
    local answer = stream:read "a"
    local _, _, code = stream:close()
    os.remove(path)
    return answer, code
  end

  it("is evaluated without prompts", function()
    local text, code = pipe "x = orepa.ones(2)\nx:sum():item()\nfor i = 1, 2 do\n  print(i)\nend\n"
    assert.equal("2.0\n1\n2\n", text)
    assert.equal(0, code)
  end)

  it("goes on after an error, which its exit code tells of", function()
    local text, code = pipe "error 'one'\n'two'\n"
    assert(text:find "one" and text:find '"two"', text)
    assert.equal(1, code)
    assert.equal("", (pipe ""))
  end)
end)
