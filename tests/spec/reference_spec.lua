-- docs/reference.md is what scripts/reference.lua prints.

local program = os.getenv "OREPA_PROGRAM" or "build/orepa"

describe("docs/reference.md", function()
  it("is up to date", function()
    local pipe <close> = assert(io.popen(("'%s' scripts/reference.lua"):format(program)))
    local file <close> = assert(io.open "docs/reference.md")
    assert.equal(pipe:read "a", file:read "a")
  end)
end)
