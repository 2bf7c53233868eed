"""The networks of the PyTorch peers, ResNet and RepVGG with blocks of any kind, and how to run them. Names of modules are
those of the reference implementation.

A *variant* is how PyTorch is asked to run a network: which memory format, whether compiled, in which precision.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from architectures import REPVGGS, RESNETS
from blocks import BLOCKS, ConvBN, Deployed


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, conv, inputs, planes, stride):
        super().__init__()
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != planes:  # plain whatever the others are
            self.shortcut = (Deployed if conv is Deployed else ConvBN)(inputs, planes, 1, stride)
        self.conv1 = conv(inputs, planes, 3, stride=stride, relu=True)
        self.conv2 = conv(planes, planes, 3)

    def forward(self, x):
        return F.relu_(self.conv2(self.conv1(x)) + self.shortcut(x))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, conv, inputs, planes, stride):
        super().__init__()
        outputs = planes * self.expansion
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv(inputs, outputs, 1, stride=stride)
        self.conv1 = conv(inputs, planes, 1, relu=True)
        self.conv2 = conv(planes, planes, 3, stride=stride, relu=True)
        self.conv3 = conv(planes, outputs, 1)

    def forward(self, x):
        return F.relu_(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, num_blocks, residual, reparam="none", width=1.0, classes=1000, channels=3):
        super().__init__()
        conv = BLOCKS[reparam]
        widths = [int(planes * width) for planes in (64, 128, 256, 512)]
        self.stage0 = nn.Sequential()
        self.stage0.add_module("conv1", conv(channels, widths[0], 7, stride=2, relu=True))
        self.stage0.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        inputs = widths[0]
        for stage, (planes, count) in enumerate(zip(widths, num_blocks), 1):
            blocks = []
            for block in range(count):
                blocks.append(residual(conv, inputs, planes, 2 if stage > 1 and block == 0 else 1))
                inputs = planes * residual.expansion
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        y = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(self.gap(y).flatten(1))


class RepVGG(nn.Module):
    """A stack of 3x3 blocks without residual sums; every second one is grouped."""

    def __init__(self, num_blocks, widths, groups=1, reparam="repvgg", classes=1000, channels=3):
        super().__init__()
        conv = BLOCKS[reparam]
        inputs, position = min(64, int(64 * widths[0])), 0
        self.stage0 = conv(channels, inputs, 3, stride=2, relu=True)
        for stage, (count, width) in enumerate(zip(num_blocks, widths), 1):
            outputs, blocks = int(32 * 2**stage * width), []
            for block in range(count):
                position += 1
                grouped = groups if position % 2 == 0 else 1
                blocks.append(conv(inputs, outputs, 3, stride=1 if block else 2, relu=True, groups=grouped))
                inputs = outputs
            setattr(self, f"stage{stage}", nn.Sequential(*blocks))
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x):
        y = self.stage4(self.stage3(self.stage2(self.stage1(self.stage0(x)))))
        return self.linear(self.gap(y).flatten(1))


def create(model, reparam, width=1.0, classes=1000, channels=3):
    """A network by its name; `reparam` is one of architectures.REPARAMS, or deploy."""
    if model in RESNETS:
        if reparam == "repvgg":
            raise SystemExit("a ResNet has no RepVGG blocks; there are none, dbb, orepa, orepa_vgg")
        num_blocks, deep = RESNETS[model]
        return ResNet(num_blocks, Bottleneck if deep else BasicBlock, reparam, width, classes, channels)
    num_blocks, widths, groups = REPVGGS[model]
    return RepVGG(num_blocks, [width * w for w in widths], groups, reparam, classes, channels)


# How PyTorch runs them


VARIANTS = ("eager", "channels-last", "compiled", "compiled-channels-last", "bfloat16", "compiled-bfloat16")


def is_channels_last(variant):
    return variant not in ("eager", "compiled")


def in_layout(x, variant):
    """The batch in the memory format of a variant. The strides are set by hand because for one input channel both
    formats are the same memory, PyTorch takes it for NCHW, and the whole network would run in that."""
    if not is_channels_last(variant):
        return x
    _, c, h, w = x.shape
    return x.contiguous(memory_format=torch.channels_last).as_strided(x.shape, (h * w * c, 1, w * c, c))


def prepare(model, variant):
    """Plain kernels lie as the maps do. OREPA's meet only einsum, and a step is 5% faster when they stay as they are."""
    if is_channels_last(variant):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)
    if variant.startswith("compiled"):
        model.compile(dynamic=False)
    return model.train()


def precision(variant):
    """Entered around a forward pass."""
    if variant.endswith("bfloat16"):
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


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


def train_step(model, optimizer, x, labels, variant):
    optimizer.zero_grad()
    with precision(variant):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()
