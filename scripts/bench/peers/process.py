"""What the peers' processes share: how they start, and how they are asked to work and wait in between."""

import gc
import json
import os
import statistics
import sys
import time

import architectures

# Without these glibc returns every large activation to the system and faults it in again at the next step.
# They are read when a process starts.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


def tune_malloc():
    """Starts the process once more, unless it was started so."""
    if not MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**MALLOC, **os.environ})


def reset_peak_memory():
    """Forgets what setting up took (compiling, above all), where the system allows it."""
    gc.collect()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def peak_memory():
    """The most memory that this process held since, in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def time_steps(step, warm_up, count):
    for _ in range(warm_up):
        step()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def serve(about, step):
    """Says what this is, then answers each line, steps to warm up and to time, with the times. One JSON object a line;
    steps run only in between, so that another process has the machine for itself meanwhile."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        warm_up, count = map(int, line.split())
        print(json.dumps({"seconds": time_steps(step, warm_up, count), "peak_memory": peak_memory()}), flush=True)


def add_arguments(parser):
    """What the network is, as step.lua says it."""
    parser.add_argument("--model", choices=architectures.MODELS, default="resnet18")
    parser.add_argument("--reparam", choices=architectures.REPARAMS, default="orepa")
    parser.add_argument("--mode", choices=("train", "eval", "deploy"), default="train")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, metavar="K", help="time K steps, print milliseconds, and leave")


def run(args, about, step):
    """Prepares the first step outside of all times, then serves, or times `args.steps` steps by itself."""
    step()
    reset_peak_memory()
    if not args.steps:
        return serve(about, step)
    seconds = time_steps(step, 3, args.steps)
    print(f"{1e3 * statistics.median(seconds):.2f} ms, {peak_memory() / 2**20:.0f} MiB")
