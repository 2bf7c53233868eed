-- orepa.profile: where the time of a function goes: by op, forward and backward, by module, and by kernel of the device.

local core = require "orepa.core"
local columns = require "orepa.columns"
local document = require "orepa.document"
local options = require "orepa.options"
local trace = require "orepa.trace"
local cjson = require "cjson"

-- ---- adding up ----

-- rows(key, make) is the row of a key, made and listed when it is asked for first.
local function new_rows()
  local list, known = {}, {}
  return list, function(key, make)
    if not known[key] then
      known[key] = make()
      list[#list + 1] = known[key]
    end
    return known[key]
  end
end

local function sort(list, field)
  table.sort(list, function(a, b) return a[field] > b[field] end)
  return list
end

-- For each event the seconds of its own: without what is directly inside it, calls of the device left in.
local function own_seconds(t)
  local own = { [0] = 0 }
  for k, e in trace.each(t) do
    own[k] = e.seconds
    if e.kind ~= "kernel" then own[e.around] = own[e.around] - e.seconds end
  end
  return own
end

local function ops_of(t, own)
  local list, rows = new_rows()
  local holders = {} -- the row that an event's kernels belong to
  for k, e in trace.each(t) do
    if e.kind == "kernel" and holders[e.around] then
      holders[e.around].macs = holders[e.around].macs + e.macs
    elseif e.kind == "op" or e.kind == "node" then
      local row = rows(e.kind .. e.name, function()
        return { name = e.name, pass = (e.kind == "node" or e.name == "backward") and "backward" or "forward", calls = 0,
          self = 0, seconds = 0, macs = 0, bytes = 0, live = 0 }
      end)
      row.calls, row.self, row.seconds = row.calls + 1, row.self + own[k], row.seconds + e.seconds
      row.bytes, row.live = row.bytes + e.bytes, row.live + e.live_at_end - e.live_at_start
      holders[k] = row
    end
  end
  return sort(list, "self")
end

local function kernels_of(t)
  local list, rows = new_rows()
  for _, e in trace.each(t) do
    if e.kind == "kernel" then
      local row = rows(table.concat({ e.name, e.op, e.detail }, "\n"), function()
        return { name = e.name, op = e.op, detail = e.detail, calls = 0, seconds = 0, macs = 0 }
      end)
      row.calls, row.seconds, row.macs = row.calls + 1, row.seconds + e.seconds, row.macs + e.macs
    end
  end
  return sort(list, "seconds")
end

-- Sums over the events of each call of a module: seconds of its own, those of them in backward passes, and multiply-adds.
local function sums_of_calls(t, own, owners, backward)
  local self, back, macs = { [0] = 0 }, { [0] = 0 }, { [0] = 0 }
  for k, e in trace.each(t) do
    local call = owners[k]
    if e.kind == "module" then self[k], back[k], macs[k] = 0, 0, 0 end
    if e.kind ~= "kernel" then
      self[call] = self[call] + own[k]
      if backward[k] then back[call] = back[call] + own[k] end
    end
    macs[call] = macs[call] + e.macs
  end
  return self, back, macs
end

local function modules_of(p, own, owners, backward)
  local t, list, rows = p.trace, new_rows()
  local self, back, macs = sums_of_calls(t, own, owners, backward)
  local calls, numbers = {}, {}
  local function is_inside_itself(k)
    local call = owners.outer[k]
    while call > 0 and numbers[call] ~= numbers[k] do call = owners.outer[call] end
    return call > 0
  end
  for k, e in trace.each(t) do
    if e.kind == "module" then
      calls[#calls + 1], numbers[k] = k, e.number
      local row = rows(e.number, function()
        return { path = p.paths[e.number], root = p.roots[e.number], type = p.types[e.number], calls = 0, self = 0,
          seconds = 0, forward = 0, backward = 0, macs = 0, live = 0 }
      end)
      row.self = row.self + self[k]
      if not backward[k] then row.calls = row.calls + 1 end
      if not backward[k] and not is_inside_itself(k) then
        row.forward, row.live = row.forward + e.seconds, row.live + e.live_at_end - e.live_at_start
      end
    end
  end
  for n = #calls, 1, -1 do -- a call comes after the one around it
    local k, outer = calls[n], owners.outer[calls[n]]
    local row = rows(numbers[k])
    if not is_inside_itself(k) then row.backward, row.macs = row.backward + back[k], row.macs + macs[k] end
    back[outer], macs[outer] = back[outer] + back[k], macs[outer] + macs[k]
  end
  for _, row in ipairs(list) do row.seconds = row.forward + row.backward end
  return sort(list, "seconds")
end

local function peak_of(t)
  local peak = 0
  for _, e in trace.each(t) do peak = math.max(peak, e.live_at_start, e.live_at_end) end
  return peak
end

-- ---- the result ----

local Profile = {}
Profile.__index = Profile

-- The modules themselves are let go: a profile that is kept keeps no network.
local function add_up(p)
  local own, owners, backward = own_seconds(p.trace), trace.owners(p.trace)
  p.paths, p.roots, p.types = trace.paths(p.trace, owners)
  p.trace.modules = nil
  p.ops, p.kernels = ops_of(p.trace, own), kernels_of(p.trace)
  p.modules = modules_of(p, own, owners, backward)
  p.peak, p.lost, p.rest = peak_of(p.trace), trace.lost(p.trace), p.seconds
  for _, row in ipairs(p.ops) do p.rest = p.rest - row.self end
  for _, root in ipairs(p.roots) do p.several = p.several or root ~= p.roots[1] end
end

local function milliseconds(seconds)
  return ("%.3f"):format(1e3 * seconds)
end

local function percent(seconds, p)
  return ("%.1f"):format(100 * seconds / p.seconds)
end

local function rate(row, seconds)
  return row.macs > 0 and ("%.1f"):format(row.macs / seconds / 1e9) or ""
end

-- A module's name in tables: its path, after its network's name if there are several.
local function name_of(p, root, path)
  if path == "" then return root end
  return p.several and ("%s: %s"):format(root, path) or path
end

local tables = {
  ops = { left = 2, head = { "op", "pass", "calls", "self ms", "%", "total ms", "ms/call", "GMAC/s", "results", "live" },
    words = function(row, p)
      return { row.name, row.pass, tostring(row.calls), milliseconds(row.self), percent(row.self, p), milliseconds(row.seconds),
        milliseconds(row.seconds / row.calls), rate(row, row.seconds), row.bytes > 0 and columns.bytes(row.bytes) or "",
        columns.bytes(row.live) }
    end },
  modules = { left = 2, head = { "module", "type", "calls", "total ms", "%", "forward", "backward", "self", "GMAC/s", "live" },
    words = function(row, p)
      return { name_of(p, row.root, row.path), row.type, tostring(row.calls), milliseconds(row.seconds), percent(row.seconds, p),
        milliseconds(row.forward), milliseconds(row.backward), milliseconds(row.self), rate(row, row.seconds),
        columns.bytes(row.live) }
    end },
  kernels = { left = 3, head = { "kernel", "of", "geometry", "calls", "ms", "%", "GMAC/s" },
    words = function(row, p)
      return { row.name, row.op, row.detail, tostring(row.calls), milliseconds(row.seconds), percent(row.seconds, p),
        rate(row, row.seconds) }
    end },
}

local function table_text(p, name, most)
  local layout, list = tables[name], p[name]
  local rows = { layout.head }
  for k = 1, math.min(most, #list) do rows[k + 1] = layout.words(list[k], p) end
  local text = columns.text(rows, layout.left)
  return #list > most and ("%s\n... and %d more"):format(text, #list - most) or text
end

local function check_rows(where, rows)
  if math.type(rows) ~= "integer" or rows < 1 then
    core.fail(("%s: rows is %s, an integer of at least 1 expected"):format(where, tostring(rows)))
  end
end

function Profile:text(name, o)
  o = options("profile:text", o, { rows = self.rows })
  check_rows("profile:text", o.rows)
  if not tables[name] then
    core.fail(("profile:text: there is no table '%s' (there are kernels modules ops)"):format(tostring(name)))
  end
  return table_text(self, name, o.rows)
end

function Profile:__tostring()
  local lines = { ("%s ms, of which %s ms outside of ops; at most %s live"):format(milliseconds(self.seconds),
    milliseconds(self.rest), columns.bytes(self.peak)) }
  if self.lost > 0 then lines[#lines + 1] = ("%d events are missing: there was no memory for them"):format(self.lost) end
  for _, name in ipairs { "ops", "modules" } do
    if #self[name] > 0 then lines[#lines + 1] = "\n" .. table_text(self, name, self.rows) end
  end
  return table.concat(lines, "\n")
end

-- ---- Chrome's format ----

-- Microseconds since the start, in whole nanoseconds, so that what is inside stays inside.
local function microseconds(seconds)
  local n = math.floor(seconds * 1e9 + 0.5)
  return n, ("%d.%03d"):format(n // 1000, n % 1000)
end

local function json_arguments(fields)
  local words = {}
  for k = 1, #fields, 2 do
    if fields[k + 1] and fields[k + 1] ~= 0 and fields[k + 1] ~= "" then
      words[#words + 1] = ("%s:%s"):format(cjson.encode(fields[k]), math.type(fields[k + 1]) and ("%d"):format(fields[k + 1])
        or cjson.encode(fields[k + 1]))
    end
  end
  return "{" .. table.concat(words, ",") .. "}"
end

local categories = { module = "module", op = "op", node = "backward", kernel = "kernel" }

local function event_json(p, e)
  local name, type_name = e.name, nil
  if e.kind == "module" then
    name, type_name = name_of(p, p.roots[e.number], p.paths[e.number]), p.types[e.number]
  elseif e.kind == "node" then
    name = name .. " backward"
  end
  local from, start = microseconds(e.start - p.start)
  local to = microseconds(e.stop - p.start)
  return ('{"ph":"X","pid":1,"tid":1,"cat":"%s","name":%s,"ts":%s,"dur":%d.%03d,"args":%s}'):format(categories[e.kind],
    cjson.encode(name), start, (to - from) // 1000, (to - from) % 1000,
    json_arguments { "type", type_name, "of", e.op, "geometry", e.detail, "multiply-adds", e.macs, "result bytes", e.bytes,
      "live bytes more", e.live_at_end - e.live_at_start })
end

local function live_json(p, e)
  local _, stop = microseconds(e.stop - p.start)
  return ('{"ph":"C","pid":1,"tid":1,"name":"live bytes","ts":%s,"args":{"bytes":%d}}'):format(stop, e.live_at_end)
end

function Profile:save(path)
  if type(path) ~= "string" then core.fail(("profile:save: a path expected, got %s"):format(type(path))) end
  local lines = { '{"ph":"M","pid":1,"tid":1,"name":"process_name","args":{"name":"orepa"}}' }
  for _, e in trace.each(self.trace) do
    lines[#lines + 1] = event_json(self, e)
    if e.kind == "op" or e.kind == "node" then lines[#lines + 1] = live_json(self, e) end
  end
  core.write_file(path, '{"displayTimeUnit":"ms","traceEvents":[\n' .. table.concat(lines, ",\n") .. "\n]}\n")
  return self
end

-- ---- taking it ----

local function profile(f, given)
  if type(f) ~= "function" then core.fail(("profile: a function expected, got %s"):format(type(f))) end
  local o = options("profile", given, { rows = 20, warm_up = 0 })
  check_rows("profile", o.rows)
  if math.type(o.warm_up) ~= "integer" or o.warm_up < 0 then
    core.fail(("profile: warm_up is %s, an integer of at least 0 expected"):format(tostring(o.warm_up)))
  end
  for _ = 1, o.warm_up do f() end
  local p = setmetatable({ rows = o.rows }, Profile)
  local results = table.pack(trace.run(nil, function()
    p.start = core.clock()
    local inner = table.pack(f())
    p.seconds = core.clock() - p.start
    return table.unpack(inner, 1, inner.n)
  end))
  p.trace = results[1]
  add_up(p)
  return p, table.unpack(results, 2, results.n)
end

document("orepa.profile", [[
  orepa.profile(f, {warm_up=, rows=}) -> profile, what f returns
  Calls f and tells where the time went; before that, f is called warm_up (0) times more. print(profile) shows the first `rows`
  (20) lines of two tables. The fields are lists, the largest first, times in seconds:
  profile.ops: {name=, pass=, calls=, self=, seconds=, macs=, bytes=, live=}, by self. The pass is "forward" for calls of ops
  and "backward" for their nodes in a backward pass, with adding up the gradients that they give; the op "backward" is a whole
  pass. `seconds` is all of it, `self` is without ops and modules inside. macs are multiply-adds of convolutions, matrix
  products and squeezing, as nn.summary counts them; bytes are the sizes of results; `live` is by how many bytes what is in use
  grew.
  profile.modules: {path=, root=, type=, calls=, seconds=, forward=, backward=, self=, macs=, live=}, by seconds. `forward` is
  all that its calls took, `backward` what backward passes took for what was recorded in these calls (a checkpoint's second
  forward pass too), `seconds` both, `self` both without the modules inside. The path is that in the outermost module that was
  called, whose type is `root`.
  profile.kernels: {name=, op=, detail=, calls=, seconds=, macs=}, the calls of the device.
  profile.seconds is the whole time, profile.rest that outside of ops (Lua), profile.peak the most live bytes at the start or
  end of any event, profile.lost the number of events that there was no memory for.
  What a norm gives is stored by whoever reads it first, in that op's time; a convolution may do it on its way. Lua's collector,
  where memory asks for it, is the op "collect garbage". Only the calling thread is seen. f can't yield, and can't profile. An
  error in it goes on, and nothing is profiled any more.
  > local net = nn.Sequential(nn.Linear{in_features = 4, out_features = 2}, nn.ReLU())
  > local p = orepa.profile(function() net(orepa.ones(3, 4)):sum():backward() end, {warm_up = 1})
  > print(p); return p.ops[1].name, p.modules[1].seconds]])
document("profile:text", [[
  profile:text(name, {rows=}) -> string
  One of the tables: "ops", "modules" or "kernels".
  > orepa.profile(function() return orepa.ones(2):sum() end):text("kernels", {rows = 3})]])
document("profile:save", [[
  profile:save(path) -> profile
  Writes all events as JSON that chrome://tracing and ui.perfetto.dev open: modules around ops around calls of the device, nodes
  of the backward pass under "backward", and the live bytes as a curve.
  > orepa.profile(function() return orepa.ones(2):sum() end):save(os.tmpname())]])

return profile
