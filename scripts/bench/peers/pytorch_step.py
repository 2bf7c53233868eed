#!/usr/bin/env python3
"""Steps of a network in PyTorch, for step.lua: training, evaluation, or the deployed network, on random images.

    pytorch_step.py --variant compiled-channels-last --steps 10     by hand
    pytorch_step.py --variant eager                                 waits for lines, see process.py

Needs torch. ATEN_CPU_CAPABILITY=avx2, ONEDNN_MAX_CPU_ISA=AVX2 and MKL_ENABLE_INSTRUCTIONS=AVX2 limit it to AVX2.
"""

import argparse

import process

if __name__ == "__main__":
    process.tune_malloc()

import torch

import networks


def training(args):
    model = networks.prepare(networks.create(args.model, args.reparam, args.width, args.classes), args.variant)
    optimizer = networks.make_optimizer(model, momentum=0.9, weight_decay=1e-4)
    networks.set_rate(optimizer, 0.01)
    x = networks.in_layout(torch.randn(args.batch_size, 3, args.size, args.size), args.variant)
    labels = torch.randint(args.classes, (args.batch_size,))
    return lambda: networks.train_step(model, optimizer, x, labels, args.variant)


def inference(args):
    """Deployed networks are as a user would have them: their weights in bfloat16 for good where that is the precision,
    and constant for the compiler."""
    deployed, compiled = args.mode == "deploy", args.variant.startswith("compiled")
    half = args.variant.endswith("bfloat16")
    if deployed and compiled:
        from torch._inductor import config

        config.freezing = True
    model = networks.create(args.model, "deploy" if deployed else args.reparam, args.width, args.classes)
    x = torch.randn(args.batch_size, 3, args.size, args.size)
    if deployed and half:
        model, x = model.bfloat16(), x.bfloat16()
    model = networks.prepare(model, args.variant).eval()
    x = networks.in_layout(x, args.variant)

    @torch.inference_mode()
    def step():
        if deployed:
            return model(x)
        with networks.precision(args.variant):
            return model(x)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    process.add_arguments(parser)
    parser.add_argument("--variant", choices=networks.VARIANTS, default="channels-last")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    about = {
        "peer": "pytorch",
        "version": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "variant": args.variant,
        "reparam": args.reparam,
    }
    process.run(args, about, training(args) if args.mode == "train" else inference(args))


if __name__ == "__main__":
    main()
