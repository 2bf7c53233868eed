-- What blocks do while they live: training leaves the branches alone, evaluation never uses an old kernel, deploying is exact
-- and happens once, state dicts have the reference's names.

local orepa = require "orepa"
local models = require "orepa.models"
local descriptions = require "tests.spec.descriptions"
local nn, F, L, optim = orepa.nn, orepa.F, orepa.reparam, orepa.optim

local EXACT, CLOSE = 0, 3e-5

-- Name and constructor of each kind of block; some take more options.
local function example(o)
  o.in_channels, o.out_channels, o.kernel_size = 4, 6, 3
  o.branches = {
    { name = "plain", scale = 0.25, L.conv { 3 } },
    { name = "smooth", scale = 0.25, L.conv { 1 }, L.average { 3 } },
    { name = "deep", scale = 0.5, L.conv { 1, plus_identity = true }, L.conv { { 3, 1 } }, L.conv { { 1, 3 } } },
    { name = "nest", L.nest { 3, branches = { { L.conv { 3 } }, { L.depthwise { 3, expand = 2 }, L.conv { 1 } } } } },
  }
  return nn.ReparamBlock(o)
end

local function maker(kind, I, O, k, groups)
  return function(o)
    o.in_channels, o.out_channels, o.kernel_size, o.groups, o.act = I, O, k, groups, o.act or "none"
    return nn[kind](o)
  end
end

local makers = {
  { "ConvBN", maker("ConvBN", 4, 6, 3) }, { "OREPA", maker("OREPA", 4, 6, 3) },
  { "OREPA of 2 groups", maker("OREPA", 4, 6, 3, 2) }, { "OREPA1x1", maker("OREPA1x1", 4, 6, 1) },
  { "OREPALargeConvBase", maker("OREPALargeConvBase", 4, 6, 5) }, { "OREPALargeConv", maker("OREPALargeConv", 4, 6, 5) },
  { "a user's block", example },
  { "DBB", maker("DBB", 4, 6, 3) }, { "depthwise DBB", maker("DBB", 6, 6, 3, 6) },
  { "RepVGGBlock", maker("RepVGGBlock", 4, 6, 3) }, { "RepVGGBlock with identity", maker("RepVGGBlock", 6, 6, 3) },
  { "OREPAVGG", maker("OREPAVGG", 4, 6, 3) },
  { "a user's block offline", function(o)
    o.mode = o.mode or "offline"
    return example(o)
  end },
}

local function each_block(name, check)
  for _, entry in ipairs(makers) do
    it(("%s: %s"):format(name, entry[1]), function()
      orepa.manual_seed(11)
      local function make(o) return descriptions.fill(entry[2](o or {})) end
      check(make, orepa.randn(3, make().options.in_channels, 9, 8))
    end)
  end
end

-- ---- comparing ----

local function difference(a, b)
  assert.same(a.shape, b.shape)
  local x, y = a:detach():to("cpu"):to("float64"), b:detach():to("cpu"):to("float64")
  return (x - y):abs():max():item() / math.max(y:abs():max():item(), 1e-3)
end

local function same(name, a, b, limit)
  local d = difference(a, b)
  assert(d <= limit, ("%s is off by %.3g"):format(name, d))
end

local function copies(block)
  local list = {}
  for name, t in pairs(block:state_dict { constants = true }) do list[name] = t:detach():clone() end
  return list
end

local function folded(block, x)
  return orepa.no_grad(function() return block(x) end)
end

