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
import ctypes
import logging
import math
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torchvision import models

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CUDA, ON_CPU = DEVICE.type == "cuda", DEVICE.type == "cpu"
MODEL, SIZE, BATCHES = ("resnet18", 64, [1, 8]) if ON_CPU else ("resnet50", 224, [1, 8, 16, 32])
SHOTS, PATIENCE = 40, 8  # single calls for p50 and p95; how many times slower is not worth the wait


# WAYS: each takes the network and a few images, and returns what to call.
def need_cuda():
    if not ON_CUDA:
        raise RuntimeError("needs a CUDA device")


def leave_out(model, images):
    raise RuntimeError("--quick leaves it out")


def run_cuda_graph(model, images):
    """Record the kernels of a call once for each batch size, then start them all at one go."""
    need_cuda()
    graphs = {}

    def record(x):
        own, stream = x.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up in the first calls must not be recorded
            for _ in range(3):
                model(own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(own)
        return graph, own, logits

    def call(x):
        if x.shape not in graphs:
            graphs[x.shape] = record(x)
        graph, own, logits = graphs[x.shape]
        own.copy_(x)
        graph.replay()
        return logits  # the next call of this batch size overwrites it

    return call


def run_onnx(model, images):
    import onnxruntime

    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(model, (images[:2],), dynamic_shapes=({0: batch},), verbose=False)
    wanted = f"{DEVICE.type.upper()}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {wanted}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # no more than PyTorch has
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or its idle threads
    # would keep a core busy after each call, and slow down whatever is timed next.
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


def main(quick=False):
    logging.disable(logging.WARNING)  # the exporters' notes to their own developers
    torch.backends.cudnn.allow_tf32 = False  # or eager fp32 would round its numbers
    batches, size = ([1, 2], 32) if quick else (BATCHES, SIZE)
    torch.manual_seed(0)
    model = models.get_model(MODEL, weights=None).eval().to(DEVICE)  # random: nothing to download
    images = torch.rand(max(batches), 3, size, size, device=DEVICE)
    print(f"{MODEL}, images of {size} x {size}")
    ways = WAYS | {way: (leave_out, 0.0) for way in NOT_QUICK if quick}
    calls, ran, broken = check_ways(ways, model, images, batches)
    options = {"seconds": 0.02, "rounds": 5, "shots": 5} if quick else {"shots": SHOTS}
    for batch in batches:
        time_ways(calls, images[:batch], **options)
    print(f"Result: ways = {ran}, outside_tolerance = {broken}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: tiny images, no compilers")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
