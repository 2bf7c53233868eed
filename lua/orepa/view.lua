-- view: numbers of a run that change, as lines in the terminal: each one's last value, and bars that tell how it came there.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"

local view = {}

-- ---- a series of numbers as bars ----

local BLOCKS, LETTERS = { "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█" }, { "_", ".", "-", "~", "=", "+", "*", "#" }

-- Whether the terminal is said to know UTF-8.
function view.has_utf8()
  local locale = ""
  for _, name in ipairs { "LC_ALL", "LC_CTYPE", "LANG" } do
    if locale == "" then locale = os.getenv(name) or "" end
  end
  return locale:lower():find "utf%-?8" ~= nil
end

local function bars_of_terminal() return view.has_utf8() and BLOCKS or LETTERS end

local WIDTH = 32 -- bars of a line

-- All that came, in at most 2 * WIDTH means of equally many numbers each.
local Series = {}
Series.__index = Series

local function series() return setmetatable({ means = {}, each = 1, sum = 0, count = 0 }, Series) end

local function halve(means)
  local half = {}
  for k = 1, #means, 2 do half[#half + 1] = (means[k] + means[k + 1]) / 2 end
  return half
end

function Series:add(value)
  self.last = value
  if value - value ~= 0 then return end -- what is not finite has no bar
  self.sum, self.count = self.sum + value, self.count + 1
  if self.count < self.each then return end
  self.means[#self.means + 1] = self.sum / self.each
  self.sum, self.count = 0, 0
  if #self.means == 2 * WIDTH then self.means, self.each = halve(self.means), 2 * self.each end
end

-- Numbers as bars from the smallest to the largest, the last WIDTH of them or, if there are more, means of pairs.
function view.bars(numbers, levels)
  levels = levels or bars_of_terminal()
  if #numbers > WIDTH then numbers = halve(#numbers % 2 == 0 and numbers or table.move(numbers, 2, #numbers, 1, {})) end
  local low, high, text = math.huge, -math.huge, {}
  for _, x in ipairs(numbers) do low, high = math.min(low, x), math.max(high, x) end
  for k, x in ipairs(numbers) do
    local share = high > low and (x - low) / (high - low) or 0
    text[k] = levels[1 + math.floor(share * (#levels - 1) + 0.5)]
  end
  return table.concat(text)
end

-- ---- lines that are drawn over ----

local PAUSE = 0.1 -- seconds between two drawings

local View = {}
View.__index = View

-- Lines on `log`; nil where nobody would see them change: elsewhere than on a terminal, or with NO_PROGRESS.
function view.on_terminal(log)
  local wanted = log == io.stdout and core.is_terminal() and (os.getenv "NO_PROGRESS" or "") == ""
  return wanted and view.open(log) or nil
end

function view.open(log)
  return setmetatable({ log = log, names = {}, series = {}, lines = 0, drawn = -math.huge, levels = bars_of_terminal() }, View)
end

-- A number of the line `name`; lines come in the order in which they are named first.
function View:add(name, value)
  if not self.series[name] then
    self.names[#self.names + 1] = name
    self.series[name] = series()
  end
  self.series[name]:add(value)
end

local function cut(line, columns)
  local length = utf8.len(line)
  return length and length > columns and line:sub(1, utf8.offset(line, columns + 1) - 1) or line
end

function View:text(title, columns)
  local lines, width = { title }, 0
  for _, name in ipairs(self.names) do width = math.max(width, #name) end
  for k, name in ipairs(self.names) do
    local s = self.series[name]
    lines[k + 1] = ("  %-" .. width .. "s  %-10s %s"):format(name, ("%.4g"):format(s.last), view.bars(s.means, self.levels))
  end
  for k, line in ipairs(lines) do lines[k] = cut(line, columns - 1) end
  return lines
end

-- Draws, unless it did so a moment ago; title() gives the first line.
function View:draw(title)
  if core.clock() - self.drawn < PAUSE then return end
  self.drawn = core.clock()
  local _, columns = core.is_terminal()
  local lines = self:text(title(), columns or 80)
  self.log:write(self.lines > 0 and ("\27[%dA"):format(self.lines) or "", "\r", table.concat(lines, "\27[K\n"), "\27[K\n")
  self.log:flush()
  self.lines = #lines
end

-- Takes the lines away.
function View:clear()
  if self.lines == 0 then return end
  self.log:write(("\27[%dA\r\27[J"):format(self.lines))
  self.log:flush()
  self.lines = 0
end

-- ---- a loop of the user's own ----

local Live = {}
Live.__index = Live

function view.watch(net, given)
  local o = options("watch", given, { log = io.stdout, every = 100 })
  if type(net) ~= "table" or not net.named_parameters then core.fail(("watch: a module expected, got %s"):format(type(net))) end
  if math.type(o.every) ~= "integer" or o.every < 1 then
    core.fail(("watch: every is %s, an integer of at least 1 expected"):format(tostring(o.every)))
  end
  return setmetatable({ net = net, log = o.log, every = o.every, steps = 0, start = core.clock(),
    view = view.on_terminal(o.log) }, Live)
end

local function gradient_norm(net)
  local total = 0
  for _, sum in ipairs(core.gradient_square_sums(net:parameters())) do total = total + sum end
  return math.sqrt(total)
end

function Live:step(numbers)
  if type(numbers) ~= "table" then core.fail(("step: a table of numbers by name expected, got %s"):format(type(numbers))) end
  local names = options.names(numbers)
  for _, name in ipairs(names) do
    if type(numbers[name]) ~= "number" then
      core.fail(("step: %s is a %s, a number expected"):format(name, type(numbers[name])))
    end
  end
  self.steps = self.steps + 1
  local rate, norm = self.steps / math.max(1e-9, core.clock() - self.start), gradient_norm(self.net)
  if self.view then
    for _, name in ipairs(names) do self.view:add(name, numbers[name]) end
    self.view:add("gradient", norm)
    self.view:draw(function() return ("step %d  %.1f steps/s"):format(self.steps, rate) end)
  elseif self.steps % self.every == 0 then
    local text = {}
    for k, name in ipairs(names) do text[k] = ("%s %.4g"):format(name, numbers[name]) end
    self.log:write(("step %d  %s  gradient %.4g  %.1f steps/s\n"):format(self.steps, table.concat(text, "  "), norm, rate))
    self.log:flush()
  end
end

document("orepa.watch", [[
  orepa.watch(net, {every=, log=}) -> live
  A live view of a training loop of your own, whose steps live:step{loss = 0.5, ...} tells: lines in the terminal with each
  number, the norm of all of the network's gradients, and bars that tell how they came there; elsewhere a line each `every` (100)
  steps.
  > local net = nn.Linear{in_features = 2, out_features = 1}; local live = orepa.watch(net, {every = 1})
  > for step = 1, 3 do net(orepa.ones(1, 2)):sum():backward(); live:step{loss = 1 / step} end]])
document("live:step", [[
  live:step{name = number, ...}
  A step that is over, with its numbers; its gradients are still there.
  > orepa.watch(nn.Linear{in_features = 2, out_features = 1}):step{loss = 1}]])

return view
