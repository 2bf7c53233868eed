"""The blocks of the PyTorch peers: plain, re-parameterized on the maps (DBB, RepVGG) or by squeezing a kernel (OREPA,
OREPA-VGG), and deployed.

Parameter names, initial values and the operations that squeeze a kernel are those of the reference implementation
(OREPA, CVPR 2022), so its tensors load by name.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn


class Geometry:
    """A convolution whose padding keeps the size. The gradient of a narrow 1x1 kernel with stride 2 on channels-last maps
    is randomly wrong in PyTorch 2.13 (oneDNN 3.12, it seems its issue 6035): every second pixel is taken first. Widths
    from 0.25 up are not concerned."""

    def __init__(self, inputs, kernel_size, stride, groups=1, padding=None):
        self.every_second = (kernel_size, stride) == (1, 2) and inputs < 16
        self.stride, self.groups = 1 if self.every_second else stride, groups
        self.padding = kernel_size // 2 if padding is None else padding

    def convolve(self, x, kernel):
        x = x[:, :, ::2, ::2] if self.every_second else x
        return F.conv2d(x, kernel, None, self.stride, self.padding, 1, self.groups)


class ConvBN(nn.Module):
    """Convolution and norm; `relu` ends the block in a ReLU."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
        super().__init__()
        self.geometry, self.relu = Geometry(inputs, kernel_size, stride, groups), relu
        self.conv = conv_layer(inputs, outputs, kernel_size, groups)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn(self.geometry.convolve(x, self.conv.weight))
        return F.relu_(y) if self.relu else y


