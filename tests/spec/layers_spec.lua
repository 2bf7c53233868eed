-- Layers that make maps larger, norms by an image's own statistics, embeddings with padding, losses as modules: options, initial
-- values, names, what they say of wrong arguments. Their numbers are compared with PyTorch's in training_spec.lua.

local orepa = require "orepa"
local fails = require "tests.spec.fails"
local nn, F = orepa.nn, orepa.F

local function near(found, wanted, limit)
  assert.same(wanted.shape, found.shape)
  assert.is_true((found:to "float32" - wanted:to "float32"):abs():max():item() <= limit)
end

local function names_of(module)
  local _, names = module:state_dict()
  return names
end

-- ---- transposed convolutions ----

describe("nn.ConvTranspose2d", function()
  local function transpose(o)
    return nn.ConvTranspose2d { in_channels = o[1], out_channels = o[2], kernel_size = o[3], stride = o.stride,
      padding = o.padding, output_padding = o.output_padding, dilation = o.dilation, groups = o.groups, bias = o.bias }
  end

  it("has PyTorch's names, shapes and bounds of initial values", function()
    orepa.manual_seed(1)
    local m = transpose { 32, 16, { 3, 2 }, groups = 4 }
    assert.same({ "weight", "bias" }, names_of(m))
    assert.same({ 32, 4, 3, 2 }, m.weight.shape)
    assert.same({ 16 }, m.bias.shape)
    local bound = 1 / math.sqrt(4 * 3 * 2)
    for _, p in ipairs(m:parameters()) do assert.is_true(p:abs():max():item() <= bound) end
    assert.near(bound, m.weight:abs():max():item(), 0.01 * bound)
    assert.near(bound / math.sqrt(3), math.sqrt((m.weight * m.weight):mean():item()), 0.05 * bound)
    assert.same({ "weight" }, names_of(transpose { 2, 3, 2, bias = false }))
    assert.equal("ConvTranspose2d 32 -> 16, 3x2, stride 1x1, padding 0x0, groups 4  (784 parameters)", tostring(m))
  end)

  it("gives back the size that a convolution of its geometry came from", function()
    for _, size in ipairs { 7, 8 } do
      local o = { kernel_size = 3, stride = 2, padding = 1 }
      local conv = nn.Conv2d { in_channels = 2, out_channels = 4, kernel_size = 3, stride = 2, padding = 1 }
      local y = conv(orepa.ones(1, 2, size, size))
      local back = transpose { 4, 2, o.kernel_size, stride = 2, padding = 1, output_padding = 1 - size % 2 }
      assert.same({ 1, 2, size, size }, back(y).shape)
    end
  end)

  it("is the data gradient of the convolution", function()
    local x, w = orepa.randn(2, 3, 9, 8):requires_grad_(), orepa.randn(4, 3, 3, 3)
    local o = { stride = 2, padding = 1, dilation = 1, groups = 1 }
    local y = F.conv2d(x, w, o)
    local dy = orepa.randn(y.shape)
    y:backward(dy)
    o.output_padding = { 0, 1 }
    near(F.conv_transpose2d(dy, w, o), x.grad, 1e-5)
  end)

  it("takes input that is not contiguous, and a bias without options", function()
    local x, w = orepa.randn(2, 5, 4, 3):permute(1, 3, 4, 2), orepa.randn(4, 2, 2, 2)
    local y = F.conv_transpose2d(x, w, orepa.ones(2))
    near(y, F.conv_transpose2d(x:contiguous(), w) + 1, 1e-5)
    assert.is_true(y:is_contiguous())
  end)

  it("names what is wrong", function()
    local x, w = orepa.ones(1, 4, 3, 3), orepa.ones(4, 2, 2, 2)
    fails("kernel has 3 input channels, input has 4 %(input 1x4x3x3, kernel 3x2x2x2", F.conv_transpose2d, x,
      orepa.ones(3, 2, 2, 2))
    fails("3 groups don't divide 4 input channels", F.conv_transpose2d, x, w, { groups = 3 })
    fails("bias 3 for 4 output channels %(kernel 4x2x2x2, groups 2%)", F.conv_transpose2d, x, w, orepa.ones(3), { groups = 2 })
    fails("output_padding 2 of the height: at least 0, and less than the stride 2 or the dilation 1", F.conv_transpose2d, x, w,
      { stride = 2, output_padding = 2 })
    fails("padding 2 leaves nothing of the height", F.conv_transpose2d, x, w, { padding = 2 })
    fails("unknown option 'out_padding'", F.conv_transpose2d, x, w, { out_padding = 1 })
    fails("both must have 4 dimensions", F.conv_transpose2d, orepa.ones(4, 3, 3), w)
    fails("the input is float32, the kernel float64", F.conv_transpose2d, x:to { device = "ref" },
      w:to { device = "ref", dtype = "float64" })
    fails("ConvTranspose2d: 3 groups don't divide 4 %-> 6 channels", transpose, { 4, 6, 2, groups = 3 })
    fails("ConvTranspose2d: output_padding 1 must be less than the stride 1 or the dilation 1", transpose,
      { 4, 6, 2, output_padding = 1 })
    fails("ConvTranspose2d: option 'kernel_size' is missing", nn.ConvTranspose2d, { in_channels = 1, out_channels = 1 })
    for _, value in ipairs { 1 << 31, 1 << 62, -1 } do
      fails("conv_transpose2d: stride", F.conv_transpose2d, x, w, { stride = value })
      fails("conv_transpose2d: stride", F.conv_transpose2d, x, w, { dilation = value })
    end
    fails("too large to address", F.conv_transpose2d, x, w, { stride = (1 << 31) - 1 })
  end)
end)

