-- The program and the scripts, run as a user runs them.

local cjson = require "cjson"
local lfs = require "lfs"
local orepa = require "orepa"
local process = require "tests.spec.process"

local run = process.run
local folder

setup(function() folder = process.folder() end)
teardown(function() process.remove(folder) end)

local function script(name, text)
  process.write(folder .. "/" .. name, text)
  return folder .. "/" .. name
end

local function has(text, wanted)
  assert(text:find(wanted, 1, true), ("'%s' is not in:\n%s"):format(wanted, text))
end

-- A run that ends with an error of the user's: exit code 1 and a message.
local function refuses(wanted, arguments)
  local text, code = run(arguments, folder)
  has(text, wanted)
  assert.equal(1, code)
  return text
end

describe("diagnose.lua", function()
  local function diagnose(...)
    return run({ process.root .. "/scripts/diagnose.lua", ... }, folder)
  end

  it("shows the likeness of branches and the error of every block", function()
    local models = require "orepa.models"
    models.save(models.create("resnet18", { reparam = "orepa", width = 0.0625, classes = 3, in_channels = 1 }),
      folder .. "/branches.safetensors")
    local draws = os.execute "command -v gnuplot >/dev/null"
    local words = draws and { "--picture", "likeness.svg" } or {}
    local text, code = diagnose("branches.safetensors", "--size", "33", table.unpack(words))
    assert.equal(0, code, text)
    has(text, "stage4.1.conv2: cosine of branches' kernels")
    has(text, "pfir")
    has(text, "OREPALargeConv")
    local count = select(2, text:gsub("\n  stage%d[%.%d]*%.[%w]+ +[%w]+ +[%d%.e%-]+", ""))
    assert.equal(20, count, text)
    if draws then has(process.read(folder .. "/likeness.svg"), "<svg") end
  end)

  it("refuses what it can't do, at once", function()
    refuses("ends in .svg or .png", { process.root .. "/scripts/diagnose.lua", "branches.safetensors", "--picture", "x.jpg" })
    refuses("nowhere.safetensors", { process.root .. "/scripts/diagnose.lua", "nowhere.safetensors" })
    if os.execute "command -v gnuplot >/dev/null" then
      local text, code = run({ process.root .. "/scripts/diagnose.lua", "branches.safetensors", "--picture", "x.svg" }, folder,
        { PATH = "/nowhere" })
      has(text, "gnuplot is not installed")
      assert.equal(1, code)
    end
  end)
end)

describe("the program", function()
  it("explains itself", function()
    for _, option in ipairs { "--help", "-h" } do
      local text, code = run { option }
      has(text, "usage: orepa [-i] [-e code] [script.lua [argument ...]]")
      assert.equal(0, code)
    end
    local text, code = run { "--version" }
    has(text, "orepa " .. orepa.version .. ", Lua 5.4")
    has(text, orepa.build_info():match "^[^\n]*")
    assert.equal(0, code)
  end)

  it("takes no unknown option, and no script that is not there", function()
    refuses("unknown option '--fast'", { "--fast" })
    refuses("no code behind '-e'", { "-e" })
    refuses("nowhere.lua", { "nowhere.lua" })
    refuses("syntax.lua:1: <name> expected near '='", { script("syntax.lua", "local = 1") })
  end)

  it("hands arguments to the script, in arg and in ...", function()
    local path = script("arguments.lua", "print(arg[0] ~= nil, #arg, arg[1], arg[2], select('#', ...), ...)")
    local text, code = run { path, "a b", "--help" }
    assert.equal("true\t2\ta b\t--help\t2\ta b\t--help\n", text)
    assert.equal(0, code)
  end)

  it("finds its library from any folder, whatever the script's", function()
    lfs.mkdir(folder .. "/elsewhere")
    script("library.lua", [[
      for _, name in ipairs { "orepa", "orepa.models", "orepa.datasets" } do require(name) end
      print(require("orepa").ones(2):sum():item())]])
    assert.equal("2.0\n", (run({ "../library.lua" }, folder .. "/elsewhere")))
    assert.equal("2.0\n", (run({ folder .. "/library.lua" }, "/")))
  end)

  it("points at the user's line", function()
    local path = script("wrong.lua", "local orepa = require 'orepa'\nlocal function f(a, b)\n  local c = a + b\n  return c\n"
      .. "end\n\nlocal sum = f(orepa.ones(2, 3), orepa.ones(4))\nprint(sum)\n")
    local text = refuses("wrong.lua:3: add: shapes 2x3 and 4 don't broadcast", { path })
    has(text, "stack traceback:")
    has(text, "wrong.lua:7: in main chunk")
    refuses("wrong2.lua:2: OREPA: option 'in_channels' is missing", { script("wrong2.lua",
      "local nn = require('orepa').nn\nlocal b = nn.OREPA{out_channels = 2, kernel_size = 3}\n") })
  end)

  it("gives the script's exit code", function()
    assert.equal(0, select(2, run { script("exit0.lua", "os.exit(true)") }))
    assert.equal(7, select(2, run { script("exit7.lua", "require 'orepa'.ones(3) os.exit(7, true)") }))
    refuses("orepa: nil", { script("error_nil.lua", "error()") })
    refuses("thing", { script("error_table.lua", "error(setmetatable({}, {__tostring = function() return 'thing' end}))") })
  end)
end)

