"""Profiling: find out where a slow training loop spends its time, and mend it fault by fault.

Run:    uv run src/advanced/07_profiling.py
Needs:  nothing
Makes:  models/07_profiling_trace.json
Expect: waits_before = 32, waits_after = 1, weight_difference <= 0.0001

A profiler writes down every operation: how often it ran and how long it took. Look for what runs once
per image where once per batch would do, and for what takes the time but is no training.
"""

import argparse
import contextlib
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile, record_function, supported_activities

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
IMAGES, PROFILED, SMALL, LARGE, LEARNING_RATE = 1024, 256, 8, 256, 0.01
PARTS = ["prepare", "transfer", "learn", "report"]
os.environ["KINETO_LOG_LEVEL"] = "5"  # or the profiler reports that it has found no GPU


# DATA: random bytes of MNIST's shape, since the time does not depend on what they show.
def scale(images):  # one or many; the numbers are MNIST's own mean and deviation
    return (images.float() / 255 - 0.1307) / 0.3081


def scale_each(images):
    return torch.stack([scale(image) for image in images])


# MODEL: small, so that what is wrong around it shows.
def start_anew():
    torch.manual_seed(0)  # every loop begins with the same weights
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    return model.to(DEVICE), torch.optim.SGD(model.parameters(), LEARNING_RATE)


# TRAIN: what is wrong with it lies in what it is given; record_function names its parts for the profiler.
def train(images, labels, size, prepare, read):
    (model, optimizer), total = start_anew(), 0.0
    for batch in torch.arange(len(images), device=images.device).split(size):
        with record_function("prepare"):
            prepared = prepare(images[batch])
        with record_function("transfer"):  # nothing to do for what is there already
            prepared, answers = prepared.to(DEVICE), labels[batch].to(DEVICE)
        with record_function("learn"):
            loss = F.cross_entropy(model(prepared), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with record_function("report"):
            total += read(loss) * len(batch)
    return model, float(total) / len(images)


# LOOK: the profiler's table, cut down to the columns and rows that matter.
def look(work):
    """Profile work and print what took its time; return the trace and how often the CPU waited."""
    work()  # the first time is slower, and not what we look for
    with profile(activities=supported_activities(), acc_events=True) as recorded:
        work()
    events = recorded.key_averages()  # with a GPU, a part can stand there twice
    spent = {name: sum(e.cpu_time_total for e in events if e.key == name) for name in PARTS}
    print("  part of the loop                  CPU ms   share")
    for name in PARTS:
        print(f"  {name:30} {spent[name] / 1e3:9.1f} {spent[name] / sum(spent.values()):7.1%}")
    rows = {event.key: event for event in events if event.key.startswith("aten::")}
    longest = sorted(rows.values(), key=lambda event: -event.self_cpu_time_total)[:7]
    print("  operation                         CPU ms  GPU ms  calls  calls per image")
    for event in [*longest, rows["aten::item"]]:
        times = f"{event.self_cpu_time_total / 1e3:9.1f} {event.self_device_time_total / 1e3:7.1f}"
        print(f"  {event.key:30} {times} {event.count:6} {event.count / PROFILED:16.2f}")
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        return Path(folder, "trace.json").read_bytes(), rows["aten::item"].count


# MEASURE: every candidate in turn, so that what disturbs the machine disturbs them all alike.
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


def measure(loops, images, **amount):
    calls = {name: lambda loop=loop: loop(images) for name, loop in loops.items()}
    times = time_in_turn(calls, **amount)
    for before, (name, spent) in zip([None, *times.values()], times.items(), strict=False):
        low, median, high = images / np.percentile(spent, [75, 50, 25])
        row = f"  {name:30} {median:9,.0f} images/s ({low:,.0f} to {high:,.0f})"
        gain = "{:.2f}x ({:.2f} to {:.2f}), {}".format(*compare(before or spent, spent))
        print(f"{row} | {gain}" if before else row)
    text = "  all of them: {:.1f}x ({:.1f} to {:.1f}), {}"
    print(text.format(*compare(times["all three faults"], spent)))


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
    images = torch.randint(256, (PROFILED if quick else IMAGES, 28, 28)).byte()
    labels = torch.randint(10, images.shape[:1])
    moved = images.to(DEVICE), labels.to(DEVICE)  # as bytes: a quarter of the numbers' size
    item, detach = torch.Tensor.item, torch.Tensor.detach  # item() waits for the GPU, detach() not
    loops = {
        "all three faults": lambda n: train(images[:n], labels[:n], SMALL, scale_each, item),
        "1 prepare whole batches": lambda n: train(images[:n], labels[:n], SMALL, scale, item),
        "2 transfer and wait once": lambda n: train(*(t[:n] for t in moved), SMALL, scale, detach),
        f"3 batches of {LARGE}": lambda n: train(*(t[:n] for t in moved), LARGE, scale, detach),
    }
    slow, _, well, _ = loops.values()
    print(f"All three faults under the profiler, {PROFILED} images")
    trace, waits_before = look(lambda: slow(PROFILED))
    models = ROOT / ("models/quick" if quick else "models")
    save(lambda file: file.write(trace), models / "07_profiling_trace.json")
    print("Each fault mended, after those before it, and compared with the line above")
    measure(loops, len(images), **({"seconds": 0.02, "rounds": 5} if quick else {}))
    print("Faults 1 and 2 mended, under the profiler")
    _, waits_after = look(lambda: well(PROFILED))
    weights = [nn.utils.parameters_to_vector(f(PROFILED)[0].parameters()) for f in (slow, well)]
    difference = (weights[0] - weights[1]).abs().max().item()
    waits = f"Result: waits_before = {waits_before}, waits_after = {waits_after}"
    print(f"{waits}, weight_difference = {difference:.6f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 256 images, short timing")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
