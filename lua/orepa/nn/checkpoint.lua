-- checkpoint: a module whose maps are not kept for the backward pass but computed again in it.

local core = require "orepa.core"
local document = require "orepa.document"
local module = require "orepa.nn.module"
local Module, internal = module.Module, module.internal
local WRAPPED = internal.WRAPPED

local Checkpoint = Module:extend("Checkpoint")

function Checkpoint:init(wrapped)
  if not internal.is_module(wrapped) then
    core.fail(("nn.checkpoint: a module expected, got %s"):format(core.is_tensor(wrapped) and "a tensor" or type(wrapped)))
  end
  rawset(self, WRAPPED, wrapped)
  rawset(self, "training", wrapped.training)
end

function Checkpoint:forward(...)
  if not self.training then return self[WRAPPED](...) end
  return core.checkpoint(self[WRAPPED], ...)
end

-- The wrapped module stands where this one does.
function Checkpoint:each(visit)
  visit("", self[WRAPPED], "module")
end

function Checkpoint:describe(indent)
  return "checkpoint of " .. self[WRAPPED]:describe(indent)
end

document("nn.checkpoint", [[
  nn.checkpoint(module) -> module
  Wraps a module so that in training it keeps only its inputs: backward computes the rest again, with the same random numbers
  of tensors and without a second update of running statistics, and gives the same gradients to the bit. It costs one more
  forward pass of the module and saves all maps inside it. Paths and state dicts are those of the module itself, so one may be
  wrapped where it stands in a model: `self.stage1[1] = nn.checkpoint(self.stage1[1])`. The module must compute the same both
  times (it may look at orepa.is_recomputing) and give tensors; forward hooks inside it run both times. The generator of orepa's
  random numbers is put back for the second time; Lua's math.random is not, so a module that draws from it must keep what it
  drew. In evaluation and under no_grad it is just the module.
  > local m = nn.checkpoint(nn.Sequential(nn.Linear{in_features = 2, out_features = 2}, nn.ReLU()))
  > m(orepa.ones(1, 2)):sum():backward(); return m:get("0.weight").grad]])

return { checkpoint = Checkpoint }
