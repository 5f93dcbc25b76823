"""Inference: one large network in four number formats, what each of them gives and for what.

Run:    uv run src/advanced/06_inference_comparison.py
Needs:  nothing
Makes:  models/plots/06_inference_comparison.png
Expect: ways >= 4, outside_tolerance = 0

A number of 16 bits takes half as long from memory as one of 32, and a GPU has units that multiply it
many times as fast. A CPU without such units has to convert it. Autocast keeps the weights in 32 bits.
"""

import argparse
import contextlib
import copy
import ctypes
import difflib
import math
import os
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torchvision import models

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CUDA, ON_CPU = DEVICE.type == "cuda", DEVICE.type == "cpu"
MODEL, SIZE, BATCHES = ("resnet18", 64, "1,8") if ON_CPU else ("resnet50", 224, "1,8,16,32")
SHOTS, PATIENCE = 40, 8  # single calls for p50 and p95; how many times slower is not worth the wait


# MODEL: random weights, so nothing is downloaded; they take as long as trained ones.
def make_classifier(name):
    names = models.list_models(module=models)
    if name not in names:
        close = ", ".join(difflib.get_close_matches(name, names)) or ", ".join(names[:3])
        sys.exit(f"torchvision has no classifier named {name}. Try: {close}")
    torch.manual_seed(0)
    return models.get_model(name, weights=None).eval().to(DEVICE)


# WAYS: each takes the network and a few images, and returns what to call.
def run_tf32(model, images):
    """Let CUDA round the factors of fp32 products to 10 bits, for as long as a call lasts."""
    if not ON_CUDA:
        raise RuntimeError("needs a CUDA device")

    def call(x):
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("high")
        logits = model(x)
        torch.backends.cudnn.allow_tf32 = False
        torch.set_float32_matmul_precision("highest")
        return logits

    return call


def run_autocast(dtype):
    return lambda model, images: torch.autocast(DEVICE.type, dtype=dtype)(lambda x: model(x))


WAYS = {  # name: (what makes it, how far it may be from fp32, in parts of the largest logit)
    "eager fp32": (lambda model, images: model, 1e-3),  # another batch alone moves the last bits
    "TF32": (run_tf32, 0.02),
    "fp16 autocast": (run_autocast(torch.float16), 0.01),
    "bf16 autocast": (run_autocast(torch.bfloat16), 0.05),
    "channels_last": (lambda model, images: model.to(memory_format=torch.channels_last), 1e-3),
}


# MEASURE: as in 04_gpu_vs_cpu_benchmark.py.
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
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


def peak_memory(call):
    """Return the MiB that a call needs at its peak on top of what was there; nan if nobody counts."""
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        from resource import RUSAGE_SELF, getrusage

        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what is free
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        before = getrusage(RUSAGE_SELF).ru_maxrss
        call()
        return (getrusage(RUSAGE_SELF).ru_maxrss - before) / 2**10
    except (ImportError, OSError, AttributeError, TypeError):
        return math.nan


@torch.inference_mode()
def check_ways(ways, model, images, batches):
    """Print how far each way's logits are from fp32, or why it does not run.

    Return {way: what to call} for those worth timing, how many ran, and how many are too far off.
    """
    calls, ran, broken, expected = {}, 0, 0, model(images).float()
    patience = PATIENCE * time_block(lambda: model(images), 3)
    print("Way           | made in  | Δ / largest logit | allowed")
    for way, (make, allowed) in ways.items():
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore")  # TorchScript is deprecated: see 02
                call = make(copy.deepcopy(model), images)
            # Some compile for each size; CUDA graphs give the same tensor again, so copy it.
            parts = [call(images[:batch]).float().to(DEVICE, copy=True) for batch in batches]
            gaps = torch.cat([part - expected[: len(part)] for part in parts])
            difference = (gaps.abs().max() / expected.abs().max()).item()  # in every batch
            seconds = time.perf_counter() - start
            slow = time_block(lambda call=call: call(images), 1) > patience
        except Exception as error:
            print(f"{way:13} | not run: {type(error).__name__}: {error}".partition("\n")[0][:99])
            continue
        kept = difference <= allowed  # nan is not
        ran, broken = ran + 1, broken + (not kept)
        verdict = f"{allowed:.3f} {'kept' if kept else 'BROKEN'}"
        if slow:
            verdict += f"; over {PATIENCE} times as slow as eager, not timed"
        else:
            calls[way] = call
        print(f"{way:13} | {seconds:6.1f} s | {difference:17.7f} | {verdict}")
    return calls, ran, broken


@torch.inference_mode()
def time_ways(calls, images, shots, **amount):
    """Print a row for each way; return {way: images/s}."""
    runs = {way: lambda call=call: call(images) for way, call in calls.items()}
    times, rates = time_in_turn(runs, **amount), {}
    print(f"Batch of {len(images):4} | images/s |   p50 ms |   p95 ms | peak MiB | vs fp32 (95 %)")
    for way, call in runs.items():
        middle, late = np.percentile([time_block(call, 1) for _ in range(shots)], [50, 95]) * 1e3
        words = "{:.2f} ({:.2f} to {:.2f}): {}".format(*compare(times["eager fp32"], times[way]))
        rates[way] = len(images) / np.median(times[way])
        row = f"{way:13} | {rates[way]:8,.1f} | {middle:8.2f} | {late:8.2f} | {peak_memory(call):8.1f}"
        print(f"{row} | {words}")
    return rates


# PICTURE: images a second against the batch.
def draw(rates, name):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for way in next(iter(rates.values())):
        axes.plot(list(rates), [rates[batch][way] for batch in rates], marker="o", label=way)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="images/s", title=name)
    axes.legend(fontsize=8)
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


def main(quick=False, model_name=MODEL, batch_sizes=BATCHES):
    torch.backends.cudnn.allow_tf32 = False  # or eager fp32 would round its numbers
    batches, size = ([1, 2], 32) if quick else (batch_sizes, SIZE)
    model = make_classifier(model_name)
    images = torch.rand(max(batches), 3, size, size, device=DEVICE)
    print(f"{model_name}, images of {size} x {size}")
    try:
        calls, ran, broken = check_ways(WAYS, model, images, batches)
    except Exception as error:  # some want larger images, or know only one size
        sys.exit(f"This network cannot read images of SIZE = {size}: {error}")
    options = {"seconds": 0.02, "rounds": 5, "shots": 5} if quick else {"shots": SHOTS}
    rates = {batch: time_ways(calls, images[:batch], **options) for batch in batches}
    plots = ROOT / ("models/quick" if quick else "models") / "plots"
    save(draw(rates, model_name).savefig, plots / "06_inference_comparison.png")
    print(f"Result: ways = {ran}, outside_tolerance = {broken}")


def positive_numbers(text):
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"it takes whole numbers, such as 1,8,16, not {text}")
    return sorted({int(part) for part in parts})


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: tiny images, models/quick/")
    cli.add_argument("--model-name", default=MODEL, help="a classifier of torchvision")
    cli.add_argument("--batch-sizes", type=positive_numbers, default=BATCHES, help="1,8,16,32")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
