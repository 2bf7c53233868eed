-- Makes docs/paper.md of what the other scripts here wrote into <out>: tables, figures, and how they were made.
--
--     build/orepa scripts/paper/page.lua --out docs/paper

local argparse = require "argparse"
local cjson = require "cjson"
package.path = (arg[0]:match "^.*/" or "") .. "../bench/?.lua;" .. package.path
local measure = require "measure"

local parser = argparse("page.lua", "Makes docs/paper.md of tables and figures.")
parser:option("--out", "folder of tables and figures; the page lies beside it", "docs/paper")
local args = parser:parse()

-- ---- what the paper says, and what differs here ----

local parts = {
  { "table1", [[
The paper removes the norms behind the branches of DBB and RepVGG on ImageNet: accuracy drops, which is its reason to put
scalings in their place. Here the same blocks have one norm behind the sum in each case, and no scaling or one for each branch
and channel.]] },
  { "table2", [[
The paper adds one component after the other and reports each one's gain on ImageNet. Here the same branches are added in the
order of the rows, each row with all before it: online with scalings, and offline with a norm behind every layer. 1x1
convolutions of a ResNet-18 are shortcuts alone, which stay plain in the reference too. From the average on, offline runs end
points apart from seed to seed: with a norm behind every layer the loss jumps while the rate is highest, online it does not.]] },
  { "table3", [[
The paper finds scalings for each channel better than one for each branch, those better than none, and training to diverge
without a norm behind the sum. A run that diverges is stopped at the first loss that is not finite; the last column is what it
said.]] },
  { "figure7", [[
The paper shows cosines of branches' kernels: with norms or scalings they are unlike, without them some become alike. The
table has the mean magnitude over all pairs of branches of a block, after training one network of each kind.]] },
  { "figure8", [[
The paper measures training memory and time of ResNet-18 as components are added, on GPUs: with all components, online
training takes 1.40 times the plain network's time and saves 96 % of the extra memory. Here: a whole step with its optimizer,
224 px, on the CPU; memory is the engine's peak (`orepa.memory()`); saved is 1 - (online - plain) / (offline - plain). Offline
blocks get what plain ones get: norms are computed when they are read, sums in place.]] },
  { "figure8-batches", [[
The same with all components at other batch sizes.]] },
  { "table4", [[
The paper's networks are trained on ImageNet, where OREPA is above DBB (by up to 0.6 %) and DBB above the plain network, with
65 to 75 % of DBB's extra memory saved and 1.5 to 2.3 times its speed. Here accuracies are Fashion-MNIST's, at a quarter of the
width; memory and time are those of the whole network at 224 px. On 28x28 images the last stages' maps have 2x2 pixels and one:
most of a 3x3 kernel meets padding. DBB pads behind a norm, with what its running statistics make of zero and without a
gradient, and there it is below the plain network.]] },
  { "table5", [[
As Table 4, for RepVGG-A0.]] },
}

-- ---- the page ----

local function read(path)
  local file <close> = io.open(path, "rb")
  return file and file:read "a"
end

local function exists(path)
  local file <close> = io.open(path, "rb")
  return file ~= nil
end

local folder = args.out:match "[^/]+$"
local page = { [[
# The paper's experiments

Hu et al., Online Convolutional Re-parameterization, CVPR 2022: its tables and figures at a scale that runs on a CPU in an
hour or two. Accuracies are on Fashion-MNIST's 10,000 test images, mean and standard deviation over seeds, by the quickstart's
recipe for all networks alike (SGD, momentum 0.9, weight decay 5e-4, rate 0.1, one epoch of warm-up, cosine); nothing is tuned
for one side. The networks are small and a few epochs short, so differences between blocks are of the size of the deviations
more often than in the paper; ImageNet, the paper's dataset, is not used here. Each script prints its table, and writes its
data and figure into this folder; runs are kept in `runs.jsonl`.
]] }

for _, part in ipairs(parts) do
  local name, text = part[1], part[2]
  local table_text, data = read(("%s/%s.md"):format(args.out, name)), read(("%s/%s.json"):format(args.out, name))
  if table_text then
    local made = cjson.decode(data)
    local o = made.options
    page[#page + 1] = ("## %s\n\n%s\n"):format(made.title, text)
    local script = name:gsub("%-.*", "")
    local words = { ("build/orepa scripts/paper/%s.lua"):format(script) }
    if name:find "^table" then words[#words + 1] = ("--seeds %d --epochs %d"):format(o.seeds, o.epochs) end
    if name == "figure7" then words[#words + 1] = ("--epochs %d"):format(o.epochs) end
    if name:find "^figure8" or name == "table4" or name == "table5" then
      words[#words + 1] = ("--batch-size %d"):format(o.batch_size)
    end
    if o.more and #o.more > 0 then words[#words + 1] = "--more " .. table.concat(o.more, ",") end
    page[#page + 1] = ("`%s`\n"):format(table.concat(words, " "))
    page[#page + 1] = table_text
    if exists(("%s/%s.svg"):format(args.out, name)) then
      page[#page + 1] = ("![%s](%s/%s.svg)\n"):format(made.title, folder, name)
    end
  end
end

local path = args.out .. ".md"
measure.write_file(path, table.concat(page, "\n"))
print(("%s has %d parts"):format(path, (#page - 1) // 3))
