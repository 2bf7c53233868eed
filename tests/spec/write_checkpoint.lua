-- For specs: writes a checkpoint in PyTorch's container before 1.6, { epoch = 3, [key] = {name = tensor} }, names with a prefix.

local process = require "tests.spec.process"

local types = { float32 = { "FloatStorage", "<f" }, int64 = { "LongStorage", "<i8" } }

local function text(s) return "X" .. string.pack("<s4", s) end
local function integer(n) return "J" .. string.pack("<i4", n) end

local function tuple(numbers)
  local parts = {}
  for k, n in ipairs(numbers) do parts[k] = integer(n) end
  return "(" .. table.concat(parts) .. "t"
end

local function strides_of(shape)
  local strides, stride = {}, 1
  for d = #shape, 1, -1 do
    strides[d] = stride
    stride = stride * shape[d]
  end
  return strides
end

local function tensor(t, key)
  return "ctorch._utils\n_rebuild_tensor_v2\n((" .. text "storage" .. "ctorch\n" .. types[t.dtype][1] .. "\n" .. text(key)
    .. text "cpu" .. integer(t:count()) .. "NtQK\0" .. tuple(t.shape) .. tuple(strides_of(t.shape)) .. "\x89NtR"
end

local function elements(t)
  local values, parts = t:reshape(-1):tolist(), {}
  for k, value in ipairs(values) do
    parts[k] = string.pack(types[t.dtype][2], t.dtype == "int64" and math.tointeger(value) or value)
  end
  return string.pack("<i8", #values) .. table.concat(parts)
end

return function(path, key, tensors, prefix)
  local names, object, keys, storages = {}, {}, {}, {}
  for name in pairs(tensors) do names[#names + 1] = name end
  table.sort(names)
  for k, name in ipairs(names) do
    object[k] = text(prefix .. name) .. tensor(tensors[name], tostring(k))
    keys[k] = text(tostring(k))
    storages[k] = elements(tensors[name])
  end
  process.write(path, "\x80\2\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\2M\xe9\3.\x80\2}" .. text "little_endian" .. "\x88s."
    .. "\x80\2}(" .. text "epoch" .. integer(3) .. text "args" .. "cargparse\nNamespace\n)\x81" .. text(key)
    .. "ccollections\nOrderedDict\n)R(" .. table.concat(object) .. "uu."
    .. "\x80\2](" .. table.concat(keys) .. "e." .. table.concat(storages))
end
