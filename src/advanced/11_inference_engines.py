"""Inference engines: the same network, run without Python between its layers.

Run:    uv run src/advanced/11_inference_engines.py
Needs:  nothing
Makes:  nothing
Expect: ways >= 3, outside_tolerance = 0

Eager PyTorch starts one layer after the other, each from Python. An engine sees the whole network
first: it can join layers, keep what lies between them in the cache, and start them all at one go.
"""

import argparse
import copy
import logging
import math
import sys
import time
import warnings

import numpy as np
import torch
from torchvision import models

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
MODEL, SIZE, BATCHES = ("resnet18", 64, [1]) if ON_CPU else ("resnet50", 224, [1, 8, 16, 32])
PATIENCE = 8  # times as slow as eager is not worth the wait


# WAYS: each takes the network and a few images, and returns what to call.
def need_cuda():
    if DEVICE.type != "cuda":
        raise RuntimeError("needs a CUDA device")


def leave_out(model, images):
    raise RuntimeError("--quick leaves it out")


def run_cuda_graph(model, images):  # records the kernels of a call, and starts them all at one go
    need_cuda()
    return torch.compile(model, backend="cudagraphs", dynamic=False)


def run_onnx(model, images):
    import onnxruntime

    wanted = f"{DEVICE.type.upper()}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {wanted}")
    batch = torch.export.Dim("batch", min=1, max=4096)  # without it, no other batch size fits
    example = images[:1].repeat(2, 1, 1, 1)  # an example of one would fix the batch, too
    program = torch.onnx.export(model, (example,), dynamic_shapes=({0: batch},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # no more than PyTorch has
    # Idle threads that spin would keep a core busy, and slow down whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=[wanted])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])


def run_tensorrt(model, images):
    need_cuda()
    import torch_tensorrt

    sizes = {"min_shape": images[:1].shape, "opt_shape": images.shape, "max_shape": images.shape}
    inputs = [torch_tensorrt.Input(**sizes, dtype=torch.float32)]
    return torch_tensorrt.compile(model, ir="dynamo", inputs=inputs)


WAYS = {  # name: (what makes it, how far it may be from fp32, in parts of the largest logit)
    "eager fp32": (lambda model, images: model, 1e-3),  # another batch alone moves the last bits
    "TorchScript": (lambda model, images: torch.jit.script(model), 1e-3),  # deprecated
    "torch.compile": (lambda model, images: torch.compile(model, dynamic=False), 1e-3),
    "CUDA graphs": (run_cuda_graph, 1e-3),
    "ONNX Runtime": (run_onnx, 1e-3),
    "TensorRT": (run_tensorrt, 0.02),
}
NOT_QUICK = "torch.compile", "ONNX Runtime"  # they take longer than all the rest


# MEASURE: all of this as in 04_gpu_vs_cpu_benchmark.py and 06_inference_comparison.py.
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


def main(quick=False):
    logging.disable(logging.WARNING)  # the exporters' notes to their own developers
    torch.backends.cudnn.allow_tf32 = False  # or eager fp32 would round its numbers
    size = 32 if quick else SIZE
    torch.manual_seed(0)
    model = models.get_model(MODEL, weights=None).eval().to(DEVICE)  # random: nothing to download
    images = torch.rand(max(BATCHES), 3, size, size, device=DEVICE)
    print(f"{MODEL}, images of {size} x {size}")
    ways = WAYS | {way: (leave_out, 0.0) for way in NOT_QUICK if quick}
    calls, ran, broken = check_ways(ways, model, images, BATCHES)
    amount = {"seconds": 0.02, "rounds": 5} if quick else {}
    for batch in BATCHES:
        time_ways(calls, images[:batch], **amount)
    print(f"Result: ways = {ran}, outside_tolerance = {broken}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: tiny images, no compilers")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
