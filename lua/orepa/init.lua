-- orepa: tensors, layers, blocks that squeeze, training. The engine is C (orepa.core); this puts the library around it.

local orepa = require "orepa.core"

require "orepa.indexing"
require "orepa.tensors"
require "orepa.einsum"
require "orepa.functional"
require "orepa.losses"
require "orepa.resize"
orepa.nn = require "orepa.nn"
orepa.optim = require "orepa.optim"
orepa.reparam = require "orepa.reparam"
for name, value in pairs(require "orepa.data") do
  orepa.data[name] = value
end
require "orepa.plot"
orepa.train = require "orepa.train"
orepa.diagnose = require "orepa.diagnose"
orepa.gradcheck = require "orepa.gradcheck"
orepa.watch = require("orepa.view").watch
orepa.profile = require "orepa.profile"
orepa.state_dict = require("orepa.state").select

return orepa
