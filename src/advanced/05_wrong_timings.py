"""Wrong timings: four ways to be fooled by a clock, and by how much each of them lies.

Run:    uv run src/advanced/10_wrong_timings.py
Needs:  nothing
Makes:  nothing
Expect: wrong_ways >= 3

The work is the same all along. What a clock says of it depends on when it is read: before the machine
has warmed up, while the device is still at work, with the compiler's time in it, or only once.
"""

import argparse
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCH, SHOTS = 32, 200


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


# MEASURE: the right way, as in 04_gpu_vs_cpu_benchmark.py.
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


# MISTAKES: what four wrong ways say of the same work.
def time_hastily(call, count):
    """Read the clock as soon as the last call has come back; a GPU may still be at work."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def time_compiled(model, images, **amount):
    """Return what 100 calls say, the first of which compiles, and what the right way says."""
    compiled = torch.compile(model)
    call = torch.inference_mode()(lambda: compiled(images))
    return time_block(call, 100), np.median(time_in_turn({"": call}, **amount)[""])


def show_lie(way, says, truth):
    print(f"{way:16} | {says * 1e3:9.3f} ms | {truth * 1e3:7.3f} ms | {says / truth:6.2f}")


def main(quick=False):
    amount = {"seconds": 0.1, "rounds": 5} if quick else {}
    model, images = CNN().to(DEVICE).eval(), torch.rand(BATCH, 1, 28, 28, device=DEVICE)
    call = torch.inference_mode()(lambda: model(images))
    cold = time_block(call, 1)  # the first that this process makes
    times = time_in_turn({"one": call, "the same": call}, **amount)
    truth = np.median(times["one"])
    print(f"A batch of {BATCH}    |         says |      truth | says / truth")
    show_lie("no warm-up", cold, truth)
    show_lie("no synchronise", time_hastily(call, 100), truth)
    torch.get_device_module(DEVICE).synchronize()
    ways = 3
    try:
        if quick:
            raise RuntimeError("--quick leaves the compiler out")
        show_lie("compile time in", *time_compiled(model, images, **amount))
        ways = 4
    except Exception as error:  # most often: no C++ compiler
        print(f"compile time in  | not run: {error}".partition("\n")[0][:99])
    shots = np.array([time_block(call, 1) for _ in range(SHOTS)])
    show_lie("one shot, lowest", shots.min(), truth)
    show_lie("one shot, median", np.median(shots), truth)
    show_lie("one shot, worst", shots.max(), truth)
    fooled = np.mean(np.abs(np.log(shots[1:] / shots[:-1])) > math.log(1.1))
    print(
        f"Two shots of the same work differ by a tenth or more in {fooled:.0%} of {SHOTS - 1} tries"
    )
    ratio, low, high, verdict = compare(times["one"], times["the same"])
    print(f"The right way, same work twice: {ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}")
    print(f"Result: wrong_ways = {ways}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: no compiler, less time")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
