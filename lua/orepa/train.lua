-- train: the loop that all scripts use. It shows what happens, evaluates exactly, and stops at the first loss or gradient that
-- is not finite, saying where.

local core = require "orepa.core"
local document = require "orepa.document"
local options = require "orepa.options"
local view = require "orepa.view"
local F = core.F

local train = {}

-- ---- what is seen on the way ----

local BAR = 24

local function duration(seconds)
  seconds = math.floor(seconds + 0.5)
  if seconds < 60 then return ("%ds"):format(seconds) end
  if seconds < 3600 then return ("%dm%02ds"):format(seconds // 60, seconds % 60) end
  return ("%dh%02dm"):format(seconds // 3600, seconds % 3600 // 60)
end

-- Sums over an epoch: mean loss, accuracy, images a second.
local Meter = {}
Meter.__index = Meter

local function meter()
  return setmetatable({ loss = 0, correct = 0, images = 0, start = core.clock() }, Meter)
end

function Meter:add(loss_sum, correct, images)
  self.loss, self.correct, self.images = self.loss + loss_sum, self.correct + correct, self.images + images
end

function Meter:result()
  local n, seconds = math.max(1, self.images), core.clock() - self.start
  return { loss = self.loss / n, accuracy = self.correct / n, images = self.images, seconds = seconds,
    images_per_second = self.images / math.max(seconds, 1e-9) }
end

local function progress_text(title, sums, step, steps)
  local r, filled = sums:result(), math.floor(BAR * step / steps)
  return ("%s [%s%s] %d/%d  accuracy %.2f %%  %s left"):format(title, ("="):rep(filled), (" "):rep(BAR - filled), step, steps,
    100 * r.accuracy, duration(r.seconds / step * (steps - step)))
end

local function show_epoch(log, title, r, valid)
  local text = ("%s  loss %.4f  accuracy %.2f %%  %.0f images/s  %s"):format(title, r.loss, 100 * r.accuracy,
    r.images_per_second, duration(r.seconds))
  if valid then text = ("%s  |  held out: loss %.4f  accuracy %.2f %%"):format(text, valid.loss, 100 * valid.accuracy) end
  log:write(text, "\n")
  log:flush()
end

-- ---- evaluation ----

local function count_correct(logits, labels)
  local found <close> = logits:argmax(2)
  local right <close> = found:eq(labels)
  local count <close> = right:sum()
  return count:item()
end

-- Puts the network into evaluation mode for a call; each module gets its own mode back.
local function in_evaluation(net, f)
  local modes = {}
  for _, module in net:named_modules() do modes[module] = module.training end
  net:eval()
  local results = table.pack(pcall(core.no_grad, f))
  for module, mode in pairs(modes) do
    if rawget(module, "training") ~= mode then rawset(module, "training", mode) end
  end
  if not results[1] then error(results[2], 0) end
  return table.unpack(results, 2, results.n)
end

-- Sums over samples, so that batches may be of unequal size.
function train.evaluate(net, loader)
  return in_evaluation(net, function()
    local sums = meter()
    for images, labels in loader:epoch(1) do
      local logits <close> = net(images)
      local losses <close> = F.cross_entropy(logits, labels, { reduction = "none" })
      sums:add(losses:sum():item(), count_correct(logits, labels), labels.shape[1])
      images:release()
    end
    return sums:result()
  end)
end

-- ---- training ----

local function is_finite(x)
  return x == x and x ~= math.huge and x ~= -math.huge
end

local function stop(what, epoch, step, rate)
  error(("train: %s in epoch %d, step %d (rate %.3g)"):format(what, epoch, step, rate), 0)
end

-- One step; gives the loss, the gradients' norm and how many were right. The last step's gradients go first: the forward pass
-- needs the room.
local function one_step(o, images, labels, epoch, step)
  o.optimizer:zero_grad()
  local logits <close> = o.net(images)
  local loss <close> = o.loss(logits, labels)
  local value = loss:item()
  if not is_finite(value) then stop(("the loss is %s"):format(value), epoch, step, o.optimizer.lr) end
  loss:backward()
  local norm, culprit = o.optimizer:gradient_norm()
  if not is_finite(norm) then
    stop(("the gradient of '%s' is not finite"):format(culprit), epoch, step, o.optimizer.lr)
  end
  o.optimizer:step()
  return value, norm, core.no_grad(function() return count_correct(logits, labels) end)
end

-- All batches, or those until Ctrl-C.
local function one_epoch(o, epoch, first_step)
  local sums, step, title, last = meter(), 0, ("epoch %d/%d"):format(epoch, o.epochs), core.clock()
  for images, labels in o.loader:epoch(epoch) do
    step = step + 1
    if o.schedule then o.optimizer.lr = o.schedule(first_step + step) end
    local n = labels.shape[1]
    local loss, norm, correct = one_step(o, images, labels, epoch, step)
    images:release()
    labels:release()
    sums:add(loss * n, correct, n)
    if o.view then
      local now = core.clock()
      o.view:add("loss", loss)
      o.view:add("rate", o.optimizer.lr)
      o.view:add("gradient", norm)
      o.view:add("images/s", n / math.max(1e-9, now - last))
      last = now
      o.view:draw(function() return progress_text(title, sums, step, o.loader.batches) end)
    end
    if core.interrupt_came() then
      title = ("%s, interrupted after step %d of %d"):format(title, step, o.loader.batches)
      break
    end
  end
  return sums:result(), step, title
end

function train.fit(given)
  local o = options("train.fit", given, { net = options.required, optimizer = options.required, loader = options.required,
    epochs = options.required, schedule = options.optional, valid = options.optional, on_epoch = options.optional,
    loss = function(logits, labels) return F.cross_entropy(logits, labels) end, log = io.stdout })
  o.view = view.on_terminal(o.log)
  local history, steps = {}, 0
  local _ <close> = core.hold_interrupt()
  if not o.net.training then o.net:train() end -- else each module keeps its own mode, such as that of a frozen norm
  for epoch = 1, o.epochs do
    local result, taken, title = one_epoch(o, epoch, steps)
    steps = steps + taken
    result.epoch, result.rate = epoch, o.optimizer.lr
    result.valid = o.valid and train.evaluate(o.net, o.valid) or nil
    history[epoch] = result
    if o.view then o.view:clear() end
    show_epoch(o.log, title, result, result.valid)
    if core.interrupt_came() then history.interrupted = true end
    if o.on_epoch then o.on_epoch(result) end
    if history.interrupted then break end
  end
  return history
end

document("train.fit", [[
  train.fit{net=, optimizer=, loader=, epochs=, schedule=, valid=, loss=, on_epoch=, log=} -> history
  Trains: for each epoch all batches of the loader, then the held-out ones. schedule(step) gives the rate; on_epoch(result) is
  called after each epoch. A terminal shows progress meanwhile, with bars of the losses, the rate, the gradients' norm and the
  speed. A loss or a gradient that is not finite is an error that names the step and the parameter. Ctrl-C ends the epoch after
  the step that runs, as if it had no more batches, and with it the training; history.interrupted says so. A second one within
  two seconds ends the program.
  > local d = data.images{images = orepa.rand(8, 1, 4, 4), labels = orepa.zeros({8}, {dtype = "int64"}), classes = 2}
  > local net = nn.Sequential(nn.Conv2d{in_channels = 1, out_channels = 2, kernel_size = 4}, nn.AdaptiveAvgPool2d(1))
  > local Head = nn.Module:extend("Head"); function Head:init() self.body = net end
  > function Head:forward(x) return self.body(x):flatten(2) end
  > local head = Head()
  > return train.fit{net = head, optimizer = optim.SGD(head:parameters(), {lr = 0.1}), epochs = 1,
  >   loader = data.loader{dataset = d, batch_size = 4}}]])
document("train.evaluate", [[
  train.evaluate(net, loader) -> {loss=, accuracy=, images=, seconds=, images_per_second=}
  Mean loss and accuracy in evaluation mode, exact over batches of unequal size.
  > local d = data.images{images = orepa.rand(5, 1, 1, 2), labels = orepa.zeros({5}, {dtype = "int64"}), classes = 2}
  > local Flat = nn.Module:extend("Flat"); function Flat:forward(x) return x:flatten(2) end
  > return train.evaluate(Flat(), data.loader{dataset = d, batch_size = 2})]])

return train
