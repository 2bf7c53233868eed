-- Checkpoints of PyTorch's: the files in tests/golden/pytorch, against what Python saw in them (make.py there wrote both).

local cjson = require "cjson"
local lfs = require "lfs"
local orepa = require "orepa"
local fails = require "tests.spec.fails"
local process = require "tests.spec.process"

local folder = "tests/golden/pytorch/"
local expected = cjson.decode(process.read(folder .. "expected.json"))

local function flat(t)
  return #t.shape == 0 and { t:item() } or t:count() == 0 and {} or t:reshape(-1):tolist()
end

local function check_tensor(wanted, t)
  assert.same({ wanted.dtype, wanted.shape }, { t.dtype, t.shape })
  assert.same(wanted.values, flat(t:to "float64"))
end

local function sorted_lines(text)
  local lines = {}
  for line in (text or ""):gmatch "[^\n]+" do lines[#lines + 1] = line end
  table.sort(lines)
  return lines
end

describe("a checkpoint of PyTorch's", function()
  for name, wanted in pairs(expected) do
    for _, container in ipairs { ".pth", ".old.pth" } do
      it(("reads as in Python: %s%s"):format(name, container), function()
        local tensors, meta, names = orepa.load(folder .. name .. container)
        local count = 0
        for path, entry in pairs(wanted.tensors) do
          assert(tensors[path], path .. " is missing")
          check_tensor(entry, tensors[path])
          count = count + 1
        end
        assert.equal(count, #names)
        for key, value in pairs(wanted.metadata) do assert.equal(value, meta[key]) end
        assert.same(wanted.kept_out, sorted_lines(meta.__kept_out__))
      end)
    end
  end

  it("has an expectation for each file", function()
    for file in lfs.dir(folder) do
      local name = file:gsub("%.pth$", ""):gsub("%.old$", "")
      if file:find "%.pth$" then assert(expected[name], file) end
    end
  end)

  it("is known by its content, and goes to the device that is named", function()
    local path = os.tmpname()
    process.write(path, process.read(folder .. "views.pth"))
    local tensors, _, names = orepa.load(path, { device = "ref" })
    os.remove(path)
    assert.equal("ref", tensors.base.device)
    assert.equal("base", names[1])
    assert.equal("parameter", names[#names - 1])
  end)

  it("that is none is called what it is, at the caller's line", function()
    local path = os.tmpname()
    for text, wanted in pairs {
      ["<html>not found</html>"] = "is neither a safetensors file nor a checkpoint of PyTorch's but an HTML or XML page",
      ["version https://git%-lfs.github.com/spec/v1\n"] = "but a Git LFS pointer",
      [""] = "is empty",
      ["PK\3\4"] = "is a truncated ZIP archive",
      ["\x80\2N."] = "is a Python pickle, but none of torch.save's",
    } do
      process.write(path, (text:gsub("%%", "")))
      local message = fails(wanted, orepa.load, path)
      assert(message:find(path, 1, true), message)
    end
    os.remove(path)
  end)
end)
