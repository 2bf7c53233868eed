-- What all optimizers do: keep and load a state, count steps that found no gradient, hold no more memory from step to step, check
-- their options.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, optim = orepa.nn, orepa.optim

local makers = {
  SGD = { lr = 0.05, momentum = 0.9, weight_decay = 0.1 },
  AdamW = { lr = 0.05, weight_decay = 0.1 },
  RMSprop = { lr = 0.05, momentum = 0.9, centered = true, weight_decay = 0.1 },
}

-- Two parameters with the steps that optimizers may take on them.
local function workload(name, values)
  local parameters = { nn.Parameter(orepa.tensor(values or { 1, -2, 0.5 })), nn.Parameter(orepa.ones(2, 1, 3, 3)) }
  local opt = optim[name](parameters, makers[name])
  return parameters, opt, function(steps)
    for _ = 1, steps do
      opt:zero_grad()
      for _, p in ipairs(parameters) do (p * p + p):sum():backward() end
      opt:step()
    end
  end
end

for name, options in pairs(makers) do
  describe(name, function()
    it("goes on from a saved state as if it had not been interrupted", function()
      local straight, _, run = workload(name)
      run(7)
      local parameters, opt, first = workload(name)
      first(3)
      local path = os.tmpname()
      orepa.save(path, opt:state_dict())
      local again = optim[name](parameters, options)
      again:load_state_dict((orepa.load(path)))
      os.remove(path)
      for _ = 1, 4 do
        again:zero_grad()
        for _, p in ipairs(parameters) do (p * p + p):sum():backward() end
        again:step()
      end
      for k, p in ipairs(parameters) do assert.same(straight[k]:tolist(), p:tolist()) end
    end)

    it("starts anew from the state of one that never stepped", function()
      local parameters, opt, run = workload(name)
      run(2)
      local _, fresh = workload(name)
      opt:load_state_dict(fresh:state_dict())
      local same = { nn.Parameter(parameters[1]:detach():clone()), nn.Parameter(parameters[2]:detach():clone()) }
      local other = optim[name](same, options)
      for _, set in ipairs { { opt, parameters }, { other, same } } do
        set[1]:zero_grad()
        for _, p in ipairs(set[2]) do (p * p):sum():backward() end
        set[1]:step()
      end
      for k, p in ipairs(parameters) do assert.same(same[k]:tolist(), p:tolist()) end
    end)

    it("changes nothing of a state that doesn't fit, and names what", function()
      local _, opt, run = workload(name)
      run(1)
      local kind = name == "SGD" and "velocity" or "square"
      local state = opt:state_dict()
      local function with(key, value)
        local copy = {}
        for k, t in pairs(state) do copy[k] = t end
        copy[key] = value
        return copy
      end
      local before = state[kind .. ".1"]:tolist()
      fails(name .. ": the state has 'x.1', which this optimizer of 2 parameters doesn't keep", opt.load_state_dict, opt,
        with("x.1", orepa.ones(3)))
      fails(name .. ": the state has '" .. kind .. ".3'", opt.load_state_dict, opt, with(kind .. ".3", orepa.ones(3)))
      fails(name .. ": the state has 'x'", opt.load_state_dict, opt, with("x", orepa.ones(3)))
      fails(name .. ": '" .. kind .. ".1' is 4, the parameter 'parameter 1' 3", opt.load_state_dict, opt,
        with(kind .. ".1", orepa.ones(4)))
      fails(name .. ": '" .. kind .. ".1' is number", opt.load_state_dict, opt, with(kind .. ".1", 1))
      fails(name .. ": a table of tensors expected, got nil", opt.load_state_dict, opt)
      assert.same(before, opt:state_dict()[kind .. ".1"]:tolist())
    end)

    it("leaves alone what has no gradient, and counts steps that found none", function()
      local parameters, opt = workload(name)
      opt:step()
      assert.equal(1, opt.skipped)
      parameters[1].grad = orepa.ones(3)
      opt:step()
      assert.equal(1, opt.skipped)
      assert.not_same({ 1, -2, 0.5 }, parameters[1]:tolist())
      assert.equal(18, parameters[2]:sum():item())
      assert.is_nil(opt:state_dict()[(name == "SGD" and "velocity" or "square") .. ".2"])
    end)

    it("holds as much memory after many steps as before, without any collection", function()
      local _, opt, run = workload(name)
      run(1)
      opt:zero_grad()
      collectgarbage()
      collectgarbage "stop"
      local before = orepa.memory().live
      for _ = 1, 20 do
        for _, p in ipairs(opt.parameters) do
          local g <close> = orepa.ones(p.shape)
          p.grad = g
        end
        opt:step()
        opt:zero_grad()
        assert.equal(before, orepa.memory().live)
      end
      collectgarbage "restart"
    end)

    it("is one step a rate and an option, which are checked", function()
      local p = nn.Parameter(orepa.ones(1))
      fails(name .. ": option 'lr' is missing", optim[name], { p })
      fails(name .. ": unknown option 'rate'", optim[name], { p }, { lr = 1, rate = 1 })
      fails(name .. ": there is nothing to train", optim[name], {}, { lr = 1 })
      for _, wrong in ipairs { "1", -1, 0 / 0, true } do
        fails(name .. ": lr is .*, a number of at least 0 expected", optim[name], { p }, { lr = wrong })
      end
    end)
  end)
