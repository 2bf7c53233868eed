-- Table 5 of the paper: RepVGG-A0 plain, as published and as OREPA-VGG: accuracy on Fashion-MNIST, memory and time of a step at
-- 224 px.
--
--     build/orepa scripts/paper/table5.lua --seeds 3 --batch-size 32

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"

study.options("table5.lua", "RepVGG-A0: plain, RepVGG, OREPA-VGG.")
study.accuracies_and_costs("table5", "Table 5: RepVGG-A0", { "vgg-plain", "repvgg", "orepa-vgg" })
