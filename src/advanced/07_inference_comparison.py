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
from torch import autocast
from torchvision import models

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
MODEL, SIZE, BATCHES = ("resnet18", 64, [1, 8]) if ON_CPU else ("resnet50", 224, [1, 8, 16, 32])
PATIENCE = 4  # times as slow as eager is not worth the wait


# MODEL: random weights, so nothing is downloaded; they take as long as trained ones.
def make_classifier(name):
    if name not in (names := models.list_models(module=models)):
        close = ", ".join(difflib.get_close_matches(name, names)) or ", ".join(names[:3])
        sys.exit(f"torchvision has no classifier named {name}. Try: {close}")
    torch.manual_seed(0)
    return models.get_model(name, weights=None).eval().to(DEVICE)


# WAYS: each takes the network and a few images, and returns what to call.
def run_tf32(model, images):  # CUDA rounds the factors in convolutions to 10 bits
    if DEVICE.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)(lambda x: model(x))


WAYS = {  # name: (what makes it, how far it may be from fp32, in parts of the largest logit)
    "eager fp32": (lambda model, _: model, 1e-3),  # another batch alone moves the last bits
    "TF32": (run_tf32, 0.02),
    "fp16 autocast": (lambda model, _: autocast(DEVICE.type, torch.float16)(model.forward), 0.01),
    "bf16 autocast": (lambda model, _: autocast(DEVICE.type, torch.bfloat16)(model.forward), 0.05),
    "channels_last": (lambda model, _: model.to(memory_format=torch.channels_last), 1e-3),
}


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


@torch.inference_mode()
def check_ways(ways, model, images, batches):
    """Print how far each way is from fp32; return {way: call} to time, how many run, how many are off."""
    calls, ran, broken, expected = {}, 0, 0, model(images).float()
    eager = time_block(lambda: model(images), 3)
    print("Way           | made in  | Δ / largest logit | allowed")
    for way, (make, allowed) in ways.items():
        start = time.perf_counter()
        try:
            ignored = warnings.catch_warnings(action="ignore")  # TorchScript is deprecated: see 18
            with ignored, torch.inference_mode(False), torch.no_grad():
                call = make(copy.deepcopy(model), images)  # compilers want ordinary tensors
            gaps = [call(images[:n]).float().to(DEVICE) - expected[:n] for n in batches]
            difference = (torch.cat(gaps).abs().max() / expected.abs().max().clamp(1e-9)).item()
            seconds = time.perf_counter() - start
            slower = min(time_block(lambda f=call: f(images), 1) for _ in range(2)) / eager
        except Exception as error:
            print(f"{way:13} | not run: {type(error).__name__}: {error}".partition("\n")[0][:99])
            continue
        verdict = "kept" if difference <= allowed else "BROKEN"  # nan is broken too
        ran, broken = ran + 1, broken + (verdict == "BROKEN")
        calls |= {way: call} if slower < PATIENCE else {}
        words = "" if way in calls else f"; {slower:.0f} times as slow as eager, not timed"
        print(f"{way:13} | {seconds:6.1f} s | {difference:17.7f} | {allowed:.3f} {verdict}{words}")
    return calls, ran, broken


@torch.inference_mode()
def time_ways(calls, images, **amount):
    """Print a row for each way; return {way: images/s}."""
    runs = {way: lambda call=call: call(images) for way, call in calls.items()}
    times, rates = time_in_turn(runs, **amount), {}
    print(f"Batch of {len(images):4} | images/s (middle half)     | times as fast as eager (95 %)")
    for way, own in times.items():
        low, rates[way], high = len(images) / np.percentile(own, [75, 50, 25])
        words = "{:.2f} ({:.2f} to {:.2f}): {}".format(*compare(times["eager fp32"], own))
        print(f"{way:13} | {f'{rates[way]:,.1f} ({low:,.1f} to {high:,.1f})':26} | {words}")
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
    size, folder = (32, "models/quick") if quick else (SIZE, "models")
    model = make_classifier(model_name)
    print(f"{model_name}, images of {size} x {size}")
    try:
        images = torch.rand(max(batch_sizes), 3, size, size, device=DEVICE)
        calls, ran, broken = check_ways(WAYS, model, images, batch_sizes)
    except Exception as error:  # some want larger images, or know only one size; or no memory
        sys.exit(f"It cannot read {max(batch_sizes)} images of SIZE = {size}: {error}")
    amount = {"seconds": 0.02, "rounds": 5} if quick else {}
    rates = {batch: time_ways(calls, images[:batch], **amount) for batch in batch_sizes}
    save(draw(rates, model_name).savefig, ROOT / folder / "plots" / "06_inference_comparison.png")
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
    cli.add_argument("--batch-sizes", type=positive_numbers, default=BATCHES, help="as 1,8,16")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
