-- show: a picture on the terminal. Where the terminal shows pictures, it gets one: by kitty's protocol, by iTerm2's, or as
-- sixels. Others get half blocks in colour, or characters, which files and pipes get as well. What a terminal can do is known by
-- the environment; nothing is asked of it, since the answer would be typed at the prompt.

local core = require "orepa.core"
local document = require "orepa.document"
local image = require "orepa.image"
local options = require "orepa.options"
local view = require "orepa.view"

local show = {}

-- ---- what the terminal can do ----

local function variable(name) return os.getenv(name) or "" end

local PROGRAMS = { ghostty = "kitty", WezTerm = "iterm", ["iTerm.app"] = "iterm", mintty = "iterm" }
local TERMS = { { "kitty", "kitty" }, { "ghostty", "kitty" }, { "^foot", "sixel" }, { "^mlterm", "sixel" }, { "^yaft", "sixel" },
  { "sixel", "sixel" } }

-- "kitty", "iterm" or "sixel"; nil for terminals that show text alone, and behind screen and tmux, which keep pictures back.
local function protocol_of_pictures()
  local term = variable "TERM"
  if variable "TMUX" ~= "" or variable "STY" ~= "" or term:find "^screen" or term:find "^tmux" then return nil end
  for _, entry in ipairs(TERMS) do
    if term:find(entry[1]) then return entry[2] end
  end
  if variable "KITTY_WINDOW_ID" ~= "" then return "kitty" end
  if variable "LC_TERMINAL" == "iTerm2" then return "iterm" end
  return PROGRAMS[variable "TERM_PROGRAM"]
end

-- How pictures are shown here.
function show.protocol()
  if not core.is_terminal() or variable "TERM" == "dumb" then return "ascii" end
  local found = protocol_of_pictures()
  if found then return found end
  return variable "NO_COLOR" == "" and view.has_utf8() and "blocks" or "ascii"
end

-- ---- pictures as bytes ----

local DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
local PAIRS = {} -- 12 bits as two digits
for k = 0, 4095 do
  local high, low = k >> 6, k & 63
  PAIRS[k] = DIGITS:sub(high + 1, high + 1) .. DIGITS:sub(low + 1, low + 1)
end

