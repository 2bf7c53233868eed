"""Writes the checkpoints in this folder with PyTorch (they were written by 2.13), each in the ZIP container (NAME.pth) and in the
one before 1.6 (NAME.old.pth), and expected.json: names, types, shapes, values and metadata as Python sees them.

    python make.py
"""
import argparse
import collections
import json
import pathlib
import warnings

import numpy
import torch
from torch import nn

FOLDER = pathlib.Path(__file__).parent
expected = {}


def describe(t):
    t = t.detach()
    return {"dtype": str(t.dtype)[6:], "shape": list(t.shape), "values": t.double().flatten().tolist()}


def write(name, value, tensors, metadata=None, kept_out=(), **options):
    """Saves a value in both containers, and what a reader should find: tensors by path, some metadata, what is kept out."""
    torch.save(value, FOLDER / f"{name}.pth", **options)
    torch.save(value, FOLDER / f"{name}.old.pth", _use_new_zipfile_serialization=False, **options)
    expected[name] = {"tensors": {path: describe(t) for path, t in tensors.items()}, "metadata": metadata or {},
                      "kept_out": sorted(kept_out)}


def types():
    tensors = {
        "float32": torch.tensor([1.5, -2.0, 3.1415927410125732]),
        "bfloat16": torch.tensor([1.5, -2.0, 3.140625], dtype=torch.bfloat16),
        "half": torch.tensor([1.5, -2.0, 65504.0], dtype=torch.float16),
        "double": torch.tensor([0.1, -1e300], dtype=torch.float64),
        "long": torch.tensor([2**40, -1]),
        "int": torch.tensor([2**30, -7], dtype=torch.int32),
        "byte": torch.tensor([0, 127, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
    }
    others = {"complex": torch.tensor([1 + 2j]), "short": torch.tensor([1], dtype=torch.int16),
              "char": torch.tensor([1], dtype=torch.int8), "deep": torch.ones(1, 1, 1, 1, 1, 1, 1)}
    write("types", tensors | others, tensors, kept_out=[
        "complex: a tensor of torch.ComplexFloatStorage", "short: a tensor of torch.ShortStorage",
        "char: a tensor of torch.CharStorage", "deep: a tensor of 7 dimensions (at most 6 are supported)"])


def views():
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {
        "base": base,
        "transposed": base.transpose(0, 2),
        "offset": base[1, 1:, ::2],
        "expanded": torch.tensor([7.0]).expand(3, 2),
        "channels_last": torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "element": base[1, 2, 3],
        "empty": torch.zeros(0, 3),
        "nothing": torch.zeros(3, 0, 2).transpose(0, 2),
        "\u00fcnicode.\u91cd\u307f": torch.tensor([1.0]),
        "parameter": nn.Parameter(torch.tensor([4.0, 5.0])),
    }
    tensors["again"] = tensors["base"]
    write("views", tensors, tensors)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 3, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(self.bn1(self.conv1(x)).mean((2, 3)))


def trained(wrap=lambda net: net):
    torch.manual_seed(1)
    net = wrap(Net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    net(torch.randn(4, 2, 5, 5)).square().mean().backward()
    optimizer.step()
    return net, optimizer


def with_prefix(prefix, tensors):
    return {prefix + name: t for name, t in tensors.items()}


def checkpoint():
    net, optimizer = trained(nn.DataParallel)
    state = optimizer.state_dict()
    value = {
        "epoch": 7, "arch": "resnet18", "state_dict": net.state_dict(), "optimizer": state, "best_acc1": torch.tensor(71.25),
        "args": argparse.Namespace(lr=0.1, data="somewhere"), "acc": numpy.float64(0.625), "none": None, "big": 2**70,
        "negative": -(2**70), "size": torch.Size([3, 4]), "device": torch.device("cuda", 1), "dtype": torch.float16,
        "history": [1, 2.5, "a\"b", True, None], "nested": {"deep": [{"x": torch.ones(1)}, 3]}, "raw": b"\xff\x00",
        "counts": collections.Counter("aab"), "defaults": collections.defaultdict(list, a=1), "class": nn.Linear,
        "set": {1}, ("a", 1): 5, "long": 2**40, "array": numpy.zeros(2), "flag": numpy.bool_(True), "step": numpy.int64(-5),
        "loss": numpy.float32(1.25), "count": numpy.int32(-3),
    }
    tensors = with_prefix("state_dict.", net.state_dict())
    tensors["best_acc1"] = value["best_acc1"]
    tensors["nested.deep.0.x"] = torch.ones(1)
    for key, entry in state["state"].items():
        tensors[f"optimizer.state.{key}.momentum_buffer"] = entry["momentum_buffer"]
    metadata = {"epoch": "7", "arch": "resnet18", "acc": "0.625", "none": "null", "big": str(2**70), "negative": str(-(2**70)),
                "size": "[3, 4]", "device": "cuda:1", "dtype": "torch.float16", "history": "[1, 2.5, \"a\\\"b\", true, null]",
                "nested.deep.1": "3", "defaults.a": "1", "long": str(2**40), "flag": "true", "step": "-5",
                "loss": "1.25", "count": "-3", "optimizer.param_groups.0.lr": "0.1",
                "optimizer.param_groups.0.params": "[0, 1, 2, 3, 4]", "optimizer.param_groups.0.weight_decay": "0.0005"}
    write("checkpoint", value, tensors, metadata, kept_out=[
        "args: argparse.Namespace", "raw: _codecs.encode", "counts: collections.Counter",
        "class: torch.nn.modules.linear.Linear", "set: __builtin__.set",
        "?: its key is neither text nor an integer", "array: numpy._core.multiarray._reconstruct"])


def modules():
    net, _ = trained()
    write("state_dict", net.state_dict(), net.state_dict())
    torch.save(net, FOLDER / "module.pth")
    torch.save(net, FOLDER / "module.old.pth", _use_new_zipfile_serialization=False)
    expected["module"] = {"tensors": {n: describe(t) for n, t in net.state_dict().items()}, "metadata": {}, "kept_out": []}
    write("protocol4", {"w": net.state_dict(), "raw": b"abc", "text": "x" * 300}, with_prefix("w.", net.state_dict()),
          {"raw": "abc", "text": "x" * 300}, pickle_protocol=4)
    write("tensor", torch.tensor([1.0, 2.0]), {"tensor": torch.tensor([1.0, 2.0])})
    tagged = torch.tensor([3.0, 4.0])
    tagged.note = "an attribute"
    write("list", [tagged, 5, torch.tensor([1])], {"0": tagged, "2": torch.tensor([1])}, {"1": "5"})


def no_source(_):
    raise OSError("the source stays out of the file, as where it can't be found")


def main():
    torch.serialization.get_source_lines_and_file = no_source
    types()
    views()
    checkpoint()
    modules()
    torch.serialization.set_crc32_options(False)
    write("unchecked", {"a": torch.tensor([1.0])}, {"a": torch.tensor([1.0])})
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
