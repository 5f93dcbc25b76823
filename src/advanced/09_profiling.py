"""Profiling: find out where a slow training loop spends its time, and repair three faults in it.

Run:    uv run src/advanced/09_profiling.py
Needs:  nothing
Makes:  models/advanced-09_profiling_trace.json
Expect: waits_before = 32, waits_after = 1, weight_difference <= 0.0001

A profiler records each operation: how often it ran and how long it took. Look for operations that
run once per image when once per batch is enough, and for time that is not spent on training.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile, record_function, supported_activities
from torch.utils.benchmark import Timer

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
IMAGES = 256
SMALL = 8  # images in a batch
PARTS = ["prepare", "transfer", "train", "report"]
ROUNDS = 21
os.environ["KINETO_LOG_LEVEL"] = "5"  # hides the profiler's warning that there is no GPU


# DATA: random bytes in MNIST's shape, because the time does not depend on what an image shows.
def standardize(images):  # one image or many, with the mean and standard deviation of MNIST
    return (images.float() / 255 - 0.1307) / 0.3081


def standardize_each(images):
    return torch.stack([standardize(image) for image in images])


# TRAIN: three arguments contain the faults. record_function names the parts for the profiler.
def build_network():
    torch.manual_seed(0)  # the same first weights for each loop
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    return model.to(DEVICE)


def train(model, images, labels, batch_size, one_by_one, wait):
    """Train on all images once; return the weights in one row."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    total_loss = 0.0
    for batch in torch.arange(len(images), device=images.device).split(batch_size):
        with record_function("prepare"):
            inputs = standardize_each(images[batch]) if one_by_one else standardize(images[batch])
        with record_function("transfer"):  # does nothing if the data is there already
            inputs = inputs.to(DEVICE)
            answers = labels[batch].to(DEVICE)
        with record_function("train"):
            loss = F.cross_entropy(model(inputs), answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with record_function("report"):
            total_loss += loss.item() if wait else loss.detach()  # item() waits for the GPU
    float(total_loss)  # waits for the GPU
    return nn.utils.parameters_to_vector(model.parameters())


def make_settings():
    """Return the arguments of train: with three faults, then with one repair after the other."""
    images = torch.randint(256, (IMAGES, 28, 28)).byte()
    labels = torch.randint(10, (IMAGES,))
    slow = {"images": images, "labels": labels, "batch_size": SMALL}
    slow |= {"one_by_one": True, "wait": True}
    moved = {"images": images.to(DEVICE), "labels": labels.to(DEVICE)}  # bytes, not float32
    whole = {**slow, "one_by_one": False}
    once = {**whole, **moved, "wait": False}
    return {
        "all three faults": slow,
        "1 prepare whole batches": whole,
        "2 transfer and wait once": once,
        f"3 batches of {IMAGES}": {**once, "batch_size": IMAGES},
    }


# PROFILE: the profiler's table, with only the columns and rows that matter here.
def show_profile(settings):
    """Print where the CPU spends its time; return the profile, its waits, and the weights."""
    model = build_network()
    train(model, **settings)  # the first run is slower
    with profile(activities=supported_activities(), acc_events=True) as recorded:  # or it warns
        weights = train(model, **settings)
    events = {event.key: event for event in recorded.key_averages() if event.cpu_time_total > 0}
    operations = [event for name, event in events.items() if name.startswith("aten::")]
    operations.sort(key=lambda event: -event.self_cpu_time_total)  # the slowest first
    print("  part of the loop                  CPU ms")
    for name in PARTS:
        print(f"  {name:30} {events[name].cpu_time_total / 1e3:9.1f}")
    print("  operation                     own CPU ms  GPU ms  calls")
    for event in [*operations[:7], events["aten::item"]]:
        cpu = event.self_cpu_time_total / 1e3
        gpu = event.self_device_time_total / 1e3
        print(f"  {event.key:30} {cpu:9.1f} {gpu:7.1f} {event.count:6}")
    return recorded, events["aten::item"].count, weights


def save_trace(recorded, path):
    """Write the whole profile in a format that https://ui.perfetto.dev shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    recorded.export_chrome_trace(str(part))
    part.replace(path)  # only a complete file takes the name
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


# MEASURE: the calls take turns, round by round, because a machine's speed changes (advanced/05).
def time_in_turn(calls, seconds=2.0):
    """Return {name: [seconds per call, one number for each round]}."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS).median)
    return times


def main(quick=False):
    settings = make_settings()
    print(f"All three faults, {IMAGES} images, as the profiler sees them")
    recorded, waits_before, weights_before = show_profile(settings["all three faults"])
    models = ROOT / ("models/quick" if quick else "models")
    save_trace(recorded, models / "advanced-09_profiling_trace.json")
    calls = {name: partial(train, build_network(), **one) for name, one in settings.items()}
    times = time_in_turn(calls, seconds=0.02 if quick else 2.0)
    medians = {name: np.median(seconds) for name, seconds in times.items()}
    print("One repair after the other         images/s  times as fast")
    for name, median in medians.items():
        gain = medians["all three faults"] / median
        print(f"  {name:30} {IMAGES / median:10,.0f} {gain:14.2f}")
    print("Faults 1 and 2 repaired, as the profiler sees the loop")
    _, waits_after, weights_after = show_profile(settings["2 transfer and wait once"])
    difference = (weights_after - weights_before).abs().max().item()
    result = f"waits_before = {waits_before}, waits_after = {waits_after}"
    print(f"Result: {result}, weight_difference = {difference:.6f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
