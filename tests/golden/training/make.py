"""Writes expected.json, beside this file, with PyTorch (it was written by 2.13) in float64: activations and losses with their
gradients, steps of optimizers, learning rates of schedules, clipped gradients, the sizes of initial values, and layers with
their gradients.

    python make.py
"""
import json
import math
import pathlib

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

FILE = pathlib.Path(__file__).parent / "expected.json"
torch.set_default_dtype(torch.float64)
torch.manual_seed(1)


def numbers(t):
    return t.detach().tolist()


# ---- activations ----

def activations():
    x = torch.cat([torch.linspace(-9, 9, 37), torch.tensor([-40.0, -1e-4, 1e-4, 40.0])])
    dy = torch.randn(len(x))
    functions = {"tanh": torch.tanh, "softplus": F.softplus, "silu": F.silu, "gelu": F.gelu, "hardswish": F.hardswish,
                 "sigmoid": torch.sigmoid, "relu": F.relu, "leaky_relu": lambda t: F.leaky_relu(t, 0.2)}
    results = {}
    for name, f in functions.items():
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(dy)
        results[name] = {"y": numbers(y), "dx": numbers(leaf.grad)}
    return {"x": numbers(x), "dy": numbers(dy), "functions": results}


# ---- losses ----

def loss(name, x, target, **options):
    """One case; what comes out is multiplied by fixed numbers before the gradient is taken."""
    x = x.clone().requires_grad_()
    floats = target.is_floating_point()
    target = target.clone().requires_grad_(floats)
    given = {k: v.tolist() if torch.is_tensor(v) else v for k, v in options.items()}
    y = getattr(F, name)(x, target, **options)
    dy = torch.randn(y.shape)
    y.backward(dy)
    return {"name": name, "options": given, "x": numbers(x), "target": numbers(target), "y": numbers(y), "dy": numbers(dy),
            "dx": numbers(x.grad), "dtarget": numbers(target.grad) if floats else None}


def losses():
    cases = []
    logits, labels = torch.randn(6, 4) * 3, torch.tensor([0, 3, 2, -100, 1, 3])
    weight = torch.tensor([0.5, 2.0, 0.25, 1.5])
    maps, dense = torch.randn(2, 4, 3, 2), torch.tensor([[[0, 1], [2, 3], [7, 7]], [[3, 3], [7, 0], [1, 2]]])
    binary, truth = torch.tensor([[-80.0, -3.0, 0.0, 0.5], [2.0, 30.0, 80.0, -0.1]]), torch.rand(2, 4)
    truth[0, 0], truth[1, 2], truth[1, 1] = 0, 1, 0
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    logp, logq = torch.randn(3, 5).log_softmax(1), torch.randn(3, 5).log_softmax(1)
    q = logq.exp()
    q[1] = torch.tensor([0.5, 0.125, 0.125, 0.125, 0.125])
    for reduction in "mean", "sum", "none":
        for more in {}, {"weight": weight}, {"label_smoothing": 0.1}, {"weight": weight, "label_smoothing": 0.3}:
            cases.append(loss("cross_entropy", logits, labels, reduction=reduction, **more))
            cases.append(loss("cross_entropy", maps, dense, reduction=reduction, ignore_index=7, **more))
        for more in ({}, {"weight": torch.rand(2, 1)}, {"pos_weight": weight},
                     {"weight": torch.rand(4), "pos_weight": torch.rand(2, 4)}):
            cases.append(loss("binary_cross_entropy_with_logits", binary, truth, reduction=reduction, **more))
        cases.append(loss("mse_loss", a, b, reduction=reduction))
        for beta in 0.0, 0.5, 1.0, 3.0:
            cases.append(loss("smooth_l1_loss", a, b, reduction=reduction, beta=beta))
    for reduction in "mean", "batchmean", "sum", "none":
        cases.append(loss("kl_div", logp, q, reduction=reduction))
        cases.append(loss("kl_div", logp, logq, reduction=reduction, log_target=True))
    targets, dense_targets = torch.randn(6, 4).softmax(1), torch.randn(2, 4, 3, 2).softmax(1)
    likelihoods = logits.log_softmax(1)
    for reduction in "mean", "sum", "none":
        for more in {}, {"weight": weight}, {"label_smoothing": 0.1}, {"weight": weight, "label_smoothing": 0.3}:
            cases.append(loss("cross_entropy", logits, targets, reduction=reduction, **more))
            cases.append(loss("cross_entropy", maps, dense_targets, reduction=reduction, **more))
        for more in {}, {"weight": weight}:
            cases.append(loss("nll_loss", likelihoods, labels, reduction=reduction, **more))
            cases.append(loss("nll_loss", maps, dense, reduction=reduction, ignore_index=7, **more))
        cases.append(loss("l1_loss", a, b, reduction=reduction))
    return cases


