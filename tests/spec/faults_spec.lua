-- The list of faults that scripts/mutate plants: each has its place in the tree as it is, and each derivative has one.

local process = require "tests.spec.process"

local root = process.root .. "/"
local faults = dofile(root .. "scripts/faults.lua")

describe("each fault", function()
  it("stands in its file once, and changes it", function()
    assert(#faults >= 40)
    for _, fault in ipairs(faults) do
      local text, first, last = faults.place(fault, root) -- an error unless it stands there, and once
      assert.equal(fault[3], text:sub(first, last))
      assert(fault[3] ~= fault[4], fault[1])
    end
  end)

  it("is for a test that is there", function()
    for _, fault in ipairs(faults) do
      local test = fault[5]
      process.read(root .. (test:find "_spec$" and "tests/spec/" .. test .. ".lua" or "tests/core/" .. test .. ".c"))
    end
  end)
end)

describe("each element-wise function that has a derivative", function()
  it("has a fault in it", function()
    local planted, count = {}, 0
    for _, fault in ipairs(faults) do planted[fault[1]:match "^[%w_]+"] = true end
    local rows = process.read(root .. "core/elementwise.h"):match "#define ELEMENTWISE_ROWS%(ROW%)(.-)\n\n"
    for row in rows:gsub("ROW%(", "\0"):gmatch "%z[^%z]*" do
      local name, _, without = row:match "^%z([%w_]+)", row:gsub("NO_GRADIENT", "")
      if without < 3 then
        count = count + 1
        assert(planted[name], name .. " has none")
      end
    end
    assert(count > 30)
  end)
end)
