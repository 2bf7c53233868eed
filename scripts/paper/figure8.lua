-- Fig. 8 of the paper: memory and time of a training step as components are added, online and offline. ResNet-18 at 224 px.
--
--     build/orepa scripts/paper/figure8.lua --batch-size 32 --more 64

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"

local args = study.options("figure8.lua", "Cost of components, online and offline.", function(parser)
  parser:option("--more", "other batch sizes at which all components are compared, a list", "")
    :convert(study.measure.list_or_none)
end)

local function costs(name, batch_size)
  local c = study.cost(name, batch_size)
  return c.step_ms.median, c.peak_bytes / 2 ^ 20
end

local rows, values, points = { { "block", "online: ms", "MiB", "offline: ms", "MiB", "of plain: time", "memory saved" } }, {}, {}
local plain_ms, plain_mib = costs "plain"

-- How much of the memory that offline takes beside the plain network's online saves.
local function saved(online, offline, plain)
  return 1 - (online - plain) / (offline - plain)
end

local function row(label, online, offline)
  local ms, mib = costs(online)
  local other_ms, other_mib = costs(offline)
  rows[#rows + 1] = { label, ("%.0f"):format(ms), ("%.0f"):format(mib), ("%.0f"):format(other_ms), ("%.0f"):format(other_mib),
    ("%.2f"):format(ms / plain_ms), ("%.1f %%"):format(100 * saved(mib, other_mib, plain_mib)) }
  values[#values + 1] = { label = label, online = { ms, mib }, offline = { other_ms, other_mib } }
  local x = #values
  for name, y in pairs { ["online: ms"] = ms, ["offline: ms"] = other_ms, ["online: MiB"] = mib, ["offline: MiB"] = other_mib } do
    points[#points + 1] = { name, { x, y } }
  end
end

rows[2] = { "plain", ("%.0f"):format(plain_ms), ("%.0f"):format(plain_mib), "", "", "1", "" }
for count = 2, #study.variants.parts do
  row(study.variants["online-" .. count].label, "online-" .. count, "offline-" .. count)
end
row("+ deep stem", "online-all", "offline-all")
study.publish("figure8", ("Fig. 8: a step of ResNet-18, batch %d, %d px"):format(args.batch_size, args.size), rows, values)

local batches = { { "batch", "plain: MiB", "online", "offline", "of plain: time", "memory saved" } }
for _, batch in ipairs(args.more) do
  local size = math.tointeger(tonumber(batch))
  local p_ms, p = costs("plain", size)
  local on_ms, on = costs("online-all", size)
  local _, off = costs("offline-all", size)
  batches[#batches + 1] = { batch, ("%.0f"):format(p), ("%.0f"):format(on), ("%.0f"):format(off), ("%.2f"):format(on_ms / p_ms),
    ("%.1f %%"):format(100 * saved(on, off, p)) }
end
if #batches > 1 then study.publish("figure8-batches", "Fig. 8: all components, other batch sizes", batches) end
study.figure("figure8", function(path) study.charts.lines(path, points, "components", "ms, MiB", true) end)
