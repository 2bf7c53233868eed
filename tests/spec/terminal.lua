-- For specs: sits at the program on a pseudo-terminal (tests/terminal), types, and reads what is shown.

local process = require "tests.spec.process"

package.cpath = process.program:match "^(.*)/[^/]*$" .. "/tests/?.so;" .. package.cpath
local pseudo = require "terminal"

local terminal = {}
terminal.__index = terminal

local PATIENCE = 60 -- seconds without a word after which a program hangs

-- The program with arguments; its history is kept in `folder`, if one is given. Variables of `environment` are set too.
function terminal.open(arguments, folder, environment)
  local words = { process.program, table.unpack(arguments or {}) }
  local variables = { TERM = "xterm", NO_COLOR = "1", OMP_WAIT_POLICY = "passive",
    OREPA_HISTORY = folder and folder .. "/history" or "/dev/null" }
  for name, value in pairs(environment or {}) do variables[name] = value end
  return setmetatable({ pseudo = pseudo.open(words, variables), unread = "" }, terminal)
end

function terminal:type(text) self.pseudo:send(text) end

-- Reads on; false at the program's end.
local function read(self, waits_for)
  for _ = 1, PATIENCE do
    local more = self.pseudo:receive(1)
    if not more then return false end
    if more ~= "" then
      self.unread = self.unread .. more
      return true
    end
  end
  error(("%s is not shown; there is: %q"):format(waits_for, self.unread), 0)
end

-- Waits for the pattern, and gives all that was shown up to its end, as it came.
function terminal:expect(pattern)
  while true do
    local _, last = self.unread:find(pattern)
    if last then
      local shown = self.unread:sub(1, last)
      self.unread = self.unread:sub(last + 1)
      return shown
    end
    if not read(self, pattern) then error(("the program ended before '%s'; it showed: %q"):format(pattern, self.unread), 0) end
  end
end

-- Without what moves the cursor or sets modes; ends of lines as \n.
local function plain(text) return (text:gsub("\27%[[%d;?]*[%a~]", ""):gsub("\r\n", "\n")) end

-- Behind a prompt pasted text is marked, from then on what is typed is read; behind a line it no longer is.
local READS, READ = "\27%[%?2004h", "\27%[%?2004l"

-- Waits for a prompt. Gives what was shown before it, and the prompt.
function terminal:prompt()
  local shown = plain(self:expect(READS))
  return shown:match "^(.-)([^\n]*)$"
end

-- Waits until a line is taken, and for the next prompt: the answer, and that prompt.
function terminal:answer()
  self:expect(READ)
  return self:prompt()
end

-- Types a line at the prompt.
function terminal:ask(line)
  self:type(line .. "\r")
  return self:answer()
end

-- Waits for the program's end: the rest of what it showed, and its exit code.
function terminal:finish()
  while read(self, "the end") do end
  local rest = plain(self.unread)
  self.unread = ""
  return rest, self.pseudo:wait()
end

-- Types the text again and again until the program ends, as finish(), or a prompt is there: nil.
function terminal:insist(text)
  for _ = 1, PATIENCE do
    self:type(text)
    local more
    repeat
      more = self.pseudo:receive(0.3)
      self.unread = self.unread .. (more or "")
    until not more or more == ""
    if not more then return self:finish() end
    if self.unread:find(READS) then return nil end
  end
  error(("the program does not end; there is: %q"):format(self.unread), 0)
end

function terminal:mode() return self.pseudo:mode() end

function terminal:close() self.pseudo:close() end

return terminal
