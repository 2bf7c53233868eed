-- docs/reference.md is what scripts/reference.lua prints, and the README's and the manual's Lua runs.

local program = os.getenv "OREPA_PROGRAM" or "build/orepa"

describe("docs/reference.md", function()
  it("is up to date", function()
    local pipe = assert(io.popen(("'%s' scripts/reference.lua"):format(program)))
    local file <close> = assert(io.open "docs/reference.md")
    assert.equal(pipe:read "a", file:read "a")
    assert(pipe:close())
  end)
end)

describe("the Lua in", function()
  for _, path in ipairs { "README.md", "docs/blocks.md", "docs/data.md", "docs/seeing.md" } do
    it(path .. " runs", function()
      local file <close> = assert(io.open(path))
      local found = 0
      for code in file:read("a"):gmatch "```lua\n(.-)```" do
        local run = assert(load("local print = function() end\n" .. code, "=" .. path))
        run()
        found = found + 1
      end
      assert.is_true(found > 0)
    end)
  end
end)
