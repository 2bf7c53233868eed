-- For specs: runs the program as a user does, in a child process, and keeps what it wrote. The program is build/orepa, or what
-- the environment variable OREPA_PROGRAM names.

local lfs = require "lfs"

local process = {}

local function absolute(path)
  return path:sub(1, 1) == "/" and path or lfs.currentdir() .. "/" .. path
end

process.root = lfs.currentdir()
process.program = absolute(os.getenv "OREPA_PROGRAM" or "build/orepa")

local function quoted(word)
  return "'" .. tostring(word):gsub("'", "'\\''") .. "'"
end

-- Runs the program, or another command, with arguments, without LUA_PATH and LUA_CPATH, in `folder` if one is given. Gives
-- standard output and standard error together, and the exit code (128 and more: a signal ended it). Waiting threads sleep:
-- tests share processors. `environment` is a table of variables.
function process.run(arguments, folder, environment, program)
  local words = { "unset LUA_PATH LUA_CPATH LUA_PATH_5_4 LUA_CPATH_5_4; export OMP_WAIT_POLICY=passive;" }
  for name, value in pairs(environment or {}) do words[#words + 1] = ("export %s=%s;"):format(name, quoted(value)) end
  if folder then words[#words + 1] = "cd " .. quoted(folder) .. " &&" end
  words[#words + 1] = program or quoted(process.program)
  for _, argument in ipairs(arguments) do words[#words + 1] = quoted(argument) end
  words[#words + 1] = "2>&1 </dev/null"
  local pipe <close> = assert(io.popen(table.concat(words, " ")))
  local text = pipe:read "a"
  local _, how, code = pipe:close()
  return text, how == "signal" and 128 + code or code
end

-- A new empty folder; process.remove takes it away with all that is in it.
function process.folder()
  local path = os.tmpname()
  os.remove(path)
  assert(lfs.mkdir(path))
  return path
end

function process.remove(path)
  if lfs.symlinkattributes(path, "mode") == "directory" then
    for entry in lfs.dir(path) do
      if entry ~= "." and entry ~= ".." then process.remove(path .. "/" .. entry) end
    end
  end
  os.remove(path)
end

function process.write(path, text)
  local file <close> = assert(io.open(path, "wb"))
  assert(file:write(text))
end

-- Runs a text with arguments, in a process where nothing else is alive; it must end well. Gives what it wrote.
function process.run_text(text, arguments, environment)
  local path = os.tmpname()
  process.write(path, text)
  local output, code = process.run({ path, table.unpack(arguments or {}) }, nil, environment)
  os.remove(path)
  assert(code == 0, output)
  return output
end

function process.read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read "a"
end

return process
