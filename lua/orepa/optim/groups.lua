-- Groups of parameters: whose rate and decay differ, and by which factors.

local document = require "orepa.document"

local groups = {}

-- The reference's rule: a parameter whose name has "bias", "bn" or "prior" in it is not decayed; one with "bias" has twice the
-- rate.
local function reference_rule(name)
  local function has(word) return name:find(word, 1, true) ~= nil end
  return { rate_factor = has "bias" and 2 or 1, decay_factor = (has "bias" or has "bn" or has "prior") and 0 or 1 }
end

-- One group a parameter, with its name, so that errors can tell which it is.
function groups.param_groups(net, rule)
  rule = rule or reference_rule
  local list = {}
  for name, p in net:named_parameters() do
    local factors = rule(name, p) or {}
    list[#list + 1] = { name = name, parameters = { p }, rate_factor = factors.rate_factor or 1,
      decay_factor = factors.decay_factor or 1 }
  end
  return list
end

document("optim.param_groups", [[
  optim.param_groups(net, rule) -> groups
  One group for each parameter; rule(name, p) gives {rate_factor=, decay_factor=}. By default the reference's: no decay for
  names with bias, bn or prior, twice the rate for bias.
  > #optim.param_groups(nn.Linear{in_features = 2, out_features = 2})]])

return groups
