-- Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28x28 grey, ten classes. Debian's package
-- dataset-fashion-mnist installs the four idx.gz files.

local orepa = require "orepa"
local data = orepa.data

local fashion_mnist = {
  folder = "/usr/share/datasets/fashion-mnist",
  class_names = { "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot" },
}

local function load(folder, images, labels)
  return data.images { images = data.load_idx(folder .. "/" .. images), labels = data.load_idx(folder .. "/" .. labels),
    classes = 10 }
end

-- {train =, valid =, test =, mean =, deviation =}: the last `held_out` training images are the validation set. Mean and
-- deviation are those of the training images.
function fashion_mnist.load(o)
  local folder, held_out = o and o.folder or fashion_mnist.folder, o and o.held_out or 5000
  local all = load(folder, "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
  if math.type(held_out) ~= "integer" or held_out < 0 or held_out >= all.size then
    orepa.fail(("fashion_mnist: held_out is %s of %d training images"):format(tostring(held_out), all.size))
  end
  local train = data.part(all, 1, all.size - held_out)
  local mean, deviation = data.image_statistics(train.images)
  return { train = train, valid = held_out > 0 and data.part(all, all.size - held_out + 1, all.size) or nil,
    test = load(folder, "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"), mean = mean, deviation = deviation,
    classes = 10, channels = 1, class_names = fashion_mnist.class_names }
end

return fashion_mnist
