-- Each distinct re-parameterized block of a network on its own: what squeezing its branches costs, forward and backward, against
-- the convolution that the squeezed kernel is for, in milliseconds and operations a second.
--
--     build/orepa scripts/bench/squeeze.lua --model resnet18 --batch-size 16
--
-- Operations of a squeeze are those of its products of kernels (1x1 with KxK, depthwise with pointwise, layer with layer of the
-- stem), two for each multiply-add, and twice as many backward; what only scales and adds is not counted.

local argparse = require "argparse"
package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local measure = require "measure"
local workload = require "workload"
local orepa = require "orepa"
local options = require "orepa.options"
local F = orepa.F

local parser = argparse("squeeze.lua", "Times the squeezing of a network's blocks.")
workload.add_options(parser)
parser:option("--steps", "runs of each block in a round", 5):convert(measure.at_least(1))
local args = parser:parse()
local compute = workload.precisions[args.precision] -- of convolutions: squeezing is float32 in any case
local dtype = workload.dtype(compute) -- of maps and their gradients

-- ---- blocks ----

-- Multiply-adds of a squeeze's products; a block that is none of these has no count.
local function orepa_products(o, i, k)
  local expand = 8
  return o * i * k * k * (i + expand)
end

local products = {
  OREPA = orepa_products,
  OREPAVGG = orepa_products, -- of its 3x3 branch
  OREPA1x1 = function(o, i) return o * i * math.min(o, i) end,
  OREPALargeConv = function(o, i, k)
    local macs = 0
    for layer = 1, (k - 1) // 2 do
      local before = 2 * layer - 1 -- the size of the kernel so far
      macs = macs + o * (layer == 1 and i or o) * 9 * ((layer == 1 and i or o) + 8)
      if layer > 1 then macs = macs + o * o * i * 9 * before * before end
    end
    return macs
  end,
}

-- `nest`: the branch that is squeezed, nil: the block. `is_first`: its input are the images, which need no gradient.
local function describe(path, block, nest, x, y, is_first)
  local o = block.options
  local text = ("%s %dx%d%s, %d -> %d, %dx%d"):format(block.kind, o.kernel_size[1], o.kernel_size[2],
    o.stride[1] ~= 1 and " stride " .. o.stride[1] or "", o.in_channels, o.out_channels, x.shape[3], x.shape[4])
  local count = products[block.kind]
  local macs = count and o.groups == 1 and count(o.out_channels, o.in_channels, o.kernel_size[1])
  if nest then path = path .. "." .. nest end
  return { text = text, path = path, block = block, nest = nest, input = x.shape, output = y.shape, squeeze_macs = macs or nil,
    is_first = is_first }
end

-- What a block squeezes: itself, or the nests of one that runs its branches on the map.
local function squeezes(block)
  if not block.squeezed_weight or block.plan.plain then return {} end
  return block.mode == "online" and { false } or options.names(block.plan.nests)
end

