-- gnuplot: runs a script of gnuplot's and gives what it draws. Text goes into a script through quoted() alone, numbers through
-- number(): nothing in them can be a command.

local core = require "orepa.core"

local gnuplot = {}

function gnuplot.is_there()
  return os.execute "command -v gnuplot >/dev/null 2>&1" == true
end

-- Everything that could have a meaning, between quotes too, becomes the number of its byte; ends of lines become spaces.
function gnuplot.quoted(text)
  local function escaped(c) return ("\\%03o"):format(c:byte()) end
  return '"' .. tostring(text):gsub("%c", " "):gsub("[^%w ,.:;/()=+_-]", escaped) .. '"'
end

-- What is not finite leaves a gap.
function gnuplot.number(x)
  if x - x ~= 0 then return "NaN" end
  return math.type(x) == "integer" and ("%d"):format(x) or ("%.17g"):format(x)
end

local function read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read "a"
end

-- The line of gnuplot's messages that says what is wrong, behind those that point at it.
local function complaint(messages)
  for line in messages:gmatch "[^\n]+" do
    local words = line:match '^"[^"]*" line %d+: (.*)' or line:match "^.*, line %d+: (.*)"
    if words and not words:find "^warning" then return words end
  end
  return messages:match "[^\n]+" or "it says nothing"
end

local function shell_quoted(path) return "'" .. path:gsub("'", "'\\''") .. "'" end

local function run_files(script, messages, text, behind)
  local file <close> = assert(io.open(script, "wb"))
  assert(file:write(text))
  file:close()
  local command = "LC_ALL=C.UTF-8 gnuplot -d %s 2>%s %s"
  local pipe = assert(io.popen(command:format(shell_quoted(script), shell_quoted(messages), behind)))
  local drawn = pipe:read "a"
  return pipe:close() == true, drawn, read(messages)
end

-- What the script draws on its standard output, which is where it does unless told otherwise. `behind`: the shell's words
-- behind the command.
function gnuplot.run(where, text, behind)
  if not gnuplot.is_there() then
    core.fail(where .. ": gnuplot is not installed (Debian's package gnuplot-nox, or gnuplot-qt, which opens windows too)")
  end
  local script, messages = os.tmpname(), os.tmpname()
  local done, good, drawn, said = pcall(run_files, script, messages, text, behind or "")
  os.remove(script)
  os.remove(messages)
  if not done then core.fail(("%s: gnuplot could not be run: %s"):format(where, good)) end
  if not good then core.fail(("%s: gnuplot could not draw: %s"):format(where, complaint(said))) end
  return drawn
end

return gnuplot
