"""Where a GPU pays: find the batch from which on it is faster, for answering and for training.

Run:    uv run src/advanced/17_where_a_gpu_pays.py
Needs:  nothing
Makes:  models/plots/17_where_a_gpu_pays.png
Expect: measurements = 12, largest_difference <= 0.001

A GPU is a bus: it leaves late, whoever gets on, and takes hundreds as fast as one. A CPU is a
bicycle. Which of them is faster depends on how many travel, so that is what this lesson varies.
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
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCHES = [1, 8, 32, 128, 512, 2048]


# SETUP: the two that compete, as in 04_gpu_vs_cpu_benchmark.py.
def pick_sides():
    """Return {name: (device, threads of the CPU)}."""
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    if DEVICE.type == "cpu":
        print(f"No GPU here: one thread of the CPU stands against all it may use, {threads}.")
        return {"1 thread": (cpu, 1), "all threads": (cpu, threads)}
    return {"CPU": (cpu, threads), "GPU": (DEVICE, threads)}


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
def make_work(kind, batch, device, threads):
    """Return a call that answers a batch ("Inference"), or that takes a step with it ("Training")."""
    torch.manual_seed(0)
    images, labels = torch.rand(batch, 1, 28, 28).to(device), torch.randint(10, (batch,)).to(device)
    model = CNN().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step():
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    answer = torch.inference_mode()(lambda: model(images))

    def call():
        torch.set_num_threads(threads)
        return answer() if kind == "Inference" else step()

    return call


# MEASURE: as in 04_gpu_vs_cpu_benchmark.py.
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
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))  # Efron 1979
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


def in_words(rates):
    low, middle, high = np.percentile(rates, [25, 50, 75])
    return f"{middle:,.0f} ({low:,.0f} to {high:,.0f})"


def compare_batches(kind, sides, batches, amount):
    """Print a row for each batch; return {batch: (images/s by side, words)}, the largest difference."""
    first, second = sides
    print(f"{kind}, images/s (middle half) by {first} | by {second} | times as fast as {first}")
    rows, differences, pays = {}, [], None
    for batch in batches:
        works = {side: make_work(kind, batch, *where) for side, where in sides.items()}
        one, other = (call().cpu() for call in works.values())
        differences.append((one - other).abs().max().item())
        times = time_in_turn(works, **amount)
        rates = {side: batch / np.array(own) for side, own in times.items()}
        ratio, low, high, verdict = compare(*times.values())
        rows[batch] = rates, f"{ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}"
        cells = " | ".join(f"{in_words(own):25}" for own in rates.values())
        print(f"  batch {batch:4} | {cells} | {rows[batch][1]}")
        pays = (pays or batch) if verdict == "faster" else None  # from where on always faster
    print(f"  {second}: {f'faster from batch {pays} on' if pays else 'not faster to the end'}")
    return rows, max(differences)


# PICTURE: both axes logarithmic, so that doubling is the same step everywhere.
def draw(results):
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (kind, (rows, _)) in zip(figure.subplots(1, 2), results.items(), strict=True):
        for side in next(iter(rows.values()))[0]:
            spread = [np.percentile(rates[side], [25, 50, 75]) for rates, _ in rows.values()]
            low, middle, high = np.transpose(spread)
            axes.errorbar(list(rows), middle, [middle - low, high - middle], fmt="o-", label=side)
        axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title=kind)
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


def main(quick=False):
    torch.backends.cudnn.allow_tf32 = False  # the same precision on both sides
    sides, kinds = pick_sides(), ("Inference", "Training")
    batches, amount = ([1, 128], {"seconds": 0.02, "rounds": 5}) if quick else (BATCHES, {})
    results = {kind: compare_batches(kind, sides, batches, amount) for kind in kinds}
    batch = 512 if 512 in batches else max(batches)
    words = results["Inference"][0][batch][1]
    print(f"Batch of {batch}, inference: 86 in the notes for 512, L4 against CPU; here {words}")
    folder = ROOT / ("models/quick" if quick else "models")
    save(draw(results).savefig, folder / "plots" / "17_where_a_gpu_pays.png")
    difference = max(difference for _, difference in results.values())
    gain = words.partition("(")[2].partition(")")[0] if "GPU" in sides else "none"
    result = f"measurements = {2 * len(batches)}, largest_difference = {difference:.7f}"
    print(f"Result: {result}, gpu_at_{batch} = {gain}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: two batches, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
