-- Each distinct convolution of a network on its own, in its three directions: milliseconds, operations a second (those of the
-- direct convolution), and the error against float64, relative to the largest magnitude. Each way of computing that can be
-- forced with OREPA_CONV runs in a process of its own; they take turns, convolution by convolution.
--
--     build/orepa scripts/bench/conv.lua --model resnet18 --batch-size 16 --ways direct,winograd
--
-- A convolution that is repeated finds its kernel in the cache, and in a step it does not: between two runs other memory is
-- written (--evict). Errors are those of one image, of a part that takes at most --error-macs million multiply-adds; with
-- --precision bf16 they count what rounding the map and the kernel to bfloat16 does.

local argparse = require "argparse"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"
local workload = require "workload"
local orepa = require "orepa"
local F = orepa.F

local parser = argparse("conv.lua", "Times the convolutions of a network.")
workload.add_options(parser, { reparam = "none" })
parser:option("--ways", "values of OREPA_CONV, a list", "direct,winograd"):convert(measure.list)
parser:option("--steps", "runs of each convolution in a round", 5):convert(measure.at_least(1))
parser:option("--evict", "MiB that are written between two runs", 32):convert(measure.at_least(0))
parser:option("--error-macs", "million multiply-adds that an error may take; 0: no errors", 30):convert(measure.at_least(0))
parser:flag("--serve", "answer lines of a convolution's number and runs, or 0 for errors")
local args = parser:parse()

local compute = workload.precisions[args.precision]
local dtype = workload.dtype(compute) -- of maps and their gradients
local directions = { { "forward", "conv_forward" }, { "data", "conv_backward_data" }, { "weight", "conv_backward_weight" } }

