-- plot: charts of numbers, drawn by gnuplot, in a file, in a window or on the terminal.

local core = require "orepa.core"
local document = require "orepa.document"
local gnuplot = require "orepa.gnuplot"
local image = require "orepa.image"
local options = require "orepa.options"
local show = require "orepa.show"
local quoted, number, optional = gnuplot.quoted, gnuplot.number, options.optional

local function fail(...) core.fail("plot: " .. (...):format(select(2, ...))) end

-- ---- series ----

local STYLES = { line = "lines lw 2", points = "points pt 7 ps 0.6", bars = "boxes fs solid 0.7 noborder",
  histogram = "boxes fs solid 0.5 border" }

local function numbers_of(values, what)
  if core.is_tensor(values) then
    if #values.shape ~= 1 then fail("%s: a tensor of one dimension expected, got %s", what, table.concat(values.shape, "x")) end
    if values.dtype == "bool" then fail("%s: numbers expected, got bools", what) end
    return values:count() > 0 and values:detach():to "cpu":tolist() or {}
  end
  if type(values) ~= "table" then fail("%s: a tensor or a list of numbers expected, got %s", what, type(values)) end
  for k, v in ipairs(values) do
    if type(v) ~= "number" then fail("%s: element %d is a %s, a number expected", what, k, type(v)) end
  end
  return values
end