-- ---- a dataset of a few images in the format of Fashion-MNIST ----

local SIZE = 16

local function write_idx(name, bytes)
  process.write(folder .. "/" .. name, bytes)
  assert(os.execute(("gzip -n '%s/%s'"):format(folder, name)))
end

local function write_images(prefix, count)
  local pixels, labels = {}, {}
  for k = 1, count do
    local label = (k - 1) % 10
    labels[k] = string.char(label)
    for p = 1, SIZE * SIZE do pixels[#pixels + 1] = string.char((p * (label + 1) + k * 7) % 256) end
  end
  write_idx(prefix .. "-images-idx3-ubyte", string.pack(">BBBBI4I4I4", 0, 0, 8, 3, count, SIZE, SIZE) .. table.concat(pixels))
  write_idx(prefix .. "-labels-idx1-ubyte", string.pack(">BBBBI4", 0, 0, 8, 1, count) .. table.concat(labels))
end

local function train(options)
  local arguments = { process.root .. "/scripts/train.lua", "--data", folder, "--width", "0.0625", "--epochs", "1",
    "--batch-size", "16", "--held-out", "10", "--lr", "0.05" }
  for _, word in ipairs(options) do arguments[#arguments + 1] = word end
  return arguments
end

local function deploy(options)
  return { process.root .. "/scripts/deploy.lua", table.unpack(options) }
end

describe("the scripts", function()
  setup(function()
    write_images("train", 50)
    write_images("t10k", 20)
  end)

  it("train.lua writes weights and metrics, and shows plain lines", function()
    local text, code = run(train { "--out", "first", "--seed", "5" }, folder)
    assert(code == 0, text)
    has(text, "resnet18, reparam orepa, width 0.0625:")
    has(text, "40 training images, 10 held out")
    assert.matches("epoch 1/1  loss [%d.]+  accuracy", text)
    assert.matches("held%-out accuracy [%d.]+ %%", text)
    assert.matches("test accuracy [%d.]+ %%", text)
    assert.is_nil(text:find "[\r\27]")
    local metrics = cjson.decode(process.read(folder .. "/first/metrics.json"))
    assert.equal(1, #metrics.epochs)
    assert.same({ 40, 10, 20 }, { metrics.epochs[1].images, metrics.epochs[1].valid.images, metrics.test.images })
    assert.equal(5, metrics.options.seed)
    local tensors, meta = orepa.load(folder .. "/first/model.safetensors")
    assert.is_not_nil(tensors["stage1.0.conv1.weight_orepa_origin"])
    assert.same({ "resnet18", "fashion-mnist", "5" }, { meta.model, meta.dataset, meta.seed })
  end)

  it("train.lua gives the same file for the same seed, another for another", function()
    run(train { "--out", "again", "--seed", "5", "--no-test" }, folder)
    local text = run(train { "--out", "other", "--seed", "6", "--no-test" }, folder)
    assert.is_nil(text:find("\ntest accuracy", 1, true))
    local first = process.read(folder .. "/first/model.safetensors")
    assert.is_true(first == process.read(folder .. "/again/model.safetensors"))
    assert.is_false(first == process.read(folder .. "/other/model.safetensors"):gsub('"seed":"6"', '"seed":"5"'))
  end)

  it("train.lua takes its other options", function()
    local text, code = run(train { "--reparam", "none", "--stem", "small", "--padding", "2", "--label-smoothing", "0.1",
      "--threads", "1", "--held-out", "0", "--no-test" }, folder)
    assert(code == 0, text)
    has(text, "resnet18, reparam none")
    has(text, "50 training images, 0 held out, 1 threads")
  end)

  it("train.lua trains in bfloat16, and says where float32 is faster", function()
    local options = { "--precision", "bf16", "--seed", "5", "--out", "short" }
    local text, code = run(train(options), folder, { OREPA_BFLOAT16 = "1" })
    assert(code == 0, text)
    assert.is_nil(text:find("orepa:", 1, true))
    local short = orepa.load(folder .. "/short/model.safetensors")
    local wide = orepa.load(folder .. "/first/model.safetensors")
    local kernel = "stage1.0.conv1.weight_orepa_origin"
    assert.equal("float32", short[kernel].dtype)
    local difference = (short[kernel] - wide[kernel]):abs():max():item() / wide[kernel]:abs():max():item()
    assert(difference > 0 and difference < 0.2, difference)
    assert.equal("bf16", cjson.decode(process.read(folder .. "/short/metrics.json")).options.precision)
    text, code = run(train { "--precision", "bf16", "--seed", "5", "--out", "refused" }, folder, { OREPA_BFLOAT16 = "0" })
    assert(code == 0, text)
    assert.equal(1, select(2, text:gsub("orepa: autocast computes in float32", "")))
    assert.is_true(process.read(folder .. "/refused/model.safetensors") == process.read(folder .. "/first/model.safetensors"))
  end)

  it("deploy.lua shows that nothing changed, and writes what models.load reads", function()
    local text, code = run(deploy { "first/model.safetensors", "deployed.safetensors", "--data", folder, "--batch-size", "8" },
      folder)
    assert(code == 0, text)
    assert.matches("deployed on 20 images: largest difference of logits [%d.e-]+ of the largest %([%d.]+%), "
      .. "20 of 20 predictions the same", text)
    assert.matches("images/s: training form squeezing each pass %d+, training form folded once %d+, deployed %d+", text)
    assert.matches("deployed test accuracy [%d.]+ %%", text)
    local models = require "orepa.models"
    local net, meta = models.load(folder .. "/first/model.safetensors")
    local deployed, deployed_meta = models.load(folder .. "/deployed.safetensors")
    assert.equal(meta.mean, deployed_meta.mean)
    assert.is_true(#deployed:parameters() < #net:parameters())
    orepa.manual_seed(1)
    local x = orepa.randn(4, 1, SIZE, SIZE)
    local wanted = net:eval()(x)
    local difference = (deployed:eval()(x) - wanted):abs():max():item()
    assert(difference <= 1e-4 * wanted:abs():max():item(), difference)
    local again = deploy { "deployed.safetensors", "--data", folder }
    assert.equal(0, (select(2, run(again, folder))))
  end)

  it("deploy.lua fails if something did change", function()
    refuses("the deployed network is not the same", deploy { "first/model.safetensors", "--data", folder, "--tolerance=-1" })
  end)

  it("refuse wrong options with their names", function()
    refuses("unknown option '--epoch'", train { "--epoch=3" })
    for _, name in ipairs { "--epochs", "--batch-size", "--lr", "--width", "--seed" } do
      refuses("malformed argument 'many'", train { name, "many" })
    end
    refuses("no network is called 'resnet17'", train { "--model", "resnet17" })
    refuses("reparam is 'magic'", train { "--reparam", "magic" })
    refuses("stem is 'large'", train { "--stem", "large" })
    refuses("no dataset is called 'mnist'", train { "--dataset", "mnist" })
    refuses("/nowhere/train-images-idx3-ubyte.gz", train { "--data", "/nowhere" })
    refuses("'abacus' is neither a type nor a device", train { "--device", "abacus" })
    refuses("batch_size is 0", train { "--batch-size", "0" })
    refuses("held_out is 60 of 50 training images", train { "--held-out", "60" })
    refuses("held_out is -1 of 50 training images", train { "--held-out=-1" })
    refuses("must be one of 'float32', 'bf16'", train { "--precision", "bf8" })
    refuses("set_threads", train { "--threads", "0" })
    refuses("/nowhere/deep", train { "--out", "/nowhere/deep" })
    refuses("missing argument 'input'", deploy {})
    refuses("missing.safetensors", deploy { "missing.safetensors" })
    refuses("not.safetensors", deploy { script("not.safetensors", "no tensors") })
    refuses("--images", deploy { "first/model.safetensors", "--data", folder, "--images", "0" })
    refuses("batch_size is -5", deploy { "first/model.safetensors", "--data", folder, "--batch-size=-5" })
  end)

  it("deploy.lua says what is missing in a file that is not its own", function()
    orepa.save(folder .. "/bare.safetensors", { x = orepa.ones(1) })
    refuses("does not say which network it holds", deploy { "bare.safetensors" })
    local models = require "orepa.models"
    models.save(models.create("resnet18", { classes = 10, in_channels = 1, width = 0.0625 }), folder .. "/no_dataset.safetensors")
    refuses("does not name the dataset it was trained on", deploy { "no_dataset.safetensors" })
  end)
end)

describe("models.save and models.load", function()
  local models = require "orepa.models"

  local function round_trip(net, meta)
    models.save(net, folder .. "/net.safetensors", meta)
    return models.load(folder .. "/net.safetensors")
  end

  it("keep name, options, weights, statistics and metadata", function()
    orepa.manual_seed(4)
    local net = models.create("resnet18", { reparam = "orepa", classes = 5, in_channels = 2, width = 0.0625, stem = "small" })
    local x = orepa.randn(2, 2, 8, 8)
    net(x)
    local back, meta = round_trip(net, { note = "from a spec" })
    assert.equal("from a spec", meta.note)
    assert.same(net:eval()(x):tolist(), back:eval()(x):tolist())
    local deployed = round_trip(net:deploy())
    assert.same(net(x):tolist(), deployed:eval()(x):tolist())
    assert.same(tostring(net), tostring(deployed))
  end)

  it("of a network of one's own want orepa.save", function()
    local path = folder .. "/own.safetensors"
    local ok, message = pcall(models.save, orepa.nn.ReLU(), path)
    assert.is_false(ok)
    has(message, "use orepa.save")
    models.register("spec_net", function(o) return orepa.nn.Linear { in_features = o.size, out_features = 1 } end)
    local net = models.create("spec_net", { size = 3 })
    assert.same(net.weight:tolist(), round_trip(net).weight:tolist())
  end)

  it("know their networks and options", function()
    for _, case in ipairs { { "resnet19", nil, "no network is called 'resnet19' (there are mobileone" },
      { "resnet18", { classes = 3, depth = 2 }, "unknown option 'depth'" },
      { "resnet18", { classes = 3, stem = "x" }, "stem is 'x'" } } do
      local ok, message = pcall(models.create, case[1], case[2])
      assert.is_false(ok)
      has(message, case[3])
    end
  end)
end)

describe("a new user's script", function()
  local path = process.root .. "/tests/spec/new_user.lua"

  it("is short", function()
    local count = 0
    for line in io.lines(path) do
      if line:find "%S" and not line:find "^%-%-" then count = count + 1 end
    end
    assert.is_true(count <= 25, count)
  end)

  it("trains a model with a block described by the user, and deploys it", function()
    local text, code = run({ path }, folder)
    assert(code == 0, text)
    local accuracy, difference = text:match "accuracy ([%d.]+), difference ([%d.e-]+)"
    assert.equal(1, tonumber(accuracy))
    assert.is_true(tonumber(difference) < 1e-4)
  end)
end)
