-- For specs of loaders: modules that workers can load, epochs as plain tables, and how many threads there are.

local lfs = require "lfs"
local orepa = require "orepa"
local process = require "tests.spec.process"

local loading = {}

-- A new folder whose modules can be loaded, here and by workers. What ends that.
function loading.begin()
  loading.folder = process.folder()
  local path = package.path
  package.path = loading.folder .. "/?.lua;" .. path
  return function()
    package.path = path
    process.remove(loading.folder)
  end
end

-- A module in that folder. Gives its name.
function loading.module(name, text)
  process.write(("%s/%s.lua"):format(loading.folder, name), text)
  package.loaded[name] = nil
  return name
end

-- Threads of this process; a collection ends those of what is dead.
function loading.threads()
  collectgarbage()
  collectgarbage()
  local count = 0
  for entry in lfs.dir "/proc/self/task" do count = count + (entry:match "^%d+$" and 1 or 0) end
  return count
end

-- Plain values of tensors.
local function plain(value)
  if orepa.is_tensor(value) then return { dtype = value.dtype, values = value:tolist() } end
  if type(value) ~= "table" then return value end
  local result = {}
  for key, entry in pairs(value) do result[key] = plain(entry) end
  return result
end

-- All batches of an epoch: a list of values each.
function loading.batches(loader, epoch)
  local list = {}
  local next_batch, _, _, guard = loader:epoch(epoch)
  local _ <close> = guard
  while true do
    local values = table.pack(next_batch())
    if values[1] == nil then return list end
    list[#list + 1] = plain(values)
  end
end

return loading
