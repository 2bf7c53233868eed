-- Losses, made of other ops: cross-entropy with weights of classes, and those of numbers beside numbers.

local core = require "orepa.core"
local checks = require "orepa.checks"
local document = require "orepa.document"
local options = require "orepa.options"
local F, wide = core.F, checks.wide

local function text_of(t)
  return ("%s on '%s'"):format(checks.text_of(t), t.device)
end

-- ---- what all share ----

local function same_shape(a, b)
  if #a.shape ~= #b.shape then return false end
  for d, size in ipairs(a.shape) do
    if b.shape[d] ~= size then return false end
  end
  return true
end

-- Both as they are computed with: short floats as float32. Shapes are equal; nothing is broadcast.
local function compared(where, x, target)
  for k, t in ipairs { x, target } do
    if not core.is_tensor(t) then core.fail(("%s: argument %d: a tensor expected, got %s"):format(where, k, type(t))) end
    if not t.dtype:find "float" then
      core.fail(("%s: argument %d is %s; floats expected, convert it with to()"):format(where, k, t.dtype))
    end
  end
  if not same_shape(x, target) or x.device ~= target.device then
    core.fail(("%s: %s and %s; one shape and one device expected"):format(where, text_of(x), text_of(target)))
  end
  return wide(x), wide(target)
end

local function check_reduction(where, reduction, also)
  if reduction ~= "mean" and reduction ~= "sum" and reduction ~= "none" and (not also or reduction ~= also) then
    core.fail(('%s: reduction is %s; "mean", "sum"%s or "none" expected'):format(where, tostring(reduction),
      also and (', "%s"'):format(also) or ""))
  end
end

local function reduced(losses, reduction)
  if reduction == "none" then return losses end
  return reduction == "mean" and losses:mean() or losses:sum()
end

-- losses * weight, which is broadcast to them.
local function weighted(where, losses, name, weight)
  if not core.is_tensor(weight) then core.fail(("%s: %s is a %s, a tensor expected"):format(where, name, type(weight))) end
  local product = losses * wide(weight)
  if not same_shape(product, losses) then
    core.fail(("%s: %s is %s, which doesn't broadcast to %s"):format(where, name, text_of(weight), text_of(losses)))
  end
  return product
end

-- ---- cross-entropy: the engine's gives a loss for each row, or their mean ----

local rows_of = F.cross_entropy

-- What logits (N, C, ...) are multiplied with, class by class: a weight (1, C, 1, ...).
local function class_weights(logits, weight)
  local shape = {}
  for d = 1, #logits.shape do shape[d] = 1 end
  if not core.is_tensor(weight) or #weight.shape ~= 1 or weight.shape[1] ~= logits.shape[2] then
    core.fail(("cross_entropy: weight is %s; a number for each of %d classes expected"):format(
      core.is_tensor(weight) and text_of(weight) or type(weight), logits.shape[2]))
  end
  shape[2] = logits.shape[2]
  return wide(weight):detach():reshape(shape)
end

-- The weight of each row's label, 0 for those that don't count: no label is ignore_index and a class too.
local function row_weights(labels, weight, ignore_index)
  local shape = labels.shape
  table.insert(shape, 2, 1)
  local classes = core.arange(0, weight.shape[2] - 1, { dtype = "int64", device = labels.device }):reshape(weight.shape)
  local counted = labels:ne(ignore_index):to(weight.dtype)
  return (labels:reshape(shape):eq(classes):to(weight.dtype) * weight):sum(2) * counted, counted
end

-- With label smoothing s a row is (1 - s) * its label's part + s / C * all classes' parts, weighted each.
local function weighted_rows(logits, labels, o)
  local losses = rows_of(logits, labels, { ignore_index = o.ignore_index, reduction = "none" }) -- checks both
  local weight = class_weights(logits, o.weight)
  local by_label, counted = core.no_grad(function() return row_weights(labels, weight, o.ignore_index) end)
  losses = losses * by_label
  if o.label_smoothing > 0 then
    local all = (F.log_softmax(logits, 2) * weight):sum(2) * counted
    losses = losses * (1 - o.label_smoothing) - all * (o.label_smoothing / logits.shape[2])
  end
  return losses, by_label
end

-- Each row's sum over classes of -weight * probability * log(softmax), where label smoothing s mixes probabilities with s / C.
local function probability_rows(logits, target, o)
  logits, target = compared("cross_entropy", logits, target)
  if o.ignore_index then core.fail "cross_entropy: ignore_index goes with labels, not with probabilities" end
  if #logits.shape < 2 then core.fail(("cross_entropy: logits are %s; (N, C, ...) expected"):format(text_of(logits))) end
  if o.label_smoothing > 0 then
    target = target:multiply_add(1 - o.label_smoothing, o.label_smoothing / logits.shape[2])
  end
  if o.weight then target = target * class_weights(logits, o.weight) end
  return -(F.log_softmax(logits, 2) * target):sum(2)
end

local function is_float(t)
  return core.is_tensor(t) and t.dtype:find "float"
end