-- The blocks that squeeze, each distinct geometry once, in the order in which a pass meets them.
local function distinct_blocks(net)
  local list, hooks = {}, {}
  for path, module in net:named_modules() do
    for _, nest in ipairs(squeezes(module)) do
      hooks[#hooks + 1] = module:register_forward_hook(function(block, inputs, y)
        list[#list + 1] = describe(path, block, nest or nil, inputs[1], y, #list == 0)
      end)
    end
  end
  workload.layers(net, args.batch_size, args.size) -- a pass
  for _, hook in ipairs(hooks) do hook.remove() end
  net:train()
  return measure.distinct(list)
end

-- ---- time ----

local function timed(f)
  local start = orepa.clock()
  local result = f()
  return orepa.clock() - start, result
end

local function squeeze_once(b, dw)
  b.block:zero_grad()
  local forward, w = timed(function() return b.block:squeezed_weight(b.nest) end)
  local backward = timed(function() w:backward(dw) end)
  w:release()
  return { forward = forward, backward = backward }
end

local function convolve_once(b, x, w, dy)
  local input, kernel = x:detach(), w:detach():requires_grad_()
  if not b.is_first then input:requires_grad_() end
  local forward, y = timed(function() return compute(F.conv2d, input, kernel, b.block.geometry) end)
  local backward = timed(function() y:backward(dy) end)
  y:release()
  return { forward = forward, backward = backward }
end

local function add(list, times)
  for name, seconds in pairs(times) do
    list[name] = list[name] or {}
    table.insert(list[name], seconds)
  end
end

-- Steps of one block; the first of each kind warms up.
local function run_block(b)
  b.input[1], b.output[1] = args.batch_size, args.batch_size
  local x, dy = orepa.randn(b.input):to(dtype), orepa.randn(b.output):to(dtype)
  local w = b.block:squeezed_weight(b.nest):detach()
  local dw = orepa.randn(w.shape)
  for step = 0, args.steps do
    local squeeze, conv = squeeze_once(b, dw), convolve_once(b, x, w, dy)
    if step > 0 then
      add(b.squeeze, squeeze)
      add(b.conv, conv)
    end
  end
  b.block:zero_grad()
  b.conv_macs = dy:count() * w:count() // w.shape[1]
end

-- ---- output ----

local function side(seconds, macs)
  local s = measure.summary(seconds)
  return { ms = measure.scaled(s, 1e3), gflops = macs and 2 * macs / s.median / 1e9 or nil }
end

local function result_of(b)
  local twice, gradients = b.squeeze_macs and 2 * b.squeeze_macs, b.is_first and 1 or 2
  local r = { block = b.text, count = b.count, first = b.path,
    squeeze_forward = side(b.squeeze.forward, b.squeeze_macs), squeeze_backward = side(b.squeeze.backward, twice),
    conv_forward = side(b.conv.forward, b.conv_macs), conv_backward = side(b.conv.backward, gradients * b.conv_macs) }
  local function both(what) return r[what .. "_forward"].ms.median + r[what .. "_backward"].ms.median end
  r.squeeze_of_conv = both "squeeze" / both "conv"
  return r
end

local columns = { "squeeze_forward", "squeeze_backward", "conv_forward", "conv_backward" }

local function show(rows)
  if #rows == 0 then print "no block of this network squeezes" return end
  print(("%s, %d threads; ms and GFLOP/s"):format(workload.title(args), args.threads))
  local totals = {}
  local lines = { { "block", "count", "squeeze", "", "backward", "", "conv", "", "backward", "", "squeeze / conv" } }
  for _, r in ipairs(rows) do
    local cells = { r.block, tostring(r.count) }
    for _, name in ipairs(columns) do
      cells[#cells + 1] = ("%.3f"):format(r[name].ms.median)
      cells[#cells + 1] = r[name].gflops and ("%.4g"):format(r[name].gflops) or ""
      totals[name] = (totals[name] or 0) + r.count * r[name].ms.median
    end
    cells[#cells + 1] = ("%.2f"):format(r.squeeze_of_conv)
    lines[#lines + 1] = cells
  end
  measure.print_table(lines)
  print(("all blocks: squeeze %.3f forward, %.3f backward; convolution %.3f, %.3f ms"):format(totals.squeeze_forward,
    totals.squeeze_backward, totals.conv_forward, totals.conv_backward))
end

orepa.set_threads(args.threads)
orepa.manual_seed(1)
local blocks = distinct_blocks(workload.network(args))
for _, b in ipairs(blocks) do b.squeeze, b.conv = {}, {} end
for _ = 1, args.rounds do
  for _, b in ipairs(blocks) do run_block(b) end
end
local rows = {}
for k, b in ipairs(blocks) do rows[k] = result_of(b) end
if args.json then measure.print_json("squeeze", args, { rows = rows }) else show(rows) end
