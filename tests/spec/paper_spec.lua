-- The scripts of the paper's tables and figures, run as a user runs them, at a size that takes no time. Once is enough: no kernel
-- is in them that other specs don't have.

if os.getenv "OREPA_AGAIN" then return end

local cjson = require "cjson"
local process = require "tests.spec.process"

local folder

local function run(name, ...)
  return process.run({ process.root .. "/scripts/paper/" .. name .. ".lua", "--out", folder, ... })
end

local images = os.getenv "OREPA_STRESS" == "gc" and 16 or 256 -- each op takes milliseconds then
local small = { "--images", images, "--epochs", "1", "--seeds", "2", "--width", "0.0625", "--batch-size", "2", "--size", "64",
  "--threads", "1" }

local function made(name, ...)
  local words = { ... }
  table.move(small, 1, #small, #words + 1, words)
  local text, code = run(name, table.unpack(words))
  assert(code == 0, text)
  return text, cjson.decode(process.read(("%s/%s.json"):format(folder, name)))
end

local function exists(name)
  local file <close> = io.open(folder .. "/" .. name, "rb")
  return file ~= nil
end

local can_draw = os.execute "command -v gnuplot >/dev/null"

local function has_figure(name)
  for _, kind in ipairs { ".svg", ".png" } do assert.equal(can_draw and true or false, exists(name .. kind), name .. kind) end
end

local function count_lines(text, pattern)
  local count = 0
  for line in text:gmatch "[^\n]+" do count = count + (line:find(pattern) and 1 or 0) end
  return count
end

describe("the paper's", function()
  setup(function() folder = process.folder() end)
  teardown(function() process.remove(folder) end)

  for name, networks in pairs { table1 = 8, table3 = 5 } do
    it(name .. " has accuracies with deviations, data and a figure", function()
      local text, data = made(name)
      assert.equal(networks + 1, #data.rows)
      assert.equal(networks, count_lines(text, "^| resnet18, ") + count_lines(text, "^| repvgg_a0, "))
      assert(text:find("test accuracy", 1, true))
      has_figure(name)
      assert.equal(text:match "\n(| .*)$", process.read(("%s/%s.md"):format(folder, name)))
    end)
  end

  it("runs are kept: the same table again trains nothing, another size of it does", function()
    local before = process.read(folder .. "/runs.jsonl")
    local text = made "table3"
    assert.is_nil(text:find("seed 1", 1, true))
    assert.equal(before, process.read(folder .. "/runs.jsonl"))
  end)

  it("table2 has every component online and offline", function()
    local _, data = made("table2", "--seeds", "1")
    assert.equal(8, #data.rows)
    for k = 3, #data.rows do
      for column = 2, 3 do assert(data.rows[k][column]:find "%d" or data.rows[k][column]:find "diverged") end
    end
    has_figure "table2"
  end)

  for _, name in ipairs { "table4", "table5" } do
    it(name .. " has accuracy, memory and time", function()
      local _, data = made(name, "--seeds", "1")
      assert.equal(4, #data.rows)
      for k = 2, 4 do assert(tonumber(data.rows[k][3]) > 0 and tonumber(data.rows[k][4]) > 0) end
      local last = name == "table4" and "orepa" or "orepa-vgg"
      assert.equal(2, data.values[last].cost.batch_size)
      has_figure(name)
    end)
  end

  it("figure7 has a matrix for each block and kind of scaling", function()
    local _, data = made "figure7"
    assert.equal(3, #data.values)
    local matrix = data.values[1][2].matrix
    assert.equal(6, #matrix)
    for k = 1, 6 do assert.near(1, matrix[k][k], 1e-9) end
    has_figure "figure7"
  end)

  it("figure8 has costs online and offline, and what is saved", function()
    local text, data = made("figure8", "--more", "1")
    assert.equal(8, #data.rows)
    for k = 3, 8 do
      for column = 2, 5 do assert(tonumber(data.rows[k][column]) > 0) end
    end
    assert.equal(7, count_lines(text, "%%"))
    has_figure "figure8"
  end)

  it("page shows what there is", function()
    local text, code = run "page"
    assert(code == 0, text)
    local page = process.read(folder .. ".md")
    os.remove(folder .. ".md")
    for _, title in ipairs { "Table 1", "Table 2", "Table 3", "Fig. 7", "Fig. 8", "Table 4", "Table 5" } do
      assert(page:find("## " .. title, 1, true), title)
    end
  end)

  it("scripts refuse what they don't know", function()
    local text, code = run("table1", "--seed", "3")
    assert(code ~= 0 and text:find("unknown option '--seed'", 1, true), text)
    text, code = run("cost", "--variant", "orpa")
    assert(code ~= 0, text)
  end)
end)
