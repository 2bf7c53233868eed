-- Prints the reference of all functions, docs/reference.md, from the documentation that they carry.

local orepa = require "orepa"
require "orepa.models"
require "orepa.datasets"

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
  { "reparam", "The layers of a block's description", "`orepa.reparam`; [blocks.md](blocks.md) is the manual." },
  { "optim", "Optimizers and schedules", "`orepa.optim`" }, { "opt", "Methods of optimizers" },
  { "profile", "Methods of profiles", "What `orepa.profile` gives." },
  { "diagnose", "Diagnostics", "`orepa.diagnose`" }, { "watch", "Methods of watches" },
  { "data", "Data", "`orepa.data`" }, { "loader", "Methods of loaders" },
  { "image", "Pictures", "`orepa.image`: PNG and JPEG, and what is done with pictures." },
  { "train", "Training", "`orepa.train`" }, { "live", "Methods of live views", "What `orepa.watch` gives." },
  { "models", "Models", '`require "orepa.models"`' }, { "datasets", "Datasets", '`require "orepa.datasets"`' },
}

local by_prefix = {}
for name, text in pairs(orepa.documentation) do
  local prefix = name:match "^(%w+)[.:]"
  by_prefix[prefix] = by_prefix[prefix] or {}
  table.insert(by_prefix[prefix], { name = name, text = text })
end

local function entry(text)
  local signature, rest = text:match "^([^\n]*)\n?(.*)$"
  local words, example = {}, {}
  for line in rest:gmatch "[^\n]+" do
    local code = line:match "^> ?(.*)$"
    table.insert(code and example or words, code or line)
  end
  print(("`%s`\n"):format(signature))
  if #words > 0 then print(table.concat(words, "\n") .. "\n") end
  if #example > 0 then print(("```lua\n%s\n```\n"):format(table.concat(example, "\n"))) end
end

print "# Reference\n\nMade by `build/orepa scripts/reference.lua > docs/reference.md`; tests run every example.\n"
for _, section in ipairs(sections) do
  local prefix, title, words = table.unpack(section)
  local entries = assert(by_prefix[prefix], prefix)
  by_prefix[prefix] = nil
  table.sort(entries, function(a, b) return a.name < b.name end)
  print(("## %s\n"):format(title))
  if words then print(words .. "\n") end
  for _, e in ipairs(entries) do entry(e.text) end
end
assert(not next(by_prefix), "no section for " .. tostring(next(by_prefix)))
