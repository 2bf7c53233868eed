-- What the scripts of the paper's tables share: accuracies over several seeds, costs in processes of their own, tables, figures.
-- Every run is kept, one JSON object a line, in <out>/runs.jsonl, and not done again; so tables can share runs.

local argparse = require "argparse"
local cjson = require "cjson"
local lfs = require "lfs"
local folder = arg[0]:match "^.*/" or ""
package.path = folder .. "?.lua;" .. folder .. "../bench/?.lua;" .. package.path
local charts = require "charts"
local measure = require "measure"
local variants = require "variants"
local orepa = require "orepa"
local models = require "orepa.models"
local datasets = require "orepa.datasets"
local options = require "orepa.options"
local data, optim, train = orepa.data, orepa.optim, orepa.train

local study = { charts = charts, measure = measure, variants = variants }

-- ---- options ----

function study.options(name, text, more)
  local parser = argparse(name, text)
  parser:option("--out", "folder of runs, tables and figures", "docs/paper")
  parser:option("--seeds", "runs of each network", 3):convert(math.tointeger)
  parser:option("--epochs", "passes over the training images", 10):convert(math.tointeger)
  parser:option("--width", "width multiplier of the networks that are trained", 0.25):convert(tonumber)
  parser:option("--images", "training images, 0: all", 0):convert(math.tointeger)
  parser:option("--batch-size", "images in a step whose cost is measured", 32):convert(math.tointeger)
  parser:option("--size", "height and width of the images whose cost is measured", 224):convert(math.tointeger)
  parser:option("--threads", "threads of the kernels"):convert(math.tointeger)
  if more then more(parser) end
  study.args = parser:parse()
  if study.args.threads then orepa.set_threads(study.args.threads) end
  lfs.mkdir(study.args.out)
  return study.args
end

-- ---- runs that are kept ----

local function runs_path() return study.args.out .. "/runs.jsonl" end

local function key_of(run)
  local parts = {}
  for k, name in ipairs(options.names(run)) do parts[k] = name .. "=" .. tostring(run[name]) end
  return table.concat(parts, " ")
end

local function read_runs()
  local runs = {}
  local file <close> = io.open(runs_path())
  for line in file and file:lines() or function() end do
    local entry = cjson.decode(line)
    runs[entry.key] = entry.result
  end
  return runs
end

local kept -- by key; read when first asked for

-- What `f` gave for a run before, or gives now.
local function once(run, f)
  local key = key_of(run)
  kept = kept or read_runs()
  if kept[key] then return kept[key] end
  local result = f()
  kept[key] = result
  local file <close> = assert(io.open(runs_path(), "a"))
  assert(file:write(cjson.encode { key = key, result = result }, "\n"))
  return result
end

-- ---- accuracy ----

local sets = {}

local function dataset()
  if not sets.loaded then
    local set = datasets.load("fashion-mnist", { held_out = 0 })
    local images = study.args.images
    if images > 0 then
      set.train = data.images { images = set.train.images:slice(1, 1, images), labels = set.train.labels:slice(1, 1, images),
        classes = set.classes }
    end
    sets.loaded = set
  end
  return sets.loaded
end

-- Trains by the quickstart's recipe. A run that diverges is caught by train.fit, and said so.
local function trained(variant, seed)
  local a, set = study.args, dataset()
  orepa.manual_seed(seed)
  local net = models.create(variant.model, { reparam = variant.reparam, classes = set.classes, in_channels = set.channels,
    width = a.width })
  local function loader(images, o)
    o.dataset, o.mean, o.deviation = images, set.mean, set.deviation
    return data.loader(o)
  end
  local batches = loader(set.train, { batch_size = 128, shuffle = true, seed = seed, augment = true, flip = true })
  local done, history = pcall(train.fit, { net = net, loader = batches, epochs = a.epochs,
    optimizer = optim.SGD(optim.param_groups(net), { lr = 0.1, momentum = 0.9, weight_decay = 5e-4 }),
    schedule = optim.warmup_cosine { lr = 0.1, steps = a.epochs * batches.batches, warmup = batches.batches } })
  if not done then return { diverged = tostring(history) }, net end
  if history.interrupted then orepa.fail "interrupted: this run is not kept" end
  return { accuracy = 100 * train.evaluate(net, loader(set.test, { batch_size = 500 })).accuracy }, net
end

local function spread(values)
  local mean, sum = 0, 0
  for _, v in ipairs(values) do mean = mean + v / #values end
  for _, v in ipairs(values) do sum = sum + (v - mean) ^ 2 end
  return mean, #values > 1 and math.sqrt(sum / (#values - 1)) or 0
end

