-- Table 4 of the paper: ResNet-18 plain, with DBB and with OREPA: accuracy on Fashion-MNIST, memory and time of a step at 224 px.
--
--     build/orepa scripts/paper/table4.lua --seeds 3 --batch-size 32

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"

study.options("table4.lua", "ResNet-18: plain, DBB, OREPA.")
study.accuracies_and_costs("table4", "Table 4: ResNet-18", { "plain", "dbb", "orepa" })
