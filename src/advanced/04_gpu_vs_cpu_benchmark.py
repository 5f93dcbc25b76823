"""GPU against CPU: what a GPU gives at its best, the product of two large matrices.

Run:    uv run src/advanced/04_gpu_vs_cpu_benchmark.py
Needs:  nothing
Makes:  models/plots/04_gpu_vs_cpu_benchmark.png
Expect: products >= 3, largest_difference <= 0.00001

Nearly all that a network computes is matrix products. A large one keeps every core of a device busy;
a small one is over before the device has got going. So the size decides what you get of it.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CPU_MATRIX, GPU_MATRIX = 1024, 8192  # rows and columns of the largest
SMALLER = 64, 256, 1024, 4096


# SETUP: the two that compete. Without a GPU, one thread of the CPU stands against all of them.
def pick_sides():
    """Return {name: (device, threads of the CPU)}."""
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    if DEVICE.type == "cpu":
        print(f"No GPU here: one thread of the CPU stands against all it may use, {threads}.")
        return {"1 thread": (cpu, 1), "all threads": (cpu, threads)}
    return {"CPU": (cpu, threads), "GPU": (DEVICE, threads)}


def find_peak():
    """Return a CUDA device's fp32 GFLOP/s: 2 for each core and tick of its clock; nan if unknown."""
    try:
        card = torch.cuda.get_device_properties(DEVICE)
        # fp32 cores of a multiprocessor: 64 in Volta, Turing and the A100, 128 in Ampere's others and Ada
        cores = 64 if (card.major, card.minor) in [(7, 0), (7, 5), (8, 0)] else 128
        return card.multi_processor_count * cores * 2 * card.clock_rate / 1e6  # kHz
    except Exception:  # no CUDA device, or a PyTorch that does not tell its clock
        return math.nan


# WORK: the same numbers on both sides; they lie on the device already when the clock starts.
def matmul(device, size):
    torch.manual_seed(0)
    try:
        a, b, product = torch.rand(3, size, size).to(device)
    except RuntimeError:
        sys.exit(f"No memory for matrices of {size} x {size}: choose a smaller --matrix-size.")
    return lambda: torch.mm(a, b, out=product)


def with_threads(threads, work):
    def call():
        torch.set_num_threads(threads)
        return work()

    return call


# MEASURE: in turn, so that what disturbs the machine disturbs both alike.
def time_block(call, count):
    """Return the seconds that each of count calls takes."""
    synchronize = torch.get_device_module(DEVICE).synchronize  # a GPU works on after a call is back
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def time_in_turn(calls, seconds=2.0, rounds=21):
    """Return {name: seconds per call, [rounds]}; each call runs for `seconds` or longer in all."""
    counts = {}
    for name, call in calls.items():  # warm up until it no longer gets faster
        before, now, count = math.inf, time_block(call, 1), 1
        while now < 0.9 * before or now * count < seconds / rounds:
            count = max(count, math.ceil(seconds / rounds / now))
            before, now = now, time_block(call, count)
        counts[name] = count
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_block(call, counts[name]))
    return times


def compare(base, other):
    """Return how many times as fast other is, the bootstrap's 95 % interval of that, and a verdict."""
    base, other = np.array(base), np.array(other)
    # Bootstrap (Efron 1979): draw the rounds again, with repeats, 1000 times. How far does the ratio move?
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


def in_words(rates):
    low, middle, high = np.percentile(rates, [25, 50, 75])
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def compare_products(sides, sizes, **options):
    """Print a row for each size; return {size: {side: GFLOP/s, [rounds]}}, how far products differ."""
    first, second = sides
    print(f"Rows x columns | GFLOP/s (middle half) | {second}: times as fast as {first} (95 %)")
    rows, differences = {}, []
    for size in sizes:
        works = {
            side: with_threads(threads, matmul(device, size))
            for side, (device, threads) in sides.items()
            if device == DEVICE or size <= CPU_MATRIX  # a CPU beside a GPU would need minutes
        }
        times = time_in_turn(works, **options)
        gflop = 2 * size**3 / 1e9  # a multiplication and an addition
        rows[size] = {side: gflop / np.array(own) for side, own in times.items()}
        words = "the CPU is not asked"
        if len(times) == 2:
            one, other = (work().cpu() for work in works.values())
            differences.append((one / other - 1).abs().max().item())
            words = "{:.2f} ({:.2f} to {:.2f}): {}".format(*compare(*times.values()))
        cells = " | ".join(f"{side} {in_words(own):20}" for side, own in rows[size].items())
        print(f"  {size:5} x {size:5} | {cells} | {words}")
    return rows, max(differences)


# PICTURE: both axes logarithmic, so that doubling is the same step everywhere.
def draw(rows, sides):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for side in sides:
        sizes = [size for size in rows if side in rows[size]]
        axes.plot(sizes, [np.median(rows[size][side]) for size in sizes], "o-", label=side)
    axes.set(xscale="log", yscale="log", xlabel="rows and columns", ylabel="GFLOP/s")
    axes.legend()
    return figure


# SAVE: as in basics/07_activations.py.
def save(write, path):
    """Let write(file) fill a new file, then rename it to path; exit with a sentence if that fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        sys.exit(
            f"Cannot write {path}: {error}. Make room or mend its permissions, then run again."
        )
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


def main(quick=False, matrix_size=None, iterations=None):
    sides, on_cpu = pick_sides(), DEVICE.type == "cpu"
    largest = matrix_size or (128 if quick else CPU_MATRIX if on_cpu else GPU_MATRIX)
    sizes = [*(size for size in SMALLER if size < largest), largest]
    rounds = iterations or (5 if quick else 21 if on_cpu else 100)
    seconds = 0.02 if quick else 2.0
    rows, difference = compare_products(sides, sizes, seconds=seconds, rounds=rounds)
    side, rates = [*rows[largest].items()][-1]  # all threads, or the GPU
    share = np.median(rates) / find_peak()
    known = "its peak is not known" if math.isnan(share) else f"{share:.0%} of its peak"
    print(f"The largest by {side}: {np.median(rates):,.0f} GFLOP/s, {known}")
    plots = ROOT / ("models/quick" if quick else "models") / "plots"
    save(draw(rows, sides).savefig, plots / "04_gpu_vs_cpu_benchmark.png")
    print(f"Result: products = {len(rows)}, largest_difference = {difference:.7f}")


def count(text):
    if not text.isdecimal() or int(text) < 5:
        raise argparse.ArgumentTypeError(f"it takes a whole number of 5 or more, not {text}")
    return int(text)


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: small ones, models/quick/")
    cli.add_argument("--matrix-size", type=count, help="the largest: 8192 on a GPU, 1024 on a CPU")
    cli.add_argument("--iterations", type=count, help="repeats: 100 on a GPU, 21 on a CPU")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