-- The network's distinct convolutions in order, with how often each occurs.
local function distinct()
  local list = {}
  for _, layer in ipairs(workload.layers(workload.network(args), args.batch_size, args.size)) do
    if layer.kind == "conv" then
      layer.text = workload.geometry_text(layer)
      list[#list + 1] = layer
    end
  end
  return measure.distinct(list)
end

-- ---- time: what the device's entries take ----

local function evict()
  if args.evict > 0 then orepa.zeros(args.evict << 18):release() end
end

local function with_gradient(t)
  return t:detach():requires_grad_()
end

local function run_once(x, w, geometry, dy)
  local input, kernel = with_gradient(x), with_gradient(w)
  orepa.timings(true)
  local y <close> = compute(F.conv2d, input, kernel, geometry)
  local forward = orepa.timings(false)
  evict()
  orepa.timings(true)
  y:backward(dy)
  local seconds = {}
  for _, rows in ipairs { forward, orepa.timings(false) } do
    for _, row in ipairs(rows) do seconds[row.entry] = row.seconds end
  end
  return seconds
end

local function time_layer(layer, runs)
  local x, w, dy = orepa.randn(layer.input):to(dtype), orepa.randn(layer.kernel), orepa.randn(layer.output):to(dtype)
  local answer = { forward = {}, data = {}, weight = {} }
  for run = 0, runs do -- the first warms up
    evict()
    local seconds = run_once(x, w, layer.geometry, dy)
    for _, d in ipairs(directions) do answer[d[1]][run] = seconds[d[2]] end
  end
  for _, d in ipairs(directions) do answer[d[1]][0] = nil end
  return answer
end

-- ---- error against the device ref in float64 ----

-- One image, cut to a size at which a direction takes few enough multiply-adds.
local function small_input(layer)
  local kernel, most = layer.kernel, args.error_macs * 1e6
  local height, width = layer.input[3], layer.input[4]
  local function macs() -- before padding and stride, which change little
    return height * width * kernel[1] * kernel[2] * kernel[3] * kernel[4] * layer.macs_share
  end
  while macs() > most and height > kernel[3] and width > kernel[4] do height, width = height - 1, width - 1 end
  return { 1, layer.input[2], height, width }
end

local function results(x, w, convolve, dy)
  local input, kernel = with_gradient(x), with_gradient(w)
  local y = convolve(input, kernel)
  dy = dy or orepa.randn(y.shape):to(y.dtype)
  y:backward(dy)
  return { forward = y:detach(), data = input.grad, weight = kernel.grad }, dy
end

local function to_ref(t)
  return t:to("ref"):to "float64"
end

local function errors_of(layer)
  layer.macs_share = layer.output[3] * layer.output[4] / (layer.input[3] * layer.input[4])
  local x, w = orepa.randn(small_input(layer)), orepa.randn(layer.kernel)
  local got, dy = results(x, w, function(i, k) return compute(F.conv2d, i, k, layer.geometry) end)
  local wanted = results(to_ref(x), to_ref(w), function(i, k) return F.conv2d(i, k, layer.geometry) end, to_ref(dy))
  local errors = {}
  for _, d in ipairs(directions) do
    local exact = wanted[d[1]]
    errors[d[1]] = ((to_ref(got[d[1]]) - exact):abs():max() / exact:abs():max()):item()
  end
  return errors
end

-- ---- a process for each way ----

local function serve()
  local layers = distinct()
  orepa.manual_seed(1)
  measure.serve({ convolutions = #layers }, function(k, runs)
    return runs > 0 and time_layer(layers[k], runs) or errors_of(layers[k])
  end)
end

local handed_on = { "model", "reparam", "batch_size", "size", "width", "classes", "threads", "precision", "evict", "error_macs" }

local function start(way)
  local words = { measure.program(), arg[0], "--serve", table.unpack(measure.words(args, handed_on)) }
  return measure.start("OREPA_CONV=" .. way, measure.command(words, { OREPA_CONV = way }))
end

-- ---- rounds ----

local function run_rounds(layers, ways)
  for _ = 1, args.rounds do
    for k, layer in ipairs(layers) do
      for _, way in ipairs(ways) do
        local answer = way.process:ask(k, args.steps)
        for _, d in ipairs(directions) do
          measure.append(layer.seconds[way.name][d[1]], answer[d[1]])
        end
      end
    end
  end
end

local function measured(layers, ways)
  local rows = {}
  for k, layer in ipairs(layers) do
    for _, way in ipairs(ways) do
      local errors = args.error_macs > 0 and way.process:ask(k, 0)
      for _, d in ipairs(directions) do
        local seconds = measure.summary(layer.seconds[way.name][d[1]])
        rows[#rows + 1] = { convolution = layer.text, count = layer.count, way = way.name, direction = d[1],
          ms = measure.scaled(seconds, 1e3), gflops = 2 * layer.macs / seconds.median / 1e9,
          error = errors and errors[d[1]] or nil }
      end
    end
  end
  return rows
end

-- ---- output ----

local function show(rows)
  print(("%s, %d threads"):format(workload.title(args), args.threads))
  local lines = { { "convolution", "count", "way", "direction", "ms", "quartiles", "GFLOP/s", "error" } }
  local totals = {}
  for _, row in ipairs(rows) do
    lines[#lines + 1] = { row.convolution, tostring(row.count), row.way, row.direction, ("%.3f"):format(row.ms.median),
      ("%.3f ... %.3f"):format(row.ms.lower, row.ms.upper), ("%.4g"):format(row.gflops),
      row.error and ("%.1e"):format(row.error) or "" }
    local key = row.way .. ", " .. row.direction
    totals[key] = (totals[key] or 0) + row.count * row.ms.median
  end
  measure.print_table(lines)
  print()
  for _, way in ipairs(args.ways) do
    for _, d in ipairs(directions) do
      print(("all convolutions %s %s: %.3f ms"):format(way, d[1], totals[way .. ", " .. d[1]]))
    end
  end
end

orepa.set_threads(args.threads)
if args.serve then return serve() end
local layers, ways = distinct(), {}
for k, name in ipairs(args.ways) do
  ways[k] = { name = name, process = start(name) }
  for _, layer in ipairs(layers) do
    layer.seconds = layer.seconds or {}
    layer.seconds[name] = { forward = {}, data = {}, weight = {} }
  end
end
run_rounds(layers, ways)
local rows = measured(layers, ways)
for _, way in ipairs(ways) do way.process:close() end
if args.json then measure.print_json("conv", args, { rows = rows }) else show(rows) end
