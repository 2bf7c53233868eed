-- orepa.datasets: datasets by name.

local orepa = require "orepa.core"
local document = require "orepa.document"

local datasets = {}

local known = { ["fashion-mnist"] = "orepa.datasets.fashion_mnist" }

function datasets.load(name, options)
  if not known[name] then
    local names = {}
    for other in pairs(known) do names[#names + 1] = other end
    table.sort(names)
    orepa.fail(("datasets.load: no dataset is called '%s' (there are %s)"):format(tostring(name), table.concat(names, " ")))
  end
  return require(known[name]).load(options)
end

document("datasets.load", [[
  datasets.load(name, {folder=, held_out=}) -> dataset
  {train=, valid=, test=, mean=, deviation=, classes=, channels=, class_names=} of a dataset by name: fashion-mnist.
  > pcall(require("orepa.datasets").load, "fashion-mnist", {folder = "/nowhere"})]])

return datasets