-- The middle one of the kernels.
local function middle(block)
  local kernels = {}
  for _, p in ipairs(block:parameters()) do
    if #p.shape == 4 then kernels[#kernels + 1] = p end
  end
  return kernels[#kernels // 2 + 1]
end

-- The block's norms, and their paths.
local function norms(block)
  local list, paths = {}, {}
  for path, module in block:named_modules() do
    if module.running_var then list[#list + 1], paths[#paths + 1] = module, path end
  end
  return list, paths
end

-- The module that holds a parameter, and its name there.
local function owner_of(block, name)
  for path, module in block:named_modules() do
    local field = path == "" and name or name:sub(1, #path + 1) == path .. "." and name:sub(#path + 2)
    if field and rawget(module, field) then return module, field end
  end
end

-- ---- squeezing changes nothing ----

describe("squeezing", function()
  each_block("200 passes leave every parameter and constant bit for bit", function(make, x)
    local block = make()
    local before, versions = copies(block), {}
    for name, p in block:named_parameters() do versions[name] = p:version() end
    for _ = 1, 200 do
      block(x):sum():backward()
    end
    for name, t in pairs(block:state_dict { constants = true }) do
      if not name:find "running_" and not name:find "num_batches" then same(name, t, before[name], EXACT) end
    end
    for name, p in block:named_parameters() do
      assert.equal(versions[name], p:version())
      assert(p.grad, name .. " has no gradient")
    end
  end)

  each_block("gives parameters that ask for none no gradient, and the others the same", function(make, x)
    local block, seen = make(), 0
    local state = copies(block)
    local function gradients()
      block:zero_grad()
      block:load_state_dict(state) -- the padding of offline blocks follows their norms' statistics
      block(x):backward(orepa.ones(3, 6, block(x).shape[3], block(x).shape[4]):multiply_add(0.5, 0))
      local list = {}
      for name, p in block:named_parameters() do list[name] = p.grad end
      return list
    end
    local all = gradients()
    for name, p in block:named_parameters() do
      p:requires_grad_(false)
      local some = gradients()
      assert.is_nil(some[name])
      for other, g in pairs(all) do
        if other ~= name then same(other, some[other], g, EXACT) end
      end
      p:requires_grad_(true)
      seen = seen + 1
    end
    assert(seen >= 3)
  end)

  for _, case in ipairs { { 8, 8, 1, 1 }, { 8, 16, 2, 2 }, { 10, 5, 5, 2 }, { 16, 8, 8, 3 }, { 6, 6, 6, 2 } } do
    local I, O, groups, dilation = table.unpack(case)
    it(("of OREPA %d -> %d in %d groups, dilation %d: all forms agree"):format(I, O, groups, dilation), function()
      orepa.manual_seed(I)
      for stride = 1, 2 do
        local o = { in_channels = I, out_channels = O, kernel_size = 3, groups = groups, dilation = dilation, stride = stride,
          padding = dilation, act = "relu" }
        local block, x = descriptions.fill(nn.OREPA(o)), orepa.randn(2, I, 9, 10)
        local w = block:squeezed_weight()
        same("leaf by leaf", block:set_fused(false):squeezed_weight(), w, CLOSE)
        local y = block:set_fused(true):eval()(x)
        assert.same({ 2, O, stride == 1 and 9 or 5, stride == 1 and 10 or 5 }, y.shape)
        same("folded", folded(block, x), y, CLOSE)
        local bn = block.bn
        local z = F.conv2d(x, w, { stride = stride, padding = dilation, dilation = dilation, groups = groups })
        same("by hand", F.relu(F.batch_norm(z, { weight = bn.weight, bias = bn.bias, running_mean = bn.running_mean,
          running_var = bn.running_var })), y, CLOSE)
        same("deployed", block:deploy()(x), y, CLOSE)
      end
    end)
  end
end)

-- ---- no old kernel is ever used ----

-- A block that was never run, with the same state.
local function fresh(block, make, mode)
  local other = make()
  other:load_state_dict(block:state_dict())
  if mode == "training" then return other:train() end
  return other:eval()
end

-- After `change`, the block computes what one without a past does: evaluation folded and with gradients, and training.
local function check_seen(make, x, change)
  local block = make():eval()
  local before = folded(block, x)
  assert(difference(folded(block, x), before) == 0)
  change(block)
  local after = folded(block, x)
  same("folded evaluation", after, folded(fresh(block, make), x), EXACT)
  same("evaluation", block(x), fresh(block, make)(x), EXACT)
  assert(difference(after, before) > 0, "the change has no effect")
  same("training", fresh(block, make, "training")(x), block:train()(x), EXACT)
end

local function without_gradients(f)
  return function(block) orepa.no_grad(function() f(block) end) end
end

describe("a change is seen by the next pass:", function()
  each_block("every parameter, in place", function(make, x)
    local names = {}
    for name in make():named_parameters() do names[#names + 1] = name end
    for _, name in ipairs(names) do
      check_seen(make, x, without_gradients(function(block) block:get(name):multiply_add_(1.25, 0.5) end))
    end
  end)

  each_block("an element of a middle weight", function(make, x)
    check_seen(make, x, without_gradients(function(block) middle(block)[1] = 2.5 end))
  end)

  each_block("through a view", function(make, x)
    check_seen(make, x, without_gradients(function(block) middle(block):detach()[2]:fill_(3) end))
  end)

  each_block("through a view made before", function(make, x)
    local views = setmetatable({}, { __mode = "k" })
    local function made()
      local block = make()
      views[block] = middle(block):detach():slice(1, 1, 1)
      return block
    end
    check_seen(made, x, without_gradients(function(block) views[block]:add_(1) end))
  end)

  each_block("running statistics", function(make, x)
    for k = 1, #norms(make()) do
      check_seen(make, x, function(block) norms(block)[k].running_mean:add_(1) end)
      check_seen(make, x, function(block) norms(block)[k].running_var:mul_(2) end)
    end
  end)

  each_block("a training pass between evaluations", function(make, x)
    check_seen(make, x, function(block)
      block:train()(x)
      block:eval()
    end)
    check_seen(make, x, function(block)
      norms(block)[1]:train()
      folded(block, x)
      norms(block)[1]:eval()
    end)
  end)

  each_block("an optimizer's step", function(make, x)
    check_seen(make, x, function(block)
      local opt = optim.SGD(optim.param_groups(block), { lr = 0.1 })
      block(x):sum():backward()
      opt:step()
      block:zero_grad()
    end)
  end)

  each_block("another state dict", function(make, x)
    check_seen(make, x, function(block) block:load_state_dict(make():state_dict()) end)
  end)

  each_block("another tensor in a parameter's place, of the same version", function(make, x)
    check_seen(make, x, function(block)
      for name, p in block:named_parameters() do
        local owner, field = owner_of(block, name)
        local other = orepa.randn(p.shape)
        while other:version() < p:version() do other:add_(0.5) end
        assert.equal(p:version(), other:version())
        owner[field] = nn.Parameter(other)
      end
    end)
  end)

  each_block("another norm", function(make, x)
    check_seen(make, x, function(block)
      local list, paths = norms(block)
      local other = nn.BatchNorm2d(list[1].options.num_features)
      orepa.no_grad(function()
        for name, t in pairs(list[1]:state_dict()) do
          if name ~= "num_batches_tracked" then other[name]:copy_(t + 0.25) end
        end
      end)
      block:replace(paths[1], other:eval())
    end)
  end)

  it("a constant that a file replaces, with a warning that names it", function()
    orepa.manual_seed(2)
    local make = maker("OREPA", 4, 6, 3)
    local block, x = descriptions.fill(make {}):eval(), orepa.randn(3, 4, 9, 8)
    local before, stderr, warnings = folded(block, x), io.stderr, {}
    local state = copies(block)
    local name = "weight_orepa_avg_avg"
    state[name]:mul_(2)
    rawset(io, "stderr", { write = function(_, text) warnings[#warnings + 1] = text end })
    local done, problem = pcall(function() block:load_state_dict(state) end)
    local other = make {}
    pcall(function() other:load_state_dict(block:state_dict()) end)
    rawset(io, "stderr", stderr)
    assert(done, problem)
    assert.equal(2, #warnings)
    assert(warnings[1]:find(name, 1, true), warnings[1])
    same("folded evaluation", folded(block, x), folded(other:eval(), x), EXACT)
    assert(difference(folded(block, x), before) > 1e-3)
  end)
end)

-- Counts how often something is squeezed while f runs.
local function squeezes(f)
  local tree, count = orepa.tree, 0
  local squeeze = tree.squeeze
  function tree.squeeze(...)
    count = count + 1
    return squeeze(...)
  end
  local done, problem = pcall(f)
  tree.squeeze = squeeze
  assert(done, problem)
  return count
end

describe("the folded kernel", function()
  each_block("is kept while nothing changes", function(make, x)
    local block = make():eval()
    local once = squeezes(function() folded(block, x) end)
    assert(block.mode == "online" and once == 1 or once > 1)
    assert.equal(0, squeezes(function()
      for _ = 1, 3 do folded(block, x) end
    end))
    orepa.no_grad(function() middle(block):add_(1) end)
    assert.equal(once, squeezes(function()
      for _ = 1, 3 do folded(block, x) end
    end))
    block:train():eval()
    assert.equal(once, squeezes(function() folded(block, x) end))
  end)

  each_block("is not used where a gradient can be asked for, nor in training", function(make, x)
    local block = make():eval()
    local each = squeezes(function() block(x) end) * 2
    assert(block.mode == "offline" or each == (block.plan.plain and 0 or 2)) -- a plain kernel needs no squeezing
    folded(block, x)
    assert.equal(each, squeezes(function()
      block(x)
      block(x):sum():backward()
    end))
    for name, p in block:named_parameters() do assert(p.grad, name .. " has no gradient") end
    block:train()
    assert.equal(each, squeezes(function()
      folded(block, x)
      folded(block, x)
    end))
  end)

  each_block("is used with gradients on where no parameter asks for one, and x gets its own", function(make, x)
    local block = make():eval()
    x:requires_grad_()
    block(x):sum():backward()
    local dx = x.grad
    x.grad = nil
    for _, p in ipairs(block:parameters()) do p:requires_grad_(false) end
    assert(0 < squeezes(function()
      assert(block(x).requires_grad)
      block(x):sum():backward()
    end))
    same("the gradient of x", x.grad, dx, CLOSE)
    middle(block):requires_grad_(true)
    block(x):sum():backward()
    assert(middle(block).grad)
  end)

  it("is not used where the norm has no running statistics", function()
    orepa.manual_seed(1)
    local block = nn.OREPA { in_channels = 4, out_channels = 6, kernel_size = 3 }
    block:replace("bn", nn.BatchNorm2d { num_features = 6, track_running_stats = false })
    block:eval()
    local x = orepa.randn(3, 4, 5, 5)
    same("evaluation", folded(block, x), block(x), EXACT)
    local done, message = pcall(function() block:deploy() end)
    assert(not done and message:find("running statistics", 1, true), message)
    same("evaluation after that", folded(block, x), block(x), EXACT)
  end)
end)

-- ---- norms that stand still ----

describe("a frozen norm in a block that trains", function()
  each_block("gives every gradient and keeps its statistics", function(make, x)
    local block = make():train()
    local before = {}
    for k, norm in ipairs(norms(block)) do before[k] = copies(norm:eval()) end
    local y = block(x)
    y:backward(orepa.ones(y.shape))
    for name, p in block:named_parameters() do
      assert(p.grad and p.grad:abs():max():item() > 0, name .. " has no gradient")
    end
    for k, norm in ipairs(norms(block)) do
      for name, t in pairs(copies(norm)) do same(name, t, before[k][name], EXACT) end
    end
    block:eval()
    same("evaluation with gradients", block(x), y, EXACT)
    same("evaluation folded", folded(block, x), y, CLOSE)
  end)
end)

-- ---- deploying ----

describe("deploying", function()
  each_block("from training mode uses running statistics and leaves evaluation mode", function(make, x)
    local block = make { act = "relu" }
    local y = block:eval()(x)
    local names = { [block.options.deployed .. ".weight"] = true, [block.options.deployed .. ".bias"] = true }
    assert.equal(block, block:train():deploy())
    assert.is_false(block.training)
    same("y", block(x), y, CLOSE)
    for name in pairs(block:state_dict { constants = true }) do
      assert(names[name], "left over: " .. name)
      names[name] = nil
    end
    assert.is_nil(next(names))
    same("y in training mode", block:train()(x), block:eval()(x), EXACT)
  end)

  each_block("twice changes nothing", function(make, x)
    local block = make():deploy()
    local weight, bits = block[block.options.deployed .. ".weight"], copies(block)
    local y = block(x)
    block:deploy()
    assert.equal(weight, block[block.options.deployed .. ".weight"])
    for name, t in pairs(block:state_dict()) do same(name, t, bits[name], EXACT) end
    same("y", block(x), y, EXACT)
  end)

  each_block("and loading into a block made deployed, or deployed itself, gives the same bits", function(make, x)
    local block = make():deploy()
    local y, state = block(x), block:state_dict()
    local made = make { mode = "deploy" }
    made:load_state_dict(state)
    same("y of a block made deployed", made:eval()(x), y, EXACT)
    local other = make():deploy()
    other:load_state_dict(state)
    same("y of another deployed block", other:deploy()(x), y, EXACT)
  end)

  each_block("trains on: the deployed convolution has gradients", function(make, x)
    local block = make():deploy():train()
    block(x):sum():backward()
    for name, p in block:named_parameters() do assert(p.grad, name .. " has no gradient") end
  end)

  each_block("ends what asks for branches, with a message", function(make)
    local block = make():deploy()
    for _, what in ipairs { "squeezed_weight", "branch_weights" } do
      local done, message = pcall(function() return block[what](block) end)
      assert(not done and message:find("deployed", 1, true) and message:find("blocks_spec.lua", 1, true), message)
    end
  end)

  each_block("ends an optimizer that holds the old parameters, with a message", function(make, x)
    local block = make()
    local opt = optim.SGD(optim.param_groups(block), { lr = 0.1 })
    block(x):sum():backward()
    block:deploy()
    local done, message = pcall(function() opt:step() end)
    assert(not done and message:find("deployed", 1, true), message)
  end)

  it("refuses the state dict of the training form, and the other way round", function()
    local make = maker("OREPA", 4, 6, 3)
    local block, deployed = make {}, make({}):deploy()
    for _, pair in ipairs { { block, deployed }, { deployed, block } } do
      local done, message = pcall(function() pair[1]:load_state_dict(pair[2]:state_dict()) end)
      assert(not done and message:find("missing", 1, true) and message:find("unexpected", 1, true), message)
    end
  end)

  it("keeps stride, padding, dilation and groups", function()
    orepa.manual_seed(3)
    local block = descriptions.fill(nn.OREPA { in_channels = 4, out_channels = 6, kernel_size = 3, stride = { 2, 1 },
      padding = { 0, 3 }, dilation = { 1, 2 }, groups = 2 }):eval()
    local x = orepa.randn(2, 4, 9, 8)
    local y = block(x)
    assert.same({ 2, 6, 4, 10 }, y.shape)
    same("y", block:deploy()(x), y, CLOSE)
  end)
end)

-- ---- networks ----

local function network(o)
  o = o or {}
  o.num_blocks, o.residual, o.width, o.reparam, o.classes = { 1, 1, 1, 1 }, o.residual or "basic", 0.125, "orepa", 5
  return models.create("resnet", o)
end

for _, residual in ipairs { "basic", "bottleneck" } do
  describe("a network of blocks, " .. residual, function()
    local net, x
    before_each(function()
      orepa.manual_seed(5)
      net, x = descriptions.fill(network { residual = residual }), orepa.randn(2, 3, 33, 32)
    end)

    it("computes the same folded, with gradients and deployed", function()
      local y = net:eval()(x)
      same("folded", folded(net, x), y, CLOSE)
      same("deployed", net:train():deploy()(x), y, CLOSE)
      assert.is_false(net.training)
    end)

    it("deployed twice has the same bits", function()
      local bits = copies(net:deploy())
      for name, t in pairs(net:deploy():state_dict()) do same(name, t, bits[name], EXACT) end
    end)

    it("loads its deployed state into a network made deployed", function()
      local y, other = net:deploy()(x), network { residual = residual, deploy = true }
      other:load_state_dict(net:state_dict())
      same("y", other(x), y, EXACT)
    end)

    it("goes to a file and back, deployed or not", function()
      local path = os.tmpname()
      for _ = 1, 2 do
        local y = folded(net:eval(), x)
        models.save(net, path)
        local other = models.load(path)
        same("y", folded(other:eval(), x), y, EXACT)
        net:deploy()
      end
      os.remove(path)
    end)
  end)
end

-- ---- names ----

local function golden_constructor(meta)
  local kind = meta.block:gsub("_1x1", "1x1"):gsub("_", "")
  local o = {}
  for _, key in ipairs { "in_channels", "out_channels", "kernel_size", "stride", "padding", "groups", "dilation" } do
    o[key] = math.tointeger(tonumber(meta[key]))
  end
  return nn[kind] and nn[kind](o), kind
end

describe("a state dict has the names of the reference's checkpoints", function()
  local folder, kinds = "tests/golden/", {}
  for file in require("lfs").dir(folder) do
    if file:find "^block_" then
      local tensors, meta = orepa.load(folder .. file)
      local block, kind = golden_constructor(meta)
      if block then
        kinds[kind] = true
        it(file, function()
          local wanted = {}
          for name in pairs(tensors) do
            local key = name:match "^param%.(.*)" or name:match "^buffer%.(.*)"
            if key and not (key:find "avg_avg$" or key:find "id_tensor$" or key:find "_prior$") then wanted[key] = true end
          end
          for name in pairs(block:state_dict()) do
            assert(wanted[name], "not in the file: " .. name)
            wanted[name] = nil
          end
          assert.is_nil(next(wanted))
        end)
      end
    end
  end

  it("of all kinds of block", function()
    for _, kind in ipairs { "ConvBN", "OREPA", "OREPA1x1", "OREPALargeConvBase", "OREPALargeConv", "DBB", "RepVGGBlock",
      "OREPAVGG" } do
      assert(kinds[kind], kind)
    end
  end)
end)

-- ---- other devices and types ----

describe("a block elsewhere", function()
  each_block("computes the same on ref and back, and never with the kernel of before", function(make, x)
    local block = make():eval()
    local y = folded(block, x)
    block:to("ref")
    for name, t in pairs(block:state_dict { constants = true }) do assert.equal("ref", t.device, name) end
    local there = folded(block, x:to("ref"))
    assert.equal("ref", there.device)
    same("on ref", there, y, CLOSE)
    block:to("ref"):to("float64")
    local wide = folded(block, x:to("ref"):to("float64"))
    assert.equal("float64", wide.dtype)
    same("in float64", wide, y, CLOSE)
    assert(difference(wide, y) > 0)
    block:to("float32"):to("cpu")
    same("back", folded(block, x), y, EXACT)
  end)

  each_block("takes the state dict of another device", function(make, x)
    local there = make():to("ref"):eval()
    local here = make():eval()
    here:load_state_dict(there:state_dict())
    assert.equal("cpu", middle(here).device)
    same("y", folded(here, x), folded(there, x:to("ref")), CLOSE)
  end)

  each_block("refuses a map from elsewhere with a message, in training and folded", function(make, x)
    local block = make():to("ref")
    for _ = 1, 2 do
      local done, message = pcall(function() return folded(block, x) end)
      assert(not done and message:find("ref", 1, true) and message:find("cpu", 1, true), message)
      block:eval()
    end
  end)
end)
