-- orepa.image.show: what it writes for each kind of terminal, and which it takes a terminal to be.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"
local show = require "orepa.show"
local terminal = require "tests.spec.terminal"

local image = orepa.image

local function bytes(rows) return orepa.tensor(rows, { dtype = "uint8" }) end

-- What a call of show writes.
local function shown(...)
  local stdout, text = io.stdout, {}
  io.stdout = { write = function(_, more) text[#text + 1] = more end, flush = function() end } -- luacheck: ignore
  local done, problem = pcall(image.show, ...)
  io.stdout = stdout -- luacheck: ignore
  if not done then error(problem, 0) end
  return table.concat(text)
end

-- The programs of these terminals, as far as needed: what they would put on the screen.

local function decoded(text)
  local value, bits, result = 0, 0, {}
  for c in text:gsub("=", ""):gmatch "." do
    local digit = ("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"):find(c, 1, true) - 1
    value, bits = value << 6 | digit, bits + 6
    if bits >= 8 then
      bits = bits - 8
      result[#result + 1] = string.char(value >> bits & 255)
    end
  end
  return table.concat(result)
end

-- Rows of {r, g, b} in percent.
local function sixels(text)
  local width, height, body = text:match '^\27Pq"1;1;(%d+);(%d+)(.*)\27\\\n$'
  local colours, rows, x, top, colour = {}, {}, 1, 1, nil
  for y = 1, tonumber(height) do rows[y] = {} end
  local at = 1
  local function draw(character, count)
    for _ = 1, count do
      for dy = 0, 5 do
        if (character:byte() - 63) >> dy & 1 == 1 then rows[top + dy][x] = colours[colour] end
      end
      x = x + 1
    end
  end
  while at <= #body do
    local index, r, g, b, behind = body:match("^#(%d+);2;(%d+);(%d+);(%d+)()", at)
    local chosen, count, character
    if index then
      colours[index] = { tonumber(r), tonumber(g), tonumber(b) }
    elseif body:find("^#", at) then
      chosen, behind = body:match("^#(%d+)()", at)
      colour = chosen
    elseif body:find("^!", at) then
      count, character, behind = body:match("^!(%d+)(.)()", at)
      draw(character, tonumber(count))
    elseif body:find("^%$", at) then
      x, behind = 1, at + 1
    elseif body:find("^%-", at) then
      x, top, behind = 1, top + 6, at + 1
    else
      character, behind = body:match("^([?-~])()", at)
      draw(character, 1)
    end
    at = behind
  end
  return rows, tonumber(width)
end

describe("image.show", function()
  local ramp = orepa.arange(0, 255):reshape(1, 256):to "uint8"

  it("writes characters, darker ones for darker pixels", function()
    local text = shown(bytes { { 0, 60, 120, 180, 255 }, { 0, 60, 120, 180, 255 } }, { protocol = "ascii" })
    assert.equal(" :=#@\n", text)
    assert.equal(" .:-=+*#%@", (shown(ramp, { protocol = "ascii", columns = 10 }):gsub("\n", "")))
    assert.equal("@\n", shown(orepa.ones(1, 2, 1), { protocol = "ascii" }))
  end)

  it("writes half blocks, two pixels each", function()
    local t = bytes { { { 255, 0 }, { 0, 0 }, { 255, 255 } }, { { 0, 0 }, { 0, 0 }, { 255, 255 } },
      { { 0, 255 }, { 0, 0 }, { 255, 255 } } }
    assert.equal("\27[38;5;196;48;5;16m▀\27[38;5;21;48;5;16m▀\27[0m\n\27[38;5;231m▀▀\27[0m\n", show.blocks(t, false))
    assert.equal("\27[38;2;255;0;0;48;2;0;0;0m▀\27[38;2;0;0;255;48;2;0;0;0m▀\27[0m\n\27[38;2;255;255;255m▀▀\27[0m\n",
      show.blocks(t, true))
  end)

  it("writes PNG in pieces for kitty, which is not to answer", function()
    local t = (orepa.rand(3, 100, 200) * 255.99):to "uint8"
    local text, pieces = shown(t, { protocol = "kitty" }), {}
    for keys, digits in text:gmatch "\27_G([^;]*);([^\27]*)\27\\" do
      assert.is_true(#digits <= 4096)
      pieces[#pieces + 1] = digits
      assert.equal(#pieces == 1, keys:find("a=T,f=100,q=2", 1, true) ~= nil)
      assert.equal(keys:find "m=1" and 4096 or #digits, #digits)
    end
    assert.is_true(#pieces > 1 and text:find "m=0" ~= nil)
    assert.same(t:tolist(), image.decode(decoded(table.concat(pieces))):tolist())
  end)

  it("writes PNG for iTerm2, and small pictures several times as large", function()
    local t = bytes { { 1, 2 }, { 3, 4 } }
    local size, digits = shown(t, { protocol = "iterm" }):match "^\27%]1337;File=inline=1;size=(%d+):([^\7]*)\7\n$"
    local png = decoded(digits)
    assert.equal(tonumber(size), #png)
    local back = image.decode(png)
    assert.same({ 1, 192, 192 }, back.shape)
    local function at(y, x) return back[1][y][x]:item() end
    assert.same({ 1, 2, 3, 4 }, { at(96, 96), at(96, 97), at(97, 1), at(192, 192) })
  end)

  it("encodes all lengths in base 64", function()
    for text, digits in pairs { [""] = "", f = "Zg==", fo = "Zm8=", foo = "Zm9v", foob = "Zm9vYg==",
      ["\255\254\253"] = "//79" } do
      assert.equal(digits, show.base64(text))
    end
  end)

  it("writes sixels of 216 colours or 64 grays", function()
    local colours = (orepa.rand(3, 20, 31) * 255.99):to "uint8"
    local rows, width = sixels(show.sixel(colours))
    assert.same({ 20, 31 }, { #rows, width })
    local wanted = colours:tolist()
    for y = 1, 20 do
      for x = 1, 31 do
        for c = 1, 3 do assert.is_true(math.abs(rows[y][x][c] - wanted[c][y][x] / 2.55) <= 10.5) end
      end
    end
    local gray = (orepa.rand(1, 7, 300) * 255.99):to "uint8"
    rows = sixels(show.sixel(gray))
    wanted = gray:tolist()[1]
    for y = 1, 7 do
      for x = 1, 300 do assert.is_true(math.abs(rows[y][x][2] - wanted[y][x] / 2.55) <= 2.5) end
    end
  end)

  it("fits pictures into the columns", function()
    local line = shown(orepa.ones(30, 200), { protocol = "ascii", columns = 40 }):match "^[^\n]*"
    assert.equal(40, #line)
    local png = decoded(shown(orepa.ones(3, 400, 1600), { protocol = "iterm", columns = 100 }):match ":([^\7]*)\7")
    assert.same({ 3, 200, 800 }, image.decode(png).shape)
    local tall = shown(orepa.ones(3000, 10), { protocol = "ascii", columns = 20 })
    assert.equal(20, select(2, tall:gsub("\n", "")))
  end)

  it("shows a batch as a grid, drops opacity, takes floats and gradients", function()
    local batch = orepa.ones(4, 1, 4, 4):requires_grad_()
    assert.equal(7, select(2, shown(batch, { protocol = "ascii" }):gsub("\n", "")))
    assert.equal("@@\n", shown(orepa.cat({ orepa.ones(3, 2, 2), orepa.zeros(1, 2, 2) }, 1), { protocol = "ascii" }))
  end)

  it("is refused in words", function()
    fails("image.show: a picture expected, got number", image.show, 3)
    fails("float32 2x5x5 is no picture", image.show, orepa.ones(2, 5, 5))
    fails("protocol is gif; there are kitty, iterm, sixel, blocks, ascii", image.show, orepa.ones(2, 2), { protocol = "gif" })
    fails("columns is 0", image.show, orepa.ones(2, 2), { columns = 0 })
    fails("unknown option 'width'", image.show, orepa.ones(2, 2), { width = 3 })
  end)
end)

describe("a terminal", function()
  -- What show.protocol says on a terminal with these variables, and the others of this test's own unset.
  local function protocol(variables)
    local environment = { TERM = "xterm", NO_COLOR = "", LC_ALL = "C.UTF-8", TMUX = "", STY = "", KITTY_WINDOW_ID = "",
      LC_TERMINAL = "", TERM_PROGRAM = "" }
    for name, value in pairs(variables) do environment[name] = value end
    local t = terminal.open({ "-e", 'print("it is " .. require("orepa.show").protocol() .. ".")' }, nil, environment)
    local said = t:expect "it is %w+%."
    t:close()
    return said:match "it is (%w+)%."
  end

  it("is known by its environment", function()
    assert.equal("kitty", protocol { TERM = "xterm-kitty" })
    assert.equal("kitty", protocol { KITTY_WINDOW_ID = "1" })
    assert.equal("kitty", protocol { TERM_PROGRAM = "ghostty" })
    assert.equal("iterm", protocol { TERM_PROGRAM = "iTerm.app" })
    assert.equal("iterm", protocol { LC_TERMINAL = "iTerm2" })
    assert.equal("sixel", protocol { TERM = "foot" })
    assert.equal("blocks", protocol {})
    assert.equal("blocks", protocol { KITTY_WINDOW_ID = "1", TMUX = "/tmp/tmux" })
    assert.equal("blocks", protocol { KITTY_WINDOW_ID = "1", TERM = "screen-256color" })
    assert.equal("ascii", protocol { NO_COLOR = "1" })
    assert.equal("ascii", protocol { LC_ALL = "C" })
    assert.equal("ascii", protocol { TERM = "dumb", KITTY_WINDOW_ID = "1" })
  end)

  it("gets characters where it is none", function()
    assert.equal("ascii\n", (process.run({ "-e", 'print(require("orepa.show").protocol())' }, nil, { TERM = "xterm-kitty" })))
    local text = process.run { "-e", 'local orepa = require "orepa"; orepa.image.show(orepa.ones(4, 4))' }
    assert.equal("@@@@\n@@@@\n", text)
  end)

  it("shows a picture at the prompt", function()
    local t = terminal.open({}, nil, { NO_COLOR = "", LC_ALL = "C.UTF-8", COLORTERM = "truecolor", TMUX = "", STY = "",
      KITTY_WINDOW_ID = "", TERM_PROGRAM = "", LC_TERMINAL = "" })
    t:prompt()
    t:type "orepa.image.show(orepa.ones(3, 2, 1))\r"
    t:expect "\27%[38;2;255;255;255;48;2;255;255;255m▀\27%[0m"
    t:close()
  end)
end)
