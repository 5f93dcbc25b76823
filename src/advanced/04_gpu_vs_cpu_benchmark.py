"""GPU against CPU: find out how large a task must be before a GPU is faster than a CPU.

Run:    uv run src/advanced/04_gpu_vs_cpu_benchmark.py
Needs:  nothing
Makes:  models/plots/advanced-04_gpu_vs_cpu_benchmark.png
Expect: products >= 3, largest_difference <= 0.0001, measurements = 12

A GPU has thousands of cores, but each operation must first be sent to them. A small task ends
before most cores have started; a large one keeps all of them busy. So we vary the size of the task.
Without a GPU, one thread of the CPU competes with all of its threads.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
UNITS = {"Matrix product": "GFLOP/s", "Inference": "images/s", "Training": "images/s"}
MATRIX_SIZE = 1024 if DEVICE.type == "cpu" else 4096  # rows and columns of the largest matrix
BATCHES = [1, 2, 8, 32, 128, 512]
ROUNDS = 21


# SETUP: the two competitors.
def pick_sides():
    """Return {name: (device, threads of the CPU)}."""
    cpu = torch.device("cpu")
    threads = torch.get_num_threads()
    if DEVICE.type == "cpu":
        print(f"No GPU: one thread of the CPU competes with all of its {threads} threads.")
        return {"1 thread": (cpu, 1), "all threads": (cpu, threads)}
    return {"CPU": (cpu, threads), "GPU": (DEVICE, threads)}


# WORK: all numbers are on the device before the clock starts, and the same on both sides.
def make_call(kind, size, device, threads):
    """Return a call that multiplies two matrices, classifies a batch, or trains on it once."""
    torch.manual_seed(0)
    if kind == "Matrix product":
        a, b, product = torch.rand(3, size, size).to(device)
    else:
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # intermediate/02
        layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers += [nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers).to(device)
        images = torch.rand(size, 1, 28, 28).to(device)
        labels = torch.randint(10, (size,)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def call():
        torch.set_num_threads(threads)
        if kind == "Matrix product":
            return torch.mm(a, b, out=product)
        if kind == "Inference":
            with torch.inference_mode():
                return model(images)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

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
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "no difference"
    if low > 1:
        verdict = "faster"
    elif high < 1:
        verdict = "slower"
    return np.median(base) / np.median(other), low, high, verdict


def measure(kind, sizes, sides, seconds):
    """Print a row for each size; return {size: (rates, interval, difference)}."""
    first, second = sides
    print(f"{kind}, {UNITS[kind]} | {second}: times as fast as {first} (95%)")
    rows = {}
    crossing = None
    for size in sizes:
        # README: start
        calls = {}
        for side, (device, threads) in sides.items():
            calls[side] = make_call(kind, size, device, threads)
        outputs = [call().cpu() for call in calls.values()]
        times = time_in_turn(calls, seconds)
        ratio, low, high, verdict = compare(times[first], times[second])
        if verdict != "faster":
            crossing = None
        elif crossing is None:
            crossing = size  # faster from this size on
        # README: end
        amount = 2 * size**3 / 1e9 if kind == "Matrix product" else size
        rates = {side: amount / np.median(own) for side, own in times.items()}
        difference = (outputs[0] - outputs[1]).abs().max() / outputs[0].abs().max()
        rows[size] = (rates, f"{low:.2f} to {high:.2f}", difference.item())
        cells = " | ".join(f"{side} {rate:9,.0f}" for side, rate in rates.items())
        print(f"  {size:5} | {cells} | {ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}")
    print(f"  {second}: {f'faster from {crossing} on' if crossing else 'not faster to the end'}")
    return rows


def print_share_of_peak(rate):
    """Compare a rate in GFLOP/s with what a CUDA device reaches at most in float32."""
    card = torch.cuda.get_device_properties(DEVICE)
    # float32 cores of a multiprocessor: 64 in Volta, Turing and the A100, 128 in later ones
    cores = 64 if (card.major, card.minor) in [(7, 0), (7, 5), (8, 0)] else 128
    peak = card.multi_processor_count * cores * 2 * card.clock_rate / 1e6  # clock in kHz
    print(f"  GPU: the largest product reaches {rate / peak:.0%} of its peak")


# PICTURE: both axes are logarithmic, so each doubling is a step of the same length.
def draw(results):
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (kind, rows) in zip(figure.subplots(1, 3), results.items(), strict=True):
        for side in rows[min(rows)][0]:
            axes.plot(list(rows), [rates[side] for rates, *_ in rows.values()], "o-", label=side)
        axes.set(xscale="log", yscale="log", title=kind, ylabel=UNITS[kind])
        axes.set_xlabel("rows and columns" if kind == "Matrix product" else "batch size")
        axes.legend()
    return figure


def main(quick=False, matrix_size=None):
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision on both sides
    sides = pick_sides()
    largest = matrix_size or (128 if quick else MATRIX_SIZE)
    sizes = dict.fromkeys(UNITS, [1, 32] if quick else BATCHES)
    sizes["Matrix product"] = [size for size in (64, 256, 1024) if size < largest] + [largest]
    results = {}
    for kind in UNITS:
        results[kind] = measure(kind, sizes[kind], sides, seconds=0.02 if quick else 1.0)
    products = results["Matrix product"]
    if DEVICE.type == "cuda":
        print_share_of_peak(products[largest][0]["GPU"])
    plots = ROOT / ("models/quick" if quick else "models") / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(plots / "advanced-04_gpu_vs_cpu_benchmark.png")

    inference = results["Inference"]
    batch = 512 if 512 in inference else max(inference)
    gain = inference[batch][1] if "GPU" in sides else "none"
    difference = max(row[2] for rows in results.values() for row in rows.values())
    result = f"products = {len(products)}, largest_difference = {difference:.7f}, "
    print(f"Result: {result}measurements = {2 * len(inference)}, gpu_at_{batch} = {gain}")


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
