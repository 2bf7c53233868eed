-- The benchmarks, run as a user runs them on sizes that take no time, and what they compute with. Peers are not run: a script
-- that speaks their protocol stands in.

local cjson = require "cjson"
local process = require "tests.spec.process"

local bench = process.root .. "/scripts/bench/"
local folder
local path = package.path

setup(function()
  folder = process.folder()
  package.path = bench .. "?.lua;" .. package.path
end)
teardown(function()
  package.path = path
  process.remove(folder)
end)

local tiny = { "--width", "0.1", "--size", "32", "--classes", "10", "--rounds", "1", "--steps", "1", "--threads", "1" }

-- `sizes` and environment variables may stand in for the usual ones.
local function run(script, options, sizes, environment)
  local arguments = { bench .. script }
  table.move(sizes or tiny, 1, #(sizes or tiny), 2, arguments)
  if script == "step.lua" then table.move({ "--matmul-size", "256" }, 1, 2, #arguments + 1, arguments) end
  table.move(options, 1, #options, #arguments + 1, arguments)
  return process.run(arguments, folder, environment)
end

local function text_of(script, options, environment)
  local text, code = run(script, options, nil, environment)
  assert(code == 0, text)
  return text
end

local function json_of(script, options, environment)
  options[#options + 1] = "--json"
  local lines = {}
  for line in text_of(script, options, environment):gmatch "[^\n]+" do lines[#lines + 1] = cjson.decode(line) end
  for _, line in ipairs(lines) do
    assert.equal(script:gsub("%.lua$", ""), line.benchmark)
    assert.equal(1, line.options.rounds)
    assert(#line.machine.cpu > 0 and line.machine.features:find("kernels", 1, true))
  end
  return table.unpack(lines)
end

local function refuses(wanted, script, options)
  local text, code = run(script, options)
  assert(text:find(wanted, 1, true), text)
  assert.equal(1, code)
end

local function is_summary(s)
  return s.lower <= s.median and s.median <= s.upper and s.lower > 0 and s.count >= 1
end

describe("measure", function()
  it("has medians and quartiles", function()
    local measure = require "measure"
    assert.same({ median = 3, lower = 2, upper = 4, count = 5 }, measure.summary { 5, 1, 4, 2, 3 })
    assert.same({ median = 2.5, lower = 1.75, upper = 3.25, count = 4 }, measure.summary { 4, 1, 3, 2 })
    assert.same({ median = 7, lower = 7, upper = 7, count = 1 }, measure.summary { 7 })
  end)

  it("reads lists", function()
    local measure = require "measure"
    assert.same({ "a", "3", "4", "5", "b" }, measure.list "a,3..5,b")
    assert.same({ 0.5, 2 }, measure.numbers "0.5,2")
    assert.same({ 1, 2, 8 }, measure.integers "1..2,8")
    for _, wrong in ipairs { "", "1,x", "1.5" } do
      local list, message = measure.integers(wrong)
      assert.is_nil(list)
      assert.is_string(message)
    end
  end)

  it("hands options on as words", function()
    local measure = require "measure"
    assert.same({ "--batch-size", 2, "--model", "m" }, measure.words({ model = "m", batch_size = 2 }, { "batch_size", "model" }))
    assert.same({ 1, 2, 3 }, measure.append({ 1 }, { 2, 3 }))
  end)

  it("counts what occurs more than once", function()
    local measure = require "measure"
    assert.same({ { text = "a", n = 1, count = 2 }, { text = "b", n = 2, count = 1 } },
      measure.distinct { { text = "a", n = 1 }, { text = "b", n = 2 }, { text = "a", n = 3 } })
  end)
end)

describe("workload", function()
  it("counts what is known of ResNet-18", function()
    local models, workload = require "orepa.models", require "workload"
    local layers = workload.layers(models.create("resnet18", { reparam = "none" }), 2, 224)
    local macs = 0
    for _, layer in ipairs(layers) do macs = macs + layer.macs end
    assert.equal(21, #layers)
    assert.equal(2 * 1814073344, macs)
    assert.equal(2 * macs, workload.operations(layers, "eval"))
    assert.equal(2 * (3 * macs - 2 * 118013952), workload.operations(layers, "train"))
    assert.equal("7x7 stride 2, 3 -> 64, 224x224", workload.geometry_text(layers[1]))
  end)

  it("counts groups, and other geometries by what they give", function()
    local orepa, workload = require "orepa", require "workload"
    local conv2d = orepa.F.conv2d
    local net = orepa.nn.Sequential(orepa.nn.Conv2d { in_channels = 4, out_channels = 6, kernel_size = { 3, 2 },
      stride = { 2, 1 }, dilation = { 1, 2 }, groups = 2 })
    local layers = workload.layers(net, 3, 9, 4)
    assert.equal(3 * 6 * 4 * 7 * 2 * 3 * 2, layers[1].macs)
    assert.equal("3x2 stride 2x1 dilation 1x2 groups 2, 4 -> 6, 9x9", workload.geometry_text(layers[1]))
    assert.equal(conv2d, orepa.F.conv2d)
    assert.has_error(function() workload.layers(net, 1, 1, 4) end)
    assert.equal(conv2d, orepa.F.conv2d)
  end)
end)

describe("step.lua", function()
  it("times training, evaluation and the deployed network", function()
    for _, mode in ipairs { "train", "eval", "deploy" } do
      local r = json_of("step.lua", { "--mode", mode, "--batch-size", "2" })
      assert(is_summary(r.step_ms))
      assert.equal(mode, r.options.mode)
      for _, name in ipairs { "gflop", "gflops", "fma_gflops", "matmul_gflops", "share_of_fma", "share_of_matmul",
        "peak_memory_mib", "peak_tensors_mib", "images_per_second" } do
        assert(r[name] > 0, name)
      end
      assert(r.peak_memory_mib > r.peak_tensors_mib)
      assert(r.collections_per_step >= 0 and r.collections_share >= 0)
    end
  end)

  it("shows it as text, with another network of ours beside it", function()
    local text = text_of("step.lua", { "--batch-size", "2", "--peers", "none:ours" })
    assert.matches("resnet18 orepa, width 0.1, batch 2, 32 px, train, fp32: 1 rounds of 1 steps", text)
    assert.matches("step +[%d.]+ %([%d.]+ %.%.%. [%d.]+%) ms, [%d.]+ images/s", text)
    assert.matches("GFLOP a step, [%d.]+ GFLOP/s: [%d.]+ of the FMA rate %(%d+%), [%d.]+ of a matrix product %(%d+%)", text)
    assert.matches("collections [%d.]+ a step", text)
    assert.matches("\nnone:ours +[%d.]+ ", text)
  end)

  it("times other kinds of blocks beside each other", function()
    local r = json_of("step.lua", { "--model", "repvgg_a0", "--reparam", "orepa_vgg", "--batch-size", "2", "--peers",
      "dbb:ours,none:ours" })
    for k, name in ipairs { "dbb:ours", "none:ours" } do
      assert.equal(name, r.peers[k].name)
      assert.near(r.gflop * 1e9, r.peers[k].about.operations, 1) -- they are those of the deployed network
    end
  end)

  it("asks peers in turn, and says how they compare", function()
    process.write(folder .. "/python", [[#!/bin/sh
      case "$1" in */pytorch_step.py) ;; *) exit 3 ;; esac
      [ "$2 $3" = "--variant eager" ] || exit 4
      case "$*" in *"--reparam dbb --model resnet18 "*) ;; *) exit 5 ;; esac
      echo '{"peer": "stand-in", "threads": 1}'
      while read -r warm_up steps; do
        [ "$warm_up $steps" = "3 1" ] && echo '{"seconds": [1000], "peak_memory": 1048576}'
      done]])
    assert(os.execute("chmod +x " .. folder .. "/python"))
    local r = json_of("step.lua", { "--batch-size", "2", "--python", folder .. "/python", "--peers", "dbb:eager" })
    local p = r.peers[1]
    assert.equal("dbb:eager", p.name)
    assert.equal("stand-in", p.about.peer)
    assert.same({ median = 1e6, lower = 1e6, upper = 1e6, count = 1 }, p.step_ms)
    assert.equal(1, p.peak_memory_mib)
    assert.near(1e6 / r.step_ms.median, p.times_ours.median, 1e-6 * p.times_ours.median)
  end)

  it("has peers of the same architectures", function()
    local script = ("import json, sys; sys.dont_write_bytecode = True; sys.path.insert(0, '%speers'); import architectures as a; "
      .. "print(json.dumps({'repvggs': a.REPVGGS, 'resnets': a.RESNETS, 'reparams': a.REPARAMS}))"):format(bench)
    local pipe <close> = assert(io.popen('python3 -c "' .. script .. '" 2>/dev/null'))
    local text = pipe:read "a"
    if text == "" then return pending "no python3 here" end
    local models, there = require "orepa.models", cjson.decode(text)
    local function same_stages(name, reparam, num_blocks, features)
      local net = models.create(name, { reparam = reparam, width = 0.25, classes = 10 })
      for k = 1, 4 do assert.equal(num_blocks[k], #net["stage" .. k], name) end
      assert.equal(features, net.linear.weight.shape[2], name)
      return net
    end
    for name, sizes in pairs(there.repvggs) do
      local net = same_stages(name, "none", sizes[1], math.floor(128 * sizes[2][4]))
      assert.equal(sizes[3], net.stage1[2].options.groups, name)
    end
    for name, sizes in pairs(there.resnets) do same_stages(name, "none", sizes[1], (sizes[2] and 4 or 1) * 128) end
    for _, reparam in ipairs(there.reparams) do
      same_stages("repvgg_a0", reparam, there.repvggs.repvgg_a0[1], 320)
    end
  end)

  it("says which peer ended", function()
    refuses("eager ended before it answered", "step.lua", { "--python", "false", "--peers", "eager" })
    refuses("the peer 'eager' needs --python", "step.lua", { "--peers", "eager" })
  end)

  it("limits itself to an instruction set", function()
    if not require("orepa").build_info():find("avx2", 1, true) then return pending "no AVX2 here" end
    local r = json_of("step.lua", { "--isa", "avx2", "--batch-size", "2" })
    assert.matches("kernels avx2$", r.machine.features)
  end)

  it("refuses what there is not", function()
    refuses("argument for option '--precision' must be one of 'bf16', 'fp32'", "step.lua", { "--precision", "fp16" })
    refuses("'--mode' must be one of", "step.lua", { "--mode", "dream" })
    refuses("'0' is not an integer of at least 1", "step.lua", { "--batch-size", "0" })
    refuses("no network is called 'resnet17'", "step.lua", { "--model", "resnet17" })
  end)
end)

describe("breakdown.lua", function()
  it("accounts for all of a step", function()
    local r = json_of("breakdown.lua", { "--batch-size", "2" })
    local sum, found = 0, {}
    for _, row in ipairs(r.rows) do
      sum = sum + row.total_ms
      found[row.name] = row
      if row.name:find "^conv_" then assert(row.gflops > 0, row.name) end
    end
    assert.near(r.step.total_ms, sum, 1e-6 * sum)
    assert.equal(13, found["conv_forward 3x3"].calls)
    assert.equal(13, found["conv_backward_data 3x3"].calls)
    assert.equal(1, found["conv_backward_weight 7x7 stride 2"].calls)
    assert(found.squeeze.ms.forward > 0 and found.squeeze_backward.ms.backward > 0 and found.sgd.ms.update > 0)
    assert.is_not_nil(found["Lua and engine"])
  end)

  it("shows it as text, convolution by convolution if asked", function()
    local text = text_of("breakdown.lua", { "--mode", "deploy", "--batch-size", "2", "--each" })
    assert.matches("\nconv_forward 3x3 stride 2, 6 %-> 12, 8x8 ", text)
    assert.matches("\nLua and engine ", text)
    assert.matches("\nstep +[%d.]+ +[%d.]+ +100.0\n", text)
  end)
end)

describe("squeeze.lua", function()
  it("compares squeezing with the convolution", function()
    for model, kind in pairs { resnet18 = "OREPA 3x3", resnet50 = "OREPA1x1 1x1" } do
      local r, seen = json_of("squeeze.lua", { "--model", model, "--batch-size", "2" }), false
      for _, row in ipairs(r.rows) do
        for _, side in ipairs { "squeeze_forward", "squeeze_backward", "conv_forward", "conv_backward" } do
          assert(is_summary(row[side].ms) and row[side].gflops > 0)
        end
        assert(row.squeeze_of_conv > 0)
        seen = seen or row.block:find(kind, 1, true)
      end
      assert(seen)
    end
    assert.matches("all blocks: squeeze [%d.]+ forward", text_of("squeeze.lua", { "--batch-size", "2" }))
    assert.matches("no block of this network squeezes", text_of("squeeze.lua", { "--reparam", "none" }))
  end)
end)

describe("conv.lua", function()
  it("times each convolution in each way and direction, and takes its error", function()
    local r = json_of("conv.lua", { "--batch-size", "2", "--evict", "1", "--error-macs", "1" })
    local directions = {}
    for _, row in ipairs(r.rows) do
      assert(is_summary(row.ms) and row.gflops > 0)
      assert(row.error > 0 and row.error < 1e-4, row.convolution .. " " .. row.error)
      directions[row.way .. " " .. row.direction] = (directions[row.way .. " " .. row.direction] or 0) + row.count
    end
    for _, way in ipairs { "direct", "winograd" } do
      for _, direction in ipairs { "forward", "data", "weight" } do assert.equal(20, directions[way .. " " .. direction]) end
    end
  end)

  it("shows it as text, without errors if asked", function()
    local text = text_of("conv.lua", { "--batch-size", "1", "--evict", "0", "--error-macs", "0", "--ways", "direct" })
    assert.matches("\n7x7 stride 2, 3 %-> 6, 32x32 +1 +direct +forward +[%d.]+ +[%d.]+ ... [%d.]+ +[%d.e-]+\n", text)
    assert.matches("all convolutions direct weight: [%d.]+ ms", text)
  end)
end)

describe("scaling.lua", function()
  local function sizes(more)
    local options = { "--size", "32", "--classes", "10", "--rounds", "1", "--steps", "1", "--warm-up", "0" }
    return table.move(more, 1, #more, #options + 1, options)
  end

  it("runs every combination", function()
    local text, code = run("scaling.lua", sizes { "--width", "0.1,0.2", "--reparam", "none,orepa", "--batch-size", "2..3",
      "--threads", "1", "--json" }, {})
    assert(code == 0, text)
    local seen = {}
    for line in text:gmatch "[^\n]+" do
      local r = cjson.decode(line)
      assert(is_summary(r.step_ms) and r.gflops > 0 and r.peak_memory_mib > 0)
      seen[#seen + 1] = ("%s %g %d"):format(r.options.reparam, r.options.width, r.options.batch_size)
    end
    assert.same({ "none 0.1 2", "none 0.1 3", "none 0.2 2", "none 0.2 3", "orepa 0.1 2", "orepa 0.1 3", "orepa 0.2 2",
      "orepa 0.2 3" }, seen)
  end)

  it("shows a table, and refuses wrong lists", function()
    local text, code = run("scaling.lua", sizes { "--width", "0.1", "--batch-size", "2", "--threads", "1" }, {})
    assert(code == 0, text)
    assert.matches("\nresnet18 +orepa +0.1 +32 +2 +1 +[%d.]+ ", text)
    refuses("'1.5' is not an integer", "scaling.lua", { "--batch-size", "1.5" })
  end)
end)

-- Wherever the processor would rather not, bfloat16 is forced.
describe("--precision bf16", function()
  local forced = { OREPA_BFLOAT16 = "1" }

  it("is that of step.lua and breakdown.lua", function()
    for _, mode in ipairs { "train", "deploy" } do
      local r = json_of("step.lua", { "--precision", "bf16", "--mode", mode, "--batch-size", "2" }, forced)
      assert.equal("bfloat16", r.dtype)
      assert(is_summary(r.step_ms) and r.matmul_gflops > 0)
    end
    assert.equal("float32", json_of("step.lua", { "--batch-size", "2" }, forced).dtype)
    local found = {}
    for _, row in ipairs(json_of("breakdown.lua", { "--precision", "bf16", "--batch-size", "2" }, forced).rows) do
      found[row.name] = row
    end
    assert.equal(13, found["conv_backward_weight 3x3"].calls)
    assert(found["copy (copy)"].ms.forward > 0)
  end)

  it("is refused by processors in one line", function()
    local text = text_of("step.lua", { "--precision", "bf16", "--batch-size", "2", "--peers", "none:ours" },
      { OREPA_BFLOAT16 = "0" })
    assert.matches("train, bf16: 1 rounds of 1 steps", text)
    assert.equal(2, select(2, text:gsub("orepa: autocast computes in float32", ""))) -- for each process
  end)

  it("is that of conv.lua, which shows what rounding costs", function()
    local r = json_of("conv.lua", { "--precision", "bf16", "--batch-size", "2", "--evict", "0", "--error-macs", "1" }, forced)
    for _, row in ipairs(r.rows) do
      assert(is_summary(row.ms) and row.gflops > 0)
      assert(row.error > 1e-4 and row.error < 2e-2, row.convolution .. " " .. row.error)
    end
  end)

  it("is that of squeeze.lua and scaling.lua", function()
    local r = json_of("squeeze.lua", { "--precision", "bf16", "--batch-size", "2" }, forced)
    assert.equal("bf16", r.options.precision)
    for _, row in ipairs(r.rows) do assert(is_summary(row.squeeze_forward.ms) and is_summary(row.conv_backward.ms)) end
    local text = text_of("scaling.lua", { "--precision", "bf16", "--batch-size", "2,3" }, forced)
    assert.matches("\nresnet18 +orepa +0.1 +32 +2 +1 +[%d.]+ ", text)
  end)
end)
