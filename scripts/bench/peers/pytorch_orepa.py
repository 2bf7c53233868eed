#!/usr/bin/env python3
"""The PyTorch peer of the benchmark: ResNet-18, plain or with OREPA blocks, trained on Fashion-MNIST.

Only measured against, never a dependency. Parameter names, initial values and the operations that squeeze a
kernel are those of the reference implementation (OREPA, CVPR 2022), so its tensors load by name.

    pytorch_orepa.py --check model_resnet18_orepa.safetensors     compare with a golden file (model_* or train_*)
    pytorch_orepa.py --reparam orepa --steps 60 --json            median time of a step
    pytorch_orepa.py --reparam orepa --epochs 10                  train by the quickstart's recipe

Needs torch, numpy and safetensors.
"""

import argparse
import gzip
import json
import math
import os
import statistics
import sys
import time

# Without these glibc returns every large activation to the system and faults it in again at the next step.
# They are read when a process starts, so it starts once more.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
if __name__ == "__main__" and not MALLOC.keys() <= os.environ.keys():
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**MALLOC, **os.environ})

import torch
import torch.nn.functional as F
from torch import nn

HELD_OUT = 5000
WARM_UP_STEPS = 10
TOLERANCE = 5e-5


class ConvBN(nn.Module):
    """Convolution and norm; `relu` ends the block in a ReLU."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False):
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.every_second = (kernel_size, stride) == (1, 2) and inputs < 16

    def forward(self, x):
        # The gradient of a narrow 1x1 kernel with stride 2 on channels-last maps is randomly wrong in PyTorch 2.13 (oneDNN
        # 3.12, it seems its issue 6035): take every second pixel first. Widths from 0.25 up are not concerned.
        y = F.conv2d(x[:, :, ::2, ::2], self.conv.weight) if self.every_second else self.conv(x)
        y = self.bn(y)
        return F.relu_(y) if self.relu else y


class Orepa(nn.Module):
    """A 3x3 convolution whose kernel is squeezed from six scaled branches in every forward pass."""

    EXPANSION = 8
    INITIAL_SCALINGS = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)

    def __init__(self, inputs, outputs, stride=1, relu=False, norm=True):
        super().__init__()
        self.stride, self.relu = stride, relu

        def kaiming(*shape):
            return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape)))

        self.weight_orepa_origin = kaiming(outputs, inputs, 3, 3)
        self.weight_orepa_avg_conv = kaiming(outputs, inputs, 1, 1)
        self.weight_orepa_pfir_conv = kaiming(outputs, inputs, 1, 1)
        self.weight_orepa_1x1 = kaiming(outputs, inputs, 1, 1)
        self.weight_orepa_1x1_kxk_idconv1 = nn.Parameter(torch.zeros(inputs, inputs, 1, 1))
        self.weight_orepa_1x1_kxk_conv2 = kaiming(outputs, inputs, 3, 3)
        self.weight_orepa_gconv_dw = kaiming(self.EXPANSION * inputs, 1, 3, 3)
        self.weight_orepa_gconv_pw = kaiming(outputs, self.EXPANSION * inputs, 1, 1)
        self.vector = nn.Parameter(torch.tensor(self.INITIAL_SCALINGS)[:, None].repeat(1, outputs))
        self.register_buffer("weight_orepa_avg_avg", torch.full((3, 3), 1 / 9))
        self.register_buffer("id_tensor", torch.eye(inputs)[:, :, None, None])
        self.register_buffer("weight_orepa_prior", self.prior(outputs))
        if norm:
            self.bn = nn.BatchNorm2d(outputs)

    @staticmethod
    def prior(outputs):
        """Cosines along h for the first half of the filters, along w for the others: (outputs, 3, 3)."""
        half = outputs / 2
        filters = torch.arange(outputs, dtype=torch.float64)
        frequency = torch.where(filters < half, filters, filters - half) + 1
        wave = torch.cos(math.pi / 3 * frequency[:, None] * (torch.arange(3, dtype=torch.float64) + 0.5))
        along_h = (filters < half)[:, None, None]
        return torch.where(along_h, wave[:, :, None], wave[:, None, :]).expand(outputs, 3, 3).float()

    def squeeze(self):
        """The kernel, (outputs, inputs, 3, 3). One einsum a product and one a scaling, as the reference does it."""

        def matrix(kernel):
            return kernel.squeeze(3).squeeze(2)

        def scaled(row, kernel):
            return torch.einsum("oihw,o->oihw", kernel, self.vector[row])

        outputs, inputs = self.weight_orepa_origin.shape[:2]
        average = torch.einsum("oi,hw->oihw", matrix(self.weight_orepa_avg_conv), self.weight_orepa_avg_avg)
        prior = torch.einsum("oi,ohw->oihw", matrix(self.weight_orepa_pfir_conv), self.weight_orepa_prior)
        conv1 = matrix(self.weight_orepa_1x1_kxk_idconv1 + self.id_tensor)
        expanded = torch.einsum("ti,othw->oihw", conv1, self.weight_orepa_1x1_kxk_conv2)
        depthwise = self.weight_orepa_gconv_dw.view(inputs, self.EXPANSION, 3, 3)
        pointwise = self.weight_orepa_gconv_pw.view(outputs, inputs, self.EXPANSION)
        separable = torch.einsum("iehw,oie->oihw", depthwise, pointwise)
        return (
            scaled(0, self.weight_orepa_origin)
            + scaled(1, average)
            + scaled(4, F.pad(self.weight_orepa_1x1, (1, 1, 1, 1)))
            + scaled(3, expanded)
            + scaled(2, prior)
            + scaled(5, separable)
        )

    def forward(self, x):
        y = self.bn(F.conv2d(x, self.squeeze(), stride=self.stride, padding=1))
        return F.relu_(y) if self.relu else y


class OrepaLargeConv(nn.Module):
    """The linear deep stem: (K-1)/2 squeezed 3x3 kernels, correlated into one K x K."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False):
        super().__init__()
        self.stride, self.relu, self.layers = stride, relu, kernel_size // 2
        for layer in range(self.layers):
            setattr(self, f"weight{layer}", Orepa(outputs if layer else inputs, outputs, norm=False))
        self.bn = nn.BatchNorm2d(outputs)

    def squeeze(self):
        kernel = self.weight0.squeeze().transpose(0, 1)
        for layer in range(1, self.layers):
            kernel = F.conv2d(kernel, getattr(self, f"weight{layer}").squeeze(), padding=2)
        return kernel.transpose(0, 1)

    def forward(self, x):
        y = self.bn(F.conv2d(x, self.squeeze(), stride=self.stride, padding=self.layers))
        return F.relu_(y) if self.relu else y