local function check_smoothing(smoothing)
  if type(smoothing) ~= "number" or not (smoothing >= 0 and smoothing <= 1) then
    core.fail(("cross_entropy: label_smoothing is %s, it lies between 0 and 1"):format(tostring(smoothing)))
  end
end

function F.cross_entropy(logits, labels, given)
  local o = options("cross_entropy", given, { label_smoothing = 0, ignore_index = options.optional, reduction = "mean",
    weight = options.optional })
  check_reduction("cross_entropy", o.reduction)
  if is_float(labels) then
    check_smoothing(o.label_smoothing)
    return reduced(probability_rows(logits, labels, o), o.reduction)
  end
  o.ignore_index = o.ignore_index or -100
  if not o.weight then
    local losses = rows_of(logits, labels, { label_smoothing = o.label_smoothing, ignore_index = o.ignore_index,
      reduction = o.reduction == "mean" and "mean" or "none" })
    return o.reduction == "sum" and losses:sum() or losses
  end
  check_smoothing(o.label_smoothing)
  local losses, by_label = weighted_rows(logits, labels, o)
  if o.reduction ~= "mean" then return reduced(losses, o.reduction) end
  return losses:sum() / by_label:sum():maximum(1e-30) -- where nothing counts, 0
end

-- ---- negative log-likelihood of what has been through log_softmax ----

local function check_likelihood(x, labels, o)
  for k, t in ipairs { x, labels } do
    if not core.is_tensor(t) then core.fail(("nll_loss: argument %d: a tensor expected, got %s"):format(k, type(t))) end
  end
  local shape = labels.shape
  table.insert(shape, 2, x.shape[2])
  local fits = #x.shape >= 2 and #x.shape == #shape and labels.dtype == "int64" and x.device == labels.device and is_float(x)
  for d, size in ipairs(shape) do fits = fits and x.shape[d] == size end
  if not fits then
    core.fail(("nll_loss: input %s, labels %s; floats (N, C) go with int64 (N), (N, C, H, W) with int64 (N, H, W)"):format(
      text_of(x), text_of(labels)))
  end
  o.ignore_index = type(o.ignore_index) == "number" and math.tointeger(o.ignore_index) or o.ignore_index
  if math.type(o.ignore_index) ~= "integer" then
    core.fail(("nll_loss: ignore_index is %s, a whole number expected"):format(tostring(o.ignore_index)))
  end
end

local function check_classes(classes, count)
  if classes:count() == 0 then return end
  local lowest, highest = classes:min():item(), classes:max():item()
  if lowest < 0 or highest >= count then
    core.fail(("nll_loss: labels from %d to %d; they lie between 0 and %d"):format(lowest, highest, count - 1))
  end
end

function F.nll_loss(x, labels, given)
  local o = options("nll_loss", given, { weight = options.optional, ignore_index = -100, reduction = "mean" })
  check_reduction("nll_loss", o.reduction)
  check_likelihood(x, labels, o)
  x = wide(x)
  local counted = labels:ne(o.ignore_index)
  local classes, shape = core.where(counted, labels, 0), labels.shape
  check_classes(classes, x.shape[2])
  local factor = counted:to(x.dtype)
  if o.weight then
    factor = class_weights(x, o.weight):reshape(-1):index_select(1, classes:reshape(-1)):reshape(shape) * factor
  end
  table.insert(shape, 2, 1)
  local losses = -x:gather(2, classes:reshape(shape)):reshape(labels.shape) * factor
  if o.reduction ~= "mean" then return reduced(losses, o.reduction) end
  return losses:sum() / factor:sum():maximum(1e-30) -- where nothing counts, 0
end

-- ---- numbers beside numbers ----

-- -weight * (pos_weight * y * log(sigmoid(x)) + (1 - y) * log(1 - sigmoid(x))), where log(sigmoid(x)) = -softplus(-x) and
-- log(1 - sigmoid(x)) = -softplus(-x) - x.
function F.binary_cross_entropy_with_logits(x, target, given)
  local where = "binary_cross_entropy_with_logits"
  local o = options(where, given, { weight = options.optional, pos_weight = options.optional, reduction = "mean" })
  check_reduction(where, o.reduction)
  x, target = compared(where, x, target)
  local softplus = (-x):softplus()
  if o.pos_weight then
    softplus = softplus * (weighted(where, target, "pos_weight", o.pos_weight) - target + 1)
  end
  local losses = (1 - target):multiply_add(x, softplus)
  if o.weight then losses = weighted(where, losses, "weight", o.weight) end
  return reduced(losses, o.reduction)
end

function F.mse_loss(x, target, given)
  local o = options("mse_loss", given, { reduction = "mean" })
  check_reduction("mse_loss", o.reduction)
  x, target = compared("mse_loss", x, target)
  local difference = x - target
  return reduced(difference * difference, o.reduction)
end

-- With d = |x - target| and m = min(d, beta) both pieces, d^2 / (2*beta) and d - beta/2, are m * (d - m/2) / beta.
function F.l1_loss(x, target, given)
  local o = options("l1_loss", given, { reduction = "mean" })
  check_reduction("l1_loss", o.reduction)
  x, target = compared("l1_loss", x, target)
  return reduced((x - target):abs(), o.reduction)
