-- repl.lua: the prompt: pieces of Lua are read, evaluated and their values shown; names are completed; help.
--
-- It knows no terminal: run(terminal) is given what reads lines, and what stands around a piece that is evaluated.

local lfs = require "lfs"
local orepa = require "orepa"
local options = require "orepa.options"
local documentation = orepa.documentation

local repl = {}

-- ---- values as text ----

local WIDTH, DEPTH, ITEMS = 76, 6, 60 -- columns of a line, tables in tables, items of a table

local function quoted(text) return (("%q"):format(text):gsub("\\\n", "\\n"):gsub("\\9", "\\t")) end

local function is_name(key) return type(key) == "string" and key:find "^[%a_][%w_]*$" and load("local " .. key) ~= nil end

local show

-- The items of a table as text: those of the list part, then the others by their keys.
local function items_of(t, depth, above)
  local items, length = {}, rawlen(t)
  local function add(text) items[#items + 1] = text end
  for k = 1, math.min(length, ITEMS) do add(show(rawget(t, k), depth + 1, above)) end
  if length > ITEMS then add(("... %d more"):format(length - ITEMS)) end
  local others = {}
  for key in next, t do
    if not (math.type(key) == "integer" and key >= 1 and key <= length) then others[#others + 1] = key end
  end
  table.sort(others, function(a, b)
    if type(a) == type(b) and (type(a) == "number" or type(a) == "string") then return a < b end
    return type(a) < type(b)
  end)
  for k = 1, math.min(#others, ITEMS) do
    local key = others[k]
    add((is_name(key) and key or ("[%s]"):format(show(key, depth + 1, above))) .. " = " .. show(rawget(t, key), depth + 1, above))
  end
  if #others > ITEMS then add(("... %d more"):format(#others - ITEMS)) end
  return items
end

local function show_table(t, depth, above)
  if above[t] then return "<the table around>" end
  if depth > DEPTH then return "{...}" end
  above[t] = true
  local items, length, lines = items_of(t, depth, above), 0, false
  above[t] = nil
  for _, item in ipairs(items) do
    length, lines = length + #item + 2, lines or item:find "\n" ~= nil
  end
  if not lines and 2 * depth + length <= WIDTH then return "{" .. table.concat(items, ", ") .. "}" end
  local indent = ("  "):rep(depth + 1)
  return ("{\n%s%s\n%s}"):format(indent, table.concat(items, ",\n" .. indent), ("  "):rep(depth))
end

function show(value, depth, above)
  local kind = type(value)
  if kind == "string" then return quoted(value) end
  local meta = debug.getmetatable(value)
  if kind == "table" and not (type(meta) == "table" and (rawget(meta, "__tostring") or rawget(meta, "__name"))) then
    return show_table(value, depth, above)
  end
  local done, text = pcall(tostring, value)
  text = done and text or ("<%s whose __tostring fails: %s>"):format(kind, tostring(text))
  return depth > 0 and text:gsub("\n", "\n" .. ("  "):rep(depth)) or text
end

-- A value as it is shown: strings quoted, tables readable, whatever they hold.
function repl.show(value) return (show(value, 0, {})) end

-- ---- pieces ----

local CHUNK = "=stdin"

-- A function that evaluates the text, an expression or statements; or nil and what is wrong, "more" where it only ends too
-- early. An expression's values are a call's arguments: what it calls is then no tail call, and errors know this line.
function repl.compile(text)
  local values = text:gsub("^%s*=", "")
  local f, as_expression = load("return " .. values, CHUNK)
  if f then
    local expression = load("return (...)(" .. values .. ")", CHUNK) or load("return (...)(" .. values .. "\n)", CHUNK)
    return function()
      local list = expression(table.pack)
      return table.unpack(list, 1, list.n)
    end
  end
  local message
  f, message = load(text, CHUNK)
  if f then return f end
  local early = message:sub(-5) == "<eof>" or as_expression:sub(-5) == "<eof>"
  return nil, early and "more" or message
end

-- The library's Lua files begin with this.
local LIBRARY = debug.getinfo(1, "S").source:match "^(.*/)"

-- Whether somebody's own function was called between the prompt and the error, not the library's alone.
local function has_own_calls()
  local level = 3 -- who raised the error
  while true do
    local call = debug.getinfo(level, "S")
    if not call or call.source == CHUNK and call.what == "main" then return false end
    if call.what ~= "C" and call.source:sub(1, #LIBRARY) ~= LIBRARY then return true end
    level = level + 1
  end
end

-- An error, with the calls between it and the prompt if there are such.
local function trace(message)
  if type(message) ~= "string" then
    local meta = debug.getmetatable(message)
    message = type(meta) == "table" and rawget(meta, "__tostring") and tostring(message) or repl.show(message)
  end
  if not has_own_calls() then return message end
  local lines = {}
  for line in debug.traceback(message, 2):gmatch "[^\n]+" do
    line = line:gsub("^(\tstdin:%d+: in) upvalue 'expression'$", "%1 main chunk")
    lines[#lines + 1] = line
    if line:find "^\tstdin:%d+: in main chunk$" then break end
  end
  return table.concat(lines, "\n")
end

-- ---- help ----

-- Where the first words of documentation's names lead.
local function roots()
  return { orepa = orepa, nn = orepa.nn, F = orepa.F, optim = orepa.optim, data = orepa.data, reparam = orepa.reparam,
    train = orepa.train, diagnose = orepa.diagnose, image = orepa.image, models = require "orepa.models",
    datasets = require "orepa.datasets" }
end

local function at_path(from, path)
  local value = from
  for name in path:gmatch "[^%.:]+" do
    if type(value) ~= "table" then return nil end
    value = value[name]
  end
  return value
end

-- The names under which a value is documented.
local function names_of(value)
  local found, from = {}, roots()
  for _, name in ipairs(options.names(documentation)) do
    local done, there = pcall(at_path, from, name)
    if done and there ~= nil and rawequal(there, value) then found[#found + 1] = name end
  end
  if #found == 0 and type(value) == "function" then
    for name, method in pairs(orepa.methods) do
      if method == value and documentation["t:" .. name] then found[1] = "t:" .. name end
    end
  end
  return found
end

-- The documented names that have the text in them; if there are none, those whose documentation has.
local function names_with(text)
  if documentation[text] then return { text } end
  local wanted, named, mentioned = text:lower(), {}, {}
  for _, name in ipairs(options.names(documentation)) do
    if name:lower():find(wanted, 1, true) then named[#named + 1] = name end
    if documentation[name]:lower():find(wanted, 1, true) then mentioned[#mentioned + 1] = name end
  end
  return #named > 0 and named or mentioned
end

local HELP = [[
Type an expression to see its value, or statements. Tab completes names, options and paths; Ctrl-C stops what runs; Ctrl-D leaves.
  help(nn.Conv2d)   what a function, a block or a layer does
  help "conv"       everything that mentions conv
]]

-- What help(...) prints.
function repl.help(...)
  if select("#", ...) == 0 then return HELP end
  local what = ...
  local names = type(what) == "string" and names_with(what) or names_of(what)
  if #names == 0 then
    return type(what) == "string" and ("nothing is said about '%s'\n"):format(what) or "nothing is said about this value\n"
  end
  if #names == 1 then return documentation[names[1]]:gsub("\n> ", "\n  > ") .. "\n" end
  local lines = {}
  for k, name in ipairs(names) do lines[k] = documentation[name]:match "[^\n]*" end
  return table.concat(lines, "\n") .. "\n"
end

-- ---- completion ----

local FIELDS = { "shape", "dtype", "device", "grad", "requires_grad", "is_leaf" } -- of tensors, beside their methods

-- Names that may follow a value: its own, and those that it inherits.
local function names_in(value)
  local found = {}
  local function add(t)
    for key in pairs(t) do
      if is_name(key) and not key:find "^__" then found[key] = true end
    end
  end
  if orepa.is_tensor(value) then
    add(orepa.methods)
    for _, name in ipairs(FIELDS) do found[name] = true end
    return found
  end
  for _ = 1, 20 do -- classes of classes
    if type(value) == "table" then add(value) end
    local meta = debug.getmetatable(value)
    value = type(meta) == "table" and rawget(meta, "__index") or nil
    if type(value) ~= "table" then break end
  end
  return found
end

-- The value of a path like nn.Conv2d or net.layers, without calling anything.
local function value_of(path)
  local value = _G
  for name in path:gmatch "[%a_][%w_]*" do
    local done, next_value = pcall(function() return value[name] end)
    if not done or next_value == nil then return nil end
    value = next_value
  end
  return value
end

-- The options of the call whose braces are open at the end of the text.
local function options_at(text)
  local depth, k = 0, #text
  while k > 0 do
    local c = text:sub(k, k)
    if c == "}" or c == ")" then depth = depth + 1 end
    if c == "{" or c == "(" then
      if depth == 0 then
        if c == "{" then break end
      else
        depth = depth - 1
      end
    end
    k = k - 1
  end
  local path = k > 0 and text:sub(1, k - 1):match "([%w_%.:]+)%s*%(?%s*$"
  local value = path and value_of(path)
  local name = value and names_of(value)[1]
  local found = {}
  for option in (name and documentation[name]:match "[^\n]*" or ""):gmatch "([%a_][%w_]*)=" do found[option .. " = "] = true end
  return found
end

local KEYWORDS = { "and", "break", "do", "else", "elseif", "end", "false", "for", "function", "goto", "if", "in", "local",
  "nil", "not", "or", "repeat", "return", "then", "true", "until", "while" }

-- Whether the text ends inside a string; then the part of the string.
local function open_string(text)
  local quote, start
  local k = 1
  while k <= #text do
    local c = text:sub(k, k)
    if quote then
      if c == "\\" then k = k + 1 elseif c == quote then quote = nil end
    elseif c == '"' or c == "'" then
      quote, start = c, k + 1
    end
    k = k + 1
  end
  return quote and text:sub(start) or nil
end

local function paths(part)
  local folder, begin = part:match "^(.*/)([^/]*)$"
  folder, begin = folder or "", begin or part
  local found = {}
  local done, next_name, state = pcall(lfs.dir, folder == "" and "." or folder)
  if not done then return {}, begin end
  for name in next_name, state do
    if name ~= "." and name ~= ".." and name:sub(1, #begin) == begin and (begin ~= "" or name:sub(1, 1) ~= ".") then
      found[name .. (lfs.attributes(folder .. name, "mode") == "directory" and "/" or "")] = true
    end
  end
  return found, begin
end

-- What may stand at the end of the text: the part that is there already, and a sorted list of all that it may become.
function repl.complete(text)
  local found, begin
  local part = open_string(text)
  if part then
    found, begin = paths(part)
  else
    local path, separator, name = text:match "([%a_][%w_%.]*)([%.:])([%a_]?[%w_]*)$"
    if path then
      begin, found = name, names_in(value_of(path))
      if separator == ":" then
        local value = value_of(path)
        for key in pairs(found) do
          local done, member = pcall(function() return value[key] end)
          if not done or type(member) ~= "function" then found[key] = nil end
        end
      end
    else
      begin = text:match "[%a_]?[%w_]*$"
      found = options_at(text:sub(1, #text - #begin))
      for name_there in pairs(names_in(_G)) do found[name_there] = true end
      for _, word in ipairs(KEYWORDS) do found[word] = true end
    end
  end
  local list = {}
  for _, candidate in ipairs(options.names(found)) do
    if candidate:sub(1, #begin) == begin then list[#list + 1] = candidate end
  end
  return begin, list
end

-- ---- the loop ----

local function painted(terminal, code, text)
  return terminal.colors and ("\27[%sm%s\27[0m"):format(code, text) or text
end

-- Says once what becomes of a local.
local function mention_local(terminal, text)
  local name = not terminal.said and text:match "^%s*local%s+([%a_][%w_]*)"
  if not name or name == "function" then return end
  terminal.said = true
  terminal.write(("a local ends with its line: write '%s = ...' to keep it\n"):format(name))
end

local function evaluate(terminal, f, text)
  local results = table.pack(xpcall(f, trace))
  if not results[1] then
    terminal.complain(painted(terminal, "31", tostring(results[2])) .. "\n")
    return false
  end
  for k = 2, results.n do
    if results.n > 2 or results[k] ~= nil then terminal.write(repl.show(results[k]) .. "\n") end
  end
  mention_local(terminal, text)
  return true
end

-- Names that are known at the prompt.
function repl.globals()
  for name, value in pairs(roots()) do
    if _G[name] == nil then _G[name] = value end
  end
  _G.help = function(...) io.write(repl.help(...)) end
end

-- terminal: read(prompt) gives a line, nil at the end, or nil and "interrupted"; write and complain take text; remember(text)
-- takes a piece for the history; call(f) is f() in whatever stands around a piece. Gives whether nothing failed.
function repl.run(terminal)
  local whole, piece = true, nil
  while true do
    local line, why = terminal.read(piece and ">> " or "> ")
    if not line and why ~= "interrupted" then
      if piece then
        terminal.complain(painted(terminal, "31", select(2, load(piece, "=stdin")) or "") .. "\n")
        whole = false
      end
      return whole
    end
    piece = line and (piece and piece .. "\n" .. line or line) or nil
    if piece and piece:find "%S" then
      local f, problem = repl.compile(piece)
      if f or problem ~= "more" then
        terminal.remember(piece)
        local text = piece
        piece = nil
        if f then
          whole = terminal.call(function() return evaluate(terminal, f, text) end) and whole
        else
          terminal.complain(painted(terminal, "31", problem) .. "\n")
          whole = false
        end
      end
    else
      piece = nil
    end
  end
end

-- ---- the program's prompt ----

local KEPT = 2000 -- pieces of the history

-- The history's file: a piece a line, ends of lines as \n.
local function history_path()
  local home = os.getenv "HOME"
  return os.getenv "OREPA_HISTORY" or (home and home .. "/.orepa_history")
end

local ESCAPES = { ["\\"] = "\\\\", ["\n"] = "\\n" }
local UNESCAPES = { ["\\\\"] = "\\", ["\\n"] = "\n" }

-- Gives the editor what former sessions left; then a function that keeps a piece.
local function keep_history(editor, path)
  local pieces = {}
  local file = path and io.open(path)
  if file then
    for line in file:lines() do pieces[#pieces + 1] = line end
    file:close()
  end
  for k = math.max(1, #pieces - KEPT + 1), #pieces do editor.enter((pieces[k]:gsub("\\[\\n]", UNESCAPES))) end
  if #pieces > 2 * KEPT then
    local shorter = io.open(path, "w")
    if shorter then
      shorter:write(table.concat(pieces, "\n", #pieces - KEPT + 1), "\n")
      shorter:close()
    end
  end
  return function(piece)
    editor.enter(piece)
    local kept = path and io.open(path, "a")
    if kept then
      kept:write(piece:gsub("[\\\n]", ESCAPES), "\n")
      kept:close()
    end
  end
end

-- host: call(f), and an editor {read =, enter =} where there is a terminal. Gives whether all went well, which matters
-- where pieces come from a pipe.
function repl.start(host)
  local editor = host.editor
  repl.globals()
  local terminal = {
    call = host.call,
    read = editor and editor.read or function() return io.read "l" end,
    remember = editor and keep_history(editor, history_path()) or function() end,
    colors = editor and (os.getenv "NO_COLOR" or "") == "" and os.getenv "TERM" ~= "dumb",
    write = function(text) io.stdout:write(text) end,
    complain = function(text)
      io.stdout:flush()
      io.stderr:write(text)
    end,
  }
  if editor then print(("orepa %s, %s; help() helps"):format(orepa.version, _VERSION)) end
  local whole = repl.run(terminal)
  if editor then print() end
  return editor ~= nil or whole
end

return repl