-- {mean, deviation, values, diverged}: over all seeds; `diverged` counts runs that stopped, with what they said.
function study.accuracy(name)
  local a, values, diverged, message = study.args, {}, 0, nil
  for seed = 1, a.seeds do
    local run = { what = "accuracy", variant = name, seed = seed, epochs = a.epochs, width = a.width, images = a.images }
    local result = once(run, function()
      io.stderr:write(("%s, seed %d\n"):format(name, seed))
      return (trained(variants[name], seed))
    end)
    if result.accuracy then values[#values + 1] = result.accuracy else diverged, message = diverged + 1, result.diverged end
  end
  local mean, deviation = spread(values)
  return { mean = #values > 0 and mean or nil, deviation = deviation, values = values, diverged = diverged, message = message }
end

function study.accuracy_text(a)
  if not a.mean then return ("diverged (%d of %d)"):format(a.diverged, study.args.seeds) end
  local text = ("%.2f ± %.2f"):format(a.mean, a.deviation)
  return a.diverged > 0 and ("%s, %d diverged"):format(text, a.diverged) or text
end

-- As charts want it: the mean, and a deviation to both sides.
function study.range(a)
  local mean = a.mean or 0
  return { median = mean, lower = mean - a.deviation, upper = mean + a.deviation }
end

-- ---- likeness of branches ----

-- What look(net) finds in a trained network; the run is kept like the others.
function study.likeness(name, seed, look)
  local a = study.args
  local run = { what = "likeness", variant = name, seed = seed, epochs = a.epochs, width = a.width, images = a.images }
  return once(run, function()
    io.stderr:write(("likeness of %s, seed %d\n"):format(name, seed))
    local result, net = trained(variants[name], seed)
    if result.diverged then orepa.fail(("%s diverged: %s"):format(name, result.diverged)) end
    return look(net)
  end)
end

-- ---- cost ----

function study.cost(name, batch_size)
  local a = study.args
  batch_size = batch_size or a.batch_size
  local run = { what = "cost", variant = name, batch_size = batch_size, size = a.size, threads = orepa.threads() }
  return once(run, function()
    io.stderr:write(("cost of %s, batch %d\n"):format(name, batch_size))
    local command = ("OMP_NUM_THREADS=%d '%s' '%scost.lua' --variant %s --batch-size %d --size %d"):format(orepa.threads(),
      arg[-1], folder, name, batch_size, a.size)
    local pipe <close> = assert(io.popen(command))
    local text = pipe:read "a"
    if not pipe:close() then orepa.fail(("the cost of %s could not be measured: %s"):format(name, command)) end
    return cjson.decode(text)
  end)
end

-- ---- what comes out ----

local function markdown(rows)
  local lines = {}
  for k, row in ipairs(rows) do
    lines[#lines + 1] = "| " .. table.concat(row, " | ") .. " |"
    if k == 1 then lines[#lines + 1] = "|" .. (" --- |"):rep(#row) end
  end
  return table.concat(lines, "\n") .. "\n"
end

-- Prints a table and writes it, its data and a word on how it was made: <out>/<name>.md and .json.
function study.publish(name, title, rows, values)
  local a, text = study.args, markdown(rows)
  io.write(title, "\n\n", text)
  measure.write_file(("%s/%s.md"):format(a.out, name), text)
  local made = options.with(a, {})
  made.out = nil -- a path of this machine
  local all = { title = title, rows = rows, values = values, options = made }
  measure.write_file(("%s/%s.json"):format(a.out, name), cjson.encode(all) .. "\n")
end

-- draw(path) makes a figure of the kind that the path's end says; both kinds are made, where gnuplot is installed.
function study.figure(name, draw)
  if not charts.can_draw() then
    io.stderr:write("no figure: gnuplot is not installed\n")
    return
  end
  for _, kind in ipairs { "svg", "png" } do draw(("%s/%s.%s"):format(study.args.out, name, kind)) end
end

-- The bars begin a little below the least, as accuracies lie close together.
function study.accuracy_figure(name, bars)
  local least = 100
  for _, bar in ipairs(bars) do
    if bar[2].median > 0 then least = math.min(least, bar[2].lower) end
  end
  study.figure(name, function(path) charts.bars(path, bars, "test accuracy, %", math.floor(least) - 1) end)
end

-- ---- whole tables ----

local reparameterized = { plain = false, ["vgg-plain"] = false }

-- A table of accuracies alone.
function study.accuracies(name, title, list)
  local rows, values, bars = { { "network", "test accuracy, %", "what was said" } }, {}, {}
  for k, variant in ipairs(list) do
    local a, label = study.accuracy(variant), ("%s, %s"):format(variants[variant].model, variants[variant].label)
    rows[k + 1] = { label, study.accuracy_text(a), a.message and a.message:match "[^\n]*" or "" }
    values[variant], bars[k] = a, { label, study.range(a), reparameterized[variant] ~= false }
  end
  study.publish(name, title, rows, values)
  study.accuracy_figure(name, bars)
end

-- A table of accuracies and of a step's cost; the first of the list is what the others are compared with.
function study.accuracies_and_costs(name, title, list)
  local a = study.args
  local rows, values, bars = { { "network", "test accuracy, %", "peak memory, MiB", "step, ms", "of the plain step" } }, {}, {}
  local plain_ms
  for k, variant in ipairs(list) do
    local accuracy, cost, label = study.accuracy(variant), study.cost(variant), variants[variant].label
    local ms, mib = cost.step_ms.median, cost.peak_bytes / 2 ^ 20
    plain_ms = plain_ms or ms
    rows[k + 1] = { label, study.accuracy_text(accuracy), ("%.0f"):format(mib), ("%.0f"):format(ms),
      ("%.2f"):format(ms / plain_ms) }
    values[variant], bars[k] = { accuracy = accuracy, cost = cost }, { label, cost.step_ms, k > 1 }
  end
  study.publish(name, ("%s; cost at batch %d, %d px"):format(title, a.batch_size, a.size), rows, values)
  study.figure(name, function(path) charts.bars(path, bars, "ms a step") end)
end

return study
