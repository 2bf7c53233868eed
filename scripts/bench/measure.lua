-- What the benchmarks share: order statistics, child processes that take turns, what the machine is, tables and JSON.

local cjson = require "cjson"
local orepa = require "orepa"

local measure = {}

-- ---- numbers ----

-- Median and quartiles of a list, with linear interpolation between neighbours.
function measure.summary(values)
  local sorted = table.move(values, 1, #values, 1, {})
  table.sort(sorted)
  local function at(share)
    local position = 1 + (#sorted - 1) * share
    local below = math.floor(position)
    return sorted[below] + (position - below) * ((sorted[below + 1] or sorted[below]) - sorted[below])
  end
  return { median = at(0.5), lower = at(0.25), upper = at(0.75), count = #sorted }
end

function measure.median(values)
  return measure.summary(values).median
end

function measure.scaled(summary, factor)
  return { median = summary.median * factor, lower = summary.lower * factor, upper = summary.upper * factor,
    count = summary.count }
end

-- Operations a second of a product of square matrices of a type on all threads, as the engine computes it (by oneDNN).
function measure.matmul_rate(size, dtype)
  local _ <close> = orepa.no_grad()
  local a <close> = orepa.rand(size, size):to(dtype)
  local b <close> = orepa.rand(size, size):to(dtype)
  local best = math.huge
  for _ = 1, 3 do -- the first warms up
    local start = orepa.clock()
    a:matmul(b):release()
    best = math.min(best, orepa.clock() - start)
  end
  return 2 * size ^ 3 / best
end

-- ---- options ----

-- "1,4..6,x" as the list {"1", "4", "5", "6", "x"}.
function measure.list(text)
  local list = {}
  for word in text:gmatch "[^,]+" do
    local first, last = word:match "^(%d+)%.%.(%d+)$"
    if first then
      for k = math.tointeger(first), math.tointeger(last) do list[#list + 1] = tostring(k) end
    else
      list[#list + 1] = word
    end
  end
  if #list == 0 then return nil, "an empty list" end
  return list
end

-- The same, and none of an empty text.
function measure.list_or_none(text)
  return text == "" and {} or measure.list(text)
end

-- For argparse: a list whose words `convert` takes.
local function list_of(convert, kind)
  return function(text)
    local list, message = measure.list(text)
    for k, word in ipairs(list or {}) do
      list[k] = convert(word)
      if not list[k] then return nil, ("'%s' is not %s"):format(word, kind) end
    end
    return list, message
  end
end

measure.numbers = list_of(tonumber, "a number")
measure.integers = list_of(math.tointeger, "an integer")

-- `values` behind those of `list`, which is given back.
function measure.append(list, values)
  return table.move(values, 1, #values, #list + 1, list)
end

-- Entries of different `text`, in order: the first of each, with how often the text occurs as `count`.
function measure.distinct(entries)
  local list, by_text = {}, {}
  for _, entry in ipairs(entries) do
    local first = by_text[entry.text]
    if first then
      first.count = first.count + 1
    else
      entry.count, by_text[entry.text] = 1, entry
      list[#list + 1] = entry
    end
  end
  return list
end

-- For argparse: an integer that is not too small.
function measure.at_least(least)
  return function(text)
    local n = math.tointeger(text)
    if n and n >= least then return n end
    return nil, ("'%s' is not an integer of at least %d"):format(text, least)
  end
end

-- ---- processes ----

local function quoted(text)
  return "'" .. tostring(text):gsub("'", "'\\''") .. "'"
end

-- A command line of words, with environment variables before it.
function measure.command(words, environment)
  local parts = {}
  for name, value in pairs(environment or {}) do parts[#parts + 1] = name .. "=" .. quoted(value) end
  table.sort(parts)
  for _, word in ipairs(words) do parts[#parts + 1] = quoted(word) end
  return "env " .. table.concat(parts, " ")
end

-- Options as words for another process: {"--batch-size", 16, ...} for the names {"batch_size", ...}.
function measure.words(options, names)
  local words = {}
  for _, name in ipairs(names) do measure.append(words, { "--" .. name:gsub("_", "-"), options[name] }) end
  return words
end

function measure.output_of(command)
  local pipe <close> = assert(io.popen(command))
  local text = pipe:read "a"
  if not pipe:close() then orepa.fail("failed: " .. command) end
  return text
end

-- The program that runs this script.
function measure.program()
  local stat <close> = assert(io.open "/proc/self/stat") -- begins with the process's number
  return measure.output_of(("readlink /proc/%d/exe"):format(stat:read "n")):match "[^\n]+"
end

-- The folder of the running script.
function measure.folder()
  return arg[0]:match "^(.*)/[^/]*$" or "."
end

-- A process that stays and answers: each line that it is sent gives one line of JSON, the first comes unasked.
local Process = {}
Process.__index = Process

local function read_answer(self)
  local line = self.from:read "l"
  if not line then orepa.fail(self.name .. " ended before it answered") end
  local ok, answer = pcall(cjson.decode, line)
  if not ok then orepa.fail(("%s answered '%s'"):format(self.name, line:sub(1, 200))) end
  if answer.error then orepa.fail(("%s: %s"):format(self.name, answer.error)) end
  return answer
end

function Process:ask(...)
  self.to:write(table.concat({ ... }, " "), "\n")
  return read_answer(self)
end

function Process:close()
  self.to:close()
  self.from:close()
end

-- Starts one and waits for its first line, which is kept as `ready`. What it answers comes through a FIFO, since a pipe of Lua's
-- goes one way; `cat` takes what is sent after the process ended.
function measure.start(name, command)
  local fifo = os.tmpname()
  os.remove(fifo)
  assert(os.execute("mkfifo -m 600 " .. quoted(fifo)))
  local to = assert(io.popen(("{ %s >%s; cat >/dev/null; }"):format(command, quoted(fifo)), "w"))
  local from = assert(io.open(fifo, "r"))
  os.remove(fifo)
  to:setvbuf "line"
  local self = setmetatable({ name = name, to = to, from = from }, Process)
  self.ready = read_answer(self)
  return self
end

-- The other end: `ready` is said at once, then `answer` is called with the numbers of each line.
function measure.serve(ready, answer)
  print(cjson.encode(ready))
  io.stdout:flush()
  for line in io.lines() do
    local numbers = {}
    for word in line:gmatch "%S+" do numbers[#numbers + 1] = math.tointeger(word) end
    print(cjson.encode(answer(table.unpack(numbers))))
    io.stdout:flush()
  end
end

-- ---- the machine, and this process ----

local function first_match(path, pattern)
  local file <close> = io.open(path)
  return file and file:read "a":match(pattern)
end

function measure.machine()
  local libraries, features = orepa.build_info():match "^([^\n]*)\n(.*)$"
  return { cpu = first_match("/proc/cpuinfo", "model name%s*:%s*([^\n]*)") or "unknown", features = features,
    libraries = libraries, orepa = orepa.version, threads = orepa.threads(), date = os.date "!%Y-%m-%d" }
end

-- Forgets what setting up took: the most memory counts from what is held now. Where the system refuses the last part, the peak of
-- the process stays that since its start.
function measure.reset_peak_memory()
  collectgarbage()
  orepa.empty_cache()
  orepa.reset_peak()
  local file <close> = io.open("/proc/self/clear_refs", "w")
  if file then file:write "5" end
end

-- The most memory that this process held since, in bytes.
function measure.peak_memory()
  return 1024 * (math.tointeger(first_match("/proc/self/status", "VmHWM:%s*(%d+)")) or 0)
end

-- ---- output ----

-- A file is never left half-written.
function measure.write_file(path, text)
  local file <close> = assert(io.open(path .. ".new", "w"))
  assert(file:write(text))
  assert(file:close())
  assert(os.rename(path .. ".new", path))
end

local MIB = 1 << 20

function measure.mib(bytes)
  return bytes / MIB
end

-- One line of JSON: what was measured, how, and where.
function measure.print_json(benchmark, options, result)
  local line = { benchmark = benchmark, machine = measure.machine(), options = {} }
  for name, value in pairs(options) do line.options[name] = value end
  for name, value in pairs(result) do line[name] = value end
  print(cjson.encode(line))
end

-- Rows of texts in columns; the first column to the left, the others to the right.
function measure.print_table(rows)
  local widths = {}
  for _, row in ipairs(rows) do
    for k, text in ipairs(row) do widths[k] = math.max(widths[k] or 0, utf8.len(text) or #text) end
  end
  for _, row in ipairs(rows) do
    local cells = {}
    for k, text in ipairs(row) do
      local gap = (" "):rep(widths[k] - (utf8.len(text) or #text))
      cells[k] = k == 1 and text .. gap or gap .. text
    end
    print((table.concat(cells, "  "):gsub("%s+$", "")))
  end
end

return measure
