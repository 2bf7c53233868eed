-- Table 3 of the paper: a scaling for each channel, one for each branch, none; and no norm behind the sum, which diverges and is
-- caught. Test accuracy on Fashion-MNIST.
--
--     build/orepa scripts/paper/table3.lua --seeds 3

package.path = (arg[0]:match "^.*/" or "") .. "?.lua;" .. package.path
local study = require "study"

study.options("table3.lua", "Kinds of scaling, and the norm behind the sum.")
study.accuracies("table3", "Table 3: scalings and the norm behind the sum", {
  "plain", "scaling-vector", "scaling-scalar", "scaling-none", "no-post-norm" })