-- The places of names on the x axis, in the order in which they come; `names` has those of all series.
local function places_of(list, names, what)
  local places = {}
  for k, name in ipairs(list) do
    if type(name) ~= "string" then fail("%s: element %d is a %s, a string expected as before", what, k, type(name)) end
    if not names[name] then
      names[#names + 1] = name
      names[name] = #names
    end
    places[k] = names[name]
  end
  return places
end

local function checked_series(entry, k, names)
  local what = ("series %d"):format(k)
  if core.is_tensor(entry) or (type(entry) == "table" and (#entry > 0 or next(entry) == nil)) then entry = { y = entry } end
  local s = options("plot: " .. what, entry,
    { y = options.required, x = optional, label = optional, type = "line", bins = optional })
  if not STYLES[s.type] then
    fail("%s: type is %s; there are %s", what, tostring(s.type), table.concat(options.names(STYLES), ", "))
  end
  if s.label ~= nil and type(s.label) ~= "string" then fail("%s: label: a string expected, got %s", what, type(s.label)) end
  if s.type == "histogram" and s.x then fail("%s: a histogram has no x, it counts y", what) end
  if s.type ~= "histogram" and s.bins then fail("%s: bins are a histogram's", what) end
  s.y = numbers_of(s.y, what .. ": y")
  if type(s.x) == "table" and type(s.x[1]) == "string" then
    s.x = places_of(s.x, names, what .. ": x")
  elseif s.x then
    s.x = numbers_of(s.x, what .. ": x")
  end
  if s.x and #s.x ~= #s.y then fail("%s: %d numbers x and %d numbers y", what, #s.x, #s.y) end
  return s, what
end

-- How many numbers lie in each of `bins` equal parts between the least and the largest; what is not finite is left out.
local function count(s, what)
  local bins = s.bins or 30
  if math.type(bins) ~= "integer" or bins < 1 or bins > 100000 then
    fail("%s: bins is %s, an integer from 1 to 100000 expected", what, tostring(bins))
  end
  local finite, low, high = {}, math.huge, -math.huge
  for _, v in ipairs(s.y) do
    if v - v == 0 then
      finite[#finite + 1] = v
      low, high = math.min(low, v), math.max(high, v)
    end
  end
  if #finite == 0 then fail("%s: no number to be counted", what) end
  if low == high then low, high = low - 0.5, high + 0.5 end
  local width = (high - low) / bins
  s.x, s.y, s.width = {}, {}, width
  for k = 1, bins do s.x[k], s.y[k] = low + (k - 0.5) * width, 0 end
  for _, v in ipairs(finite) do
    local k = math.min(bins, 1 + math.floor((v - low) / width))
    s.y[k] = s.y[k] + 1
  end
end

-- Bars of several series stand side by side in 4/5 of the least distance between two places.
local function place_bars(list)
  local bars, places, least = {}, {}, math.huge
  for _, s in ipairs(list) do
    if s.type == "bars" then
      bars[#bars + 1] = s
      s.x = s.x or {}
      for k = 1, #s.y do
        s.x[k] = s.x[k] or k
        places[#places + 1] = s.x[k]
      end
    end
  end
  table.sort(places)
  for k = 2, #places do
    if places[k] > places[k - 1] then least = math.min(least, places[k] - places[k - 1]) end
  end
  local width = 0.8 * (least < math.huge and least or 1) / #bars
  for k, s in ipairs(bars) do
    local moved = {}
    for n, x in ipairs(s.x) do moved[n] = x + (k - (#bars + 1) / 2) * width end
    s.x, s.width = moved, width
  end
end

-- The series of the table's list, and the names on the x axis.
local function series_of(given)
  local list, names = {}, {}
  if type(given[1]) == "number" then given = { table.move(given, 1, #given, 1, {}) } end
  for k, entry in ipairs(given) do
    local s, what = checked_series(entry, k, names)
    if s.type == "histogram" then count(s, what) end
    if #s.y == 0 then fail("%s: there is no number", what) end
    list[k] = s
  end
  if #list == 0 then fail "there is no series" end
  place_bars(list)
  return list, names
end

-- ---- the script ----

local function data_of(s, k)
  local lines = { ("$series%d << END"):format(k) }
  for n, y in ipairs(s.y) do
    lines[n + 1] = ("%s %s"):format(number(s.x and s.x[n] or n), number(y)) .. (s.width and " " .. number(s.width) or "")
  end
  lines[#lines + 1] = "END"
  return table.concat(lines, "\n")
end

local function plot_of(s, k)
  return ("$series%d using 1:2%s with %s %s"):format(k, s.width and ":3" or "", STYLES[s.type],
    s.label and "title " .. quoted(s.label) or "notitle")
end

local function range(name, pair)
  if type(pair) ~= "table" or #pair ~= 2 or type(pair[1]) ~= "number" or type(pair[2]) ~= "number" then
    fail("%s: {low, high} expected", name)
  end
  return ("[%s:%s]"):format(number(pair[1]), number(pair[2]))
end

local function axis(lines, o, name, has_zero)
  local label, log, limits = o[name .. "_label"], o[name .. "_log"], o[name .. "_range"]
  if label then lines[#lines + 1] = ("set %slabel %s"):format(name, quoted(label)) end
  if log then lines[#lines + 1] = "set logscale " .. name end
  if limits then
    lines[#lines + 1] = ("set %srange %s"):format(name, range(name .. "_range", limits))
  elseif has_zero and not log then
    lines[#lines + 1] = ("set %srange [*<0:0<*]"):format(name)
  end
end

local function tics(lines, names)
  if #names == 0 then return end
  local list = {}
  for k, name in ipairs(names) do list[k] = ("%s %d"):format(quoted((name:gsub("%%", "%%%%"))), k) end
  lines[#lines + 1] = ("set xtics (%s)"):format(table.concat(list, ", "))
end

local function script_of(o, list, names)
  local lines, plots, has_labels, has_bars = { "set grid", "set tics nomirror" }, {}, false, false
  for k, s in ipairs(list) do
    lines[#lines + 1] = data_of(s, k)
    plots[k] = plot_of(s, k)
    has_labels, has_bars = has_labels or s.label ~= nil, has_bars or s.width ~= nil
  end
  if o.title then lines[#lines + 1] = "set title " .. quoted(o.title) end
  axis(lines, o, "x", false)
  axis(lines, o, "y", has_bars)
  tics(lines, names)
  if has_bars then lines[#lines + 1] = "set offsets graph 0.03, graph 0.03, 0, 0" end
  lines[#lines + 1] = has_labels and "set key" or "unset key"
  lines[#lines + 1] = "plot " .. table.concat(plots, ", ")
  return table.concat(lines, "\n") .. "\n"
end

-- ---- where it goes ----

local FILES = {
  png = "set terminal pngcairo noenhanced background 'white' size %d,%d font 'sans-serif,10'\n",
  svg = "set terminal svg noenhanced background 'white' size %d,%d font 'sans-serif,13'\n",
  pdf = "set terminal pdfcairo noenhanced background 'white' size %gin,%gin font 'sans-serif,10'\n",
}
local INCH = 100 -- pixels, for the sizes of a PDF

local function to_file(path, o, script)
  local ending = path:lower():match "%.(%w+)$"
  if not FILES[ending] then fail("path '%s': it ends in .png, .svg or .pdf", path) end
  local unit = ending == "pdf" and INCH or 1
  core.write_file(path, gnuplot.run("plot", FILES[ending]:format(o.width / unit, o.height / unit) .. script))
end

-- The first of these that this gnuplot has; without any it would draw nowhere, and not say so.
local WINDOW = [[
if (strstrt(GPVAL_TERMINALS, ' qt ')) { set terminal qt noenhanced persist size %d,%d } else {
  if (strstrt(GPVAL_TERMINALS, ' wxt ')) { set terminal wxt noenhanced persist size %d,%d } else {
    set terminal x11 noenhanced persist size %d,%d } }
]]

local function to_window(o, script)
  if (os.getenv "DISPLAY" or "") == "" and (os.getenv "WAYLAND_DISPLAY" or "") == "" then
    fail "there is no display for a window (DISPLAY and WAYLAND_DISPLAY are not set)"
  end
  local w, h = o.width, o.height
  gnuplot.run("plot", WINDOW:format(w, h, w, h, w, h) .. script, ">/dev/null") -- the window stays, and keeps what it inherits
end

local LINES = 24 -- of a chart in characters

local function to_terminal(o, script)
  local protocol = show.protocol()
  if protocol == "ascii" or protocol == "blocks" then
    local _, columns = core.is_terminal()
    local colours = protocol == "blocks" and "ansi256" or "mono"
    local head = ("set terminal dumb noenhanced %s size %d,%d\n"):format(colours, math.max(30, (columns or 80) - 1), LINES)
    io.stdout:write((gnuplot.run("plot", head .. script):gsub("\f", ""):gsub("^\n+", "")))
    io.stdout:flush()
  else
    image.show(image.decode(gnuplot.run("plot", FILES.png:format(o.width, o.height) .. script)), { protocol = protocol })
  end
end

local known = { title = optional, x_label = optional, y_label = optional, x_log = false, y_log = false, x_range = optional,
  y_range = optional, path = optional, window = false, width = 860, height = 480 }

local function checked(given)
  local named = {}
  for key, value in pairs(given) do
    if math.type(key) ~= "integer" then named[key] = value end
  end
  local o = options("plot", named, known)
  for _, name in ipairs { "title", "x_label", "y_label", "path" } do
    if o[name] ~= nil and type(o[name]) ~= "string" then fail("%s: a string expected, got %s", name, type(o[name])) end
  end
  for _, name in ipairs { "x_log", "y_log", "window" } do
    if type(o[name]) ~= "boolean" then fail("%s: true or false expected, got %s", name, type(o[name])) end
  end
  for _, name in ipairs { "width", "height" } do
    if math.type(o[name]) ~= "integer" or o[name] < 50 or o[name] > 20000 then
      fail("%s is %s, an integer from 50 to 20000 expected", name, tostring(o[name]))
    end
  end
  if o.path and o.window then fail "a file and a window at once" end
  return o
end

function core.plot(given)
  if core.is_tensor(given) then given = { given } end
  if type(given) ~= "table" then fail("a table of series and options expected, got %s", type(given)) end
  local o = checked(given)
  local script = script_of(o, series_of(given))
  if o.path then
    to_file(o.path, o, script)
  elseif o.window then
    to_window(o, script)
  else
    to_terminal(o, script)
  end
end

document("orepa.plot", [[
  orepa.plot{series, ..., title=, x_label=, y_label=, x_log=, y_log=, x_range=, y_range=, path=, window=, width=, height=}
  A chart, drawn by gnuplot. A series is a tensor of one dimension or a list of numbers, which are y over 1, 2, ...; or a table
  {y =, x =, label =, type =}: type "line" (at first), "points", "bars", for which x may be a list of names, or "histogram", which
  counts y in `bins` (30) equal parts. Numbers that are not finite, or not positive on an axis with x_log or y_log, leave gaps.
  x_range and y_range are {low, high}. The chart goes to the file `path`, PNG, SVG or PDF by its ending, which is written beside
  it and renamed; into a window (window = true); else onto the terminal, as a picture where that shows some, else in characters.
  width (860) and height (480) are pixels, hundredths of an inch in a PDF.
  > local series = {y = {2, 1, 0.6, 0.5}, label = "loss"}
  > if os.execute "command -v gnuplot >/dev/null" then orepa.plot{series, title = "training", y_log = true} end]])

return core.plot
