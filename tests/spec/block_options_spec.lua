-- Blocks as they are made: options and descriptions are checked, initial values are the reference's.

local orepa = require "orepa"
local nn, L = orepa.nn, orepa.reparam

-- What each named block needs, with a size that it takes.
local needed = {
  ConvBN = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  OREPA = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  OREPA1x1 = { in_channels = 4, out_channels = 6, kernel_size = 1 },
  OREPALargeConvBase = { in_channels = 4, out_channels = 6, kernel_size = 5 },
  OREPALargeConv = { in_channels = 4, out_channels = 6, kernel_size = 5 },
  ReparamBlock = { in_channels = 4, out_channels = 6, kernel_size = 3, branches = { { L.conv { 3 } } } },
  DBB = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  RepVGGBlock = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  OREPAVGG = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  OREPAVGGInner = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  ACBlock = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  ExpandBlock = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  MobileOneBlock = { in_channels = 4, out_channels = 6, kernel_size = 3 },
  RepLKBlock = { in_channels = 4, out_channels = 4, kernel_size = 7 },
}
local kinds = {}
for kind in pairs(needed) do kinds[#kinds + 1] = kind end
table.sort(kinds)

local function with(o, extra)
  local all = {}
  for key, value in pairs(o) do all[key] = value end
  for key, value in pairs(extra or {}) do all[key] = value end
  return all
end

-- The call fails at a line of this file, and the message has all words.
local function refused(words, f)
  local done, message = pcall(f)
  assert(not done, "it was accepted")
  assert(type(message) == "string", "the error is no message")
  assert(message:find("block_options_spec.lua:", 1, true), "not at this file: " .. message)
  for _, word in ipairs(words) do
    assert(message:find(word, 1, true), ("'%s' is not in the message: %s"):format(word, message))
  end
end

-- ---- options ----

local wrong = {
  in_channels = { false, 0, -4, 2.5, "four", {} },
  out_channels = { false, 0, -4, 2.5, "four", {} },
  kernel_size = { false, 0, -3, 2.5, "three", {}, { 3 }, { 3, 3, 3 }, { 3, 0 }, { 3, "x" } },
  stride = { false, 0, -1, 1.5, "two", {}, { 1 }, { 1, 0 } },
  padding = { -1, 0.5, "same", {}, { 1 }, { 0, -1 } },
  dilation = { false, 0, -1, 1.5, "two", {}, { 2, 2, 2 } },
  groups = { false, 0, -1, 1.5, "two", {}, 3 },
  act = { false, "gelu", 1, {} },
  mode = { false, "offlin", "onlin", 1 },
  scaling = { "rows", 1, {} },
  norms = { 1, "all", {} },
  se = { false, 1, "se", {} },
  post_bn = { 1, "", {} },
  bias = { 1, "yes", {} },
  spare_rows = { -1, 0.5, "one", {} },
  eps = { false, 0, -1e-5, "small", 0 / 0 },
  momentum = { false, "much", {} },
  deployed = { false, "", 1, {} },
}

for _, kind in ipairs(kinds) do
  describe("nn." .. kind, function()
    it("refuses what is no table of options", function()
      for _, value in ipairs { false, 64, "64" } do
        refused({ kind, "options" }, function() nn[kind](value) end)
      end
      refused({ kind }, function() nn[kind]() end)
    end)

    it("refuses an unknown option by name", function()
      for _, name in ipairs { "kernel", "offline", "norm", "linearize", "relu" } do
        refused({ kind, "unknown option '" .. name .. "'" }, function()
          nn[kind](with(needed[kind], { [name] = true }))
        end)
      end
    end)

    it("refuses norms behind layers online", function()
      refused({ kind, "norms = true", "offline" }, function()
        nn[kind](with(needed[kind], { mode = "online", norms = true }))
      end)
    end)

    it("names a missing option", function()
      for name in pairs(needed[kind]) do
        if not (kind == "OREPA1x1" and name == "kernel_size") then -- which is always 1
          local o = with(needed[kind])
          o[name] = nil
          refused({ kind, name }, function() nn[kind](o) end)
        end
      end
    end)

    for name, values in pairs(wrong) do
      it("refuses a wrong " .. name, function()
        for _, value in ipairs(values) do
          refused({ kind, name }, function() nn[kind](with(needed[kind], { [name] = value })) end)
        end
      end)
    end

    it("takes what is right", function()
      for _, extra in ipairs { { stride = 2 }, { stride = { 2, 1 } }, { padding = 0 }, { padding = { 3, 0 } }, { dilation = 2 },
        { groups = 1 }, { act = "relu" }, { act = "none" }, { mode = "deploy" }, { mode = "offline" },
        { mode = "online" }, { mode = "offline", scaling = "vector", norms = false, post_bn = true },
        { post_bn = false, bias = true }, { eps = 1e-3 }, { se = nn.SqueezeExcite { channels = 6, reduced = 1 } },
        { momentum = 0.01 }, { deployed = "whole" } } do
        nn[kind](with(needed[kind], extra))
      end
    end)
  end)
end

describe("a named block", function()
  it("refuses a value other than its only one", function()
    refused({ "OREPA1x1", "groups is 2" }, function() nn.OREPA1x1(with(needed.OREPA1x1, { groups = 2 })) end)
    refused({ "OREPA1x1", "kernel_size is 3" }, function() nn.OREPA1x1(with(needed.OREPA1x1, { kernel_size = 3 })) end)
    refused({ "OREPALargeConv", "groups is 2" }, function() nn.OREPALargeConv(with(needed.OREPALargeConv, { groups = 2 })) end)
    for _, kind in ipairs { "OREPALargeConv", "OREPALargeConvBase" } do
      for _, k in ipairs { 1, 3, 4, 6 } do
        refused({ kind, "kernel_size is " .. k, "odd" }, function() nn[kind](with(needed[kind], { kernel_size = k })) end)
      end
    end
  end)

  it("refuses a bias before its norm", function()
    refused({ "ConvBN", "post_bn = false" }, function() nn.ConvBN(with(needed.ConvBN, { bias = true })) end)
  end)

  it("lets its options win over its description's", function()
    local block = nn.OREPA(with(needed.OREPA, { deployed = "mine" }))
    assert.same({ 6, 4, 3, 3 }, block:deploy()["mine.weight"].shape)
  end)
end)

-- ---- descriptions ----

local function block(branches, extra)
  return function()
    return nn.ReparamBlock(with({ in_channels = 4, out_channels = 6, kernel_size = 3, branches = branches }, extra))
  end
end

describe("a description", function()
  local function refuses(name, words, branches, extra)
    it("is refused for " .. name, function()
      refused(words, block(branches, extra))
    end)
  end

  refuses("no branches", { "branches" }, {})
  refuses("branches that are all false", { "no branches" }, { false, false })
  refuses("branches that are no list", { "branches", "list" }, 3)
  refuses("a branch that is no table", { "branches 1" }, { 3 })
  refuses("an empty branch", { "branch 'none'", "no layers" }, { { name = "none" } })
  refuses("a layer that is no layer", { "branch 'a'", "layer 2" }, { { name = "a", L.conv { 3 }, { 3 } } })
  refuses("a layer that is a number", { "branch 'a'", "layers 1" }, { { name = "a", 3 } })
  refuses("a nil among its branches", { "nil", "branches" }, { nil, { L.conv { 3 } } })
  refuses("a nil among a branch's layers", { "branch 'a'", "nil" }, { { name = "a", L.conv { 1 }, nil, L.conv { 3 } } })
  refuses("an unknown option of a branch", { "branch 'a'", "unknown option 'skale'" },
    { { name = "a", skale = 1, L.conv { 3 } } })
  refuses("a scale that is no number", { "branch 'a'", "scale" }, { { name = "a", scale = "1", L.conv { 3 } } })
  refuses("a name that is no string", { "name" }, { { name = 3, L.conv { 3 } } })
  refuses("two branches of one name", { "branch 'a'", "two branches" },
    { { name = "a", L.conv { 3 } }, { name = "a", L.conv { 1 } } })

  for _, option in ipairs { "stride", "padding", "dilation", "bias", "norm" } do
    for form in pairs { conv = true, depthwise = true, average = true, prior = true, nest = true } do
      refuses(("the option %s of a layer %s"):format(option, form), { "branch 'a', layer 1 (" .. form .. ")", option },
        { { name = "a", L[form] { 3, [option] = 1, branches = form == "nest" and { { L.conv { 3 } } } or nil } } })
    end
  end
  refuses("a norm without a name", { "layer 1 (identity)", "norm" }, { { L.identity { norm = "" }, L.conv { 3 } } })
  refuses("a norm inside a nest", { "layer 1 (nest), branch 'branch0', layer 1 (conv)", "no norms" },
    { { L.nest { 3, branches = { { L.conv { 3, norm = true } } } } } })
  refuses("two norms of one name", { "'n'" }, { { L.conv { 1, norm = "n" }, L.conv { 3, norm = "n" } } }, { mode = "offline" })
  refuses("a name of an identity", { "layer 1 (identity)", "name" }, { { L.identity { name = "x" }, L.conv { 3 } } })
  refuses("a kernel size of an identity", { "layer 1 (identity)", "kernel size" }, { { L.identity { 1 }, L.conv { 3 } } })
  refuses("a conv without kernel size", { "layer 1 (conv)", "kernel size" }, { { L.conv {} } })
  refuses("a conv with two kernel sizes", { "layer 1 (conv)", "kernel size" }, { { L.conv { 3, 3 } } })
  for _, k in ipairs { 0, -1, 1.5, "three", { 3 } } do
    refuses("the kernel size " .. tostring(type(k) == "table" and "{3}" or k), { "layer 1 (conv)", "kernel size" },
      { { L.conv { k } } })
  end

  refuses("a branch larger than the kernel", { "branch 'a'", "5x5", "3x3" }, { { name = "a", L.conv { 3 }, L.conv { 3 } } })
  refuses("a branch larger in one dimension", { "branch 'a'", "3x5" }, { { name = "a", L.conv { { 3, 5 } } } })
  refuses("a branch without centre", { "branch 'a'", "2x2", "centre" }, { { name = "a", L.conv { 2 } } })
  refuses("groups that are no multiple of the block's", { "layer 1 (conv)", "3 groups", "multiple", "2" },
    { { L.conv { 3, groups = 3 } } }, { groups = 2, in_channels = 6 })
  refuses("groups that don't divide the channels", { "layer 1 (conv)", "4 groups", "4 -> 6" }, { { L.conv { 3, groups = 4 } } })
  refuses("a branch of constants between other channels", { "branch 'a'", "4 channels", "6" },
    { { name = "a", L.average { 3 } } })
  refuses("an identity between other channels", { "branch 'a'", "4 channels", "6" }, { { name = "a", L.identity {} } })
  refuses("a branch that ends with other channels", { "branch 'a'", "5 channels", "6" },
    { { name = "a", L.conv { 3, out = 5 } } })
  refuses("both out and expand", { "layer 1 (conv)", "both out and expand" },
    { { L.conv { 1, out = 6, expand = 2 }, L.conv { 3 } } })
  refuses("out that is no size", { "layer 1 (conv)", "out is 0" }, { { L.conv { 1, out = 0 }, L.conv { 3 } } })
  refuses("a depthwise layer to no multiple of its channels", { "layer 1 (depthwise)", "4 -> 6" }, { { L.depthwise { 3 } } })
  refuses("plus_identity with an even kernel", { "layer 1 (conv)", "plus_identity", "2x2" },
    { { L.conv { 2, out = 4, plus_identity = true }, L.conv { 2 } } })
  refuses("plus_identity to no multiple of the channels", { "layer 1 (conv)", "plus_identity", "6", "4" },
    { { L.conv { 3, plus_identity = true } } })
  refuses("an unknown init", { "layer 1 (conv)", "init" }, { { L.conv { 3, init = "xavier" } } })
  refuses("a table as init without kaiming", { "layer 1 (conv)", "init" }, { { L.conv { 3, init = { 1 } } } })
  refuses("identity as init between other channels", { "layer 1 (conv)", "identity", "4 -> 6" },
    { { L.conv { 3, init = "identity" } } })

  refuses("a nest with an unknown option", { "layer 1 (nest)", "unknown option 'post_bn'" },
    { { L.nest { 3, post_bn = true, branches = { { L.conv { 3 } } } } } })
  refuses("a nest without branches", { "layer 1 (nest)", "branches" }, { { L.nest { 3 } } })
  refuses("a wrong branch in a nest", { "branch 'a', layer 1 (nest), branch 'b'", "5x5", "3x3" },
    { { name = "a", L.nest { 3, branches = { { name = "b", L.conv { 5 } } } } } })

  refuses("two parameters of one name", { "branch 'b'", "'w'" },
    { { L.conv { 3, name = "w" } }, { name = "b", L.conv { 1, name = "w" } } })
  refuses("a parameter with the name of the rows", { "'vector'" }, { { L.conv { 3, name = "vector" } } })
  refuses("a parameter with the name of the norm", { "'bn'" }, { { L.conv { 3, name = "bn" } } })
  refuses("a parameter with the name of a norm's", { "'bn.weight'" }, { { L.conv { 3, name = "bn.weight" } } })
  refuses("a parameter with the name of the bias", { "'bias'" },
    { { L.conv { 3, name = "bias" } } }, { post_bn = false, bias = true })
  for _, name in ipairs { "training", "forward", "options", "plan", "mode", "deploy" } do
    refuses("the name " .. name .. ", which the block has", { name, "named" }, { { L.conv { 3, name = name } } })
    refuses("the name " .. name .. " of the norm", { name, "named" }, { { L.conv { 3 } } }, { post_bn = name })
    refuses("the name " .. name .. " of a constant", { name, "named" }, { { L.conv { 1 }, L.average { 3, name = name } } })
  end
  refuses("nothing but identities", { "nothing to train" }, { { L.identity {} } }, { out_channels = 4, scaling = "none" })

  it("is refused where a layer gets no table", function()
    for _, form in ipairs { "conv", "depthwise", "average", "prior", "identity", "nest" } do
      refused({ "L." .. form, "table" }, function() return L[form](3) end)
    end
  end)

  it("may leave out branches and layers with false", function()
    local b = block({ false, { L.conv { 1 }, false, L.average { 3 } }, false })()
    local count = 0
    for name in pairs(b:branch_weights()) do
      assert.equal("branch0", name)
      count = count + 1
    end
    assert.equal(1, count)
  end)

  it("may have nothing to train but constants", function()
    local b = block({ { L.average { 3 } } }, { out_channels = 4, scaling = "none", post_bn = false })():eval()
    local x = orepa.rand(2, 4, 5, 5)
    local y = b(x)
    assert.same(y:tolist(), b:deploy()(x):tolist())
  end)
end)

-- ---- initial values ----

local function uniform(name, t, a, fan)
  local bound = math.sqrt(6 / ((1 + a ^ 2) * fan))
  local values = t:detach():to("float64")
  local n, largest = t:count(), values:abs():max():item()
  local mean = values:mean():item()
  local variance = ((values - mean) * (values - mean)):mean():item()
  assert(n >= 300, name .. " is too small to tell its distribution")
  assert(largest <= bound and largest >= 0.97 * bound, ("%s: largest %g, bound %g"):format(name, largest, bound))
  assert(math.abs(mean) < 5 * bound / math.sqrt(3 * n), ("%s: mean %g, bound %g"):format(name, mean, bound))
  -- the relative deviation of a uniform sample's variance is sqrt(0.8/n)
  assert(math.abs(variance / (bound ^ 2 / 3) - 1) < 5 * math.sqrt(0.8 / n),
    ("%s: variance %g, bound %g"):format(name, variance, bound))
end

local function all(name, t, value)
  assert(t:eq(value):all():item(), ("%s is not %g everywhere"):format(name, value))
end

local function check_norm(bn)
  all("bn.weight", bn.weight, 1)
  all("bn.bias", bn.bias, 0)
  all("bn.running_mean", bn.running_mean, 0)
  all("bn.running_var", bn.running_var, 1)
  assert.equal(0, bn.num_batches_tracked:item())
end

local function check_rows(t, values, out)
  assert.same({ #values, out }, t.shape)
  for k, value in ipairs(values) do all("row " .. k, t[k], value) end
end

-- The parameters of an OREPA kernel; T channels a group are inside, r groups.
local function check_orepa(b, p, I, O, K, groups)
  local Ig, T = I // groups, groups > 4 and 2 * I // groups or I // groups
  local function kaiming(name, shape)
    assert.same(shape, b[p .. name].shape)
    uniform(name, b[p .. name], 0, shape[2] * shape[3] * shape[4])
  end
  kaiming("origin", { O, Ig, K, K })
  kaiming("avg_conv", { O, Ig, 1, 1 })
  kaiming("pfir_conv", { O, Ig, 1, 1 })
  kaiming("1x1", { O, Ig, 1, 1 })
  kaiming("1x1_kxk_conv2", { O, T, K, K })
  kaiming("gconv_dw", { 8 * I, 1, K, K })
  kaiming("gconv_pw", { O, 8 * Ig, 1, 1 })
  assert.same({ groups * T, Ig, 1, 1 }, b[p .. "1x1_kxk_idconv1"].shape)
  all("1x1_kxk_idconv1", b[p .. "1x1_kxk_idconv1"], 0)
end

local function check_constants(b, root, I, O, K, groups)
  local state, Ig = b:state_dict { constants = true }, I // groups
  all("avg_avg", state[root .. "weight_orepa_avg_avg"], orepa.full({}, 1 / K ^ 2):item())
  local rows = state[root .. "id_tensor"]:reshape(-1, Ig):tolist()
  assert.equal(groups > 4 and 2 * I or I, #rows)
  for t, row in ipairs(rows) do
    for i, value in ipairs(row) do assert.equal((t - 1) % Ig == i - 1 and 1 or 0, value) end
  end
  local prior = state[root .. "weight_orepa_prior"]:tolist()
  assert.equal(O, #prior)
  for o = 0, O - 1 do
    for h = 0, K - 1 do
      for w = 0, K - 1 do
        local tall = o < O / 2
        local f, u = tall and o + 1 or o + 1 - O / 2, tall and h or w
        assert.near(math.cos(math.pi * (u + 0.5) * f / K), prior[o + 1][h + 1][w + 1], 1e-7)
      end
    end
  end
end

describe("initial values", function()
  before_each(function() orepa.manual_seed(7) end)

  it("of ConvBN", function()
    local b = nn.ConvBN { in_channels = 16, out_channels = 24, kernel_size = 3, groups = 2 }
    assert.same({ 24, 8, 3, 3 }, b["conv.weight"].shape)
    uniform("conv.weight", b["conv.weight"], math.sqrt(5), 72)
    check_norm(b.bn)
  end)

  for _, case in ipairs { { 24, 32, 3, 1 }, { 64, 96, 3, 4 }, { 160, 96, 3, 8 }, { 24, 33, 5, 1 }, { 64, 64, 7, 1 } } do
    local I, O, K, groups = table.unpack(case)
    it(("of OREPA %d -> %d, %dx%d, %d groups"):format(I, O, K, K, groups), function()
      local b = nn.OREPA { in_channels = I, out_channels = O, kernel_size = K, groups = groups }
      check_orepa(b, "weight_orepa_", I, O, K, groups)
      check_rows(b.vector, { 0.25, 0.25, 0, 0.5, 1, 0.5 }, O)
      check_constants(b, "", I, O, K, groups)
      check_norm(b.bn)
    end)
  end

  for _, case in ipairs { { 24, 40 }, { 40, 24 }, { 24, 24 } } do
    local I, O = table.unpack(case)
    it(("of OREPA1x1 %d -> %d"):format(I, O), function()
      local b = nn.OREPA1x1 { in_channels = I, out_channels = O }
      uniform("origin", b.weight_or1x1_origin, 1, I)
      local one, two = b.weight_or1x1_l2i_conv1, b.weight_or1x1_l2i_conv2
      assert.same({ O > I and I or O, I, 1, 1 }, one.shape)
      assert.same({ O, O > I and I or O, 1, 1 }, two.shape)
      local identity, plain = O > I and one or two, O > I and two or one
      uniform("l2i", plain, 1, plain.shape[2])
      for t, row in ipairs(identity:reshape(identity.shape[1], -1):tolist()) do
        for i, value in ipairs(row) do assert.equal(t == i and 1 or 0, value) end
      end
      check_rows(b.vector, { 1, 0.5 }, O)
      check_norm(b.bn)
    end)
  end

  it("of OREPALargeConvBase", function()
    local b = nn.OREPALargeConvBase { in_channels = 16, out_channels = 24, kernel_size = 7, groups = 2 }
    for l, I in ipairs { 8, 12, 12 } do
      local w = b["weight" .. l - 1]
      assert.same({ 24, I, 3, 3 }, w.shape)
      uniform("weight" .. l - 1, w, math.sqrt(5), 9 * I)
    end
    assert.is_nil(b.weight3)
    check_norm(b.bn)
  end)

  it("of OREPALargeConv", function()
    local b = nn.OREPALargeConv { in_channels = 24, out_channels = 32, kernel_size = 7 }
    for l, I in ipairs { 24, 32, 32 } do
      local root = ("weight%d."):format(l - 1)
      check_orepa(b, root .. "weight_orepa_", I, 32, 3, 1)
      check_rows(b[root .. "vector"], { 0.25, 0.25, 0, 0.5, 1, 0.5 }, 32)
      check_constants(b, root, I, 32, 3, 1)
    end
    assert.is_nil(b["weight3.vector"])
    assert.is_nil(b.vector)
    check_norm(b.bn)
  end)

  it("of a user's block: scale, init, spare rows and bias are what the description says", function()
    local b = nn.ReparamBlock({ in_channels = 16, out_channels = 32, kernel_size = 3, post_bn = false, bias = true,
      spare_rows = 2, init = { kaiming = 1 } }, { branches = {
      { name = "a", scale = 0.75, L.conv { 3 } }, { name = "b", scale = false, L.conv { 3, init = 0.125 } },
      { name = "c", L.conv { 1, init = "identity" }, L.conv { 3, init = { kaiming = 3 } } },
      { name = "d", scale = -1, L.nest { 3, branches = { { scale = 2, L.conv { 3 } } } } } } })
    check_rows(b.vector, { 0.75, 1, -1, 0, 0 }, 32)
    uniform("a", b["a.conv.weight"], 1, 144)
    all("b", b["b.conv.weight"], 0.125)
    all("the identity's sum", b["c.conv1.weight"]:detach():sum():reshape(1), 16)
    uniform("c", b["c.conv2.weight"], 3, 144)
    uniform("the nest's branch, which has its own default", b["d.conv.branch0.conv.weight"], math.sqrt(5), 144)
    check_rows(b["d.conv.vector"], { 2 }, 32)
    all("bias", b.bias, 0)
    assert.is_nil(b.bn)
  end)

  it("with scalar scaling are one number a row", function()
    local b = block({ { scale = 0.5, L.conv { 3 } }, { L.conv { 1 } } }, { scaling = "scalar" })()
    check_rows(b.vector, { 0.5, 1 }, 1)
  end)
end)

-- ---- why a description is refused: what it asks for is no single convolution ----

local F = orepa.F

local function wide(t) return t:to("ref"):to("float64") end

local function largest(t) return t:abs():max():item() end

-- A linear map's answers to single ones at each place: the kernel that it would be, seen from there. A convolution's are all
-- the same, but for the place.
local function responses(f, size)
  local list = {}
  for h = 1, size do
    for w = 1, size do
      local x = orepa.zeros(1, 1, size, size)
      x:select(3, h):select(3, w):fill_(1)
      list[#list + 1] = { h = h, w = w, y = f(wide(x)) }
    end
  end
  return list
end

-- Whether f is a convolution with some k x k kernel, padding k // 2: each response is the one in the middle, moved.
local function is_convolution(f, size, k)
  local list = responses(f, size)
  local kernel = wide(orepa.zeros(k, k)) -- kernel[a][b] = y at (middle - a, middle - b), as seen from the middle
  local middle = (size + 1) // 2
  for _, r in ipairs(list) do
    if r.h == middle and r.w == middle then
      for a = 1, k do
        for b = 1, k do kernel[a][b] = r.y[1][1][middle + (k + 1) // 2 - a][middle + (k + 1) // 2 - b]:item() end
      end
    end
  end
  for _, r in ipairs(list) do
    local x = orepa.zeros(1, 1, size, size)
    x:select(3, r.h):select(3, r.w):fill_(1)
    local y = F.conv2d(wide(x), kernel:reshape(1, 1, k, k), { padding = k // 2 })
    if y.shape[3] ~= r.y.shape[3] or largest(y - r.y) > 1e-9 then return false end
  end
  return true
end

describe("what is refused", function()
  local a, b, point
  before_each(function()
    orepa.manual_seed(4)
    a, b, point = wide(orepa.randn(1, 1, 3, 3)), wide(orepa.randn(1, 1, 3, 3)), wide(orepa.randn(1, 1, 1, 1))
  end)

  it("would not be one convolution: the check tells them apart", function()
    assert.is_true(is_convolution(function(x) return F.conv2d(x, a, { padding = 1 }) end, 9, 3))
    assert.is_true(is_convolution(function(x)
      return F.conv2d(F.conv2d(orepa.pad(x, { 0, 0, 0, 0, 2, 2, 2, 2 }), a), b)
    end, 9, 5))
    assert.is_false(is_convolution(function(x) return F.conv2d(x, a, { padding = 1 }) end, 9, 1))
  end)

  it("padding between layers", function()
    local function f(x) return F.conv2d(F.conv2d(x, a, { padding = 1 }), b, { padding = 1 }) end
    assert.is_false(is_convolution(f, 9, 5))
  end)

  it("a stride before the last layer, within the block's kernel", function()
    -- stride 2, then 3x3: the composed kernel is 7x7, no 5x5 with stride 2 comes near
    local x = wide(orepa.zeros(1, 1, 15, 15))
    x:select(3, 8):select(3, 10):fill_(1)
    local y = F.conv2d(F.conv2d(x, a, { padding = 1, stride = 2 }), b, { padding = 1 })
    local reached = 0 -- outputs that see one input, in a row: a 5x5 kernel with stride 2 has at most three
    for w = 1, y.shape[4] do
      if largest(y:select(4, w)) > 0 then reached = reached + 1 end
    end
    assert(reached > 3, reached)
  end)

  it("a dilation of one layer, within the sizes that a composition has", function()
    local function f(x)
      return F.conv2d(F.conv2d(orepa.pad(x, { 0, 0, 0, 0, 3, 3, 3, 3 }), a, { dilation = 2 }), b)
    end
    assert.is_false(is_convolution(f, 11, 5))
    assert.is_true(is_convolution(f, 11, 7))
  end)

  it("a bias before padding", function()
    local zero = wide(orepa.zeros(1, 1, 7, 7))
    local y = F.conv2d(F.conv2d(zero, point, wide(orepa.ones(1))), a, { padding = 1 })
    assert(largest(y - y:select(3, 4):select(3, 4):reshape(1, 1, 1, 1)) > 1e-3) -- no bias of one convolution is that
  end)

  it("an even kernel beside an odd one", function()
    local even = wide(orepa.randn(1, 1, 2, 2))
    local first = F.conv2d(orepa.pad(wide(orepa.ones(1, 1, 6, 6)), { 0, 0, 0, 0, 1, 0, 1, 0 }), even)
    local second = F.conv2d(orepa.pad(wide(orepa.ones(1, 1, 6, 6)), { 0, 0, 0, 0, 0, 1, 0, 1 }), even)
    assert(largest(first - second) > 1e-3) -- two places are as near to the centre, and differ
  end)

  it("a kernel larger than the block's", function()
    local function f(x) return F.conv2d(x, wide(orepa.ones(1, 1, 5, 5)), { padding = 2 }) end
    assert.is_false(is_convolution(f, 9, 3))
    assert.is_true(is_convolution(f, 9, 5))
  end)

  it("a norm behind a layer, online: its scale depends on the whole batch", function()
    local x = wide(orepa.randn(4, 1, 6, 6))
    local function f(t) return F.batch_norm(F.conv2d(t, a), { training = true }) end
    assert(largest(f(x * 2) - f(x) * 2) > 1e-3) -- not linear
  end)

  it("groups that are no multiple of the block's: channels of different groups would mix", function()
    local x = wide(orepa.zeros(1, 6, 1, 1))
    x:select(2, 3):fill_(1) -- the last of the first of two groups, in the middle one of three
    local y = F.conv2d(x, wide(orepa.ones(6, 2, 1, 1)), { groups = 3 })
    assert(largest(y:slice(2, 4, 6)) > 0)
  end)

  it("an identity between other channels: there is no channel for it", function()
    local done = pcall(function() return wide(orepa.ones(1, 4, 3, 3)) + wide(orepa.ones(1, 6, 3, 3)) end)
    assert.is_false(done)
  end)
end)