class BasicBlock(nn.Module):
    def __init__(self, conv3x3, inputs, outputs, stride):
        super().__init__()
        changes = stride != 1 or inputs != outputs
        self.shortcut = ConvBN(inputs, outputs, 1, stride) if changes else nn.Identity()
        self.conv1 = conv3x3(inputs, outputs, stride=stride, relu=True)
        self.conv2 = conv3x3(outputs, outputs)

    def forward(self, x):
        return F.relu_(self.conv2(self.conv1(x)) + self.shortcut(x))


class ResNet18(nn.Module):
    def __init__(self, reparam="none", width=1.0, classes=1000, channels=3):
        super().__init__()
        orepa = reparam == "orepa"

        def conv3x3(inputs, outputs, stride=1, relu=False):
            if orepa:
                return Orepa(inputs, outputs, stride, relu)
            return ConvBN(inputs, outputs, 3, stride, relu)

        widths = [int(planes * width) for planes in (64, 128, 256, 512)]
        self.stage0 = nn.Sequential()
        stem = OrepaLargeConv if orepa else ConvBN
        self.stage0.add_module("conv1", stem(channels, widths[0], 7, stride=2, relu=True))
        self.stage0.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        inputs = widths[0]
        for stage, outputs in enumerate(widths, 1):
            first = BasicBlock(conv3x3, inputs, outputs, 1 if stage == 1 else 2)
            setattr(self, f"stage{stage}", nn.Sequential(first, BasicBlock(conv3x3, outputs, outputs, 1)))
            inputs = outputs
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        y = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(self.gap(y).flatten(1))


def in_layout(x, mode):
    """The batch in the memory format of `mode`. The strides are set by hand because for one input channel both
    formats are the same memory, PyTorch takes it for NCHW, and the whole network would run in that."""
    if mode == "eager":
        return x
    _, c, h, w = x.shape
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, (h * w * c, 1, w * c, c))


def prepare(model, mode):
    """Plain kernels lie as the maps do. OREPA's meet only einsum, and a step is 5% faster when they stay as they are."""
    if mode != "eager":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    if mode == "compile":
        model.compile(dynamic=False)
    return model.train()


