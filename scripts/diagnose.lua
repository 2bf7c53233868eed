-- Looks into a re-parameterized network that was trained: how alike the branches of its blocks are, as a table and as a picture,
-- and what rounding will cost when it is deployed, block by block.

local argparse = require "argparse"
local orepa = require "orepa"
local models = require "orepa.models"
package.path = (arg[0]:match "^.*/" or "") .. "bench/?.lua;" .. package.path
local charts = require "charts"

local parser = argparse("diagnose.lua", "How alike a network's branches are, and what deploying it costs.")
parser:argument("input", "weights that models.save or train.lua wrote")
parser:option("--picture", "draw the likeness of branches into this file, .svg or .png (needs gnuplot)")
parser:option("--size", "height and width of the random images that the error is found with", 224):convert(math.tointeger)
parser:option("--batch-size", "how many of them", 2):convert(math.tointeger)
local args = parser:parse()

local function fail(...) orepa.fail("diagnose.lua: " .. string.format(...)) end

if args.picture and not (args.picture:find "%.svg$" or args.picture:find "%.png$") then
  fail("--picture %s: a name that ends in .svg or .png expected", args.picture)
end
if args.picture and not charts.can_draw() then fail("--picture: gnuplot is not installed") end

local net = models.load(args.input):eval()

-- ---- likeness ----

local found, maps = orepa.diagnose.similarity(net), {}
for _, block in ipairs(found) do
  if #block.branches > 1 then
    print(("%s: cosine of branches' kernels"):format(block.path))
    for i, row in ipairs(block.matrix) do
      local numbers = {}
      for j, value in ipairs(row) do numbers[j] = ("%6.3f"):format(value) end
      print(("  %-12s %s"):format(block.branches[i], table.concat(numbers, " ")))
    end
    maps[#maps + 1] = { title = block.path, names = block.branches, matrix = block.matrix }
  end
end
if #maps == 0 then print "no block has more than one branch" end
if args.picture and #maps > 0 then
  charts.maps(args.picture, maps, 4)
  print(args.picture .. " shows them")
end

-- ---- the error of deploying ----

orepa.manual_seed(1)
local channels = net.model_options.in_channels or 3
print "\ndeployed, the largest error relative to a block's largest output:"
for _, entry in ipairs(orepa.diagnose.deployment(net, orepa.randn(args.batch_size, channels, args.size, args.size))) do
  print(("  %-24s %-16s %.2g"):format(entry.path, entry.kind, entry.error))
end
