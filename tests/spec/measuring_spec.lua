-- What the engine says of its own time: rates, timings of the device's entries, collections.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"

describe("fma_rate", function()
  it("is a rate", function()
    local rate = orepa.fma_rate(5)
    assert(rate > 1e8 and rate < 1e16, rate)
  end)

  it("takes 1 to 1000 milliseconds", function()
    for _, wrong in ipairs { 0, -1, 1001, 1 << 32 } do fails("fma_rate: .*milliseconds", orepa.fma_rate, wrong) end
    fails("fma_rate: an integer expected", orepa.fma_rate)
  end)
end)

describe("timings", function()
  local function by_entry(rows)
    local found = {}
    for _, row in ipairs(rows) do
      local key = row.entry .. "|" .. row.op .. "|" .. row.detail
      assert.is_nil(found[key])
      found[key] = row
    end
    return found
  end

  after_each(function() orepa.timings(false) end)

  it("are empty until they are asked for", function()
    orepa.timings(false)
    orepa.ones(3):sum()
    assert.same({}, orepa.timings(true))
  end)

  it("count calls by op, entry and a convolution's geometry", function()
    local w = orepa.rand(8, 2, 3, 3):requires_grad_()
    local x = orepa.rand(2, 4, 10, 8):requires_grad_()
    orepa.timings(true)
    local y = orepa.F.conv2d(x, w, { stride = 2, padding = 1, groups = 2 })
    orepa.F.conv2d(x, w, { stride = { 1, 2 }, dilation = { 2, 2 }, groups = 2 })
    orepa.F.conv2d(x, w, { stride = { 1, 2 }, dilation = { 2, 2 }, groups = 2 })
    y:backward(y:detach())
    local found = by_entry(orepa.timings(false))
    local once = found["conv_forward|conv2d|3x3 stride 2 groups 2, 4 -> 8, 10x8"]
    assert.equal(1, once.calls)
    assert(once.seconds > 0 and once.seconds < 60)
    assert.equal(2, found["conv_forward|conv2d|3x3 stride 1x2 dilation 2 groups 2, 4 -> 8, 10x8"].calls)
    assert.equal(1, found["conv_backward_data|conv2d's data gradient|3x3 stride 2 groups 2, 4 -> 8, 10x8"].calls)
    assert.equal(1, found["conv_backward_weight|conv2d's weight gradient|3x3 stride 2 groups 2, 4 -> 8, 10x8"].calls)
  end)

  it("start again when they are asked for again", function()
    orepa.timings(true)
    orepa.F.relu(orepa.ones(3))
    assert.equal(1, by_entry(orepa.timings(true))["elementwise|relu|"].calls)
    orepa.F.relu(orepa.ones(3))
    orepa.F.relu(orepa.ones(3))
    assert.equal(2, by_entry(orepa.timings(false))["elementwise|relu|"].calls)
    assert.same({}, orepa.timings(false))
  end)

  it("keep many rows apart", function()
    local x = orepa.rand(1, 1, 200, 1)
    orepa.timings(true)
    for k = 1, 200 do orepa.F.conv2d(x:slice(3, 1, k), orepa.ones(1, 1, 1, 1)) end
    local found = by_entry(orepa.timings(false))
    for k = 1, 200 do assert.equal(1, found[("conv_forward|conv2d|1x1, 1 -> 1, %dx1"):format(k)].calls) end
  end)

  it("want a boolean", function()
    fails("timings: true or false expected, got no value", orepa.timings)
    fails("timings: true or false expected, got number", orepa.timings, 1)
  end)
end)

describe("memory", function()
  it("tells how long Lua's collections took", function()
    local before = orepa.memory()
    for _ = 1, 400 do orepa.zeros(1 << 20) end
    local after = orepa.memory()
    assert(after.collections > before.collections)
    assert(after.collection_seconds > before.collection_seconds)
  end)

  it("collects the less often the larger Lua's heap is, which a collection walks", function()
    local text = process.run_text([[
      local orepa = require "orepa"
      local function collections(megabytes)
        collectgarbage()
        local before = orepa.memory().collections
        for _ = 1, megabytes do orepa.zeros(1 << 18):add(1) end -- two maps of a megabyte
        return orepa.memory().collections - before
      end
      local few = collections(100)
      heap = {}
      for k = 1, 1 << 19 do heap[k] = { k } end -- some 40 MB
      print(few, collections(100))]], nil, { OREPA_STRESS = "" })
    local few, fewer = text:match "^(%d+)\t(%d+)\n$"
    assert(fewer, text)
    assert(tonumber(few) >= 4 and tonumber(fewer) >= 1 and 2 * tonumber(fewer) < tonumber(few), text)
  end)
end)
