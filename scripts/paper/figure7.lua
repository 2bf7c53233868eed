-- Fig. 7 of the paper: how alike the kernels of a block's branches are after training (cosine), with scalings and without.
--
--     build/orepa scripts/paper/figure7.lua

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"
local orepa = require "orepa"

study.options("figure7.lua", "Likeness of branches after training.", function(parser)
  parser:option("--seed", "of the run", 1):convert(math.tointeger)
end)

-- The mean magnitude of the cosines of two different branches: 1 where all are the same, 0 where they have nothing in common.
local function mean_likeness(matrix)
  local sum, count = 0, 0
  for i = 1, #matrix do
    for j = 1, i - 1 do sum, count = sum + math.abs(matrix[i][j]), count + 1 end
  end
  return sum / math.max(count, 1)
end

local found, rows, kinds = {}, { { "block" } }, { "scaling-vector", "scaling-scalar", "scaling-none" }
for k, name in ipairs(kinds) do
  found[k] = study.likeness(name, study.args.seed, function(net) return orepa.diagnose.similarity(net) end)
  rows[1][k + 1] = study.variants[name].label
end
for n, block in ipairs(found[1]) do
  if #block.branches > 1 then
    local row = { block.path }
    for k = 1, #kinds do row[k + 1] = ("%.3f"):format(mean_likeness(found[k][n].matrix)) end
    rows[#rows + 1] = row
  end
end
study.publish("figure7", "Fig. 7: mean |cosine| of two branches' kernels, by block", rows, found)
study.figure("figure7", function(path)
  local maps = {}
  for k, name in ipairs(kinds) do
    for _, n in ipairs { 2, #found[k] // 2, #found[k] } do
      local block = found[k][n]
      if #block.branches > 1 then
        maps[#maps + 1] = { title = ("%s, %s"):format(study.variants[name].label, block.path), names = block.branches,
          matrix = block.matrix }
      end
    end
  end
  study.charts.maps(path, maps, 3)
end)
