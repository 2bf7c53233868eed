#!/usr/bin/env python3
"""Inference of a network in onnxruntime, for step.lua: the deployed network, or the plain one in evaluation, exported by
PyTorch to a file that lives as long as this process.

    onnxruntime_step.py --mode deploy --batch-size 1 --steps 10     by hand

Needs torch, onnx and onnxruntime.
"""

import argparse
import multiprocessing
import os
import tempfile
import warnings

import process

if __name__ == "__main__":
    process.tune_malloc()

import numpy
import onnxruntime


def export(args, path):
    """Runs in a process of its own, so that PyTorch takes none of this one's memory."""
    import torch

    import networks

    warnings.simplefilter("ignore")  # the exporter says that there is a newer one, which needs one more package
    torch.manual_seed(1)
    reparam = "deploy" if args.mode == "deploy" else args.reparam
    model = networks.create(args.model, reparam, args.width, args.classes).eval()
    x = torch.randn(args.batch_size, 3, args.size, args.size)
    torch.onnx.export(model, (x,), path, input_names=["x"], output_names=["logits"], opset_version=17, dynamo=False)


def exported(args, path):
    child = multiprocessing.get_context("spawn").Process(target=export, args=(args, path))
    child.start()
    child.join()
    if child.exitcode != 0:
        raise SystemExit("the network could not be exported")
    return path


def inference(args, path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = numpy.random.default_rng(1).standard_normal((args.batch_size, 3, args.size, args.size), dtype=numpy.float32)
    return lambda: session.run(None, {"x": x})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    process.add_arguments(parser)
    args = parser.parse_args()
    if args.mode == "train":
        parser.error("onnxruntime only runs networks: --mode eval or deploy")
    if args.mode == "eval" and args.reparam != "none":
        parser.error("a re-parameterized network is exported deployed: --mode deploy, or --reparam none")
    with tempfile.TemporaryDirectory() as folder:
        step = inference(args, exported(args, os.path.join(folder, "model.onnx")))
    about = {"peer": "onnxruntime", "version": onnxruntime.__version__, "threads": args.threads, "reparam": args.reparam}
    process.run(args, about, step)


if __name__ == "__main__":
    main()
