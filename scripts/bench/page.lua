-- The page of report.lua: for each part what was measured, by which command, a chart, and tables of medians and quartiles.

local measure = require "measure"
local workload = require "workload"
local charts = require "charts"

local page = {}

local function spread(format, s)
  return (format .. " (" .. format .. " ... " .. format .. ")"):format(s.median, s.lower, s.upper)
end

local function exactly(value)
  return { median = value, lower = value, upper = value }
end

-- ---- what each script's results look like: `show` gives rows of a table, under `head`, and what a chart is drawn of ----

local views = {}

views.step = { head = { "", "ms", "times ours", "images/s", "most memory, MiB" }, unit = "milliseconds a step" }

function views.step.show(r, row, mark)
  local ours = { name = "ours", step_ms = r.step_ms, times_ours = exactly(1), peak_memory_mib = r.peak_memory_mib }
  for _, c in ipairs { ours, table.unpack(r.peers or {}) } do
    row(c.name, spread("%.2f", c.step_ms), spread("%.2f", c.times_ours),
      ("%.1f"):format(1e3 * r.options.batch_size / c.step_ms.median), ("%.0f"):format(c.peak_memory_mib))
    local network, name = c.name:match "^(.-):(.*)$"
    mark(("%s, batch %d: %s"):format(network or r.options.reparam, r.options.batch_size, name or c.name), c.step_ms,
      c.name:find "ours$")
  end
end

views.breakdown = { head = { "", "forward", "backward", "update", "all", "%", "calls" }, unit = "milliseconds a step" }

function views.breakdown.show(r, row, mark)
  local function ms(value) return value > 0 and ("%.2f"):format(value) or "" end
  for k, entry in ipairs { r.step, table.unpack(r.rows) } do
    local share = 100 * entry.total_ms / r.step.total_ms
    if share >= 0.5 then
      row(entry.name, ms(entry.ms.forward), ms(entry.ms.backward), ms(entry.ms.update), ms(entry.total_ms),
        ("%.1f"):format(share), entry.calls and ("%g"):format(entry.calls) or "")
      if k > 1 then mark(r.options.reparam .. ": " .. entry.name, exactly(entry.total_ms), r.options.reparam ~= "none") end
    end
  end
end

views.squeeze = { head = { "block", "how often", "squeeze", "its backward", "convolution", "its backward", "ratio" },
  unit = "milliseconds, forward and backward" }

function views.squeeze.show(r, row, mark)
  for _, b in ipairs(r.rows) do
    row(b.block, ("%d"):format(b.count), spread("%.3f", b.squeeze_forward.ms), spread("%.3f", b.squeeze_backward.ms),
      spread("%.3f", b.conv_forward.ms), spread("%.3f", b.conv_backward.ms), ("%.2f"):format(b.squeeze_of_conv))
    mark(b.block .. ": squeeze", exactly(b.squeeze_forward.ms.median + b.squeeze_backward.ms.median), true)
    mark(b.block .. ": convolution", exactly(b.conv_forward.ms.median + b.conv_backward.ms.median))
  end
end

views.conv = { head = { "convolution", "how often", "direction", "direct, ms", "error", "Winograd, ms", "error" },
  unit = "milliseconds" }

function views.conv.show(r, row, mark)
  local by_winograd = {}
  local function key(c) return c.convolution .. ", " .. c.direction end
  for _, c in ipairs(r.rows) do
    if c.way == "winograd" then by_winograd[key(c)] = c end
  end
  for _, c in ipairs(r.rows) do
    if c.way == "direct" and c.convolution:find "^3x3, " then
      local w = by_winograd[key(c)]
      row(c.convolution, ("%d"):format(c.count), c.direction, spread("%.3f", c.ms), ("%.1e"):format(c.error),
        spread("%.3f", w.ms), ("%.1e"):format(w.error))
      mark(key(c) .. ": direct", c.ms)
      mark(key(c) .. ": Winograd", w.ms, true)
    end
  end
end

views.scaling = { head = { "network", "threads", "batch", "ms", "images/s", "GFLOP/s", "most memory, MiB" } }

function views.scaling.show(r, row, mark)
  local o = r.options
  row(o.reparam, ("%d"):format(o.threads), ("%d"):format(o.batch_size), spread("%.2f", r.step_ms),
    ("%.1f"):format(r.images_per_second), ("%.4g"):format(r.gflops), ("%.0f"):format(r.peak_memory_mib))
  mark(("%s, %d threads"):format(o.reparam, o.threads), { o.batch_size, r.images_per_second })
end

for _, view in pairs(views) do view.draw = charts.bars end
function views.scaling.draw(path, points) charts.lines(path, points, "images in a step", "images a second") end

-- ---- the page ----

