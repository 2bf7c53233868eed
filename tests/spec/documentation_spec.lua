-- Every function that a script can reach is documented, everything documented can be reached, and every example runs.

local orepa = require "orepa"
local models, datasets = require "orepa.models", require "orepa.datasets"
local nn, optim, data = orepa.nn, orepa.optim, orepa.data
local documentation = orepa.documentation

-- ---- what can be reached ----

local inner = { tree = true, methods = true, documentation = true, check = true } -- for the library itself

local function is_callable(v)
  return type(v) == "function" or (getmetatable(v) or {}).__call ~= nil or (type(v) == "table" and v.class_name ~= nil)
end

local some = nn.Parameter(orepa.ones(1))
local images = data.images { images = orepa.zeros(2, 4, 4), labels = orepa.zeros({ 2 }, { dtype = "int64" }), classes = 2 }
local places = {
  orepa = orepa, F = orepa.F, nn = nn, ["nn.init"] = nn.init, optim = optim, data = data, train = orepa.train,
  reparam = orepa.reparam, models = models, datasets = datasets, diagnose = orepa.diagnose,
  image = orepa.image,
}
local context
orepa.Function { forward = function(ctx, x) context = ctx return x end, backward = print } (orepa.ones(1))
local objects = {
  t = { orepa.methods }, m = { nn.Module }, b = { nn.ReparamBlock }, list = { nn.ModuleList, nn.Sequential },
  norm = { nn.BatchNorm2d }, opt = { require("orepa.optim.optimizer").Optimizer },
  watch = { getmetatable(orepa.diagnose.watch(nn.ConvBN { in_channels = 1, out_channels = 1, kernel_size = 1 })).__index },
  live = { getmetatable(orepa.watch(nn.ReLU())).__index },
  profile = { getmetatable((orepa.profile(function() end))).__index },
  ctx = { getmetatable(context).__index },
  hook = { getmetatable(orepa.ones(1):requires_grad_():register_hook(print)).__index },
  loader = { getmetatable(data.loader { dataset = images, batch_size = 1 }).__index },
}
for _, name in ipairs { "SGD", "AdamW", "RMSprop" } do
  table.insert(objects.opt, getmetatable(optim[name]({ some }, { lr = 1 })).__index)
end

local function public_methods(class)
  local names = {}
  for name, f in pairs(class) do
    if type(name) == "string" and type(f) == "function" and not name:find "^__" then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

-- A method is documented where its class is, or as nn.Module's that it overrides.
local function is_documented(prefix, name)
  return documentation[prefix .. ":" .. name] or (nn.Module[name] and documentation["m:" .. name])
end

describe("documentation", function()
  for place, functions in pairs(places) do
    it(("has all functions of %s"):format(place), function()
      local missing = {}
      for name, f in pairs(functions) do
        if not inner[name] and is_callable(f) and not documentation[place .. "." .. name] then missing[#missing + 1] = name end
      end
      assert.same({}, missing)
    end)
  end

  for prefix, classes in pairs(objects) do
    it(("has all methods %s:..."):format(prefix), function()
      local missing = {}
      for _, class in ipairs(classes) do
        for _, name in ipairs(public_methods(class)) do
          if name ~= "extend" and not is_documented(prefix, name) then missing[#missing + 1] = name end
        end
      end
      assert.same({}, missing)
    end)
  end

  it("has all methods that layers and blocks add", function()
    local missing = {}
    for class_name, class in pairs(nn) do
      for _, name in ipairs(type(class) == "table" and class.class_name and public_methods(class) or {}) do
        local found = name == "extend"
        for prefix in pairs(objects) do found = found or is_documented(prefix, name) end
        if not found then missing[#missing + 1] = class_name .. ":" .. name end
      end
    end
    assert.same({}, missing)
  end)

  it("has nothing that can't be reached", function()
    local lost = {}
    for name in pairs(documentation) do
      local place, field = name:match "^([%a.]+)%.(.+)$"
      local prefix, method = name:match "^(%a+):(.+)$"
      local found = place and places[place] and is_callable(places[place][field])
      for _, class in ipairs(objects[prefix] or {}) do found = found or type(class[method]) == "function" end
      if not found then lost[#lost + 1] = name end
    end
    assert.same({}, lost)
  end)

  it("starts with a signature that names the function, and says something", function()
    for name, text in pairs(documentation) do
      local short = name:match "[%w_]+$"
      assert(text:match("^[^\n]*"):find(short, 1, true), name .. ": " .. text)
      assert(text:match "^[^\n]+\n[^>\n]", name .. " says nothing")
    end
  end)
end)

-- ---- examples ----

-- One program, or, where the lines together are none, a program a line.
local function programs(text)
  local lines = {}
  for line in text:gmatch "\n> ([^\n]*)" do lines[#lines + 1] = line end
  local all = table.concat(lines, "\n")
  if #lines == 0 or load("return " .. all) or load(all) then return #lines == 0 and {} or { all } end
  return lines
end

local function run(program)
  local env = setmetatable({ orepa = orepa, nn = nn, F = orepa.F, optim = optim, data = data, train = orepa.train,
    print = function() end }, { __index = _G })
  local chunk = load("return " .. program, "=example", "t", env) or assert(load(program, "=example", "t", env))
  return chunk()
end

describe("examples", function()
  local tmpname, files, stdout = os.tmpname, {}, io.stdout
  local silent = setmetatable({}, { __index = function() return function() end end })

  setup(function()
    os.tmpname = function() -- luacheck: ignore
      files[#files + 1] = tmpname()
      return files[#files]
    end
    io.stdout = silent -- luacheck: ignore
  end)
  teardown(function()
    os.tmpname, io.stdout = tmpname, stdout -- luacheck: ignore
    for _, path in ipairs(files) do os.remove(path) end
  end)

  local names = {}
  for name in pairs(documentation) do names[#names + 1] = name end
  table.sort(names)
  for _, name in ipairs(names) do
    it(("of %s runs"):format(name), function()
      local list = programs(documentation[name])
      assert(#list > 0 or name:find "^t:.*_$", "there is no example")
      for _, program in ipairs(list) do run(program) end
    end)
  end
end)
