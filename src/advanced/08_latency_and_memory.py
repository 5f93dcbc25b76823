"""Latency and memory: measure how long one request waits, and the memory that its answer needs.

Run:    uv run src/advanced/08_latency_and_memory.py
Needs:  nothing
Makes:  nothing
Expect: engines >= 3

Throughput counts images per second. A user who waits for an answer cares about latency instead.
Half of all calls take p50 or less. One in twenty takes longer than p95, and users remember those.
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
MODEL = "resnet18" if DEVICE.type == "cpu" else "resnet50"
SIZE = 64 if DEVICE.type == "cpu" else 224  # pixels on each side
BATCH_SIZES = [1] if DEVICE.type == "cpu" else [1, 8, 32]
CALLS = 50
ENGINES = ["eager", "torch.compile", "ONNX Runtime", "CUDA graphs", "TensorRT"]
SLOW_TO_MAKE = ["torch.compile", "ONNX Runtime"]


# ENGINES: each is a function from images to logits. advanced/07 compares their answers.
def run_onnx(model, images):
    import onnxruntime

    wanted = f"{DEVICE.type.upper()}ExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {wanted}")
    batch = torch.export.Dim("batch", min=1, max=4096)  # accept 1 to 4,096 images
    example = images[:1].repeat(2, 1, 1, 1)  # an example of one image would fix the batch size
    program = torch.onnx.export(model, (example,), dynamic_shapes=({0: batch},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads sleep, so they do not slow the other engines.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=[wanted])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])


def make_engine(engine, model, images):
    if engine in ("CUDA graphs", "TensorRT") and DEVICE.type != "cuda":
        raise RuntimeError("needs a CUDA device")
    match engine:
        case "eager":  # Python calls one operation after the other
            return model
        case "torch.compile":
            return torch.compile(model, dynamic=False)
        case "ONNX Runtime":
            return run_onnx(model, images)
        case "CUDA graphs":  # records all kernels of a call, and starts them together
            return torch.compile(model, backend="cudagraphs", dynamic=False)
        case "TensorRT":
            import torch_tensorrt

            return torch_tensorrt.compile(model, ir="dynamo", inputs=[images])


def make_engines(model, images, quick):
    """Return {engine: function} for those that run here, and print why the others do not."""
    calls = {}
    for engine in ENGINES:
        try:
            if quick and engine in SLOW_TO_MAKE:
                raise RuntimeError("--quick leaves it out")
            call = make_engine(engine, copy.deepcopy(model), images)
            for batch_size in BATCH_SIZES:  # some engines compile for each size
                call(images[:batch_size])
            calls[engine] = call
        except Exception as error:  # no package, no compiler, or no GPU
            reason = str(error).partition("\n")[0][:70]
            print(f"{engine:13} | not run: {type(error).__name__}: {reason}")
    return calls


# MEASURE: the time of single calls, because a user waits for a single call.
# README: start
def time_calls(calls, images):
    """Return {engine: the seconds of each call}. The engines take turns (advanced/05)."""
    synchronize = torch.get_device_module(DEVICE).synchronize  # waits until a GPU has finished
    times = {engine: [] for engine in calls}
    for _ in range(CALLS):
        for engine, call in calls.items():
            start = time.perf_counter()
            call(images)
            synchronize()
            times[engine].append(time.perf_counter() - start)
    return times


# README: end
def measure_peak_memory(call, images):
    """Return the MiB that a call needs in addition, at its peak; nan if the system cannot tell."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(images)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        from resource import RUSAGE_SELF, getrusage

        ctypes.CDLL(None).malloc_trim(0)  # gives free memory back to Linux
        Path("/proc/self/clear_refs").write_text("5")  # 5: forget the peak so far
        before = getrusage(RUSAGE_SELF).ru_maxrss
        call(images)
        return (getrusage(RUSAGE_SELF).ru_maxrss - before) / 2**10
    except (ImportError, OSError, AttributeError, TypeError):  # not Linux
        return math.nan


def measure(calls, images):
    times = time_calls(calls, images)
    print(f"Batch of {len(images):4} |   p50 ms |   p95 ms | p95 / p50 | peak MiB")
    for engine, call in calls.items():
        p50, p95 = np.percentile(times[engine], [50, 95]) * 1e3
        peak = measure_peak_memory(call, images)
        print(f"{engine:13} | {p50:8.2f} | {p95:8.2f} | {p95 / p50:9.2f} | {peak:8.1f}")


@torch.no_grad()
def main(quick=False):
    logging.disable(logging.WARNING)  # hide messages from the exporters
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # use full float32 precision on a GPU
    model = models.get_model(MODEL, weights=None).eval().to(DEVICE)  # random weights take as long
    size = 32 if quick else SIZE
    images = torch.rand(max(BATCH_SIZES), 3, size, size, device=DEVICE)
    print(f"{MODEL}, images of {size} x {size}")
    calls = make_engines(model, images, quick)
    for batch_size in BATCH_SIZES:
        measure(calls, images[:batch_size])
    print(f"Result: engines = {len(calls)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test without compilers")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
