-- Writes the reference of all functions into a folder, docs/reference, from the documentation that they carry: a page for each
-- section, and README.md, which lists all names.

local orepa = require "orepa"
local lfs = require "lfs"
require "orepa.models"
require "orepa.datasets"

local folder = arg[1]
if #arg ~= 1 or folder:sub(1, 1) == "-" then
  io.stderr:write "usage: build/orepa scripts/reference.lua docs/reference\n"
  os.exit(2)
end

local sections = {
  { "orepa", "Tensors and the engine", "`orepa.zeros` makes a tensor; a first argument that is a list is its shape." },
  { "t", "Methods of tensors",
    "`t` is a tensor; names that end in `_` change it in place. Dimensions and positions count from 1." },
  { "hook", "Methods of hooks", "What `t:register_hook` gives." },
  { "ctx", "Methods of contexts", "What the functions of an `orepa.Function` get first." },
  { "F", "Functions of layers", "`orepa.F`" },
  { "nn", "Layers and blocks", "`orepa.nn`" },
  { "m", "Methods of modules", "`m` is a module." },
  { "b", "Methods of blocks" }, { "norm", "Methods of batch norms" }, { "list", "Methods of lists of modules" },
  { "reparam", "The layers of a block's description", "`orepa.reparam`; [blocks.md](../blocks.md) is the manual." },
  { "optim", "Optimizers and schedules", "`orepa.optim`" }, { "opt", "Methods of optimizers" },
  { "profile", "Methods of profiles", "What `orepa.profile` gives." },
  { "diagnose", "Diagnostics", "`orepa.diagnose`" }, { "watch", "Methods of watches" },
  { "data", "Data", "`orepa.data`" }, { "loader", "Methods of loaders" },
  { "image", "Pictures", "`orepa.image`: PNG and JPEG, and what is done with pictures." },
  { "train", "Training", "`orepa.train`" }, { "live", "Methods of live views", "What `orepa.watch` gives." },
  { "models", "Models", '`require "orepa.models"`' }, { "datasets", "Datasets", '`require "orepa.datasets"`' },
}

local MADE = "Made by `build/orepa scripts/reference.lua docs/reference`; tests run every example.\n"

-- The documentation's names by their first word, sorted.
local names = {}
for name in pairs(orepa.documentation) do
  local prefix = name:match "^(%w+)[.:]"
  names[prefix] = names[prefix] or {}
  table.insert(names[prefix], name)
end
for _, list in pairs(names) do table.sort(list) end

-- A name's heading, as what shows Markdown pages makes a link's target of it.
local function link(page, name) return ("[`%s`](%s#%s)"):format(name, page, name:lower():gsub("[^%w_]", "")) end

local function entry(name)
  local signature, rest = orepa.documentation[name]:match "^([^\n]*)\n?(.*)$"
  local words, example = {}, {}
  for line in rest:gmatch "[^\n]+" do
    local code = line:match "^> ?(.*)$"
    table.insert(code and example or words, code or line)
  end
  local parts = { "## " .. name, "`" .. signature .. "`", table.concat(words, "\n") }
  if #example > 0 then parts[4] = "```lua\n" .. table.concat(example, "\n") .. "\n```" end
  return table.concat(parts, "\n\n") .. "\n"
end

local function write(page, lines)
  local file <close> = assert(io.open(folder .. "/" .. page, "w"))
  assert(file:write(table.concat(lines, "\n")))
end

lfs.mkdir(folder)
local index = { "# Reference\n", MADE }
for _, section in ipairs(sections) do
  local prefix, title, words = table.unpack(section)
  local page, links, lines = title:lower():gsub("'", ""):gsub("%W+", "-") .. ".md", {}, { "# " .. title .. "\n" }
  if words then lines[2] = words .. "\n" end
  for _, name in ipairs(assert(names[prefix], prefix)) do
    links[#links + 1] = link(page, name)
    lines[#lines + 1] = entry(name)
  end
  names[prefix] = nil
  write(page, lines)
  index[#index + 1] = ("## [%s](%s)\n\n%s%s\n"):format(title, page, words and words .. "\n\n" or "", table.concat(links, "\n"))
end
assert(not next(names), "no section for " .. tostring(next(names)))
write("README.md", index)
