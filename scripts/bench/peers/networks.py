"""The networks of the PyTorch peers: ResNet-18/34/50, plain, with OREPA blocks, or deployed, and how to run them.

Parameter names, initial values and the operations that squeeze a kernel are those of the reference implementation
(OREPA, CVPR 2022), so its tensors load by name. A *variant* is how PyTorch is asked to run a network: which memory
format, whether compiled, in which precision.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


class Geometry:
    """A convolution whose padding keeps the size. The gradient of a narrow 1x1 kernel with stride 2 on channels-last maps
    is randomly wrong in PyTorch 2.13 (oneDNN 3.12, it seems its issue 6035): every second pixel is taken first. Widths
    from 0.25 up are not concerned."""

    def __init__(self, inputs, kernel_size, stride):
        self.every_second = (kernel_size, stride) == (1, 2) and inputs < 16
        self.stride, self.padding = 1 if self.every_second else stride, kernel_size // 2

    def convolve(self, x, kernel):
        return F.conv2d(x[:, :, ::2, ::2] if self.every_second else x, kernel, None, self.stride, self.padding)


class ConvBN(nn.Module):
    """Convolution and norm; `relu` ends the block in a ReLU."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False):
        super().__init__()
        self.geometry, self.relu = Geometry(inputs, kernel_size, stride), relu
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn(self.geometry.convolve(x, self.conv.weight))
        return F.relu_(y) if self.relu else y


class Deployed(nn.Module):
    """What every block is after training: a convolution with bias."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False):
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2)

    def forward(self, x):
        y = self.conv(x)
        return F.relu_(y) if self.relu else y


def kaiming(*shape, slope=0):
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=slope))


def kernel_matrix(kernel):
    """(O, I) of a 1x1 kernel."""
    return kernel.squeeze(3).squeeze(2)


class Orepa(nn.Module):
    """A 3x3 convolution whose kernel is squeezed from six scaled branches in every forward pass."""

    EXPANSION = 8
    INITIAL_SCALINGS = (0.25, 0.25, 0.0, 0.5, 1.0, 0.5)

    def __init__(self, inputs, outputs, stride=1, relu=False, norm=True):
        super().__init__()
        self.geometry, self.relu = Geometry(inputs, 3, stride), relu

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

        def scaled(row, kernel):
            return torch.einsum("oihw,o->oihw", kernel, self.vector[row])

        outputs, inputs = self.weight_orepa_origin.shape[:2]
        average = torch.einsum("oi,hw->oihw", kernel_matrix(self.weight_orepa_avg_conv), self.weight_orepa_avg_avg)
        prior = torch.einsum("oi,ohw->oihw", kernel_matrix(self.weight_orepa_pfir_conv), self.weight_orepa_prior)
        conv1 = kernel_matrix(self.weight_orepa_1x1_kxk_idconv1 + self.id_tensor)
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
        y = self.bn(self.geometry.convolve(x, self.squeeze()))
        return F.relu_(y) if self.relu else y


class Orepa1x1(nn.Module):
    """A 1x1 convolution squeezed from itself and a product of two; the wider of those starts as the identity."""

    def __init__(self, inputs, outputs, stride=1, relu=False):
        super().__init__()
        self.geometry, self.relu = Geometry(inputs, 1, stride), relu
        inner = min(inputs, outputs)
        self.weight_or1x1_origin = kaiming(outputs, inputs, 1, 1, slope=1)
        identity = nn.Parameter(torch.eye(inner)[:, :, None, None])
        if outputs > inputs:
            self.weight_or1x1_l2i_conv1, self.weight_or1x1_l2i_conv2 = identity, kaiming(outputs, inner, 1, 1, slope=1)
        else:
            self.weight_or1x1_l2i_conv1, self.weight_or1x1_l2i_conv2 = kaiming(inner, inputs, 1, 1, slope=1), identity
        self.vector = nn.Parameter(torch.tensor((1.0, 0.5))[:, None].repeat(1, outputs))
        self.bn = nn.BatchNorm2d(outputs)

    def squeeze(self):
        first, second = kernel_matrix(self.weight_or1x1_l2i_conv1), kernel_matrix(self.weight_or1x1_l2i_conv2)
        product = torch.einsum("ti,ot->oi", first, second)[:, :, None, None]
        return torch.einsum("oihw,o->oihw", self.weight_or1x1_origin, self.vector[0]) + torch.einsum(
            "oihw,o->oihw", product, self.vector[1]
        )

    def forward(self, x):
        y = self.bn(self.geometry.convolve(x, self.squeeze()))
        return F.relu_(y) if self.relu else y


class OrepaLargeConv(nn.Module):
    """The linear deep stem: (K-1)/2 squeezed 3x3 kernels, correlated into one K x K."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False):
        super().__init__()
        self.geometry, self.relu, self.layers = Geometry(inputs, kernel_size, stride), relu, kernel_size // 2
        for layer in range(self.layers):
            setattr(self, f"weight{layer}", Orepa(outputs if layer else inputs, outputs, norm=False))
        self.bn = nn.BatchNorm2d(outputs)

    def squeeze(self):
        kernel = self.weight0.squeeze().transpose(0, 1)
        for layer in range(1, self.layers):
            kernel = F.conv2d(kernel, getattr(self, f"weight{layer}").squeeze(), padding=2)
        return kernel.transpose(0, 1)

    def forward(self, x):
        y = self.bn(self.geometry.convolve(x, self.squeeze()))
        return F.relu_(y) if self.relu else y


def plain(inputs, outputs, kernel_size, stride=1, relu=False):
    return ConvBN(inputs, outputs, kernel_size, stride, relu)


def orepa(inputs, outputs, kernel_size, stride=1, relu=False):
    if kernel_size == 1:
        return Orepa1x1(inputs, outputs, stride, relu)
    if kernel_size >= 7:
        return OrepaLargeConv(inputs, outputs, kernel_size, stride, relu)
    return Orepa(inputs, outputs, stride, relu)


BLOCKS = {"none": plain, "orepa": orepa, "deploy": Deployed}


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


MODELS = {
    "resnet18": ((2, 2, 2, 2), BasicBlock),
    "resnet34": ((3, 4, 6, 3), BasicBlock),
    "resnet50": ((3, 4, 6, 3), Bottleneck),
}


class ResNet(nn.Module):
    def __init__(self, model="resnet18", reparam="none", width=1.0, classes=1000, channels=3):
        super().__init__()
        counts, residual = MODELS[model]
        conv = BLOCKS[reparam]
        widths = [int(planes * width) for planes in (64, 128, 256, 512)]
        self.stage0 = nn.Sequential()
        self.stage0.add_module("conv1", conv(channels, widths[0], 7, stride=2, relu=True))
        self.stage0.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
        inputs = widths[0]
        for stage, (planes, count) in enumerate(zip(widths, counts), 1):
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