-- ---- interpolation, borders ----

describe("nn.Upsample", function()
  it("takes a scale factor alone, and prints what it does", function()
    assert.same({ 1, 2, 6, 8 }, nn.Upsample(2)(orepa.ones(1, 2, 3, 4)).shape)
    assert.equal("Upsample by 2x2, nearest", tostring(nn.Upsample(2)))
    assert.equal("Upsample to 7x5, bilinear", tostring(nn.Upsample { size = { 7, 5 }, mode = "bilinear" }))
  end)

  it("keeps the type, and the device", function()
    for _, o in ipairs { { dtype = "bfloat16" }, { dtype = "float64", device = "ref" } } do
      local x = orepa.ones({ 1, 3, 2, 2 }, o):requires_grad_()
      for _, mode in ipairs { "nearest", "bilinear" } do
        local y = F.interpolate(x, { scale_factor = 2, mode = mode })
        assert.same({ o.dtype, o.device or "cpu" }, { y.dtype, y.device })
        y:sum():backward()
        assert.same({ o.dtype, 24 }, { x.grad.dtype, x.grad[1]:sum():item() // 2 })
        x.grad = nil
      end
    end
  end)

  it("of a view is that of its copy", function()
    local x = orepa.randn(2, 6, 5, 3):permute(1, 4, 3, 2)
    for _, mode in ipairs { "nearest", "bilinear" } do
      local o = { size = { 4, 9 }, mode = mode }
      assert.same(F.interpolate(x:contiguous(), o):tolist(), F.interpolate(x, o):tolist())
    end
  end)

  it("does not look at what has no share", function()
    local x = orepa.tensor { { { { 1, 0 / 0 } } } }
    assert.equal(1, F.interpolate(x, { size = { 3, 3 }, mode = "bilinear", align_corners = true })[1][1][1][1]:item())
  end)

  it("names what is wrong", function()
    local x = orepa.ones(1, 2, 3, 4)
    for where, f in pairs { interpolate = function(o) return F.interpolate(x, o) end, Upsample = nn.Upsample } do
      fails(where .. ": one of the options size and scale_factor expected, got neither", f, {})
      fails(where .. ": one of the options size and scale_factor expected, got both", f, { size = 2, scale_factor = 2 })
      fails(where .. ": size is 2.5; a whole number of at least 1, or two of them, expected", f, { size = 2.5 })
      fails(where .. ": size is {0, 3}; a whole number", f, { size = { 0, 3 } })
      fails(where .. ": scale_factor is 0; a number above 0", f, { scale_factor = 0 })
      fails(where .. ": scale_factor is .*nan; a number above 0", f, { scale_factor = 0 / 0 })
      fails(where .. ': mode is area, "nearest" or "bilinear" expected', f, { size = 2, mode = "area" })
      fails(where .. ": align_corners is 1, true or false", f, { size = 2, mode = "bilinear", align_corners = 1 })
      fails(where .. ': align_corners goes with mode = "bilinear"', f, { size = 2, align_corners = true })
      fails(where .. ": unknown option 'factor'", f, { factor = 2 })
    end
    fails("interpolate: a size of 3 times 0.2 is 0; at least 1 expected", F.interpolate, x, { scale_factor = 0.2 })
    fails("interpolate: a tensor expected, got number", F.interpolate, 1, { size = 2 })
    fails("interpolate: input 3x4 must have 4 dimensions", F.interpolate, x[1][1], { size = 2 })
    fails("interpolate: 4 dimensions expected, got 2", F.interpolate, x[1][1], { scale_factor = 2 })
    fails("interpolate: from 0x4 to 2x2", F.interpolate, orepa.ones(1, 2, 0, 4), { size = 2 })
    fails("too large to address", F.interpolate, x, { size = 1 << 40 })
    fails("does not do this for int64", F.interpolate, orepa.ones({ 1, 1, 2, 2 }, { dtype = "int64" }), { size = 2 })
  end)
end)

describe("F.pad", function()
  it("puts borders around any number of dimensions, with gradients", function()
    local x = orepa.tensor({ 1, 2, 3 }):requires_grad_()
    assert.same({ 3, 2, 1, 2, 3, 2 }, F.pad(x, { 2, 1 }, { mode = "reflect" }):tolist())
    assert.same({ 1, 1, 1, 2, 3, 3 }, F.pad(x, { 2, 1 }, { mode = "replicate" }):tolist())
    assert.same({ 2, 3, 1, 2, 3, 1 }, F.pad(x, { 2, 1 }, { mode = "circular" }):tolist())
    assert.same({ 9, 9, 1, 2 }, F.pad(x, { 2, -1 }, { value = 9 }):tolist())
    F.pad(x, { 2, 1 }, { mode = "reflect" }):sum():backward()
    assert.same({ 1, 3, 2 }, x.grad:tolist())
    assert.same({ 1, 2, 3 }, F.pad(x, {}):tolist())
  end)

  it("names what is wrong", function()
    local x = orepa.ones(2, 3)
    fails("pad: a list of widths expected, before and after for each dimension from the last on %(the input has 2%)", F.pad, x, 1)
    fails("pad: a list of widths expected", F.pad, x, { 1, 1, 1 })
    fails("pad: a list of widths expected", F.pad, x, { 1, 1, 1, 1, 1, 1 })
    fails("pad: width 2 is 0.5, a whole number expected", F.pad, x, { 1, 0.5 })
    fails("pad: mode is mirror", F.pad, x, { 1, 1 }, { mode = "mirror" })
    fails('pad: 3 before and 0 after are too many for mode = "reflect" and a size of 3', F.pad, x, { 3, 0 }, { mode = "reflect" })
    fails('pad: 0 before and 4 after are too many for mode = "circular" and a size of 3', F.pad, x, { 0, 4 },
      { mode = "circular" })
    fails("pad: value is x, a number expected", F.pad, x, { 1, 1 }, { value = "x" })
    fails("pad: a tensor expected, got number", F.pad, 1, { 1, 1 })
  end)
end)

-- ---- norms ----

describe("nn.GroupNorm and nn.LayerNorm", function()
  it("have PyTorch's names and start as the norm alone", function()
    local group, layer = nn.GroupNorm { num_groups = 2, num_channels = 4 }, nn.LayerNorm { 3, 4 }
    assert.same({ "weight", "bias" }, names_of(group))
    assert.same({ "weight", "bias" }, names_of(layer))
    assert.same({ 3, 4 }, layer.weight.shape)
    assert.same({}, names_of(nn.GroupNorm { num_groups = 2, num_channels = 4, affine = false }))
    assert.same({}, names_of(nn.LayerNorm { normalized_shape = 4, elementwise_affine = false }))
    assert.same({ "weight" }, names_of(nn.LayerNorm { normalized_shape = 4, bias = false }))
    local x = orepa.randn(2, 4, 3, 4)
    assert.same(F.group_norm(x, 2):tolist(), group(x):tolist())
    near(layer(x), F.layer_norm(x, { 3, 4 }), 1e-6)
    assert.equal("GroupNorm 4 channels in 2 groups  (8 parameters)", tostring(group))
    assert.equal("LayerNorm 3x4  (24 parameters)", tostring(layer))
  end)

  it("leave a mean of 0 and a variance of 1, also of numbers far from 0", function()
    local x = orepa.randn(3, 8, 17, 9) + 1000
    local groups = F.group_norm(x, 2):reshape(3, 2, -1)
    local rows = F.layer_norm(x, 9)
    for _, y in ipairs { groups, rows } do
      assert.is_true(y:mean(-1):abs():max():item() < 2e-4)
      assert.near(1, (y * y):mean():item(), 1e-3)
    end
  end)

  it("do the same in evaluation, in bfloat16 with float32 parameters", function()
    local m, x = nn.GroupNorm { num_groups = 4, num_channels = 8 }, orepa.randn(2, 8, 5, 5)
    assert.same(m(x):tolist(), m:eval()(x):tolist())
    local short = x:to("bfloat16"):requires_grad_()
    for _, norm in ipairs { m, nn.LayerNorm(5), nn.LayerNorm { 8, 5, 5 } } do
      local y = norm(short)
      assert.equal("bfloat16", y.dtype)
      near(y, norm(x), 0.05)
      y:sum():backward()
      assert.same({ "bfloat16", "float32" }, { short.grad.dtype, norm.weight.grad.dtype })
    end
  end)

  it("over channels of a map by permute copy nothing, and the result may be changed in place", function()
    local x = orepa.randn(2, 6, 4, 3):requires_grad_()
    local y = F.layer_norm(x:permute(1, 3, 4, 2), 6)
    near(y, F.layer_norm(x:permute(1, 3, 4, 2):contiguous(), 6), 1e-6)
    y:mul_(2)
    y:sum():backward()
    assert.is_true(y:permute(1, 4, 2, 3):is_contiguous())
    assert.is_true(x.grad:abs():max():item() < 1e-5)
    local plain = F.layer_norm(orepa.randn(2, 3, 4):requires_grad_(), 4)
    assert.is_true(plain:is_contiguous())
    plain:add_(1)
  end)

  it("of no elements give none", function()
    for _, shape in ipairs { { 0, 4, 3, 3 }, { 2, 4, 0, 3 } } do
      local x = orepa.ones(shape):requires_grad_()
      local m = nn.GroupNorm { num_groups = 2, num_channels = 4 }
      m(x):sum():backward()
      assert.same(shape, x.grad.shape)
      assert.same({ 0, 0, 0, 0 }, m.weight.grad:tolist())
    end
  end)

  it("name what is wrong", function()
    local x = orepa.ones(2, 4, 3, 3)
    fails("group_norm: 3 groups don't divide 4 channels %(input 2x4x3x3%)", F.group_norm, x, 3)
    fails("group_norm: 0 groups", F.group_norm, x, 0)
    fails("group_norm: the number of groups", F.group_norm, x, "x")
    fails("group_norm: weight is float32 3 on 'cpu'; an input of float32 2x4x3x3 on 'cpu' needs float32 4", F.group_norm, x, 2,
      { weight = orepa.ones(3) })
    fails("group_norm: option 'bias': a tensor expected, got number", F.group_norm, x, 2, { bias = 1 })
    fails("group_norm: eps is %-1", F.group_norm, x, 2, { eps = -1 })
    fails("group_norm: input 4 has no channels", F.group_norm, orepa.ones(4), 2)
    fails("group_norm: unknown option 'momentum'", F.group_norm, x, 2, { momentum = 1 })
    fails("layer_norm: the last sizes of the input, 2x4x3x3, are not 4", F.layer_norm, x, 4)
    fails("layer_norm: the last sizes of the input, 2x4x3x3, are not {}", F.layer_norm, x, {})
    fails("layer_norm: bias is float32 4 on 'cpu'; .* needs float32 3x3", F.layer_norm, x, { 3, 3 }, { bias = orepa.ones(4) })
    fails("does not do this for int64", F.layer_norm, orepa.ones({ 2, 3 }, { dtype = "int64" }), 3)
    fails("GroupNorm: 3 groups don't divide 4 channels", nn.GroupNorm, { num_groups = 3, num_channels = 4 })
    fails("GroupNorm: input 2x6 for 4 channels", nn.GroupNorm { num_groups = 2, num_channels = 4 }, orepa.ones(2, 6))
    fails("GroupNorm: eps is x", nn.GroupNorm, { num_groups = 2, num_channels = 4, eps = "x" })
    fails("LayerNorm: option 'normalized_shape' is missing", nn.LayerNorm, {})
    fails("LayerNorm", nn.LayerNorm, { normalized_shape = { 2, 0.5 } })
  end)
end)

-- ---- embeddings, dropout of channels, GELU by tanh ----

describe("nn.Embedding with padding_idx", function()
  local list = orepa.tensor({ 0, 2, 2 }, { dtype = "int64" })

  it("has a row of zeros without a gradient", function()
    for _, row in ipairs { 2, -1 } do
      local m = nn.Embedding { num_embeddings = 3, embedding_dim = 2, padding_idx = row }
      assert.same({ 0, 0 }, m.weight[3]:tolist())
      m(list):sum():backward()
      assert.same({ { 1, 1 }, { 0, 0 }, { 0, 0 } }, m.weight.grad:tolist())
      assert.equal("Embedding 3, 2, padding 2  (6 parameters)", tostring(m))
    end
  end)

  it("gives the row as it is, and names a wrong one", function()
    local weight = orepa.ones(3, 2):requires_grad_()
    assert.same({ { 1, 1 }, { 1, 1 }, { 1, 1 } }, F.embedding(list, weight, { padding_idx = 2 }):tolist())
    for _, row in ipairs { 3, -4, 0.5, "x" } do
      fails("embedding: padding_idx is .*; a row of 3, counted from 0, expected", F.embedding, list, weight,
        { padding_idx = row })
      fails("Embedding: padding_idx", nn.Embedding, { num_embeddings = 3, embedding_dim = 2, padding_idx = row })
    end
  end)
end)

describe("dropout2d", function()
  it("takes away whole channels of each image", function()
    orepa.manual_seed(2)
    local y = F.dropout2d(orepa.ones(50, 40, 2, 3), { p = 0.25 })
    local first = y:slice(3, 1, 1):slice(4, 1, 1)
    assert.is_true(y:eq(first):min():item() == true or y:eq(first):all():item() == true)
    assert.near(0.25, first:eq(0):sum():item() / 2000, 0.04)
    assert.near(1, first:max():item() * 0.75, 1e-6)
  end)

  it("is the input in evaluation, and wants channels", function()
    local x = orepa.ones(2, 3, 1, 1)
    assert.is_true(nn.Dropout2d(0.5):eval()(x) == x)
    fails("dropout2d: an input of 1 dimensions has no channels", F.dropout2d, orepa.ones(3))
    fails("Dropout2d: p is 1", nn.Dropout2d, 1)
  end)
end)

it("gelu names an approximation that there is not", function()
  fails('gelu: approximate is x, "none" or "tanh" expected', F.gelu, orepa.ones(1), { approximate = "x" })
  fails("GELU: approximate is x", nn.GELU, { approximate = "x" })
  assert.equal("GELU by tanh", tostring(nn.GELU { approximate = "tanh" }))
  assert.equal("GELU", tostring(nn.GELU()))
end)

it("Flatten ends where it is told to", function()
  local x = orepa.randn(2, 3, 4, 5)
  assert.same({ 2, 12, 5 }, nn.Flatten { dim = 2, end_dim = 3 } (x).shape)
  assert.same({ 24, 5 }, nn.Flatten { dim = 1, end_dim = -2 } (x).shape)
  assert.same(x:reshape(2, 12, 5):tolist(), nn.Flatten { end_dim = 3 } (x):tolist())
  fails("Flatten: dimensions 3 to 2 of an input that has 4", nn.Flatten { dim = 3, end_dim = 2 }, x)
  fails("Flatten: dimensions 2 to 5 of an input that has 4", nn.Flatten { dim = 2, end_dim = 5 }, x)
end)

-- ---- losses ----

describe("losses as modules", function()
  it("are their functions with options", function()
    local x, labels = orepa.randn(4, 3), orepa.tensor({ 0, 2, 1, 1 }, { dtype = "int64" })
    local weight, truth = orepa.tensor { 1, 2, 3 }, orepa.rand(4, 3)
    assert.equal(F.cross_entropy(x, labels, { weight = weight, label_smoothing = 0.1 }):item(),
      nn.CrossEntropyLoss { weight = weight, label_smoothing = 0.1 } (x, labels):item())
    assert.equal(F.nll_loss(x, labels, { reduction = "sum" }):item(), nn.NLLLoss { reduction = "sum" } (x, labels):item())
    for name, f in pairs { BCEWithLogitsLoss = "binary_cross_entropy_with_logits", MSELoss = "mse_loss", L1Loss = "l1_loss",
      SmoothL1Loss = "smooth_l1_loss", KLDivLoss = "kl_div" } do
      assert.equal(F[f](x, truth):item(), nn[name]()(x, truth):item())
      fails(name .. ": unknown option 'size'", nn[name], { size = 1 })
    end
    assert.equal(F.smooth_l1_loss(x, truth, { beta = 0.5 }):item(), nn.SmoothL1Loss { beta = 0.5 } (x, truth):item())
  end)

  it("move their weights, and name them as PyTorch does", function()
    local loss = nn.CrossEntropyLoss { weight = orepa.ones(3) }
    assert.same({ "weight" }, names_of(loss))
    loss:to "ref"
    local x, labels = orepa.randn({ 2, 3 }, { device = "ref" }), orepa.zeros({ 2 }, { dtype = "int64", device = "ref" })
    assert.near(F.cross_entropy(x, labels):item(), loss(x, labels):item(), 1e-6)
    assert.same({ "pos_weight" }, names_of(nn.BCEWithLogitsLoss { pos_weight = orepa.ones(3) }))
  end)
end)

describe("cross_entropy of probabilities", function()
  it("of one class each is that of labels", function()
    local x, labels = orepa.randn(3, 4), orepa.tensor({ 1, 3, 0 }, { dtype = "int64" })
    local target = orepa.tensor { { 0, 1, 0, 0 }, { 0, 0, 0, 1 }, { 1, 0, 0, 0 } }
    for _, smoothing in ipairs { 0, 0.2 } do
      assert.near(F.cross_entropy(x, labels, { label_smoothing = smoothing }):item(),
        F.cross_entropy(x, target, { label_smoothing = smoothing }):item(), 1e-6)
    end
    assert.equal("float32", F.cross_entropy(x:to "bfloat16", target:to "bfloat16").dtype)
  end)

  it("names what is wrong", function()
    local x = orepa.ones(2, 3)
    fails("cross_entropy: float32 2x3 on 'cpu' and float32 2 on 'cpu'; one shape", F.cross_entropy, x, orepa.ones(2))
    fails("cross_entropy: ignore_index goes with labels", F.cross_entropy, x, x, { ignore_index = 1 })
    fails("cross_entropy: label_smoothing is 2", F.cross_entropy, x, x, { label_smoothing = 2 })
    fails("cross_entropy: logits are float32 3", F.cross_entropy, x[1], x[1])
    fails("cross_entropy: weight is float32 2", F.cross_entropy, x, x, { weight = orepa.ones(2) })
  end)
end)

it("nll_loss is 0 where nothing counts, and names what is wrong", function()
  local x, labels = orepa.randn(2, 3), orepa.zeros({ 2 }, { dtype = "int64" })
  assert.equal(0, F.nll_loss(x, labels - 100):item())
  fails("nll_loss: input float32 2x3 on 'cpu', labels int64 3 on 'cpu'", F.nll_loss, x,
    orepa.zeros({ 3 }, { dtype = "int64" }))
  fails("nll_loss: argument 2: a tensor expected, got number", F.nll_loss, x, 1)
  fails("nll_loss: ignore_index is 0.5", F.nll_loss, x, labels, { ignore_index = 0.5 })
  fails("nll_loss: labels from 3 to 3; they lie between 0 and 2", F.nll_loss, x, labels + 3)
  fails("nll_loss: labels from %-1 to %-1; they lie between 0 and 2", F.nll_loss, x, labels - 1)
end)

-- ---- containers ----

describe("lists of modules", function()
  local function classes(seq)
    local names = {}
    for k, m in ipairs(seq) do names[k] = m.class_name end
    return table.concat(names, " ")
  end

  it("grow by add and insert, shrink by remove, and are indexed from 1 or from the end", function()
    local seq = nn.Sequential():add(nn.ReLU()):add(nn.Tanh())
    assert.equal("ReLU Tanh", classes(seq))
    assert.is_true(seq:insert(1, nn.Flatten()) == seq)
    seq:insert(-1, nn.Sigmoid()):insert(3, nn.SiLU())
    assert.equal("Flatten ReLU SiLU Tanh Sigmoid", classes(seq))
    assert.equal(5, #seq)
    assert.is_true(seq:get(-1) == seq[5] and seq:get(1) == seq[1] and seq:get "1" == seq[2])
    assert.equal("SiLU", seq:remove(3).class_name)
    assert.equal("Sigmoid", seq:remove(-1).class_name)
    assert.equal("Flatten ReLU Tanh", classes(seq))
    seq[2] = nn.Linear { in_features = 4, out_features = 1 }
    assert.same({ "1.weight", "1.bias" }, names_of(seq))
    assert.same({ 2, 1 }, seq(orepa.ones(2, 4)).shape)
    seq.extra_part = nn.ReLU()
    seq:remove "extra_part"
    assert.is_nil(rawget(seq, "extra_part"))
  end)

  it("name what is wrong", function()
    local seq = nn.Sequential(nn.ReLU())
    fails("Sequential: item 2 is a number, not a module", seq.add, seq, 5)
    fails("Sequential: item 1 is a nil, not a module", seq.insert, seq, 1, nil)
    for _, k in ipairs { 0, 3, -3, 1.5 } do
      fails("insert: position .*; there are 1 items", seq.insert, seq, k, nn.ReLU())
      fails("get: position .*; there are 1 items", seq.get, seq, k)
      fails("remove: position .*; there are 1 items", seq.remove, seq, k)
    end
    fails("insert: position x", seq.insert, seq, "x", nn.ReLU())
  end)
end)
