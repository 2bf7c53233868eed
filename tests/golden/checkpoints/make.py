#!/usr/bin/env python3
"""Writes training checkpoints (.pth.tar) as the reference implementation's scripts do, of networks whose tensors are in the golden
files beside this folder: the state dict of a network under DataParallel, constants included, and the optimizer's.

Run by hand, with torch; the results are in the repository.
"""

import json
import pathlib
import struct

import numpy
import torch

FOLDER = pathlib.Path(__file__).parent
TYPES = {"F32": numpy.float32, "I64": numpy.int64}


def read_safetensors(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in TYPES:
            first, last = (8 + size + at for at in entry["data_offsets"])
            values = numpy.frombuffer(data[first:last], TYPES[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = torch.from_numpy(values.copy())
    return tensors, header["__metadata__"]


def main():
    for name in ("model_resnet18_orepa", "model_repvgg_a0_repvgg"):
        tensors, about = read_safetensors(FOLDER.parent / f"{name}.safetensors")
        state = {}
        for key, t in tensors.items():
            kind, _, rest = key.partition(".")
            if kind in ("param", "buffer"):
                state["module." + rest] = t
        torch.save(
            {
                "epoch": 119,
                "arch": about["arch"],
                "state_dict": state,
                "best_acc1": torch.tensor(72.0),
                "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "momentum": 0.9, "params": list(range(3))}]},
                "scheduler": {"T_max": 120, "_step_count": 1},
            },
            FOLDER / f"{name}.pth.tar",
        )


if __name__ == "__main__":
    main()