def make_optimizer(model, momentum, weight_decay):
    """SGD by the reference's rule: no decay for bias, bn and prior, twice the rate for bias. Three groups and the
    fused kernel instead of the reference's group for every parameter, which is slower."""
    groups = {}
    for name, parameter in model.named_parameters():
        scale = 2 if "bias" in name else 1
        decay = 0.0 if any(word in name for word in ("bias", "bn", "prior")) else weight_decay
        groups.setdefault((scale, decay), []).append(parameter)
    groups = [{"params": p, "scale": s, "weight_decay": d} for (s, d), p in groups.items()]
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=True)


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def train_step(model, optimizer, x, labels):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


# Fashion-MNIST


def read_idx(path):
    with gzip.open(path) as file:
        data = bytearray(file.read())
    sizes = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(data[3])]
    return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * len(sizes)).view(sizes)


class FashionMnist:
    """Training, held-out and test images as normalised float tensors (N, 1, 28, 28), with their labels."""

    def __init__(self, folder, test):
        images = read_idx(f"{folder}/train-images-idx3-ubyte.gz")[:, None].float()
        labels = read_idx(f"{folder}/train-labels-idx1-ubyte.gz").long()
        deviation, mean = torch.std_mean(images[:-HELD_OUT], correction=0)
        images = (images - mean) / deviation
        self.train = images[:-HELD_OUT].clone(), labels[:-HELD_OUT]
        self.held_out = images[-HELD_OUT:].clone(), labels[-HELD_OUT:]
        if test:
            images = read_idx(f"{folder}/t10k-images-idx3-ubyte.gz")[:, None].float()
            self.test = (images - mean) / deviation, read_idx(f"{folder}/t10k-labels-idx1-ubyte.gz").long()

    def batches(self, size, mode):
        """One epoch of shuffled batches, each image flipped with probability 1/2. The last one is smaller."""
        images, labels = self.train
        for chosen in torch.randperm(len(labels)).split(size):
            x = images.index_select(0, chosen)
            flip = torch.rand(len(chosen), 1, 1, 1) < 0.5
            yield in_layout(torch.where(flip, x.flip(3), x), mode), labels.index_select(0, chosen)


@torch.inference_mode()
def accuracy(model, images, labels, mode):
    model.eval()
    pairs = zip(images.split(500), labels.split(500))
    right = sum((model(in_layout(x, mode)).argmax(1) == y).sum().item() for x, y in pairs)
    model.train()
    return right / len(labels)


def rate_at(step, peak, epoch_steps, total_steps):
    """Linear from 0 in the first epoch, then a cosine to 0."""
    if step < epoch_steps:
        return peak * step / epoch_steps
    return peak * (1 + math.cos(math.pi * (step - epoch_steps) / (total_steps - epoch_steps))) / 2


def describe(args):
    return {
        "peer": "pytorch",
        "version": torch.__version__,
        "reparam": args.reparam,
        "width": args.width,
        "batch_size": args.batch_size,
        "mode": args.mode,
        "threads": torch.get_num_threads(),
        "seed": args.seed,
    }


def time_steps(args, model, optimizer, data):
    """Median time of a whole step, the gathering of its batch included."""
    epoch_steps = math.ceil(len(data.train[1]) / args.batch_size)
    set_rate(optimizer, args.lr)
    times = []
    batches = iter(())
    while len(times) < WARM_UP_STEPS + args.steps:
        start = time.perf_counter()
        x, labels = next(batches, (None, None))
        if x is None or len(labels) < args.batch_size:
            batches = data.batches(args.batch_size, args.mode)
            continue
        train_step(model, optimizer, x, labels)
        times.append(1e3 * (time.perf_counter() - start))
    times = times[WARM_UP_STEPS:]
    median = statistics.median(times)
    result = {"steps": args.steps, "step_ms": round(median, 3), "step_ms_min": round(min(times), 3)}
    result["epoch_seconds"] = round(median * epoch_steps / 1e3, 3)
    if args.json:
        print(json.dumps(describe(args) | result))
    else:
        print("step {step_ms:.1f} ms (best {step_ms_min:.1f}), epoch {epoch_seconds:.1f} s".format(**result))