# ---- optimizers: ten steps of sum(p * p * w + p), where w counts from 1; the second parameter has twice the rate and no decay ----

START = [[[1.0, -2.0, 0.5], [3.0, 0.0, -1.0]], [0.25, -0.75]]


def trained(name, steps=10, **options):
    parameters = [torch.tensor(values, requires_grad=True) for values in START]
    second = {"params": [parameters[1]], "lr": 2 * options["lr"], "weight_decay": 0.0}
    optimizer = getattr(torch.optim, name)([{"params": [parameters[0]]}, second], **options)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        for p in parameters:
            w = torch.arange(1, p.numel() + 1).reshape(p.shape)
            (p * p * w + p).sum().backward()
        optimizer.step()
        path.append([numbers(p) for p in parameters])
    return {"name": name, "options": options, "path": path}


def optimizers():
    return [
        trained("SGD", lr=0.02, weight_decay=0.1),
        trained("SGD", lr=0.02, momentum=0.9, weight_decay=0.1),
        trained("SGD", lr=0.02, momentum=0.8, nesterov=True),
        trained("AdamW", lr=0.05, weight_decay=0.0),
        trained("AdamW", lr=0.05, weight_decay=0.1),
        trained("AdamW", lr=0.05, betas=[0.8, 0.95], eps=0.01, weight_decay=0.01),
        trained("RMSprop", lr=0.05),
        trained("RMSprop", lr=0.05, alpha=0.9, eps=0.01, weight_decay=0.1),
        trained("RMSprop", lr=0.05, alpha=0.9, centered=True),
        trained("RMSprop", lr=0.02, momentum=0.9),
        trained("RMSprop", lr=0.02, alpha=0.9, momentum=0.8, centered=True, weight_decay=0.1),
    ]


# ---- schedules: the rates before the first scheduler step, after one, and so on ----

def rates(make, steps, lr=0.5):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler, found = make(optimizer), []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(found) <= steps:
            scheduler.step()
    return found


def warmed(optimizer):
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [warmup, lr_scheduler.MultiStepLR(optimizer, [3, 6], gamma=0.1)], [5])


def plateau(metrics, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler, found = lr_scheduler.ReduceLROnPlateau(optimizer, **options), []
    for metric in metrics:
        scheduler.step(metric)
        found.append(optimizer.param_groups[0]["lr"])
    return {"metrics": metrics, "options": options, "rates": found}


def schedules():
    worse = [1.0, 0.9, 0.89999, 0.9, 0.91, 0.9, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    better = [2 - m for m in worse]
    return {
        "cosine": rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.05), 20),
        "polynomial": rates(lambda o: lr_scheduler.PolynomialLR(o, 20, power=2), 20),
        "step_decay": rates(lambda o: lr_scheduler.MultiStepLR(o, [4, 9, 15], gamma=0.2), 20),
        "one_cycle": rates(lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20), 19),
        "one_cycle_linear": rates(lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=30, pct_start=0.4, div_factor=10,
                                                                    final_div_factor=100, anneal_strategy="linear"), 29),
        "warmup": rates(warmed, 15),
        "plateau": [plateau(worse, patience=2), plateau(better, patience=1, factor=0.5, mode="max"),
                    plateau(worse, patience=1, factor=0.5, cooldown=2, min_lr=0.1),
                    plateau(worse, patience=1, threshold=0.05, threshold_mode="abs")],
    }


# ---- clipped gradients, initial values ----

def clips():
    gradients, cases = [torch.randn(2, 3), torch.randn(4) * 5], []
    for most in 1.0, 100.0:
        for kind in 1.0, 2.0, 3.0, math.inf:
            parameters = [torch.zeros_like(g, requires_grad=True) for g in gradients]
            for p, g in zip(parameters, gradients):
                p.grad = g.clone()
            norm = nn.utils.clip_grad_norm_(parameters, most, norm_type=kind)
            cases.append({"most": most, "norm_type": "inf" if kind == math.inf else kind, "norm": norm.item(),
                          "gradients": [numbers(p.grad) for p in parameters]})
    return {"gradients": [numbers(g) for g in gradients], "cases": cases}


def initial():
    fans = []
    for shape in [8, 4], [8, 4, 3, 3], [6, 2, 5], [8, 1, 1, 7]:
        fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(torch.zeros(shape))
        fans.append({"shape": shape, "fan_in": fan_in, "fan_out": fan_out})
    gains = {name: nn.init.calculate_gain(name) for name in ("linear", "conv2d", "sigmoid", "tanh", "relu", "leaky_relu", "selu")}
    return {"fans": fans, "gains": gains, "leaky_relu 0.2": nn.init.calculate_gain("leaky_relu", 0.2)}


