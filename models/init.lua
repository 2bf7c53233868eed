-- orepa.models: networks by name. `create` makes one, `save` and `load` keep name and options with the weights.

local orepa = require "orepa.core"
local document = require "orepa.document"
local cjson = require "cjson"

local models = {}

local families = {} -- name of a network -> function(options) that makes it

-- A network's name with what it fixes of the family's options.
function models.register(name, make)
  families[name] = make
end

local function names()
  local list = {}
  for name in pairs(families) do list[#list + 1] = name end
  table.sort(list)
  return table.concat(list, " ")
end

function models.create(name, options)
  local make = families[name]
  if not make then orepa.fail(("models.create: no network is called '%s' (there are %s)"):format(tostring(name), names())) end
  local given = {}
  for key, value in pairs(options or {}) do given[key] = value end
  local net = make(given)
  rawset(net, "model_name", name)
  rawset(net, "model_options", given)
  return net
end

-- Whether the network's blocks are deployed: its first block says so.
local function is_deployed(net)
  for _, module in net:named_modules() do
    if module.mode == "deploy" then return true end
  end
  return false
end

-- Options as JSON with sorted keys: the same network gives the same file.
local function encoded(options)
  local entries = {}
  for key, value in pairs(options) do entries[#entries + 1] = cjson.encode(key) .. ":" .. cjson.encode(value) end
  table.sort(entries)
  return "{" .. table.concat(entries, ",") .. "}"
end

function models.save(net, path, meta)
  if not net.model_name then orepa.fail("models.save: this network was not made by models.create; use orepa.save") end
  local options = {}
  for key, value in pairs(net.model_options) do options[key] = value end
  options.deploy = is_deployed(net) or nil
  local all = { model = net.model_name, model_options = encoded(options) }
  for key, value in pairs(meta or {}) do all[key] = value end
  local tensors, order = net:state_dict()
  orepa.save(path, tensors, all, order)
end

function models.load(path, options)
  local tensors, meta = orepa.load(path)
  if not (meta.model and meta.model_options) then
    orepa.fail(("models.load: %s does not say which network it holds; make one with models.create and use "
      .. "net:load_state_dict(orepa.load(path))"):format(path))
  end
  local all = cjson.decode(meta.model_options)
  for key, value in pairs(options or {}) do all[key] = value end
  local net = models.create(meta.model, all)
  net:load_state_dict(tensors)
  return net, meta
end

document("models.create", [[
  models.create(name, {reparam=, classes=, in_channels=, width=, stem=, deploy=}) -> module
  A network by name: resnet18, resnet34, resnet50, resnet101, resnext50; repvgg_a0, a1, a2, b0, b1, b2, b3, b1g2, b1g4, ...;
  mobileone_s0 to s4. The families resnet, repvgg and mobileone take num_blocks and width, resnet also residual, cardinality and
  width_per_group. reparam is none, dbb, orepa or orepa_vgg, in a repvgg also repvgg; mobileone has a mode instead.
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
document("models.register", [[
  models.register(name, make)
  Adds a network under a name: make(options) gives the module.
  > require("orepa.models").register("tiny", function() return nn.Sequential(nn.ReLU()) end)]])

package.loaded["orepa.models"] = models -- the families below register themselves
require "orepa.models.resnet"
require "orepa.models.repvgg"
require "orepa.models.mobileone"

return models