def train(args, model, optimizer, data):
    epoch_steps = math.ceil(len(data.train[1]) / args.batch_size)
    step = 0
    for epoch in range(1, args.epochs + 1):
        start, total = time.perf_counter(), 0.0
        for x, labels in data.batches(args.batch_size, args.mode):
            set_rate(optimizer, rate_at(step, args.lr, epoch_steps, args.epochs * epoch_steps))
            total += train_step(model, optimizer, x, labels).item() * len(labels)
            step += 1
        result = {"epoch": epoch, "seconds": round(time.perf_counter() - start, 3)}
        result["loss"] = round(total / len(data.train[1]), 5)
        result["held_out_accuracy"] = accuracy(model, *data.held_out, args.mode)
        if args.test and epoch == args.epochs:
            result["test_accuracy"] = accuracy(model, *data.test, args.mode)
        if args.json:
            print(json.dumps(describe(args) | result), flush=True)
        else:
            print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)


# Golden files


def error(got, expected):
    """The largest difference, relative to the largest magnitude expected."""
    return ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()


def check_model(model, golden, mode):
    x, labels = in_layout(golden["x"], mode), golden["labels"]
    logits = model(x)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    model.eval()
    with torch.no_grad():
        logits_eval = model(x)
    yield "logits", error(logits.detach(), golden["logits"])
    yield "loss", error(loss.detach(), golden["loss"])
    yield "logits_eval", error(logits_eval, golden["logits_eval"])
    grads = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}
    scale = max(golden[name].abs().max() for name in grads if name in golden)
    differences = (grads[name] - golden[name] for name in grads if name in golden)
    yield "grad", (max(difference.abs().max() for difference in differences) / scale).item()


def check_train(model, golden, meta, mode):
    """A run of some steps: the optimizer's rule."""
    optimizer = make_optimizer(model, float(meta["momentum"]), float(meta["weight_decay"]))
    set_rate(optimizer, float(meta["lr"]))
    batches = [in_layout((x.float() / 255 - 0.5) / 0.25, mode) for x in golden["x_u8"]]
    losses = [train_step(model, optimizer, x, labels) for x, labels in zip(batches, golden["labels"])]
    parameters = dict(model.named_parameters())
    final = [name for name in parameters if f"final.{name}" in golden]
    yield "loss", error(torch.stack(losses), golden["loss"])
    yield "final", max(error(parameters[name].detach(), golden[f"final.{name}"]) for name in final)
    model.eval()
    with torch.no_grad():
        yield "logits_eval", error(model(batches[0]), golden["logits_eval"])


def check(path, mode):
    """Errors against a golden file, which holds float64 results of the reference: pairs of what and how much."""
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        meta = file.metadata()
        golden = {name: file.get_tensor(name) for name in file.keys()}
    if meta["arch"] != "ResNet-18" or meta["reparam"].lower() not in ("none", "orepa"):
        raise SystemExit(f"{path} holds a {meta['arch']} with {meta['reparam']}, not a ResNet-18 with none or OREPA")
    model = ResNet18(meta["reparam"].lower(), float(meta["width_multiplier"]), int(meta["num_classes"]))
    state = {}
    for name, tensor in golden.items():
        group, _, rest = name.partition(".")
        if group in ("param", "buffer"):
            state[rest] = tensor
    own = model.state_dict()
    constants = ("weight_orepa_prior", "weight_orepa_avg_avg", "id_tensor")
    yield "constants", max((error(own[n], state[n]) for n in state if n.endswith(constants)), default=0.0)
    model.load_state_dict(state)
    prepare(model, mode)
    yield from check_model(model, golden, mode) if meta["kind"] == "model" else check_train(model, golden, meta, mode)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="FILE", help="compare with a golden file and leave")
    parser.add_argument("--reparam", choices=("none", "orepa"), default="orepa")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=("eager", "channels-last", "compile"), default="channels-last",
                        help="compile: channels-last and torch.compile; the first epoch includes compiling")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", metavar="DIR", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--steps", type=int, metavar="K", help="only time K steps")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--test", action="store_true", help="test accuracy after the last epoch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        errors = dict(check(args.check, args.mode))
        print(json.dumps(errors) if args.json else "  ".join(f"{name} {value:.1e}" for name, value in errors.items()))
        sys.exit(0 if all(value < TOLERANCE for value in errors.values()) else 1)
    torch.manual_seed(args.seed)
    data = FashionMnist(args.data, args.test)
    model = prepare(ResNet18(args.reparam, args.width, classes=10, channels=1), args.mode)
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=5e-4)
    (time_steps if args.steps else train)(args, model, optimizer, data)


if __name__ == "__main__":
    main()
