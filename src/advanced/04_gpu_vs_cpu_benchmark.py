"""GPU against CPU: find out how large a task must be before a GPU is faster than a CPU.

Run:    uv run src/advanced/04_gpu_vs_cpu_benchmark.py
Needs:  nothing
Makes:  models/plots/advanced-04_gpu_vs_cpu_benchmark.png
Expect: products >= 3, largest_difference <= 0.0001, measurements = 6

A GPU has thousands of cores, but each operation must first be sent to them. A small task ends
before most cores have started; a large one keeps all of them busy. So we vary the size of the task.
Without a GPU, one thread of the CPU competes with all of its threads.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
MATRIX_SIZE = 1024 if DEVICE.type == "cpu" else 4096  # rows and columns of the largest matrix
BATCHES = [1, 2, 8, 32, 128, 512]
ROUNDS = 21

# SETUP: the two competitors, {name: (device, threads of the CPU)}.
THREADS = torch.get_num_threads()
SIDES = {"CPU": ("cpu", THREADS), "GPU": (DEVICE, THREADS)}
if DEVICE.type == "cpu":
    SIDES = {"1 thread": ("cpu", 1), "all threads": ("cpu", THREADS)}


# WORK: all numbers are on the device before the clock starts, and the same on both sides.
def make_call(kind, size, device, threads):
    """Return a call that multiplies two matrices, or classifies a batch of images."""
    torch.manual_seed(0)
    if kind == "Matrix product":
        a, b, product = torch.rand(3, size, size).to(device)
        work = partial(torch.mm, a, b, out=product)
    else:
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # intermediate/02
        layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers += [nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers).to(device)
        work = partial(model, torch.rand(size, 1, 28, 28).to(device))

    @torch.inference_mode()
    def call():
        torch.set_num_threads(threads)  # the Timer has set its own number
        return work()

    return call


# MEASURE: the calls take turns, round by round, because a machine's speed changes (advanced/05).
def time_in_turn(calls, seconds=2.0):
    """Return {name: [seconds per call, one number for each round]}."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS).median)
    return times


def compare(base, other):
    """Return how many times as fast other is, its 95% interval (bootstrap), and a verdict."""
    base, other = np.array(base), np.array(other)
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(1000):
        picks = random.integers(len(base), size=len(base))  # some rounds twice, some never
        ratios.append(np.median(base[picks]) / np.median(other[picks]))
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as printed: 1.004 counts as 1.00
    verdict = "no difference"
    if low > 1:
        verdict = "faster"
    elif high < 1:
        verdict = "slower"
    return np.median(base) / np.median(other), low, high, verdict


def measure(kind, sizes, seconds, axes):
    """Print a row for each size and draw the speed; return {size: (interval, difference)}."""
    first, second = SIDES
    unit = "GFLOP/s" if kind == "Matrix product" else "images/s"
    print(f"{kind}, {unit}: {first} | {second} | times as fast (95%)")
    rates = {first: [], second: []}
    rows = {}
    limit = 0
    for size in sizes:
        calls = {}
        for side, (device, threads) in SIDES.items():
            calls[side] = make_call(kind, size, device, threads)
        outputs = [call().cpu() for call in calls.values()]
        times = time_in_turn(calls, seconds)
        ratio, low, high, verdict = compare(times[first], times[second])
        if verdict != "faster":
            limit = size  # the largest so far that is not faster
        amount = 2 * size**3 / 1e9 if kind == "Matrix product" else size
        for side, own in times.items():
            rates[side].append(amount / np.median(own))
        difference = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
        rows[size] = (f"{low:.2f} to {high:.2f}", difference.item())
        row = f"  {size:5} | {rates[first][-1]:9,.0f} | {rates[second][-1]:9,.0f}"
        print(f"{row} | {ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}")
    if limit == sizes[-1]:
        print(f"  {second}: not faster at the largest size")
    else:
        print(f"  {second}: faster at every measured size above {limit}")
    for side, values in rates.items():
        axes.loglog(sizes, values, "o-", label=side)
    axes.set(title=kind, xlabel="size", ylabel=unit)
    axes.legend()
    return rows


def main(quick=False, matrix_size=None):
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision on both sides
    if "GPU" not in SIDES:
        print(f"No GPU: one thread of the CPU competes with all of its {THREADS} threads.")
    largest = matrix_size or (128 if quick else MATRIX_SIZE)
    sizes = [size for size in (64, 256, 1024) if size < largest]
    seconds = 0.02 if quick else 1.0
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    products = measure("Matrix product", [*sizes, largest], seconds, left)
    inference = measure("Inference", [1, 32] if quick else BATCHES, seconds, right)
    plots = ROOT / ("models/quick" if quick else "models") / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    figure.savefig(plots / "advanced-04_gpu_vs_cpu_benchmark.png")

    gain = inference[max(inference)][0] if "GPU" in SIDES else "none"
    difference = max(row[1] for row in [*products.values(), *inference.values()])
    result = f"products = {len(products)}, largest_difference = {difference:.7f}"
    print(f"Result: {result}, measurements = {len(inference)}, gpu_at_{max(inference)} = {gain}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    parser.add_argument("--matrix-size", type=int, help="rows of the largest matrix")
    parser.add_argument("--iterations", type=int, default=ROUNDS, help="rounds of taking turns")
    arguments = parser.parse_args()
    if min(arguments.iterations, arguments.matrix_size or MATRIX_SIZE) < 5:
        parser.error("--matrix-size and --iterations must be 5 or more")
    ROUNDS = arguments.iterations
    try:
        main(arguments.quick, arguments.matrix_size)
    except (KeyboardInterrupt, OSError, RuntimeError) as error:  # RuntimeError: out of memory
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