class Deployed(nn.Module):
    """What every block is after training: a convolution with bias."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
        super().__init__()
        self.relu = relu
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, stride, kernel_size // 2, groups=groups)

    def forward(self, x):
        y = self.conv(x)
        return F.relu_(y) if self.relu else y


def conv_layer(inputs, outputs, kernel_size, groups=1):
    """Holds a kernel by its usual name; a Geometry runs it."""
    return nn.Conv2d(inputs, outputs, kernel_size, groups=groups, bias=False)


def kaiming(*shape, slope=0):
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=slope))


def identity_kernel(channels, groups=1):
    """(channels, channels / groups, 1, 1)"""
    return torch.eye(channels // groups).repeat(groups, 1)[:, :, None, None]


def kernel_matrix(kernel):
    """(O, I) of a 1x1 kernel."""
    return kernel.squeeze(3).squeeze(2)


# Branches on the maps


class NormAndPad(nn.Module):
    """A norm, and around its map what it makes of zero by its running statistics, through which no gradient flows."""

    def __init__(self, channels, padding):
        super().__init__()
        self.padding = padding
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        y, p = F.pad(self.bn(x), 4 * (self.padding,)), self.padding
        with torch.no_grad():
            deviation = torch.sqrt(self.bn.running_var + self.bn.eps)
            border = (self.bn.bias - self.bn.running_mean * self.bn.weight / deviation)[:, None, None].to(y.dtype)
            for side in (y[:, :, :p], y[:, :, -p:], y[:, :, p:-p, :p], y[:, :, p:-p, -p:]):
                side.copy_(border)
        return y


class DbbAverage(nn.Module):
    """1x1 convolution, norm, average, norm."""

    def __init__(self, inputs, outputs, kernel_size, stride, groups):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.geometry = Geometry(inputs, 1, 1, groups)
        self.conv = conv_layer(inputs, outputs, 1, groups)
        self.bn = NormAndPad(outputs, kernel_size // 2)
        self.avgbn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn(self.geometry.convolve(x, self.conv.weight))
        return self.avgbn(F.avg_pool2d(y, self.kernel_size, self.stride))


class Dbb1x1KxK(nn.Module):
    """1x1 convolution that starts as the identity, norm, K x K convolution, norm."""

    def __init__(self, inputs, outputs, kernel_size, stride, groups):
        super().__init__()
        self.first = Geometry(inputs, 1, 1, groups)
        self.second = Geometry(inputs, kernel_size, stride, groups, padding=0)
        self.idconv1 = conv_layer(inputs, inputs, 1, groups)
        nn.init.zeros_(self.idconv1.weight)
        self.register_buffer("identity", identity_kernel(inputs, groups), persistent=False)
        self.bn1 = NormAndPad(inputs, kernel_size // 2)
        self.conv2 = conv_layer(inputs, outputs, kernel_size, groups)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        y = self.bn1(self.first.convolve(x, self.idconv1.weight + self.identity))
        return self.bn2(self.second.convolve(y, self.conv2.weight))


class Dbb(nn.Module):
    """Diverse branch block: four branches, each with norms of its own."""

    def __init__(self, inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
        super().__init__()
        self.relu = relu
        self.dbb_origin = ConvBN(inputs, outputs, kernel_size, stride, groups=groups)
        self.dbb_1x1 = ConvBN(inputs, outputs, 1, stride, groups=groups)
        self.dbb_avg = DbbAverage(inputs, outputs, kernel_size, stride, groups)
        self.dbb_1x1_kxk = Dbb1x1KxK(inputs, outputs, kernel_size, stride, groups)

    def forward(self, x):
        y = self.dbb_origin(x)
        y += self.dbb_1x1(x)
        y += self.dbb_avg(x)
        y += self.dbb_1x1_kxk(x)
        return F.relu_(y) if self.relu else y


class RepVGGBlock(nn.Module):
    """A 3x3 branch, a 1x1 branch and, where the map keeps its shape, the map itself, each with its norm; always a ReLU."""

    def __init__(self, inputs, outputs, stride=1, groups=1, dense=None):
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inputs) if has_identity(inputs, outputs, stride) else None
        self.rbr_dense = dense or ConvBN(inputs, outputs, 3, stride, groups=groups)
        self.rbr_1x1 = ConvBN(inputs, outputs, 1, stride, groups=groups)

    def forward(self, x):
        y = self.rbr_dense(x)
        y += self.rbr_1x1(x)
        if self.rbr_identity is not None:
            y += self.rbr_identity(x)
        return F.relu_(y)


def has_identity(inputs, outputs, stride):
    return inputs == outputs and stride == 1


# Squeezed kernels


class Orepa(nn.Module):
    """A 3x3 convolution whose kernel is squeezed from six scaled branches in every forward pass."""

    EXPANSION = 8
    PREFIX = "weight_orepa_"
    SLOPE = 0
    SCALINGS = {"origin": 0.25, "average": 0.25, "prior": 0.0, "expanded": 0.5, "1x1": 1.0, "separable": 0.5}

    def __init__(self, inputs, outputs, stride=1, relu=False, groups=1, norm=True):
        super().__init__()
        assert groups <= 4, "with more the reference doubles the channels between two layers"
        self.geometry, self.relu = Geometry(inputs, 3, stride, groups), relu
        inner = inputs // groups

        def parameter(name, *shape):
            setattr(self, self.PREFIX + name, kaiming(*shape, slope=self.SLOPE))

        parameter("origin", outputs, inner, 3, 3)
        parameter("avg_conv", outputs, inner, 1, 1)
        parameter("pfir_conv", outputs, inner, 1, 1)
        if "1x1" in self.SCALINGS:
            parameter("1x1", outputs, inner, 1, 1)
        setattr(self, self.PREFIX + "1x1_kxk_idconv1", nn.Parameter(torch.zeros(inputs, inner, 1, 1)))
        parameter("1x1_kxk_conv2", outputs, inner, 3, 3)
        parameter("gconv_dw", self.EXPANSION * inputs, 1, 3, 3)
        parameter("gconv_pw", outputs, self.EXPANSION * inner, 1, 1)
        self.vector = nn.Parameter(torch.tensor([*self.SCALINGS.values()])[:, None].repeat(1, outputs))
        self.register_buffer(self.PREFIX + "avg_avg", torch.full((3, 3), 1 / 9))
        self.register_buffer("id_tensor", identity_kernel(inputs, groups))
        self.register_buffer(self.PREFIX + "prior", self.prior(outputs))
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

    def part(self, name):
        return getattr(self, self.PREFIX + name)

    def expanded(self):
        """(outputs, inputs / groups, 3, 3), the product of a 1x1 and a 3x3 kernel."""
        second, groups = self.part("1x1_kxk_conv2"), self.geometry.groups
        outputs, inner = second.shape[:2]
        first = kernel_matrix(self.part("1x1_kxk_idconv1") + self.id_tensor)
        if groups == 1:
            return torch.einsum("ti,othw->oihw", first, second)
        first, second = first.view(groups, inner, inner), second.view(groups, outputs // groups, inner, 3, 3)
        return torch.einsum("gti,gothw->goihw", first, second).reshape(outputs, inner, 3, 3)

    def separable(self):
        """The same of a depthwise and a pointwise kernel, whose rows take turns between the groups."""
        outputs, inner = self.part("origin").shape[:2]
        depthwise, pointwise, groups = self.part("gconv_dw"), self.part("gconv_pw"), self.geometry.groups
        if groups == 1:
            depthwise, pointwise = depthwise.view(inner, -1, 3, 3), pointwise.view(outputs, inner, -1)
            return torch.einsum("iehw,oie->oihw", depthwise, pointwise)
        depthwise = depthwise.view(groups, inner, -1, 3, 3)
        pointwise = pointwise.view(outputs // groups, groups, inner, -1)
        return torch.einsum("giehw,ogie->goihw", depthwise, pointwise).reshape(outputs, inner, 3, 3)

    def squeeze(self):
        """The kernel, (outputs, inputs / groups, 3, 3). One einsum a product and one a scaling, as the reference does it."""
        kernels = {
            "origin": self.part("origin"),
            "average": torch.einsum("oi,hw->oihw", kernel_matrix(self.part("avg_conv")), self.part("avg_avg")),
            "prior": torch.einsum("oi,ohw->oihw", kernel_matrix(self.part("pfir_conv")), self.part("prior")),
            "expanded": self.expanded(),
            "separable": self.separable(),
        }
        if "1x1" in self.SCALINGS:
            kernels["1x1"] = F.pad(self.part("1x1"), (1, 1, 1, 1))
        scaled = (torch.einsum("oihw,o->oihw", kernels[name], self.vector[row]) for row, name in enumerate(self.SCALINGS))
        return functools.reduce(torch.add, scaled)

    def forward(self, x):
        y = self.bn(self.geometry.convolve(x, self.squeeze()))
        return F.relu_(y) if self.relu else y


class OrepaVggDense(Orepa):
    """The squeezed 3x3 branch of an OREPA-VGG block. Where the block has an identity, a last row of scalings is there
    that nothing uses."""

    PREFIX = "weight_rbr_"
    SLOPE = 1
    SCALINGS = {"origin": 0.25, "average": 0.25, "prior": 0.0, "expanded": 0.5, "separable": 0.5}

    def __init__(self, inputs, outputs, stride=1, groups=1):
        super().__init__(inputs, outputs, stride, groups=groups)
        if has_identity(inputs, outputs, stride):
            self.vector = nn.Parameter(F.pad(self.vector.detach(), (0, 0, 0, 1)))


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


# Which block a convolution of a network becomes, by its kernel's size. All take the same arguments.


def plain(inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
    return ConvBN(inputs, outputs, kernel_size, stride, relu, groups)


def dbb(inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
    kind = Dbb if 3 <= kernel_size < 7 else ConvBN
    return kind(inputs, outputs, kernel_size, stride, relu, groups)


def orepa(inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
    if kernel_size == 1:
        return Orepa1x1(inputs, outputs, stride, relu)
    if kernel_size >= 7:
        return OrepaLargeConv(inputs, outputs, kernel_size, stride, relu)
    return Orepa(inputs, outputs, stride, relu, groups)


def repvgg(inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
    if kernel_size != 3:
        return ConvBN(inputs, outputs, kernel_size, stride, relu, groups)
    return RepVGGBlock(inputs, outputs, stride, groups)


def orepa_vgg(inputs, outputs, kernel_size, stride=1, relu=False, groups=1):
    if kernel_size != 3:
        return ConvBN(inputs, outputs, kernel_size, stride, relu, groups)
    return RepVGGBlock(inputs, outputs, stride, groups, OrepaVggDense(inputs, outputs, stride, groups))


BLOCKS = {"none": plain, "dbb": dbb, "orepa": orepa, "repvgg": repvgg, "orepa_vgg": orepa_vgg, "deploy": Deployed}
