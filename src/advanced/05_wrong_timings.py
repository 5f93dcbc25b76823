"""Wrong timings: make four common timing mistakes, see how large each error is, and time correctly.

Run:    uv run src/advanced/05_wrong_timings.py
Needs:  nothing
Makes:  nothing
Expect: wrong_timings >= 3

Every row below times the same network on the same images. The answers differ because the clock was
started too early, stopped too early, counted the compiler, or was read only once. A correct timing
warms up, waits for the device, repeats, and lets the versions that it compares take turns.
"""

import argparse
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCH_SIZE = 32
SINGLE_CALLS = 200
ROUNDS = 21


# THE CORRECT WAY: advanced/02, 04, 07 and 09 time with these functions. PyTorch's Timer
# calls a few times before it starts the clock (caches, threads and compilers need that), and waits
# for the device before it reads the clock. The versions take turns, round by round: if the machine
# slows down for a while, because it is hot or busy, it slows down all of them.
def time_in_turn(calls, seconds=2.0):
    """Return {name: [seconds per call, one number for each round]}."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS).median)
    return times


# Is a ratio of 1.04 a difference, or chance? The bootstrap (Efron 1979) repeats the experiment
# without the machine: it draws 21 of the 21 rounds, some twice and some not at all, and computes
# the ratio of the medians. After 1,000 draws, 95% of the ratios lie between `low` and `high`. If 1
# lies between them, too, the measurement shows no difference.
def compare(base, other):
    """Return how many times as fast other is, its 95% interval, and a verdict."""
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


# MISTAKES: a stopwatch in the program, used in four wrong ways.
def time_once(call):
    """Return the seconds of one call, the work of the device included."""
    synchronize = torch.get_device_module(DEVICE).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()  # a GPU still computes when the call has returned
    return time.perf_counter() - start


def time_without_waiting(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start  # a GPU may not even have started


def prepare_call(model, images):
    @torch.inference_mode()
    def call():
        return model(images)

    return call


def show(mistake, measured, correct):
    times = f"{measured * 1e3:9.3f} ms | {correct * 1e3:7.3f} ms"
    print(f"{mistake:21} | {times} | {measured / correct:6.2f}")


def main(quick=False):
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # as intermediate/02
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    layers += [nn.Linear(16 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)]
    model = nn.Sequential(*layers).to(DEVICE).eval()
    images = torch.rand(BATCH_SIZE, 1, 28, 28, device=DEVICE)
    call = prepare_call(model, images)
    cold = time_once(call)  # the first call of this process
    times = time_in_turn({"first": call, "second": call}, seconds=0.1 if quick else 2.0)
    correct = np.median(times["first"])
    single = [time_once(call) for _ in range(SINGLE_CALLS)]
    impatient = np.median([time_without_waiting(call) for _ in range(SINGLE_CALLS)])

    print(f"A batch of {BATCH_SIZE} images  |     measured |    correct | measured / correct")
    show("no warm-up", cold, correct)
    show("no waiting", impatient, correct)
    show("single call, fastest", min(single), correct)
    show("single call, slowest", max(single), correct)
    mistakes = 3
    try:
        if quick:
            raise RuntimeError("a short test leaves the compiler out")
        call = prepare_call(torch.compile(model), images)
        measured = np.mean([time_once(call) for _ in range(100)])  # the first call compiles
        compiled = np.median(time_in_turn({"compiled": call})["compiled"])
        show("compile time included", measured, compiled)
        mistakes += 1
    except Exception as error:  # most often: there is no C++ compiler
        print(f"compile time included | not run: {type(error).__name__}: {str(error)[:60]}")
    ratio, low, high, verdict = compare(times["first"], times["second"])
    print(f"The same call, correctly timed twice: {ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}")
    print(f"Result: wrong_timings = {mistakes}, no_warm_up = {cold / correct:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, without a compiler")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
