#!/usr/bin/env python3
"""The PyTorch peer of the benchmark: ResNet-18, plain or re-parameterized, trained on Fashion-MNIST.

Only measured against, never a dependency. The networks are those of networks.py, which tensors of the reference
implementation (OREPA, CVPR 2022) fit by name.

    pytorch_orepa.py --check model_resnet18_orepa.safetensors     compare with a golden file (model_* or train_*)
    pytorch_orepa.py --check FILE --float64                       the same in the precision that the files were made in
    pytorch_orepa.py --reparam orepa --steps 60 --json            median time of a step
    pytorch_orepa.py --reparam orepa --epochs 10                  train by the quickstart's recipe

Needs torch, numpy and safetensors.
"""

import argparse
import gzip
import json
import math
import statistics
import sys
import time

import process

if __name__ == "__main__":
    process.tune_malloc()

import torch
import torch.nn.functional as F

import architectures
from networks import VARIANTS, RepVGG, create, in_layout, make_optimizer, precision, prepare, set_rate, train_step

HELD_OUT = 5000
WARM_UP_STEPS = 10
TOLERANCE = 1e-4  # the reference's own float32 is up to 9.6e-5 off


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

    def batches(self, size, variant):
        """One epoch of shuffled batches, each image flipped with probability 1/2. The last one is smaller."""
        images, labels = self.train
        for chosen in torch.randperm(len(labels)).split(size):
            x = images.index_select(0, chosen)
            flip = torch.rand(len(chosen), 1, 1, 1) < 0.5
            yield in_layout(torch.where(flip, x.flip(3), x), variant), labels.index_select(0, chosen)


@torch.inference_mode()
def accuracy(model, images, labels, variant):
    model.eval()
    pairs = zip(images.split(500), labels.split(500))
    with precision(variant):
        right = sum((model(in_layout(x, variant)).argmax(1) == y).sum().item() for x, y in pairs)
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
        "variant": args.variant,
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
            batches = data.batches(args.batch_size, args.variant)
            continue
        train_step(model, optimizer, x, labels, args.variant)
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
        for x, labels in data.batches(args.batch_size, args.variant):
            set_rate(optimizer, rate_at(step, args.lr, epoch_steps, args.epochs * epoch_steps))
            total += train_step(model, optimizer, x, labels, args.variant).item() * len(labels)
            step += 1
        result = {"epoch": epoch, "seconds": round(time.perf_counter() - start, 3)}
        result["loss"] = round(total / len(data.train[1]), 5)
        result["held_out_accuracy"] = accuracy(model, *data.held_out, args.variant)
        if args.test and epoch == args.epochs:
            result["test_accuracy"] = accuracy(model, *data.test, args.variant)
        if args.json:
            print(json.dumps(describe(args) | result), flush=True)
        else:
            print("  ".join(f"{name} {value}" for name, value in result.items()), flush=True)


# Golden files


def error(got, expected):
    """The largest difference, relative to the largest magnitude expected."""
    return ((got.double() - expected.double()).abs().max() / expected.abs().max()).item()


def check_model(model, golden, variant, dtype):
    x, labels = in_layout(golden["x"].to(dtype), variant), golden["labels"]
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


def check_train(model, golden, meta, variant, dtype):
    """A run of some steps: the optimizer's rule."""
    optimizer = make_optimizer(model, float(meta["momentum"]), float(meta["weight_decay"]))
    set_rate(optimizer, float(meta["lr"]))
    batches = [in_layout((x.to(dtype) / 255 - 0.5) / 0.25, variant) for x in golden["x_u8"]]
    losses = [train_step(model, optimizer, x, labels, variant) for x, labels in zip(batches, golden["labels"])]
    parameters = dict(model.named_parameters())
    final = [name for name in parameters if f"final.{name}" in golden]
    yield "loss", error(torch.stack(losses), golden["loss"])
    yield "final", max(error(parameters[name].detach(), golden[f"final.{name}"]) for name in final)
    model.eval()
    with torch.no_grad():
        yield "logits_eval", error(model(batches[0]), golden["logits_eval"])


def numbers(text, kind):
    return [kind(word) for word in text.split(",")]


def network_of(meta):
    """The network that a golden file's metadata describe."""
    arch, reparam, classes = meta["arch"].lower().replace("-", ""), meta["reparam"].lower(), int(meta["num_classes"])
    if arch.startswith("repvgg"):
        num_blocks, widths = numbers(meta["num_blocks"], int), numbers(meta["width_multiplier"], float)
        return RepVGG(num_blocks, widths, reparam=reparam, classes=classes)
    if arch not in architectures.RESNETS:
        raise SystemExit(f"a {meta['arch']} is neither a RepVGG nor a {' or '.join(architectures.RESNETS)}")
    return create(arch, reparam, float(meta["width_multiplier"]), classes)


def check(path, variant, dtype):
    """Errors against a golden file, which holds float64 results of the reference: pairs of what and how much."""
    import safetensors

    with safetensors.safe_open(path, "pt") as file:
        meta = file.metadata()
        golden = {name: file.get_tensor(name) for name in file.keys()}
    model = network_of(meta)
    state = {}
    for name, tensor in golden.items():
        group, _, rest = name.partition(".")
        if group in ("param", "buffer"):
            state[rest] = tensor
    own = model.state_dict()
    constants = ("_prior", "_avg_avg", "id_tensor")
    yield "constants", max((error(own[n], state[n]) for n in state if n.endswith(constants)), default=0.0)
    model.load_state_dict(state)
    prepare(model.to(dtype), variant)
    if meta["kind"] == "model":
        yield from check_model(model, golden, variant, dtype)
    else:
        yield from check_train(model, golden, meta, variant, dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="FILE", help="compare with a golden file and leave")
    parser.add_argument("--float64", action="store_true", help="compare in float64")
    parser.add_argument("--reparam", choices=architectures.REPARAMS, default="orepa")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--variant", choices=VARIANTS, default="channels-last",
                        help="compiled: the first epoch includes compiling")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", metavar="DIR", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--steps", type=int, metavar="K", help="only time K steps")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--test", action="store_true", help="test accuracy after the last epoch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.check:
        dtype = torch.float64 if args.float64 else torch.float32
        errors = dict(check(args.check, args.variant, dtype))
        print(json.dumps(errors) if args.json else "  ".join(f"{name} {value:.1e}" for name, value in errors.items()))
        sys.exit(0 if all(value < TOLERANCE for value in errors.values()) else 1)
    torch.manual_seed(args.seed)
    data = FashionMnist(args.data, args.test)
    model = prepare(create("resnet18", args.reparam, args.width, classes=10, channels=1), args.variant)
    optimizer = make_optimizer(model, momentum=0.9, weight_decay=5e-4)
    (time_steps if args.steps else train)(args, model, optimizer, data)


if __name__ == "__main__":
    main()
