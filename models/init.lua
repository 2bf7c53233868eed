-- orepa.models: networks by name. `create` makes one, `save` and `load` keep name and options with the weights.

local orepa = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local reparam = require "orepa.reparam"
local cjson = require "cjson"

local models = {}

local families = {} -- name of a network -> function(options) that makes it

-- A network's name with what it fixes of the family's options.
function models.register(name, make)
  families[name] = make
end

function models.create(name, o)
  local make = families[name]
  if not make then
    orepa.fail(("models.create: no network is called '%s' (there are %s)"):format(tostring(name),
      table.concat(options.names(families), " ")))
  end
  local given = options.with(o or {}, {})
  local net = make(given)
  rawset(net, "model_name", name)
  rawset(net, "model_options", given)
  return net
end

-- The widths of a named network's stages: its own times a number, or a list instead.
function models.scaled(own, width)
  if type(width) == "table" then return width end
  if width ~= nil and type(width) ~= "number" then
    orepa.fail(("width is %s, a number or a list expected"):format(tostring(width)))
  end
  local list = {}
  for k, w in ipairs(own) do list[k] = w * (width or 1) end
  return list
end

-- For networks: a function conv(in_channels, out_channels, kernel_size, {stride=, groups=, act=}) that makes blocks of one kind,
-- which must be in a list, or a function that makes a block.
function models.conv_maker(network, kind, kinds)
  local make = type(kind) == "function" and kind or nil
  for _, known in ipairs(kinds) do
    if kind == known then make = function(o) return reparam.make(kind, o) end end
  end
  if make then
    return function(in_channels, out_channels, kernel_size, o)
      return make { in_channels = in_channels, out_channels = out_channels, kernel_size = kernel_size, stride = o.stride,
        groups = o.groups, act = o.act }
    end
  end
  orepa.fail(("%s: reparam is '%s'; there are %s"):format(network, tostring(kind), table.concat(kinds, ", ")))
end

-- Whether the network's blocks are deployed: its first block says so.
local function is_deployed(net)
  for _, module in net:named_modules() do
    if module.mode == "deploy" then return true end
  end
  return false
end

-- Options as JSON with sorted keys: the same network gives the same file.
local function encoded(given)
  local entries = {}
  for key, value in pairs(given) do entries[#entries + 1] = cjson.encode(key) .. ":" .. cjson.encode(value) end
  table.sort(entries)
  return "{" .. table.concat(entries, ",") .. "}"
end

-- What a network went through, as JSON; nil if nothing but, perhaps, being deployed in the end.
local function encoded_changes(net)
  local list, others = {}, false
  for k, change in ipairs(net.changes or {}) do
    local name, kind, o = change[1], change[2], change[3] or {}
    if name == "expand" and type(kind) ~= "string" then
      orepa.fail("models.save: this network was expanded by a function, which a file can't hold; use orepa.save")
    end
    others = others or name ~= "deploy"
    list[k] = name == "deploy" and '["deploy"]' or name == "linearize" and ('["linearize",%s]'):format(encoded(kind))
      or ('["expand",%s,%s]'):format(cjson.encode(kind), encoded(o))
  end
  return others and "[" .. table.concat(list, ",") .. "]" or nil
end

local function replay(net, changes)
  for _, change in ipairs(changes) do
    if change[1] == "deploy" then net:deploy() end
    if change[1] == "linearize" then reparam.linearize(net, change[2]) end
    if change[1] == "expand" then reparam.expand(net, change[2], change[3]) end
  end
end

function models.save(net, path, meta)
  if not net.model_name then orepa.fail("models.save: this network was not made by models.create; use orepa.save") end
  local given, changes = {}, encoded_changes(net)
  for key, value in pairs(net.model_options) do
    if type(value) == "function" then
      orepa.fail(("models.save: option '%s' is a function, which a file can't hold; use orepa.save"):format(key))
    end
    given[key] = value
  end
  if not changes then given.deploy = is_deployed(net) or nil end
  local all = options.with({ model = net.model_name, model_options = encoded(given), model_changes = changes }, meta or {})
  local tensors, order = net:state_dict()
  orepa.save(path, tensors, all, order)
end

function models.load(path, o)
  local tensors, meta = orepa.load(path)
  if not (meta.model and meta.model_options) then
    orepa.fail(("models.load: %s does not say which network it holds; make one with models.create and use "
      .. "net:load_state_dict(orepa.load(path))"):format(path))
  end
  local net = models.create(meta.model, options.with(cjson.decode(meta.model_options), o or {}))
  if meta.model_changes then replay(net, cjson.decode(meta.model_changes)) end
  net:load_state_dict(tensors)
  return net, meta
end

document("models.create", [[
  models.create(name, {reparam=, classes=, in_channels=, width=, stem=, deploy=}) -> module
  A network by name: resnet18, resnet34, resnet50, resnet101, resnext50; repvgg_a0, a1, a2, b0, b1, b2, b3, b1g2, b1g4, ...;
  mobileone_s0 to s4. The families resnet, repvgg and mobileone take num_blocks and width, resnet also residual, cardinality and
  width_per_group. reparam is none, dbb, orepa or orepa_vgg, in a repvgg also repvgg, or a function that makes the block of
  {in_channels=, out_channels=, kernel_size=, stride=, groups=, act=}; mobileone has a mode instead.
  > local models = require "orepa.models"; return models.create("resnet18", {reparam = "orepa", classes = 10, width = 0.125})]])
document("models.save", [[
  models.save(net, path, meta)
  Writes weights, name and options of a network that models.create made, deployed or not, to a safetensors file.
  > local models = require "orepa.models"
  > models.save(models.create("resnet18", {classes = 10, width = 0.125}), os.tmpname())]])
document("models.load", [[
  models.load(path) -> module, metadata
  Makes the network that models.save wrote.
  > local models = require "orepa.models"; local path = os.tmpname()
  > models.save(models.create("resnet18", {classes = 10, width = 0.125}), path); return (models.load(path))]])
document("models.scaled", [[
  models.scaled(own, width) -> list
  For networks that are written: the stages' widths `own` times a number (1 if there is none), or `width` itself if it is a list.
  > return require("orepa.models").scaled({0.75, 0.75, 0.75, 2.5}, 2)]])
document("models.conv_maker", [[
  models.conv_maker(network, kind, kinds) -> function
  For networks that are written: conv(in_channels, out_channels, kernel_size, {stride=, groups=, act=}) makes blocks of a kind
  (reparam.make); an error, in the network's name, if that is not in the list of kinds. The kind may be a function that makes a
  block of options.
  > return require("orepa.models").conv_maker("tiny", "orepa", {"none", "orepa"})(4, 8, 3, {act = "relu"})]])
document("models.register", [[
  models.register(name, make)
  Adds a network under a name: make(options) gives the module.
  > require("orepa.models").register("tiny", function() return nn.Sequential(nn.ReLU()) end)]])

package.loaded["orepa.models"] = models -- the families below register themselves
require "orepa.models.resnet"
require "orepa.models.repvgg"
require "orepa.models.mobileone"

return models