# ---- layers: what they give and the gradients of input and parameters, as names in a state dict ----

def function(name, x, *arguments, **options):
    """One call of F's function, with its options as ours are called."""
    leaf = x.clone().requires_grad_()
    y = getattr(F, name)(leaf, *arguments, **options)
    dy = torch.randn(y.shape)
    y.backward(dy)
    return {"name": name, "arguments": arguments, "options": options, "x": numbers(x), "y": numbers(y), "dy": numbers(dy),
            "dx": numbers(leaf.grad)}


def layer(name, x, *arguments, **options):
    module = getattr(nn, name)(*arguments, **options)
    for p in module.parameters():
        nn.init.normal_(p)
    if options.get("padding_idx") is not None:
        module.weight.data[options["padding_idx"]] = 0
    leaf = x.clone().requires_grad_() if x.is_floating_point() else x
    y = module(leaf)
    dy = torch.randn(y.shape)
    y.backward(dy)
    return {"name": name, "arguments": arguments, "options": options, "x": numbers(x), "y": numbers(y), "dy": numbers(dy),
            "dx": numbers(leaf.grad) if x.is_floating_point() else None,
            "state": {k: numbers(v) for k, v in module.state_dict().items()},
            "gradients": {k: numbers(p.grad) for k, p in module.named_parameters()}}


def functions():
    x, cases = torch.randn(1, 2, 4, 5), []
    for o in ({"size": [8, 10]}, {"size": [7, 13]}, {"size": [3, 2]}, {"size": [4, 5]}, {"size": 1}, {"scale_factor": 2.0},
              {"scale_factor": [1.3, 0.7]}, {"scale_factor": [2.6, 1.1]}, {"scale_factor": [0.5, 3.0]}):
        cases.append(function("interpolate", x, mode="nearest", **o))
        for corners in False, True:
            cases.append(function("interpolate", x, mode="bilinear", align_corners=corners, **o))
    cases.append(function("interpolate", torch.randn(1, 2, 1, 3), size=[5, 4], mode="bilinear", align_corners=True))
    cases.append(function("pad", x, [1, 2, 0, 3], value=0.5))
    cases.append(function("pad", x, [1, -2, -1, 1, 0, 2]))
    cases.append(function("pad", x, [4, 3, 2, 3], mode="reflect"))
    cases.append(function("pad", x, [5, 0, 1, 4], mode="circular"))
    cases.append(function("pad", x, [7, 1, 0, 2], mode="replicate"))
    cases.append(function("gelu", x, approximate="tanh"))
    return cases


def layers():
    maps, wide, rows, indices = torch.randn(2, 4, 3, 5), torch.randn(1, 6, 2, 2), torch.randn(3, 2, 5), torch.tensor([[2, 0], [4, 2]])
    convolutions = [
        layer("ConvTranspose2d", maps, 4, 3, 3),
        layer("ConvTranspose2d", maps, 4, 3, 2, stride=2),
        layer("ConvTranspose2d", maps, 4, 2, [3, 2], stride=[2, 3], padding=[1, 0], output_padding=[1, 2]),
        layer("ConvTranspose2d", maps, 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False),
        layer("ConvTranspose2d", wide, 6, 3, 2, dilation=[1, 3], output_padding=[0, 2], groups=3),
        layer("ConvTranspose2d", wide, 6, 6, 4, stride=2, padding=1, groups=6),
    ]
    norms = [
        layer("GroupNorm", maps, 2, 4),
        layer("GroupNorm", 100 + maps, 4, 4, eps=0.1),
        layer("GroupNorm", wide, 1, 6, affine=False),
        layer("GroupNorm", torch.randn(3, 6), 2, 6),
        layer("GroupNorm", torch.randn(2, 4, 3), 2, 4),
        layer("LayerNorm", rows, 5),
        layer("LayerNorm", 50 + rows, [2, 5], eps=0.01),
        layer("LayerNorm", rows, 5, bias=False),
        layer("LayerNorm", rows, 5, elementwise_affine=False),
        layer("LayerNorm", maps, [4, 3, 5]),
        layer("LayerNorm", maps, 5),
    ]
    return convolutions + norms + [
        layer("Embedding", indices, 5, 3),
        layer("Embedding", indices, 5, 3, padding_idx=2),
        layer("Embedding", indices, 5, 3, padding_idx=-1),
        layer("Upsample", maps, scale_factor=2.0),
        layer("Upsample", maps, size=[5, 9], mode="bilinear", align_corners=True),
        layer("GELU", rows, approximate="tanh"),
        layer("Flatten", maps, 1, 2),
    ]


parts = [activations, losses, optimizers, schedules, clips, initial, functions, layers]
FILE.write_text("{" + ",\n".join(f'"{part.__name__}": {json.dumps(part())}' for part in parts) + "}\n")
