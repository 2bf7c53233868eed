-- Numbers as people read them, and tables of text.

local columns = require "orepa.columns"

describe("numbers", function()
  it("are grouped by thousands", function()
    for n, text in pairs { [0] = "0", [7] = "7", [999] = "999", [1000] = "1,000", [11689512] = "11,689,512",
      [-123456] = "-123,456" } do
      assert.equal(text, columns.grouped(n))
    end
  end)

  it("are short, with a unit", function()
    assert.equal("0", columns.short(0))
    assert.equal("999", columns.short(999))
    assert.equal("1 k", columns.short(1000))
    assert.equal("1.814 G", columns.short(1814073344))
    assert.equal("512 B", columns.bytes(512))
    assert.equal("1.5 KiB", columns.bytes(1536))
    assert.equal("-2.0 MiB", columns.bytes(-(2 << 20)))
  end)
end)

describe("a table", function()
  it("has columns as wide as their widest word", function()
    local rows = { { "name", "n", "x" }, { "ä", "10", "" }, { "long", "1", "y" } }
    assert.equal("name   n  x\nä     10\nlong   1  y", columns.text(rows, 1))
  end)
end)
