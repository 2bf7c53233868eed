-- Losses as modules: each is its options and one call of orepa.F with a prediction and a target.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local module = require "orepa.nn.module"
local F, optional = core.F, options.optional

local losses = {}

local layer = module.internal.lister(losses)

-- Options that are tensors become buffers, so that they move with the module.
local function loss(name, f, known, example)
  local class, compute, words = layer(name), F[f], {}
  function class:init(o)
    local plain = options(name, o, known)
    for key, value in pairs(plain) do
      if core.is_tensor(value) then
        self:register_buffer(key, value)
        plain[key] = nil
      end
    end
    self.options, self.tensors = plain, {}
    for _, key in ipairs(options.names(known)) do
      if rawget(self, key) then self.tensors[#self.tensors + 1] = key end
    end
  end
  function class:forward(x, target)
    local o = options.with(self.options, {})
    for _, key in ipairs(self.tensors) do o[key] = self[key] end
    return compute(x, target, o)
  end
  function class:extra()
    return self.options.reduction == "mean" and "" or tostring(self.options.reduction)
  end
  for k, key in ipairs(options.names(known)) do words[k] = key .. "=" end
  document("nn." .. name, ("nn.%s{%s} -> module\nF.%s of a prediction and a target, with these options.\n> nn.%s()(%s)"):format(
    name, table.concat(words, ", "), f, name, example))
end

local two = "orepa.randn(4), orepa.ones(4)"
loss("CrossEntropyLoss", "cross_entropy", { weight = optional, label_smoothing = 0, ignore_index = optional, reduction = "mean" },
  "orepa.randn(2, 5), orepa.tensor({0, 4}, {dtype = \"int64\"})")
loss("NLLLoss", "nll_loss", { weight = optional, ignore_index = -100, reduction = "mean" },
  "F.log_softmax(orepa.randn(2, 5), 2), orepa.tensor({0, 4}, {dtype = \"int64\"})")
loss("BCEWithLogitsLoss", "binary_cross_entropy_with_logits", { weight = optional, pos_weight = optional,
  reduction = "mean" }, two)
loss("MSELoss", "mse_loss", { reduction = "mean" }, two)
loss("L1Loss", "l1_loss", { reduction = "mean" }, two)
loss("SmoothL1Loss", "smooth_l1_loss", { beta = 1, reduction = "mean" }, two)
loss("KLDivLoss", "kl_div", { log_target = false, reduction = "mean" },
  "F.log_softmax(orepa.randn(2, 5), 2), orepa.ones(2, 5) / 5")

return losses
