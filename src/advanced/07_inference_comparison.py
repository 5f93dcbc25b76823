"""Inference comparison: run one network in ten versions and compare their errors and their speed.

Run:    uv run src/advanced/07_inference_comparison.py
Needs:  nothing
Makes:  nothing
Expect: versions >= 6, outside_tolerance = 0

A version changes the number format or the engine. Formats with 16 bits move half as many bytes, but
are only fast on hardware that supports them. Eager PyTorch starts one layer after the other from
Python; an inference engine plans the whole network ahead and can combine its layers.
"""

import argparse
import copy
import logging
import sys
import time
import warnings
from functools import partial

import numpy as np
import onnxruntime
import torch
from torch.utils.benchmark import Timer
from torchvision import models

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
MODEL = "resnet18" if ON_CPU else "resnet50"
SIZE = 64 if ON_CPU else 224  # height and width of the images
BATCHES = [8] if ON_CPU else [1, 8, 16, 32]
PATIENCE = 5  # a version that takes 5 times as long as eager is checked, but not timed
ROUNDS = 21
VERSIONS = ["eager", "channels_last", "TF32", "fp16 autocast", "bf16 autocast", "TorchScript"]
VERSIONS += ["torch.compile", "CUDA graphs", "ONNX Runtime", "TensorRT"]
# The largest allowed difference from eager, as a part of the largest logit; 0.001 for the others.
ALLOWED = {"TF32": 0.02, "fp16 autocast": 0.01, "bf16 autocast": 0.05, "TensorRT": 0.02}
SLOW_TO_MAKE = ["torch.compile", "ONNX Runtime"]  # a short test leaves them out


# VERSIONS: each is a function from images to logits. autocast and flags wrap a function, so that it
# always runs with this setting.
def make_version(version, model, images):
    match version:
        case "TF32" | "CUDA graphs" | "TensorRT" if DEVICE.type != "cuda":
            raise RuntimeError("needs a CUDA device")
        case "eager":
            return model
        case "channels_last":  # the channels of a pixel lie side by side in memory
            return model.to(memory_format=torch.channels_last)
        case "TF32":  # convolutions round their factors to 10 bits after the point
            return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)(model.forward)
        case "fp16 autocast":
            return torch.autocast(DEVICE.type, torch.float16)(model.forward)
        case "bf16 autocast":  # the range of float32 with fewer digits
            return torch.autocast(DEVICE.type, torch.bfloat16)(model.forward)
        case "TorchScript":  # runs without Python; deprecated
            return torch.jit.script(model)
        case "torch.compile":  # new machine code for this network and each batch size
            return torch.compile(model, dynamic=False)
        case "CUDA graphs":  # one command starts all the work that was recorded before
            return torch.compile(model, backend="cudagraphs", dynamic=False)
        case "ONNX Runtime":  # an engine for many languages and devices
            provider = f"{DEVICE.type.upper()}ExecutionProvider"
            if provider not in onnxruntime.get_available_providers():
                raise RuntimeError(f"this onnxruntime has no {provider}")
            example = (images[:1].repeat(2, 1, 1, 1),)  # with one image, only one would ever fit
            program = torch.onnx.export(model, example, dynamic_shapes=({0: "N"},), verbose=False)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            # Idle threads sleep, so they do not slow down what is timed next.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            content = program.model_proto.SerializeToString()
            session = onnxruntime.InferenceSession(content, options, [provider])
            name = session.get_inputs()[0].name

            def run_in_onnx(x):
                return torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])

            return run_in_onnx
        case "TensorRT":  # NVIDIA's engine
            return torch.compile(model, backend="torch_tensorrt", dynamic=False)


# CHECK: a faster version is useless if it answers differently.
def check_versions(versions, model, images, batch_sizes):
    """Print a row for each version; return {version: call} and {version: largest difference}."""
    expected = model(images).cpu()
    calls = {}
    differences = {}
    seconds = {}
    print("version       | made in | difference")
    for version in versions:
        start = time.perf_counter()
        try:
            call = make_version(version, copy.deepcopy(model), images)
            gaps = [call(images[:size]).float().cpu() - expected[:size] for size in batch_sizes]
        except Exception as error:  # no package, no compiler, or a different kind of device
            print(f"{version:13} | not run: {type(error).__name__}: {str(error)[:60]}")
            continue
        made = time.perf_counter() - start
        difference = torch.cat(gaps).abs().max() / expected.abs().max().clamp(1e-9)
        differences[version] = difference.item()
        work = partial(call, images)
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        seconds[version] = timer.timeit(1).mean  # after two calls, because the first ones are slow
        row = f"{version:13} | {made:5.1f} s | {difference:10.7f}"
        if seconds[version] <= PATIENCE * seconds["eager"]:
            calls[version] = call
            print(row)
        else:
            print(f"{row} | too slow to time")
    return calls, differences


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


def time_versions(calls, images, seconds):
    """Print how many images each version computes in a second, and compare with eager."""
    ready = {version: partial(call, images) for version, call in calls.items()}
    times = time_in_turn(ready, seconds)
    print(f"Batch of {len(images):4} | images/s | times as fast as eager (95%)")
    for version, own in times.items():
        rate = len(images) / np.median(own)
        ratio, low, high, verdict = compare(times["eager"], own)
        print(f"{version:13} | {rate:8,.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}")


def main(quick=False, model_name=MODEL, batch_sizes=BATCHES):
    logging.disable(logging.WARNING)  # hide log messages of the exporters
    warnings.simplefilter("ignore")  # TorchScript is deprecated
    torch.backends.cudnn.allow_tf32 = False  # eager uses full float32 precision
    torch.manual_seed(0)
    size = 32 if quick else SIZE
    model = models.get_model(model_name, weights=None)  # random weights, nothing to download
    model = model.eval().requires_grad_(False).to(DEVICE)
    print(f"{model_name}, images of {size} x {size}")
    versions = [version for version in VERSIONS if not (quick and version in SLOW_TO_MAKE)]
    images = torch.rand(max(batch_sizes), 3, size, size, device=DEVICE)
    calls, differences = check_versions(versions, model, images, batch_sizes)
    for batch_size in batch_sizes:
        time_versions(calls, images[:batch_size], seconds=0.02 if quick else 1.0)
    inside = [name for name, gap in differences.items() if gap <= ALLOWED.get(name, 0.001)]
    outside = len(differences) - len(inside)
    print(f"Result: versions = {len(differences)}, outside_tolerance = {outside}")


def batch_sizes(text):
    return [int(size) for size in text.split(",")]  # argparse reports a ValueError


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, without compilers")
    parser.add_argument("--model-name", default=MODEL, help="of torchvision.models")
    parser.add_argument("--batch-sizes", default=BATCHES, type=batch_sizes, metavar="1,8")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.model_name, arguments.batch_sizes)
    except (KeyboardInterrupt, ValueError, RuntimeError, AssertionError) as error:
        sys.exit(f"Stopped: {error!r}")  # such as an unknown network, or images of a wrong size
