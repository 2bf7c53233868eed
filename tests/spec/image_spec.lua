-- Pictures: the files in tests/fuzz/seeds/image against what Pillow and the definition of PNG say (tests/golden/images/make.py
-- wrote both), and what is written read again.

local cjson = require "cjson"
local lfs = require "lfs"
local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"

local image = orepa.image
local folder = "tests/fuzz/seeds/image/"
local expected = cjson.decode(process.read "tests/golden/images/expected.json")

local function flat(t) return t:reshape(-1):tolist() end

-- Numbers of hexadecimal text, `digits` of it each.
local function numbers(hex, digits)
  local list = {}
  for text in hex:gmatch(("%x"):rep(digits)) do list[#list + 1] = tonumber(text, 16) end
  return list
end

local function check(wanted, t)
  assert.same({ "uint8", wanted.shape }, { t.dtype, t.shape })
  assert.same(numbers(wanted.bytes, 2), flat(t))
end

-- The same bits as numbers / most, rounded once.
local function check_floats(wanted, digits, most, t)
  assert.same({ "float32", wanted.shape }, { t.dtype, t.shape })
  local list = numbers(wanted.bytes, digits)
  for k, v in ipairs(list) do list[k] = string.unpack("f", string.pack("f", v / most)) end
  assert.same(list, flat(t))
end

local function sizes(text)
  return { math.tointeger(tonumber(text:match "^%d+")), math.tointeger(tonumber(text:match "%d+$")) }
end

describe("a picture", function()
  local count = 0
  for name, wanted in pairs(expected) do
    if wanted.default then
      count = count + 1
      it("reads as it should: " .. name, function()
        local path = folder .. name
        check(wanted.default, image.load(path))
        check(wanted.default, image.decode(process.read(path)))
        for _, channels in ipairs { 1, 3, 4 } do
          local variant = wanted[tostring(channels)]
          if variant then check(variant, image.load(path, { channels = channels })) end
        end
        if wanted.stored then check(wanted.stored, image.load(path, { orientation = false })) end
        if wanted.indices then check(wanted.indices, image.load(path, { indices = true })) end
        if wanted.wide then
          check_floats(wanted.wide, 4, 65535, image.load(path, { channels = 4, dtype = "float32" }))
        else
          check_floats(wanted.default, 2, 255, image.load(path, { dtype = "float32" }))
        end
      end)
    end
  end

  it("is of every kind", function() assert.is_true(count >= 40) end)

  it("comes smaller where that is enough", function()
    local path, wanted = folder .. "large.jpg", expected["large.jpg"]
    for text, part in pairs { ["32x17"] = "part2", ["33x17"] = "part2", ["16x8"] = "part4", ["17x9"] = "part4", ["9x5"] = "part8",
      ["1x1"] = "part8", ["34x17"] = "default", ["33x18"] = "default", ["500x500"] = "default", ["0x0"] = "default" } do
      check(wanted[part], image.load(path, { at_least = sizes(text) }))
    end
    assert.same({ 3, 9, 5 }, image.load(path, { at_least = 5 }).shape)
  end)

  it("is turned before what is enough is asked", function()
    local path = folder .. "turned6.jpg" -- stored 7 x 11
    assert.same({ 1, 6, 4 }, image.load(path, { at_least = { 6, 4 } }).shape)
    assert.same({ 1, 11, 7 }, image.load(path, { at_least = { 4, 6 } }).shape)
    assert.same({ 1, 4, 6 }, image.load(path, { at_least = { 4, 6 }, orientation = false }).shape)
  end)

  it("is refused with its path and what is wrong", function()
    local function refused(name, pattern) fails(folder .. name .. ": " .. pattern, image.load, folder .. name) end
    refused("cut.png", "is cut off: it ends after 148 bytes, before its picture does")
    refused("claim.png", "claims 2147483647 x 2147483647 pixels, more than its %d+ bytes can hold")
    refused("claim_arithmetic.jpg", "claims 60000 x 60000 pixels, more than its %d+ bytes can hold")
    refused("checksum.png", "is damaged, near byte 162: IDAT: incorrect data check")
    refused("cut.jpg", "is cut off: it ends after 731 bytes")
    refused("cut_progressive.jpg", "is cut off: it ends after 708 bytes")
    refused("two_components.jpg", "has 2 components, of which nothing says what colours they are")
    refused("claim_exif.png", "is cut off")
    refused("picture.gif", "is a GIF picture, neither PNG nor JPEG")
    refused("none.png", "cannot be opened: No such file")
    fails("is a folder, not a file", image.load, folder)
    fails("is empty, neither", image.decode, "")
    fails("neither PNG nor JPEG: it starts with 61 62 63 64", image.decode, "abcde")
    fails("HTML", image.decode, "<html>")
    fails("WebP", image.decode, "RIFF1234WEBPVP8 ")
    fails("its pixels are colours, not indices of a palette", image.load, folder .. "rgb.png", { indices = true })
    fails("not indices of a palette", image.load, folder .. "gray.jpg", { indices = true })
    fails("indices of a palette are uint8", image.load, folder .. "palette4.png", { indices = true, dtype = "float32" })
  end)

  it("is refused where it is cut anywhere", function()
    for _, name in ipairs { "interlaced.png", "palette8.png", "turned_after.png" } do
      local bytes = process.read(folder .. name)
      for size = 0, #bytes - 1 do fails("", image.decode, bytes:sub(1, size)) end
    end
    local bytes = process.read(folder .. "progressive.jpg")
    for size = 0, #bytes - 1 do fails("", image.decode, bytes:sub(1, size)) end
  end)

  it("may lack the end marker of a JPEG, but no pixel", function()
    local bytes = process.read(folder .. "420.jpg")
    check(expected["420.jpg"].default, image.decode(bytes:sub(1, -3)))
    for size = 0, #bytes - 8 do fails("cut off\n?", image.decode, bytes:sub(1, math.max(size, 20))) end
  end)

  it("stays below the limit of memory, and leaves none", function()
    collectgarbage() -- what other specs left would make room
    collectgarbage()
    local path, live = folder .. "large.jpg", orepa.memory().live
    orepa.set_memory_limit(live + 4000)
    finally(function() orepa.set_memory_limit(nil) end)
    fails(folder .. "large.jpg: out of memory", image.load, path)
    assert.equal(live, orepa.memory().live)
  end)

  it("knows its options", function()
    local path = folder .. "rgb.png"
    fails("image.load: channels is 2; there are 1, 3 and 4", image.load, path, { channels = 2 })
    fails("channels is 0", image.load, path, { channels = 0 })
    fails("'dtype': 'int64'; a picture is read as uint8 or float32", image.load, path, { dtype = "int64" })
    fails("unknown option 'size'", image.load, path, { size = 3 })
    fails("option 'orientation': true or false expected", image.load, path, { orientation = 1 })
    fails("at least %-1 x 2 pixels", image.load, path, { at_least = { -1, 2 } })
    fails("string expected", image.load, {})
  end)
end)

describe("a picture that is written", function()
  local place
  setup(function() place = process.folder() end)
  teardown(function() process.remove(place) end)

  local function bytes_like(...) return (orepa.rand(...) * 255.99):to "uint8" end

  it("keeps every bit as PNG", function()
    for _, shape in ipairs { { 5, 7 }, { 1, 5, 7 }, { 3, 5, 7 }, { 4, 1, 1 } } do
      local t, path = bytes_like(shape), place .. "/a.png"
      image.save(path, t, { compression = 9 })
      local back = image.load(path, { channels = #shape == 3 and shape[1] or 1 })
      assert.same(flat(t), flat(back))
      assert.same(flat(t), flat(image.decode(image.encode(t), { channels = back.shape[1] })))
    end
  end)

  it("may be a view", function()
    local t = bytes_like(2, 6, 8, 3):permute(1, 4, 2, 3)[2]:slice(2, 1, 6, 2)
    assert.same(flat(t), flat(image.decode(image.encode(t))))
  end)

  it("may be of floats, bools, any device, and ask for gradients", function()
    local t = orepa.tensor { { -1, 0, 0.5 / 255, 0.49 / 255 }, { 0.5, 1, 7, 0 / 0 } }
    local wanted = { 0, 0, 1, 0, 128, 255, 255, 0 }
    assert.same(wanted, flat(image.decode(image.encode(t))))
    assert.same(wanted, flat(image.decode(image.encode(t:to "ref"))))
    assert.same(wanted, flat(image.decode(image.encode(t:clone():requires_grad_()))))
    assert.same({ 0, 255, 128 }, flat(image.decode(image.encode(orepa.tensor({ { 0, 1, 0.5 } }, { dtype = "bfloat16" })))))
    assert.same({ 0, 255 }, flat(image.decode(image.encode(orepa.tensor { { false, true } }))))
  end)

  it("is close as JPEG, and closer with more quality", function()
    local original = image.load(folder .. "large.jpg")
    local function distance(quality)
      local path = place .. "/a.JPEG"
      image.save(path, original, { quality = quality })
      assert.equal("\xff\xd8\xff", process.read(path):sub(1, 3))
      return (image.load(path):to "float32" - original:to "float32"):abs():mean():item()
    end
    local best, middle, worst = distance(100), distance(nil), distance(5)
    assert.is_true(best < middle and middle < worst and worst < 40, table.concat({ best, middle, worst }, " "))
  end)

  it("is a PNG or a JPEG by its name, or by what is asked", function()
    image.save(place .. "/b.PNG", orepa.ones(2, 2))
    image.save(place .. "/b.jpg", orepa.ones(2, 2))
    image.save(place .. "/b.data", orepa.ones(2, 2), { format = "png" })
    assert.equal("\x89PNG", process.read(place .. "/b.PNG"):sub(1, 4))
    assert.equal("\xff\xd8", process.read(place .. "/b.jpg"):sub(1, 2))
    assert.equal("\x89PNG", process.read(place .. "/b.data"):sub(1, 4))
    fails("b.data: a picture's name ends in .png", image.save, place .. "/b.data", orepa.ones(2, 2))
  end)

  it("is refused before anything is written", function()
    local path = place .. "/c.png"
    process.write(path, "old")
    fails("c.png: int64 2x2 is no picture", image.save, path, orepa.zeros({ 2, 2 }, { dtype = "int64" }))
    fails("float32 2x5x5 is no picture", image.save, path, orepa.zeros(2, 5, 5))
    fails("float32 1x3x5x5 is no picture", image.save, path, orepa.zeros(1, 3, 5, 5))
    fails("float32 3x0x5 is no picture", image.save, path, orepa.zeros(3, 0, 5))
    fails("a PNG has no quality", image.save, path, orepa.ones(2, 2), { quality = 3 })
    fails("'quality': 101; it goes from 1 to 100", image.save, path, orepa.ones(2, 2), { quality = 101 })
    fails("'format': 'gif'; there are png and jpeg", image.save, path, orepa.ones(2, 2), { format = "gif" })
    fails("has an opacity, which JPEG cannot keep", image.save, place .. "/c.jpg", orepa.ones(4, 2, 2))
    fails("a JPEG has a quality instead", image.save, place .. "/c.jpg", orepa.ones(2, 2), { compression = 3 })
    fails("65501 pixels, at most 65500", image.save, place .. "/c.jpg", orepa.ones(1, 65501))
    fails("no file can be made in", image.save, place .. "/none/c.png", orepa.ones(2, 2))
    assert.equal("old", process.read(path))
    for name in lfs.dir(place) do assert.is_nil(name:find "tmp$") end
    assert.is_nil(lfs.attributes(place .. "/c.jpg"))
  end)
end)
