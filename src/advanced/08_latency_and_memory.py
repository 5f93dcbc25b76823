"""Latency and memory: how long one request waits for its answer, and what the answer takes.

Run:    uv run src/advanced/19_latency_and_memory.py
Needs:  nothing
Makes:  nothing
Expect: ways >= 6

Images a second are counted over a full queue; who sends a request waits for that one alone. Half of all
calls take p50 or less, one in twenty takes longer than p95: people remember the second number.
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
from torch import autocast
from torchvision import models

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
MODEL, SIZE, BATCHES = ("resnet18", 64, [1]) if ON_CPU else ("resnet50", 224, [1, 8, 16, 32])
CALLS = 50


# WAYS: as in 06_inference_comparison.py and 11_inference_engines.py, which check their answers.
def run_tf32(model, images):  # CUDA rounds the factors in convolutions to 10 bits
    if DEVICE.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)(lambda x: model(x))


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


WAYS = {
    "eager fp32": lambda model, images: model,
    "TF32": run_tf32,
    "fp16 autocast": lambda model, images: autocast(DEVICE.type, torch.float16)(model.forward),
    "bf16 autocast": lambda model, images: autocast(DEVICE.type, torch.bfloat16)(model.forward),
    "channels_last": lambda model, images: model.to(memory_format=torch.channels_last),
    "TorchScript": lambda model, images: torch.jit.script(model),
    "torch.compile": lambda model, images: torch.compile(model, dynamic=False),
    "CUDA graphs": run_cuda_graph,
    "ONNX Runtime": run_onnx,
    "TensorRT": run_tensorrt,
}
NOT_QUICK = "torch.compile", "ONNX Runtime"  # they take longer than all the rest


@torch.inference_mode()
def make_ways(ways, model, images, batches):
    """Return {way: what to call} for those that run here; print why the others do not."""
    calls = {}
    for way, make in ways.items():
        try:
            ignored = warnings.catch_warnings(action="ignore")  # TorchScript is deprecated: see 18
            with ignored, torch.inference_mode(False), torch.no_grad():
                call = make(copy.deepcopy(model), images)  # compilers want ordinary tensors
            for batch in batches:
                call(images[:batch])  # some compile for each size
            calls[way] = call
        except Exception as error:
            print(f"{way:13} | not run: {type(error).__name__}: {error}".partition("\n")[0][:99])
    return calls


# MEASURE: single calls, in turn; time_block as in 04_gpu_vs_cpu_benchmark.py.
def time_block(call, count):
    """Return the seconds that each of count calls takes."""
    synchronize = torch.get_device_module(DEVICE).synchronize  # a GPU works on after a call is back
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def time_calls(calls, count):
    """Return {way: the seconds of each of count calls}."""
    for call in calls.values():  # warm up
        time_block(call, 3)
    times = {way: [] for way in calls}
    for _ in range(count):
        for way, call in calls.items():
            times[way].append(time_block(call, 1))
    return times


def peak_memory(call):
    """Return the MiB that a call needs at its peak on top of what was there; nan if nobody counts."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        from resource import RUSAGE_SELF, getrusage

        ctypes.CDLL(None).malloc_trim(0)  # glibc: give back what is free
        Path("/proc/self/clear_refs").write_text("5")  # Linux: 5 forgets the peak so far
        before = getrusage(RUSAGE_SELF).ru_maxrss
        call()
        return (getrusage(RUSAGE_SELF).ru_maxrss - before) / 2**10
    except (ImportError, OSError, AttributeError, TypeError):
        return math.nan


@torch.inference_mode()
def measure(calls, images, count):
    """Print a row for each way."""
    runs = {way: lambda call=call: call(images) for way, call in calls.items()}
    times = time_calls(runs, count)
    print(f"Batch of {len(images):4} |   p50 ms |   p95 ms | p95 / p50 | peak MiB")
    for way, run in runs.items():
        half, late = np.percentile(times[way], [50, 95]) * 1e3
        row = f"{way:13} | {half:8.2f} | {late:8.2f} | {late / half:9.2f}"
        print(f"{row} | {peak_memory(run):8.1f}")


def main(quick=False):
    logging.disable(logging.WARNING)  # the exporters' notes to their own developers
    torch.backends.cudnn.allow_tf32 = False  # or eager fp32 would round its numbers
    torch.manual_seed(0)
    model = models.get_model(MODEL, weights=None).eval().to(DEVICE)  # random: nothing to download
    size, count = (32, 5) if quick else (SIZE, CALLS)
    images = torch.rand(max(BATCHES), 3, size, size, device=DEVICE)
    print(f"{MODEL}, images of {size} x {size}")
    ways = WAYS | {way: leave_out for way in NOT_QUICK if quick}
    calls = make_ways(ways, model, images, BATCHES)
    for batch in BATCHES:
        measure(calls, images[:batch], count)
    print(f"Result: ways = {len(calls)}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: tiny images, no compilers")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
