-- docs/guides: the Lua of a page is one script, which runs and prints what the page says that it prints.
--
-- A page's blocks of ```lua are run one after another, as the chunk that is left when everything else is made blank, so that
-- lines keep their numbers. A block of ```text behind one is what that printed; "..." in it stands for anything.

local orepa = require "orepa"
local lfs = require "lfs"

local FOLDER = "docs/guides"

-- The chunk, and a list of what follows each block: {line =, expected = text or nil}.
local function script_of(page)
  local lines, blocks, kind, number = {}, {}, nil, 0
  for line in page:gmatch "([^\n]*)\n" do
    number = number + 1
    local fence = line:match "^```(.*)$"
    if fence and not kind then
      kind = fence
      if kind == "lua" then blocks[#blocks + 1] = { line = number } end
      if kind == "text" then blocks[#blocks].expected = "" end
      line = ""
    elseif fence then
      line = kind == "lua" and ("ends(%d)"):format(#blocks) or ""
      kind = nil
    elseif kind == "text" then
      blocks[#blocks].expected = blocks[#blocks].expected .. line .. "\n"
      line = ""
    elseif kind ~= "lua" then
      line = ""
    end
    lines[number] = line
  end
  assert(not kind, "a block has no end")
  return table.concat(lines, "\n"), blocks
end

-- Whether a text is what is expected, in which "..." stands for anything within a line.
local function matches(text, expected)
  local pattern = expected:gsub("%p", "%%%0"):gsub("%%%.%%%.%%%.", "[^\n]*")
  return text:find("^" .. pattern .. "$") ~= nil
end

-- Runs a page; `modules` stand for those of their names.
local function run(path, modules)
  local file <close> = assert(io.open(path))
  local code, blocks = script_of(file:read "a")
  local printed = {}
  local env = setmetatable({}, { __index = _G })
  function env.print(...)
    local words = table.pack(...)
    for k = 1, words.n do words[k] = tostring(words[k]) end
    printed[#printed + 1] = table.concat(words, "\t") .. "\n"
  end
  function env.ends(k)
    local text, block = table.concat(printed), blocks[k]
    printed = {}
    if block.expected and not matches(text, block.expected) then
      error(("%s:%d: the block prints\n%snot\n%s"):format(path, block.line, text, block.expected), 0)
    end
    block.done = true
  end
  function env.require(name) return modules and modules[name] or require(name) end
  orepa.manual_seed(1)
  assert(load(code, "=" .. path, "t", env))()
  for _, block in ipairs(blocks) do assert(block.done, ("%s:%d: did not run"):format(path, block.line)) end
  return #blocks
end

describe("the guide", function()
  local names = {}
  for name in lfs.dir(FOLDER) do
    if name:find "%.md$" then names[#names + 1] = name end
  end
  table.sort(names)
  for _, name in ipairs(names) do
    it(name .. " runs and prints what it says", function()
      local blocks = run(FOLDER .. "/" .. name)
      assert(blocks > 0 or name == "README.md" or name == "new-op.md", "there is no Lua in it")
    end)
  end
end)

-- ---- the tables of names ----

local places = { orepa = orepa, nn = orepa.nn, F = orepa.F, optim = orepa.optim, data = orepa.data }
local methods = { x = orepa.methods, mask = orepa.methods, t = orepa.methods, w = orepa.methods, loss = orepa.methods,
  y = orepa.methods, net = orepa.nn.Sequential, seq = orepa.nn.Sequential }

-- The names in code of the last cells of a page's tables that nothing has.
local function unknown_names(page)
  local unknown, count = {}, 0
  local function look(place, name)
    count = count + 1
    if place[name] == nil then unknown[#unknown + 1] = name end
  end
  for line in page:gmatch "\n| [^\n]* | ([^\n]*) |" do
    for code in line:gmatch "`([^`]*)`" do
      for where, name in code:gmatch "(%a+)%.([%a_][%w_]*)" do if places[where] then look(places[where], name) end end
      for where, name in code:gmatch "(%a+):([%a_][%w_]*)" do if methods[where] then look(methods[where], name) end end
    end
  end
  return unknown, count
end

describe("the tables of", function()
  for _, name in ipairs { "from-pytorch.md", "from-torch7.md" } do
    it(name .. " name what there is", function()
      local file <close> = assert(io.open(FOLDER .. "/" .. name))
      local unknown, count = unknown_names(file:read "a")
      assert.same({}, unknown)
      assert(count > 50, count)
    end)
  end
end)

it("the tutorial runs without the dataset too", function()
  run(FOLDER .. "/tutorial.md", { ["orepa.datasets"] = { load = function() error "there is none" end } })
end)

describe("what a page says is printed", function()
  it("is compared, but for the places of dots", function()
    assert.is_true(matches("a 1.25\nb\n", "a 1...\nb\n"))
    assert.is_false(matches("a 1.25\nb\n", "a 2...\nb\n"))
    assert.is_false(matches("a\nb\nc\n", "a...\nc\n"))
    assert.is_false(matches("a\n", "a\nb\n"))
  end)

  it("belongs to the block before it", function()
    local code, blocks = script_of "# x\n```lua\nprint(1)\n```\n\n```text\n1\n```\nend\n```lua\nlocal x\n```\n"
    assert.equal("\n\nprint(1)\nends(1)\n\n\n\n\n\n\nlocal x\nends(2)", code)
    assert.same({ { line = 2, expected = "1\n" }, { line = 10 } }, blocks)
  end)
end)
