-- Table 1 of the paper: the norms behind the branches of DBB and RepVGG are removed, so that one norm behind the sum is left; and
-- scalings take their place. Test accuracy on Fashion-MNIST.
--
--     build/orepa scripts/paper/table1.lua --seeds 3

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"

study.options("table1.lua", "Branch norms removed from DBB and RepVGG.")
study.accuracies("table1", "Table 1: norms behind branches removed", {
  "plain", "dbb", "dbb-bare", "dbb-scaled", "vgg-plain", "repvgg", "repvgg-bare", "repvgg-scaled" })
