-- state: tables of tensors from files beside the names of a network. Takes a network's weights out of a checkpoint, and says
-- what doesn't fit, and why.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"

local state = {}

-- ---- names ----

local function check(tensors, where)
  if type(tensors) ~= "table" then core.fail(("%s: a table of tensors expected, got %s"):format(where, type(tensors))) end
  for name in pairs(tensors) do
    if type(name) ~= "string" then
      core.fail(("%s: tensors are named by strings, not by a %s"):format(where, type(name)))
    end
  end
end

local function starts(name, prefix)
  return name:sub(1, #prefix) == prefix
end

-- What a training script keeps beside weights under `model`: optimizers and the like, and single values.
local function is_beside(name)
  local first = name:match "^[^.]*"
  return first == name or first:find "optim" or first:find "sched" or first:find "ema" or first:find "scaler"
end

-- Prefixes that scripts and wrappers put before names; each is one if it holds for all names, or for some and the others may be
-- left out.
local prefixes = {
  { "state_dict.", function() return true end },
  { "model_state_dict.", function() return true end },
  { "model.", is_beside },
  { "module.", function() return false end },    -- of DataParallel
  { "_orig_mod.", function() return false end }, -- of torch.compile
}

local function find_prefix(names)
  for _, entry in ipairs(prefixes) do
    local prefix, may_be_left_out = entry[1], entry[2]
    local some, all = false, true
    for _, name in ipairs(names) do
      if starts(name, prefix) then some = true elseif not may_be_left_out(name) then all = false end
    end
    if some and all then return prefix end
  end
end

local function under(tensors, prefix)
  local found = {}
  for name, t in pairs(tensors) do
    if starts(name, prefix) then found[name:sub(#prefix + 1)] = t end
  end
  return found
end

local function has_any(tensors, own)
  for name in pairs(own) do
    if tensors[name] ~= nil then return true end
  end
  return false
end

-- Buffers that follow from a block's definition or only count; the reference implementation leaves some in its deployed files.
local function is_constant(name)
  local last = name:match "[^.]*$"
  return last == "id_tensor" or last == "num_batches_tracked" or last:find "^weight_%w+_avg_avg$"
    or last:find "^weight_%w+_prior$"
end

-- ---- weights out of a checkpoint ----

function state.select(tensors, net)
  check(tensors, "state_dict")
  local own = net and net:state_dict { constants = true }
  while not (own and has_any(tensors, own)) do
    local prefix = find_prefix(options.names(tensors))
    if not prefix then break end
    tensors = under(tensors, prefix)
  end
  local found = {}
  for name, t in pairs(tensors) do
    if not (own and own[name] == nil and is_constant(name)) then found[name] = t end
  end
  return found, options.names(found)
end

-- ---- what doesn't fit ----

function state.shape_text(t)
  if not core.is_tensor(t) then return "a " .. type(t) end
  return #t.shape == 0 and "scalar" or table.concat(t.shape, "x")
end

-- Counts of batches are missing in files from before they existed; then nothing else of them is there.
local function counts_batches(tensors)
  for name in pairs(tensors) do
    if name:find "num_batches_tracked$" then return true end
  end
  return false
end

-- Lists of names that are missing, unexpected, and of another shape, and how many fit; entries are {name, tensor, kind}.
function state.compare(entries, tensors)
  check(tensors, "load_state_dict")
  local missing, unexpected, wrong, known, fitting = {}, {}, {}, {}, 0
  local counted = counts_batches(tensors)
  for _, entry in ipairs(entries) do
    local name, own, t = entry[1], entry[2], tensors[entry[1]]
    known[name] = true
    if t == nil then
      if entry[3] ~= "constant" and (counted or not name:find "num_batches_tracked$") then missing[#missing + 1] = name end
    elseif state.shape_text(own) ~= state.shape_text(t) then
      wrong[#wrong + 1] = ("%s is %s, the file has %s"):format(name, state.shape_text(own), state.shape_text(t))
    else
      fitting = fitting + 1
    end
  end
  for name in pairs(tensors) do
    if not known[name] then unexpected[#unexpected + 1] = name end
  end
  table.sort(unexpected)
  return missing, unexpected, wrong, fitting
end

-- ---- why ----

local function has_under(tensors, prefix)
  for name in pairs(tensors) do
    if starts(name, prefix) and not is_constant(name) then return true end
  end
  return false
end

-- A block in one form and its weights in the other.
local function form_hint(net, tensors)
  for path, module in net:named_modules() do
    local deployed = module.mode and module.options and module.options.deployed
    local prefix = path == "" and "" or path .. "."
    if deployed and (tensors[prefix .. deployed .. ".bias"] ~= nil) ~= (module.mode == "deploy")
      and has_under(tensors, prefix) then
      return module.mode == "deploy"
        and "  these are weights of the training form, and the network is deployed: load them before deploy()"
        or "  these are weights of the deployed form, and the network is of the training form: "
          .. "make it with deploy = true, or call deploy() before loading"
    end
  end
end

local function prefix_hint(net, tensors)
  local own = net:state_dict { constants = true }
  if not has_any(tensors, own) and has_any(state.select(tensors, net), own) then
    return "  these are the names of a checkpoint: orepa.state_dict(tensors, net) takes the network's weights out of it"
  end
end

local function add_list(text, title, list)
  if #list > 0 then text[#text + 1] = ("  %s: %s"):format(title, table.concat(list, ", ")) end
end

-- The error of weights that don't fit: what to do first, if that is known, then the lists that compare gave.
function state.fail(net, tensors, missing, unexpected, wrong, fitting)
  local text = { fitting + #wrong > 0 and ("load_state_dict: the weights don't fit %s"):format(net.class_name)
    or ("load_state_dict: none of the %d tensors has a name of %s's"):format(#unexpected, net.class_name) }
  text[#text + 1] = prefix_hint(net, tensors)
  text[#text + 1] = form_hint(net, tensors)
  add_list(text, "missing", missing)
  add_list(text, "unexpected", unexpected)
  add_list(text, "of another shape", wrong)
  core.fail(table.concat(text, "\n"))
end

document("orepa.state_dict", [[
  orepa.state_dict(tensors, net) -> tensors, names
  A network's weights out of what orepa.load read, with the names that the network has: what stands under `state_dict`,
  `model_state_dict` or `model` in a checkpoint, without the `module.` of DataParallel and the `_orig_mod.` of torch.compile. With
  a network, nothing more is taken off once a name is one of its own, and constants of the reference implementation's blocks that
  it doesn't hold are left out.
  > local net = nn.Linear{in_features = 2, out_features = 1}
  > local loaded = {["state_dict.module.weight"] = orepa.ones(1, 2), ["state_dict.module.bias"] = orepa.ones(1)}
  > return net:load_state_dict(orepa.state_dict(loaded, net))]])

return state