end

describe("AdamW and RMSprop", function()
  local p = nn.Parameter(orepa.ones(1))

  it("check their factors", function()
    for _, wrong in ipairs { 1, -0.1, "x", 0 / 0 } do
      fails("AdamW: betas%[2%] is .*, a number of at least 0 and less than 1", optim.AdamW, { p },
        { lr = 1, betas = { 0.9, wrong } })
      fails("RMSprop: alpha is .*, a number of at least 0 and less than 1", optim.RMSprop, { p }, { lr = 1, alpha = wrong })
    end
    fails("AdamW: betas: a list of two numbers expected", optim.AdamW, { p }, { lr = 1, betas = 0.9 })
    fails("AdamW: eps is %-1", optim.AdamW, { p }, { lr = 1, eps = -1 })
    fails("RMSprop: centered is 1, true or false expected", optim.RMSprop, { p }, { lr = 1, centered = 1 })
    local opt = optim.AdamW({ p }, { lr = 1 })
    fails("AdamW: 'steps' is nil; an int64 for each of 1 parameters expected", opt.load_state_dict, opt, {})
    fails("AdamW: 'steps' is int64 2", opt.load_state_dict, opt, { steps = orepa.zeros({ 2 }, { dtype = "int64" }) })
  end)

  it("change nothing when memory runs out in a step", function()
    for _, name in ipairs { "AdamW", "RMSprop" } do
      local small, big = nn.Parameter(orepa.ones(4)), nn.Parameter(orepa.ones(1 << 20))
      local opt = optim[name]({ small, big }, { lr = 0.1 })
      opt:zero_grad()
      small.grad, big.grad = orepa.ones(4), orepa.ones(1 << 20)
      collectgarbage()
      orepa.set_memory_limit(orepa.memory().live + (4 << 20))
      local ok, message = pcall(opt.step, opt)
      orepa.set_memory_limit(nil)
      assert.is_false(ok)
      assert.matches("out of memory", message)
      for k, t in ipairs { small, big } do
        assert.equal(1, t:min():item())
        assert.equal(0, opt:state_dict()["square." .. k]:max():item())
      end
      opt:step()
      assert.is_true(small:max():item() < 1 and big:max():item() < 1)
    end
  end)

  it("stay finite where rounding makes a variance negative", function()
    local q = nn.Parameter(orepa.zeros(64))
    local opt = optim.RMSprop({ q }, { lr = 1e-3, alpha = 0.9, eps = 1e-3, centered = true })
    local g = orepa.rand(64) + 0.5
    for step = 1, 300 do -- the means come down to g, and rounding stops them before they are there
      q.grad = step <= 20 and g * 2 or g
      opt:step()
    end
    local mean, square = opt:state_dict()["mean.1"], opt:state_dict()["square.1"]
    assert.is_true((square - mean * mean):min():item() < 0)
    assert.is_true(q:sum():item() < 0) -- a number
  end)
end)

describe("clip_grad_norm_ with non_finite = \"skip\"", function()
  for name in pairs(makers) do
    it("makes the next step of " .. name .. " one that is skipped and counted", function()
      local parameters, opt, run = workload(name)
      run(2)
      local before, state = parameters[1]:tolist(), opt:state_dict()[name == "SGD" and "velocity.1" or "square.1"]:tolist()
      parameters[1].grad, parameters[2].grad = orepa.tensor { 1, 0 / 0, 1 }, orepa.ones(2, 1, 3, 3)
      local norm = optim.clip_grad_norm_(parameters, 1, { non_finite = "skip" })
      assert.is_true(norm ~= norm)
      opt:step()
      assert.equal(1, opt.skipped)
      assert.same(before, parameters[1]:tolist())
      assert.same(state, opt:state_dict()[name == "SGD" and "velocity.1" or "square.1"]:tolist())
      run(1)
      assert.equal(1, opt.skipped)
      assert.not_same(before, parameters[1]:tolist())
    end)
  end
end)
