-- For specs: whether a network trains. A few steps down its gradient, each as long as makes a small part of the loss vanish by
-- the first derivative: the loss falls whatever the network, and rounding doesn't decide. Each step begins with the same running
-- statistics, as the padding of offline blocks follows them. Gives the first loss and the last.

local orepa = require "orepa"

local STEPS, PART = 3, 0.01

return function(net, loss_of)
  net:train()
  local first, last
  local buffers = {}
  for name, b in net:named_buffers() do buffers[name] = b:clone() end
  for _ = 1, STEPS do
    net:zero_grad()
    for name, b in net:named_buffers() do b:copy_(buffers[name]) end
    local loss = loss_of(net)
    loss:backward()
    last = loss:item()
    first = first or last
    local squares = 0
    for _, p in ipairs(net:parameters()) do
      if p.grad then squares = squares + (p.grad * p.grad):sum():item() end
    end
    orepa.no_grad(function()
      for _, p in ipairs(net:parameters()) do
        if p.grad then p:add_(p.grad * (-PART * last / squares)) end
      end
    end)
  end
  net:zero_grad()
  return first, last
end
