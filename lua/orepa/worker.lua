-- worker: what a loader's worker runs, in a Lua state of its own. Gives the number of samples, and a function that makes a batch.

require "orepa" -- all of it, as the dataset's module may expect
local samples = require "orepa.samples"

return function(settings)
  local batches = samples.open(settings)
  return batches.size, function(epoch, number) return batches:make(epoch, number) end
end