local function table_text(head, rows)
  local lines = { ("| %s |"):format(table.concat(head, " | ")), "| --- |" .. (" ---: |"):rep(#head - 1) }
  for _, row in ipairs(rows) do lines[#lines + 1] = ("| %s |"):format(table.concat(row, " | ")) end
  return table.concat(lines, "\n")
end

local function title(r)
  local text = "**" .. workload.title(r.options) .. (r.options.isa and ", " .. r.options.isa or "") .. "**"
  return r.dtype and ("%s, computed in %s: ours %.4g GFLOP/s, %.2f of the rate of float32 FMAs, %.2f of a matrix product's")
    :format(text, r.dtype, r.gflops, r.share_of_fma, r.share_of_matmul) or text
end

-- What one command gave, as its text and a table; what is drawn of it is added to `marks`.
local function record_blocks(view, record, marks)
  local rows = {}
  for _, r in ipairs(record.results) do
    view.show(r, function(...) rows[#rows + 1] = { ... } end, function(...) marks[#marks + 1] = { ... } end)
  end
  local blocks = { ("```sh\n%s\n```"):format(record.command), not record.results[2] and title(record.results[1]) or nil }
  return measure.append(blocks, { table_text(view.head, rows) })
end

local function section(part, records, folder)
  local head, blocks, marks, view = { "## " .. part.title, part.about }, {}, {}, nil
  for _, record in ipairs(records) do
    if record.part == part.name then
      view = views[record.results[1].benchmark]
      measure.append(blocks, record_blocks(view, record, marks))
    end
  end
  if not view then return {} end
  if charts.can_draw() then
    view.draw(("%s/%s.svg"):format(folder, part.name), marks, view.unit)
    measure.append(head, { ("![%s](%s/%s.svg)"):format(part.title, folder:match "[^/]+$", part.name) })
  end
  return measure.append(head, blocks)
end

-- All values of something in the results, each once; `pick` gives a list of texts.
local function values_text(records, pick)
  local entries, texts = {}, {}
  for _, record in ipairs(records) do
    for _, r in ipairs(record.results) do
      for _, text in ipairs(pick(r)) do entries[#entries + 1] = { text = text } end
    end
  end
  for k, entry in ipairs(measure.distinct(entries)) do texts[k] = entry.text end
  return table.concat(texts, "; ")
end

local function machine_text(records)
  local lines = {}
  for k, name in ipairs { "cpu", "features", "libraries", "orepa", "date" } do
    lines[k] = ("- %s: %s"):format(name, values_text(records, function(r) return { r.machine[name] } end))
  end
  local peers = values_text(records, function(r)
    local names = {}
    for _, p in ipairs(r.peers or {}) do
      if p.about.peer ~= "ours" then names[#names + 1] = p.about.peer .. " " .. p.about.version end
    end
    return names
  end)
  if #peers > 0 then lines[#lines + 1] = "- peers: " .. peers end
  return table.concat(lines, "\n")
end

-- What the numbers above don't say by themselves.
local LIMITS = [[
## What stands in the way

Convolutions are two thirds of a plain step, and most of them are matrix products of our own: these reach about 80 % of the
FMA rate, where a bare loop of the same loads and multiplications in the first cache reaches 82 to 86 % on the CPU that this
was written on. Winograd's way needs 36 products where direct convolution needs 144, so the rest is its transforms, which run
at the speed of the second cache. `norm_backward` reads its maps twice and writes one at the speed of memory. Of an OREPA
step, squeezing is a quarter: two thirds of that are products at 410 GFLOP/s, the rest reads and writes each parameter once
and its gradient once. In ResNet-50 a third of the step is 1x1 convolutions, which oneDNN computes at 260 to 300 GFLOP/s.

Tried without gain: 1x1 convolutions as products of our own in training, which normalise their input while they pack it and
measure their output while it is in the cache (by shape 0.8 to 1.8 times oneDNN's speed; 1.5 % of ResNet-50's step, nothing of
DBB's or OREPA-VGG's: not worth the code), strided ones by implicit panels, fetching the rows of the squeeze's next run ahead
(the products take longer by what the packing saves), rectangles of half the size in the weight gradient, lowering the stem's
weight gradient to a product, keeping the pooled stem's gradient instead of gathering it twice, oneDNN's PReLU post-op in the
deployed network (runs its reference code), the gradients of norms whose results are added taken in one pass (a fifth faster on
warm maps, nothing in a step, where each map comes from memory once either way). Convolutions of 3x3 with stride 2 go by
Winograd's way where that was measured to pay (81 products instead of 144); their kernels' transforms cost too much at 512
channels.]]

-- Markdown; charts are drawn into the folder, beside which the page lies.
function page.text(parts, records, folder)
  if not charts.can_draw() then print "gnuplot is not installed (package gnuplot-nox): the page is made without charts" end
  local blocks = { "# Performance", ([[
Made by `scripts/bench/report.lua` from `%s/results.jsonl`. Numbers are medians (and quartiles). Those that are compared took
turns in one run, each in a process of its own. *Times ours* is a peer's time over ours: above 1, ours is faster.]]):format(
    folder:match "[^/]+$"), machine_text(records) }
  for _, part in ipairs(parts) do measure.append(blocks, section(part, records, folder)) end
  blocks[#blocks + 1] = LIMITS
  return table.concat(blocks, "\n\n") .. "\n"
end

return page
