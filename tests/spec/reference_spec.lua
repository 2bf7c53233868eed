-- docs/reference is what scripts/reference.lua writes, links between pages lead somewhere, and the README's and the manual's Lua
-- runs.

local lfs = require "lfs"

local program = os.getenv "OREPA_PROGRAM" or "build/orepa"

local function contents(path)
  local file <close> = assert(io.open(path))
  return file:read "a"
end

-- The names of a folder's files that end in an ending, sorted.
local function files(folder, ending)
  local list = {}
  for name in lfs.dir(folder) do
    if name:sub(-#ending) == ending then list[#list + 1] = name end
  end
  table.sort(list)
  return list
end

describe("docs/reference", function()
  local folder

  setup(function()
    folder = os.tmpname()
    os.remove(folder)
  end)
  teardown(function()
    for _, name in ipairs(files(folder, ".md")) do os.remove(folder .. "/" .. name) end
    lfs.rmdir(folder)
  end)

  it("is up to date", function()
    assert(os.execute(("'%s' scripts/reference.lua '%s'"):format(program, folder)))
    assert.same(files(folder, ".md"), files("docs/reference", ".md"))
    for _, name in ipairs(files(folder, ".md")) do
      assert.equal(contents(folder .. "/" .. name), contents("docs/reference/" .. name))
    end
  end)
end)

-- ---- links ----

-- What may stand behind # in a link to a page.
local anchors = setmetatable({}, { __index = function(self, path)
  local found = {}
  for title in ("\n" .. contents(path)):gmatch "\n#+ ([^\n]*)" do
    found[title:lower():gsub("[^%w_%- ]", ""):gsub(" ", "-")] = true
  end
  self[path] = found
  return found
end })

-- The folder and name of a link's file, seen from a page.
local function target(page, link)
  local path = (page:match "^(.*/)" or "") .. link
  repeat
    local count
    path, count = path:gsub("[^/]+/%.%./", "", 1)
  until count == 0
  return path
end

describe("the links in", function()
  local pages = { "README.md" }
  for _, folder in ipairs { "docs", "docs/guides", "docs/reference" } do
    for _, name in ipairs(files(folder, ".md")) do pages[#pages + 1] = folder .. "/" .. name end
  end
  for _, page in ipairs(pages) do
    it(page .. " lead somewhere", function()
      for link in contents(page):gsub("```.-```", ""):gmatch "%]%(([^%s)]+)%)" do
        if not link:find "^%a+:" then
          local path, anchor = link:match "^([^#]*)#?(.*)$"
          path = path == "" and page or target(page, path)
          assert(lfs.attributes(path), link)
          assert(anchor == "" or anchors[path][anchor], link)
        end
      end
    end)
  end
end)

describe("the Lua in", function()
  for _, path in ipairs { "README.md", "docs/blocks.md", "docs/data.md", "docs/seeing.md" } do
    it(path .. " runs", function()
      local found = 0
      for code in contents(path):gmatch "```lua\n(.-)```" do
        local run = assert(load("local print = function() end\n" .. code, "=" .. path))
        run()
        found = found + 1
      end
      assert.is_true(found > 0)
    end)
  end
end)
