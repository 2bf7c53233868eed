-- Table 2 of the paper: what each component adds, and norms against scalings: the same blocks offline, with a norm behind every
-- layer, and online, with a scaling for each branch. Test accuracy on Fashion-MNIST.
--
--     build/orepa scripts/paper/table2.lua --seeds 3

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"

study.options("table2.lua", "Components of the block, with norms and with scalings.")
local rows, values, bars = { { "block", "scalings (online)", "norms (offline)" } }, {}, {}

local function row(label, online, offline)
  local a, b = study.accuracy(online), offline and study.accuracy(offline)
  rows[#rows + 1] = { label, study.accuracy_text(a), b and study.accuracy_text(b) or "" }
  values[online], bars[#bars + 1] = a, { b and label .. " (online)" or label, study.range(a), b ~= nil }
  if b then values[offline], bars[#bars + 1] = b, { label .. " (offline)", study.range(b), false } end
end

row("plain", "plain")
for count = 2, #study.variants.parts do
  row(study.variants["online-" .. count].label, "online-" .. count, "offline-" .. count)
end
row("+ deep stem", "online-all", "offline-all")
study.publish("table2", "Table 2: components; scalings against norms", rows, values)
study.accuracy_figure("table2", bars)
