"""GPU against CPU: find the batch from which on a GPU pays.

Run:    uv run src/advanced/04_gpu_vs_cpu_benchmark.py
Needs:  nothing
Makes:  models/plots/04_gpu_vs_cpu_benchmark.png
Expect: measurements = 13, largest_difference <= 0.001

A GPU is a bus: it leaves late, whoever gets on, and takes hundreds as fast as one. A CPU is a
bicycle. Which of them is faster depends on how many travel, so that is what this lesson varies.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCHES = [1, 8, 32, 128, 512, 2048]
CPU_MATRIX, GPU_MATRIX = 1024, 8192


# SETUP: the two that compete. Without a GPU, one thread of the CPU stands against all of them.
def pick_sides():
    """Return {name: (device, threads of the CPU)}."""
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    if DEVICE.type == "cpu":
        print(f"No GPU here: one thread of the CPU stands against all it may use, {threads}.")
        print("Missing: the GPU's columns, what starting its kernels costs, its share of its peak.")
        return {"1 thread": (cpu, 1), "all threads": (cpu, threads)}
    return {"CPU": (cpu, threads), "GPU": (DEVICE, threads)}


def find_peak():
    """Return a CUDA device's fp32 GFLOP/s: 2 for each core and tick of its clock; nan if unknown."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm"]
    try:
        card = torch.cuda.get_device_properties(DEVICE)
        command = [*query, "--format=csv,noheader,nounits", f"--id=GPU-{card.uuid}"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
        driver, megahertz = answer.stdout.strip().split(", ")
        print(f"{card.name}, driver {driver}, torch {torch.__version__}")
        cores = 64 if (card.major, card.minor) in [(7, 0), (7, 5), (8, 0)] else 128
        return card.multi_processor_count * cores * 2 * float(megahertz) / 1e3
    except Exception:  # no CUDA device, or nobody who knows its clock
        return math.nan


# MODEL: as in intermediate/02_cnn.py.
class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [N, 8, 14, 14]; pooled first: 4x less to ReLU
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [N, 16, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 64]
        return self.fc2(x)  # [N, 10], one logit per digit


# WORK: the same numbers on both sides; they lie on the device already when the clock starts.
def make_model(device, batch):
    torch.manual_seed(0)
    images, labels = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    return CNN().to(device), images.to(device), labels.to(device)


def inference(device, batch):
    model, images, _ = make_model(device, batch)
    return torch.inference_mode()(lambda: model.eval()(images))


def training(device, batch):
    model, images, labels = make_model(device, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def matmul(device, size):
    try:
        a, b, product = torch.rand(3, size, size, device=device)
    except RuntimeError:
        sys.exit(f"No memory for matrices of {size} x {size}: choose a smaller --matrix-size.")
    return lambda: torch.mm(a, b, out=product)


def with_threads(threads, work):
    def call():
        torch.set_num_threads(threads)
        return work()

    return call


# MEASURE: as in 02_model_optimization.py.
def synchronize():
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()  # a GPU works on after the call has come back


def time_block(call, count):
    """Return the seconds that each of count calls takes."""
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
    """Return how many times faster other is than base, the 95 % interval of that, and a verdict.

    The interval is a bootstrap (Efron 1979) over the rounds; one that spans 1 shows no difference.
    """
    base, other = np.array(base), np.array(other)
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


def measure(works, amounts, **options):
    """Time the works in turn; return {side: amount a second, [rounds]} and the comparison in words."""
    times = time_in_turn(works, **options)
    rates = {side: amounts[side] / np.array(own) for side, own in times.items()}
    first, second = rates.values()
    ratio, low, high, verdict = compare(1 / first, 1 / second)
    return rates, f"{ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}"


def in_words(rates):
    low, middle, high = np.percentile(rates, [25, 50, 75])
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def compare_batches(title, work, sides, batches, amount):
    """Print a row for each batch; return {batch: (rates, words)} and the largest difference."""
    first, second = sides
    print(f"{title}, images/s (middle half) by {first} | by {second} | times as fast (95 %)")
    rows, differences = {}, []
    for batch in batches:
        works = {side: with_threads(n, work(device, batch)) for side, (device, n) in sides.items()}
        one, other = (call().cpu() for call in works.values())
        differences.append((one - other).abs().max().item())
        rows[batch] = measure(works, dict.fromkeys(sides, batch), **amount)
        rates, words = rows[batch]
        print(
            f"  batch {batch:4} | {' | '.join(f'{in_words(own):28}' for own in rates.values())} | {words}"
        )
    slow = [batch for batch in batches if not rows[batch][1].endswith("faster")]
    late = [batch for batch in batches if batch > max(slow, default=0)]
    crossing = f"faster from batch {late[0]} on" if late else "not faster to the end"
    print(f"  {second}: {crossing}")
    return rows, max(differences)


def compare_products(sides, sizes, peak, **amount):
    works = {
        side: with_threads(n, matmul(device, sizes[side])) for side, (device, n) in sides.items()
    }
    work = {side: 2 * sizes[side] ** 3 / 1e9 for side in sides}  # a multiplication and an addition
    rates, words = measure(works, work, **amount)
    for side, own in rates.items():
        share = np.median(own) / (peak if sides[side][0].type == "cuda" else math.nan)
        known = "peak not known" if math.isnan(share) else f"{share:.0%} of its peak"
        print(f"Matrices of {sizes[side]} by {side}: {in_words(own)} GFLOP/s, {known}")
    print(f"  {words}")


# PICTURE: both axes logarithmic, so that a straight line is a constant rate of growth.
def draw(results):
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, 2), results.items(), strict=True):
        for side in next(iter(rows.values()))[0]:
            low, middle, high = np.transpose(
                [np.percentile(rates[side], [25, 50, 75]) for rates, _ in rows.values()]
            )
            spread = [middle - low, high - middle]
            axes.errorbar(list(rows), middle, spread, marker="o", capsize=3, label=side)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title=title)
        axes.set_xticks(list(rows), list(rows))
        axes.minorticks_off()
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
    torch.backends.cudnn.allow_tf32 = False  # the same precision on both sides
    sides, peak, on_cpu = pick_sides(), find_peak(), DEVICE.type == "cpu"
    batches, amount = ([1, 32], {"seconds": 0.02, "rounds": 5}) if quick else (BATCHES, {})
    results = {
        "Inference": compare_batches("Inference", inference, sides, batches, amount),
        "Training": compare_batches("Training", training, sides, batches, amount),
    }
    size = matrix_size or (128 if quick else CPU_MATRIX if on_cpu else GPU_MATRIX)
    sizes = {
        side: size if device == DEVICE else min(size, CPU_MATRIX)
        for side, (device, _) in sides.items()
    }
    rounds = iterations or (5 if quick else 21 if on_cpu else 100)
    compare_products(sides, sizes, peak, **amount | {"rounds": rounds})
    batch = max(batch for batch in batches if batch <= 512)
    words = results["Inference"][0][batch][1]
    print(f"Batch of {batch}, inference: 86 in the notes, L4 against CPU; here {words}")
    picture = draw({title: rows for title, (rows, _) in results.items()})
    plots = ROOT / ("models/quick" if quick else "models") / "plots"
    save(picture.savefig, plots / "04_gpu_vs_cpu_benchmark.png")
    difference = max(difference for _, difference in results.values())
    gain = "none" if on_cpu else words.partition("(")[2].partition(")")[0]
    result = f"measurements = {2 * len(batches) + 1}, largest_difference = {difference:.7f}"
    print(f"Result: {result}, gpu_at_{batch} = {gain}")


def count(text):
    if int(text) < 5:  # argparse makes one sentence of it
        raise ValueError
    return int(text)


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: two batches, models/quick/")
    cli.add_argument("--matrix-size", type=count, help="8192 on a GPU, 1024 on a CPU")
    cli.add_argument(
        "--iterations", type=count, help="repeats: 100 on a GPU, 21 on a CPU, 5 or more"
    )
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
