"""Latency and memory: measure how long one user waits for an answer, and how much memory it needs.

Run:    uv run src/advanced/08_latency_and_memory.py
Needs:  nothing
Makes:  nothing
Expect: engines >= 4

Images per second (throughput) matter to the owner of a server. A user waits for one answer, and
remembers the slow ones. Half of all calls take p50 or less; one in twenty takes longer than p95.
"""

import argparse
import ctypes
import logging
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torchvision import models

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
MODEL = "resnet18" if ON_CPU else "resnet50"
SIZE = 64 if ON_CPU else 224  # height and width of the images
BATCHES = [1] if ON_CPU else [1, 8, 16, 32]


# ENGINES: as in advanced/07, which compares their answers.
def load_in_onnx_runtime(model, images):
    provider = f"{DEVICE.type.upper()}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}")
    example = images[:1].repeat(2, 1, 1, 1)  # with an example of one, only one image would fit
    program = torch.onnx.export(model, (example,), dynamic_shapes=({0: "N"},), verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads sleep, so they do not slow down what is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, [provider])
    name = session.get_inputs()[0].name

    def run(x):
        return torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])

    return run


def make_engines(model, images, quick):
    """Return {engine: call}, warm for every batch size; print why others do not run."""
    makers = {"eager": nn.Module.eval, "TorchScript": torch.jit.script}  # eager: the model itself
    if not quick:  # these two take long to make
        makers["torch.compile"] = partial(torch.compile, dynamic=False)
        makers["ONNX Runtime"] = partial(load_in_onnx_runtime, images=images)
    if DEVICE.type == "cuda":
        makers["CUDA graphs"] = partial(torch.compile, backend="cudagraphs", dynamic=False)
    calls = {}
    for engine, make in makers.items():
        try:
            call = make(model)
            for batch_size in BATCHES * 3:  # warm up; some engines compile for each size
                call(images[:batch_size])
            calls[engine] = call
        except Exception as error:  # no package, no compiler, or a different kind of device
            print(f"{engine:13} | not run: {type(error).__name__}: {str(error)[:60]}")
    return calls


# MEASURE: single calls, because a user makes a single call.
def time_once(call):
    """Return the seconds of one call, the work of the device included."""
    synchronize = torch.get_device_module(DEVICE).synchronize
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()  # a GPU still computes when the call has returned
    return time.perf_counter() - start


def measure_memory(call):
    """Return how many MiB a call needs at its peak, beyond what is in use; nan if unknown."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():  # not Linux
        return float("nan")
    from resource import RUSAGE_SELF, getrusage

    ctypes.CDLL(None).malloc_trim(0)  # give free memory back
    peak.write_text("5")  # forget the peak so far
    before = getrusage(RUSAGE_SELF).ru_maxrss
    call()
    return (getrusage(RUSAGE_SELF).ru_maxrss - before) / 2**10


def measure(engines, images, count):
    """Print a row for each engine; return {engine: (p50, p95) in milliseconds}."""
    times = {engine: [] for engine in engines}
    for _ in range(count):
        for engine, call in engines.items():  # the engines take turns
            times[engine].append(time_once(partial(call, images)))
    percentiles = {engine: np.percentile(own, [50, 95]) * 1000 for engine, own in times.items()}
    print(f"Batch of {len(images):4} |   p50 ms |   p95 ms | p95 / p50 | peak MiB")
    for engine, (p50, p95) in percentiles.items():
        memory = measure_memory(partial(engines[engine], images))
        print(f"{engine:13} | {p50:8.2f} | {p95:8.2f} | {p95 / p50:9.2f} | {memory:8.1f}")
    return percentiles


def main(quick=False):
    logging.disable(logging.WARNING)  # hides messages of the exporters
    warnings.simplefilter("ignore")  # TorchScript is deprecated
    model = models.get_model(MODEL).eval().requires_grad_(False).to(DEVICE)  # random weights
    images = torch.rand(max(BATCHES), 3, SIZE, SIZE, device=DEVICE)
    print(f"{MODEL}, images of {SIZE} x {SIZE}")
    engines = make_engines(model, images, quick)
    rows = [measure(engines, images[:size], 5 if quick else 100) for size in BATCHES]
    p50, p95 = rows[0]["eager"]
    print(f"Result: engines = {len(engines)}, eager_p50_ms = {p50:.2f}, eager_p95_ms = {p95:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, without compilers")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