end

function F.smooth_l1_loss(x, target, given)
  local o = options("smooth_l1_loss", given, { beta = 1, reduction = "mean" })
  check_reduction("smooth_l1_loss", o.reduction)
  if type(o.beta) ~= "number" or o.beta ~= o.beta or o.beta < 0 then
    core.fail(("smooth_l1_loss: beta is %s, a number of at least 0 expected"):format(tostring(o.beta)))
  end
  x, target = compared("smooth_l1_loss", x, target)
  local distance = (x - target):abs()
  if o.beta == 0 then return reduced(distance, o.reduction) end
  local near = distance:minimum(o.beta)
  return reduced(near * near:multiply_add(-0.5, distance) / o.beta, o.reduction)
end

function F.kl_div(x, target, given)
  local o = options("kl_div", given, { log_target = false, reduction = "mean" })
  check_reduction("kl_div", o.reduction, "batchmean")
  if type(o.log_target) ~= "boolean" then
    core.fail(("kl_div: log_target is %s, true or false expected"):format(tostring(o.log_target)))
  end
  x, target = compared("kl_div", x, target)
  local losses
  if o.log_target then
    losses = target:exp() * (target - x)
  else
    losses = target:xlogy(target) - target * x
  end
  if o.reduction ~= "batchmean" then return reduced(losses, o.reduction) end
  if #x.shape == 0 then core.fail "kl_div: a scalar has no batch to take the mean of" end
  return losses:sum() / x.shape[1]
end

document("F.cross_entropy", [[
  F.cross_entropy(logits, labels, {weight=, label_smoothing=, ignore_index=, reduction=}) -> tensor
  The negative log-likelihood of labels: its mean over rows, their "sum", or with reduction = "none" each row's. logits (N, C)
  with int64 labels (N) that count from 0, or (N, C, H, W) with (N, H, W). Rows labelled ignore_index (-100) don't count. A
  weight (C) multiplies rows by their label, and the mean is divided by the sum of those. Instead of labels there may be
  probabilities, floats of the logits' shape, which may have a gradient too; then the mean is over all rows.
  > F.cross_entropy(orepa.randn(2, 5), orepa.tensor({0, 4}, {dtype = "int64"}))
  > F.cross_entropy(orepa.randn(2, 2), orepa.tensor({0, 1}, {dtype = "int64"}), {weight = orepa.tensor({1, 10})})]])
document("F.binary_cross_entropy_with_logits", [[
  F.binary_cross_entropy_with_logits(x, target, {weight=, pos_weight=, reduction=}) -> tensor
  -(target * log(sigmoid(x)) + (1 - target) * log(1 - sigmoid(x))), accurate for any x: the "mean", the "sum", or with "none"
  each one. Tensors are of one shape; `weight` multiplies each loss, pos_weight the first term, and both are broadcast.
  > F.binary_cross_entropy_with_logits(orepa.randn(4), orepa.tensor({0, 1, 1, 0}))
  > F.binary_cross_entropy_with_logits(orepa.randn(2, 3), orepa.ones(2, 3), {pos_weight = orepa.tensor({1, 2, 3})})]])
document("F.mse_loss", [[
  F.mse_loss(x, target, {reduction=}) -> tensor
  The squared difference of two tensors of one shape: the "mean", the "sum", or with "none" each one.
  > F.mse_loss(orepa.ones(2, 3), orepa.zeros(2, 3))]])
document("F.nll_loss", [[
  F.nll_loss(x, labels, {weight=, ignore_index=, reduction=}) -> tensor
  F.cross_entropy of what has been through log_softmax along the second dimension.
  > F.nll_loss(F.log_softmax(orepa.randn(2, 5), 2), orepa.tensor({0, 4}, {dtype = "int64"}))]])
document("F.l1_loss", [[
  F.l1_loss(x, target, {reduction=}) -> tensor
  The absolute difference of two tensors of one shape: the "mean", the "sum", or with "none" each one.
  > F.l1_loss(orepa.ones(2, 3), orepa.zeros(2, 3))]])
document("F.smooth_l1_loss", [[
  F.smooth_l1_loss(x, target, {beta=, reduction=}) -> tensor
  With d = |x - target|: d^2 / (2*beta) up to beta (1), then d - beta/2; with beta = 0 it is d. Tensors are of one shape;
  reduction is "mean", "sum" or "none".
  > F.smooth_l1_loss(orepa.tensor({0.5, 4}), orepa.zeros(2))]])
document("F.kl_div", [[
  F.kl_div(x, target, {reduction=, log_target=}) -> tensor
  target * (log(target) - x), where x has logarithms of probabilities and target probabilities, or, with log_target, logarithms
  too. reduction is "mean" (over all elements), "batchmean" (the sum divided by the first size, which is the divergence),
  "sum" or "none".
  > F.kl_div(F.log_softmax(orepa.randn(2, 5), 2), F.softmax(orepa.randn(2, 5), 2), {reduction = "batchmean"})]])
