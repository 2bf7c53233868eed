-- scripts/bench/report.lua at sizes that take no time: what it keeps of each measurement, and the page and charts that it makes
-- of that. A script that speaks the peers' protocol stands in for PyTorch.

local cjson = require "cjson"
local orepa = require "orepa"
local process = require "tests.spec.process"

local folder, out
setup(function()
  folder = process.folder()
  out = folder .. "/performance"
end)
teardown(function() process.remove(folder) end)

local function report(options, environment)
  return process.run({ process.root .. "/scripts/bench/report.lua", "--out", out, table.unpack(options) }, folder, environment)
end

local function made(options, environment)
  local text, code = report(options, environment)
  assert(code == 0, text)
  return text, process.read(out .. ".md")
end

local function refuses(wanted, options)
  local text, code = report(options)
  assert(text:find(wanted, 1, true), text)
  assert.equal(1, code)
end

local function records()
  local list = {}
  for line in process.read(out .. "/results.jsonl"):gmatch "[^\n]+" do list[#list + 1] = cjson.decode(line) end
  return list
end

local function has(page, text)
  assert(page:find(text, 1, true), ("'%s' is not in:\n%s"):format(text, page))
end

local counts = { plain = 1, orepa = 1, overhead = 3, resnet50 = 2, branches = 2, bfloat16 = 2, deployed = 2, avx2 = 2,
  breakdown = 2, squeeze = 1, conv = 1, scaling = 1 }
local without_gnuplot = { PATH = "/nowhere" }

describe("report.lua", function()
  it("refuses to draw nothing, and parts that there are not", function()
    refuses("there are no results in " .. out, { "--draw" })
    refuses("there is no part 'speed'", { "--only", "squeeze,speed" })
    refuses("can not be used together", { "--only", "squeeze", "--draw" })
  end)

  it("keeps each command with what it gave", function()
    local text = made { "--quick" }
    local has_avx2, found = orepa.build_info():find("avx2", 1, true), {}
    for _, record in ipairs(records()) do
      found[record.part] = (found[record.part] or 0) + 1
      local result = record.results[1]
      assert.matches("^build/orepa scripts/bench/" .. result.benchmark .. "%.lua %-%-.* %-%-json$", record.command)
      assert.equal(record.part == "scaling" and 4 or 1, #record.results)
      assert.equal(1, result.options.rounds)
      assert.is_string(result.machine.cpu)
    end
    local wanted = {}
    for name, count in pairs(counts) do wanted[name] = (name ~= "avx2" or has_avx2) and count or nil end
    assert.same(wanted, found)
    if not has_avx2 then has(text, "avx2: left out, this processor has no avx2") end
  end)

  it("shows all of it on a page, with the machine", function()
    local _, page = made({ "--draw" }, without_gnuplot)
    for _, text in ipairs { "# Performance\n", "\n- cpu: ", "\n- features: x86-64", "\n- libraries: oneDNN ", "\n- date: 20",
      "## What OREPA costs beside the plain network", "--peers none:ours", "\n| none:ours | ", "| forward | backward | update |",
      "**resnet50 orepa, width 0.1, batch 2, 32 px, train, fp32**", "\n| OREPA 3x3, 6 -> 6, 8x8 | 4 | ",
      "| direct, ms | error | Winograd, ms | error |", "\n| 3x3, 12 -> 12, 4x4 | 3 | weight | ", "\n| orepa | 1 | 4 | " } do
      has(page, text)
    end
    assert.matches("\n| ours | [%d.]+ %([%d.]+ %.%.%. [%d.]+%) | 1%.00 %(1%.00 %.%.%. 1%.00%) | [%d.]+ | %d+ |\n", page)
    assert.is_nil(page:find("\n| 3x3 stride 2", 1, true))
  end)

  it("says that there are no charts without gnuplot", function()
    local text, page = made({ "--draw" }, without_gnuplot)
    has(text, "gnuplot is not installed")
    assert.is_nil(page:find(".svg", 1, true))
  end)

  it("draws a chart for each part", function()
    if not os.execute "command -v gnuplot >/dev/null" then return pending "gnuplot is not installed" end
    local text, page = made { "--draw" }
    assert.equal("", text)
    local charts = 0
    for path in page:gmatch "%]%(performance/([^)]+)%)" do
      local svg = process.read(out .. "/" .. path)
      assert(svg:find("<svg", 1, true) and svg:find("</svg>%s*$"), path)
      charts = charts + 1
    end
    assert.equal(orepa.build_info():find("avx2", 1, true) and 12 or 11, charts)
    for name, label in pairs { overhead = "none, batch 2: ours", squeeze = "8x8: convolution", conv = "4x4, data: Winograd",
      breakdown = "orepa: squeeze_backward", scaling = "orepa, 1 threads" } do
      assert(process.read(("%s/%s.svg"):format(out, name)):find(label, 1, true), label)
    end
  end)

  it("measures a part again in place of what there was, and keeps the rest", function()
    local function others()
      local list = {}
      for _, record in ipairs(records()) do list[#list + 1] = record.part ~= "squeeze" and record or nil end
      return list
    end
    local before, kept = records(), others()
    made { "--quick", "--only", "squeeze" }
    assert.equal(#before, #records())
    assert.equal("squeeze", records()[#before].part)
    assert.same(kept, others())
  end)

  it("runs peers, and keeps no path of their interpreter", function()
    process.write(folder .. "/python", [[#!/bin/sh
      echo '{"peer": "stand-in", "version": "7.5", "threads": 1}'
      while read -r line; do echo '{"seconds": [1000], "peak_memory": 1048576}'; done]])
    assert(os.execute("chmod +x " .. folder .. "/python"))
    local _, page = made({ "--quick", "--only", "deployed", "--python", folder .. "/python" })
    has(page, "\n- peers: stand-in 7.5\n")
    has(page, "--peers onnxruntime,channels-last --threads 1 ")
    has(page, " --python python3 --json\n")
    has(page, "\n| onnxruntime | 1000000.00 (1000000.00 ... 1000000.00) | ")
    has(page, "\n| channels-last | 1000000.00 ")
    assert.is_nil(process.read(out .. "/results.jsonl"):gsub("\\/", "/"):find(folder, 1, true))
  end)
end)