function show.base64(bytes)
  local text, rest = {}, #bytes % 3
  for k = 1, #bytes - rest, 3 do
    local a, b, c = bytes:byte(k, k + 2)
    text[#text + 1] = PAIRS[a << 4 | b >> 4] .. PAIRS[(b & 15) << 8 | c]
  end
  if rest > 0 then
    local a, b = bytes:byte(-rest, -1)
    b = rest == 2 and b or 0
    text[#text + 1] = (PAIRS[a << 4 | b >> 4] .. PAIRS[(b & 15) << 8]):sub(1, rest + 1) .. ("="):rep(3 - rest)
  end
  return table.concat(text)
end

-- A PNG's bytes for kitty: in pieces of at most 4096 digits; q=2: it is not to answer.
function show.kitty(bytes)
  local digits, pieces = show.base64(bytes), {}
  for k = 1, #digits, 4096 do
    local keys = (k == 1 and "a=T,f=100,q=2," or "") .. (k + 4096 <= #digits and "m=1" or "m=0")
    pieces[#pieces + 1] = ("\27_G%s;%s\27\\"):format(keys, digits:sub(k, k + 4095))
  end
  return table.concat(pieces) .. "\n"
end

function show.iterm(bytes)
  return ("\27]1337;File=inline=1;size=%d:%s\7\n"):format(#bytes, show.base64(bytes))
end

-- ---- pixels ----

-- Rows of pixels (C, H, W) in bytes: {{r, g, b}, ...}; gray has r = g = b.
local function pixels_of(t)
  local planes, rows = t:tolist(), {}
  local red, green, blue = planes[1], planes[2] or planes[1], planes[3] or planes[1]
  for y = 1, #red do
    local row = {}
    for x = 1, #red[y] do row[x] = { red[y][x], green[y][x], blue[y][x] } end
    rows[y] = row
  end
  return rows
end

-- Sixels: bands of six rows; each colour of a band is a line of characters, a bit for each row.
local SHADES = 6 -- of red, green and blue

local function shade_of(pixel)
  local function level(v) return (v * (SHADES - 1) + 127) // 255 end
  return (level(pixel[1]) * SHADES + level(pixel[2])) * SHADES + level(pixel[3])
end

local function gray_shade_of(pixel) return pixel[1] >> 2 end

local function palette(is_gray)
  local text = {}
  local function define(index, r, g, b) text[#text + 1] = ("#%d;2;%d;%d;%d"):format(index, r, g, b) end
  for k = 0, is_gray and 63 or SHADES ^ 3 - 1 do
    if is_gray then
      define(k, k * 100 // 63, k * 100 // 63, k * 100 // 63)
    else
      local function percent(level) return level * 100 // (SHADES - 1) end
      define(k, percent(k // SHADES ^ 2), percent(k // SHADES % SHADES), percent(k % SHADES))
    end
  end
  return table.concat(text)
end

-- The bits of each colour in a band: {colour = {x = bits}}.
local function bits_of(rows, top, shade)
  local colours = {}
  for dy = 0, math.min(5, #rows - top) do
    for x, pixel in ipairs(rows[top + dy]) do
      local index = shade(pixel)
      local line = colours[index] or {}
      colours[index] = line
      line[x] = (line[x] or 0) | 1 << dy
    end
  end
  return colours
end

local function sixel_line(bits, width)
  local text, k = {}, 1
  while k <= width do
    local value, first = bits[k] or 0, k
    repeat k = k + 1 until k > width or (bits[k] or 0) ~= value
    local character, count = string.char(63 + value), k - first
    if k <= width or value ~= 0 then -- the end of a line may be left empty
      text[#text + 1] = count > 3 and ("!%d%s"):format(count, character) or character:rep(count)
    end
  end
  return table.concat(text)
end

function show.sixel(t)
  local is_gray = t.shape[1] == 1
  local rows, width = pixels_of(t), t.shape[3]
  local bands = {}
  for top = 1, #rows, 6 do
    local lines = {}
    local colours = bits_of(rows, top, is_gray and gray_shade_of or shade_of)
    for _, index in ipairs(options.names(colours)) do
      lines[#lines + 1] = ("#%d%s"):format(index, sixel_line(colours[index], width))
    end
    bands[#bands + 1] = table.concat(lines, "$")
  end
  return ('\27Pq"1;1;%d;%d%s%s\27\\\n'):format(width, #rows, palette(is_gray), table.concat(bands, "-"))
end

-- Two pixels a character, one above the other: "▀" in the upper one's colour on the lower one's.
function show.blocks(t, exact)
  local function colour(ground, pixel)
    if exact then return ("%d;2;%d;%d;%d"):format(ground, pixel[1], pixel[2], pixel[3]) end
    return ("%d;5;%d"):format(ground, 16 + shade_of(pixel)) -- the 6 x 6 x 6 colours of terminals with 256
  end
  local rows, lines = pixels_of(t), {}
  for y = 1, #rows, 2 do
    local line, before = {}, nil
    for x, upper in ipairs(rows[y]) do
      local code = colour(38, upper) .. (rows[y + 1] and ";" .. colour(48, rows[y + 1][x]) or "")
      line[x] = (code == before and "" or ("\27[%sm"):format(code)) .. "▀"
      before = code
    end
    lines[#lines + 1] = table.concat(line) .. "\27[0m\n"
  end
  return table.concat(lines)
end

local RAMP = " .:-=+*#%@" -- from black to white: terminals are dark

function show.ascii(t)
  local lines = {}
  for y, row in ipairs(pixels_of(t)) do
    local line = {}
    for x, pixel in ipairs(row) do
      local gray = 0.299 * pixel[1] + 0.587 * pixel[2] + 0.114 * pixel[3]
      local level = math.min(#RAMP, 1 + math.floor(gray / 256 * #RAMP))
      line[x] = RAMP:sub(level, level)
    end
    lines[y] = (table.concat(line):gsub(" +$", ""))
  end
  return table.concat(lines, "\n") .. "\n"
end

-- ---- sizes ----

local CELL, SMALLEST = 8, 192 -- pixels that a character is wide at least; that a picture should have

-- Bytes (1 or 3, H, W): opacity is dropped.
local function bytes_of(t)
  if #t.shape == 4 then t = image.grid(t, { value = t.dtype == "uint8" and 128 or 0.5 }) end
  return image.decode(image.encode(t, { compression = 1 }))
end

local function resized(t, height, width, method)
  height, width = math.max(1, math.floor(height + 0.5)), math.max(1, math.floor(width + 0.5))
  if height == t.shape[2] and width == t.shape[3] then return t end
  return image.resize(t, { height, width }, { method = method })
end

-- Within so many pixels; small ones several times as large.
local function for_pictures(t, columns)
  local _, height, width = table.unpack(t.shape)
  local most = columns * CELL
  local share = math.min(1, most / width, most / height)
  if share < 1 then return resized(t, height * share, width * share, "bilinear") end
  local times = math.max(1, math.min(SMALLEST // math.max(height, width), most // width))
  return resized(t, height * times, width * times, "nearest")
end

-- Within so many columns and, of a tall one, as many rows; `tall`: pixels above each other in a character.
local function for_characters(t, columns, tall)
  local _, height, width = table.unpack(t.shape)
  local share = math.min(1, columns / width, columns * 2 / height)
  return resized(t, height * share * tall / 2, width * share, "box")
end

-- ---- showing ----

local PROTOCOLS = { "kitty", "iterm", "sixel", "blocks", "ascii" }

local function drawn(t, protocol, columns)
  if protocol == "blocks" then
    local exact = variable("COLORTERM"):find "truecolor" or variable("COLORTERM"):find "24bit"
    return show.blocks(for_characters(t, columns, 2), exact)
  end
  if protocol == "ascii" then return show.ascii(for_characters(t, columns, 1)) end
  t = for_pictures(t, columns)
  return show[protocol](protocol == "sixel" and t or image.encode(t))
end

local function is_protocol(name)
  for _, known in ipairs(PROTOCOLS) do
    if name == known then return true end
  end
  return false
end

function image.show(t, given)
  local _, wide = core.is_terminal()
  local o = options("image.show", given, { protocol = options.optional, columns = math.max(1, (wide or 80) - 1) })
  if not core.is_tensor(t) then core.fail(("image.show: a picture expected, got %s"):format(type(t))) end
  if o.protocol ~= nil and not is_protocol(o.protocol) then
    core.fail(("image.show: protocol is %s; there are %s"):format(tostring(o.protocol), table.concat(PROTOCOLS, ", ")))
  end
  if math.type(o.columns) ~= "integer" or o.columns < 1 or o.columns > 10000 then
    core.fail(("image.show: columns is %s, an integer from 1 to 10000 expected"):format(tostring(o.columns)))
  end
  io.stdout:write(drawn(bytes_of(t), o.protocol or show.protocol(), o.columns))
  io.stdout:flush()
end

document("image.show", [[
  image.show(t, {protocol=, columns=})
  Shows a picture (H, W) or (C, H, W), or those of a tensor (N, C, H, W) as a grid, on the standard output; uint8, bool or floats
  from 0 to 1. Terminals that show pictures get one, small ones several times as large: by kitty's protocol ("kitty": kitty,
  ghostty), by iTerm2's ("iterm": iTerm2, WezTerm, mintty) or as sixels ("sixel": foot, mlterm). Others get half blocks in colour
  ("blocks") unless NO_COLOR is set, else characters ("ascii"), which files and pipes get too. TERM, TERM_PROGRAM and the like
  tell which; `protocol` overrules them. It takes `columns` at most, all that the terminal has if it is left out.
  > orepa.image.show(orepa.rand(3, 8, 8), {protocol = "ascii"})]])

return show
