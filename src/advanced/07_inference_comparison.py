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
import torch
from torch.utils.benchmark import Timer
from torchvision import models
from tqdm import tqdm

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
MODEL = "resnet18" if ON_CPU else "resnet50"
SIZE = 64 if ON_CPU else 224  # height and width of the images
BATCHES = [8] if ON_CPU else [1, 8, 16, 32]
PATIENCE = 5  # a version that takes 5 times as long as eager is checked, but not timed
ROUNDS = 21
ALLOWED = {  # the largest difference from eager, as a part of the largest logit
    "eager": 0.001,  # a different batch size alone changes the last bits
    "channels_last": 0.001,
    "TF32": 0.02,
    "fp16 autocast": 0.01,
    "bf16 autocast": 0.05,
    "TorchScript": 0.001,
    "torch.compile": 0.001,
    "CUDA graphs": 0.001,
    "ONNX Runtime": 0.001,
    "TensorRT": 0.02,
}
SLOW_TO_MAKE = ["torch.compile", "ONNX Runtime"]  # a short test leaves them out


# VERSIONS: each is a function from images to logits.
def make_version(version, model, images):
    # README: start
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
        # README: end
        case "TorchScript":  # runs without Python; deprecated
            return torch.jit.script(model)
        case "torch.compile":  # new machine code for this network and each batch size
            return torch.compile(model, dynamic=False)
        case "CUDA graphs":  # one command starts all the work that was recorded before
            return torch.compile(model, backend="cudagraphs", dynamic=False)
        case "ONNX Runtime":  # an engine for many languages and devices
            return load_in_onnx_runtime(model, images)
        case "TensorRT":  # NVIDIA's engine
            import torch_tensorrt

            sizes = {"min_shape": images[:1].shape, "opt_shape": images.shape}
            inputs = torch_tensorrt.Input(**sizes, max_shape=images.shape, dtype=torch.float32)
            return torch_tensorrt.compile(model, ir="dynamo", inputs=[inputs])


def load_in_onnx_runtime(model, images):
    import onnxruntime

    provider = f"{DEVICE.type.upper()}ExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise RuntimeError(f"this onnxruntime has no {provider}")
    example = images[:1].repeat(2, 1, 1, 1)  # with an example of one, only one image would fit
    any_batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    program = torch.onnx.export(model, (example,), dynamic_shapes=any_batch, verbose=False)
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


# CHECK: a faster version is useless if it answers differently.
def check_versions(versions, model, images, batch_sizes):
    """Return {version: (call, seconds to make it, largest difference, times as long as eager)}."""
    expected = model(images).cpu()
    checked = {}
    for version in tqdm(versions, "Making versions", leave=False, disable=None):
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
                call = make_version(version, copy.deepcopy(model), images)
            gaps = [call(images[:size]).float().cpu() - expected[:size] for size in batch_sizes]
        except Exception as error:  # no package, no compiler, or a different kind of device
            print(f"{version:13} | not run: {type(error).__name__}: {str(error)[:60]}")
            continue
        made = time.perf_counter() - start
        work = {"call": call, "images": images}
        timer = Timer("call(images)", globals=work, num_threads=torch.get_num_threads())
        once = timer.timeit(1).median  # after two calls to warm up: TorchScript's second is slow
        if version == "eager":
            eager = once
        difference = torch.cat(gaps).abs().max() / expected.abs().max().clamp(1e-9)
        checked[version] = (call, made, difference.item(), once / eager)
    return checked


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
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "no difference"
    if low > 1:
        verdict = "faster"
    elif high < 1:
        verdict = "slower"
    return np.median(base) / np.median(other), low, high, verdict


def time_versions(checked, images, seconds):
    """Print a row for each version: its error and its speed."""
    calls = {}
    for version, (call, _, _, slower) in checked.items():
        if slower <= PATIENCE:
            calls[version] = partial(call, images)
    times = time_in_turn(calls, seconds)
    print(f"Batch of {len(images):4} | made in | difference | images/s | times as fast (95%)")
    for version, (_, made, difference, slower) in checked.items():
        words = f"not timed, {slower:.0f} times as slow as eager"
        if version in times:
            rate = len(images) / np.median(times[version])
            ratio, low, high, verdict = compare(times["eager"], times[version])
            words = f"{rate:8,.1f} | {ratio:.2f} ({low:.2f} to {high:.2f}): {verdict}"
        print(f"{version:13} | {made:5.1f} s | {difference:10.7f} | {words}")


def main(quick=False, model_name=MODEL, batch_sizes=BATCHES):
    logging.disable(logging.WARNING)  # hide log messages of the exporters
    torch.backends.cudnn.allow_tf32 = False  # eager uses full float32 precision
    torch.manual_seed(0)
    size = 32 if quick else SIZE
    model = models.get_model(model_name, weights=None)  # random weights, nothing to download
    model = model.eval().requires_grad_(False).to(DEVICE)
    print(f"{model_name}, images of {size} x {size}")
    versions = [version for version in ALLOWED if not (quick and version in SLOW_TO_MAKE)]
    try:
        images = torch.rand(max(batch_sizes), 3, size, size, device=DEVICE)
        checked = check_versions(versions, model, images, batch_sizes)
    except Exception as error:  # no memory, or a network for one size of images only
        sys.exit(f"{model_name} cannot read {max(batch_sizes)} images of {size} x {size}: {error}")
    for batch_size in batch_sizes:
        time_versions(checked, images[:batch_size], seconds=0.02 if quick else 1.0)
    inside = [version for version, row in checked.items() if row[2] <= ALLOWED[version]]
    print(f"Result: versions = {len(checked)}, outside_tolerance = {len(checked) - len(inside)}")


def positive_numbers(text):
    numbers = sorted({int(number) for number in text.split(",")})
    if numbers[0] < 1:
        raise ValueError
    return numbers


if __name__ == "__main__":
    names = models.list_models(module=models)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, without compilers")
    parser.add_argument("--model-name", default=MODEL, choices=names, metavar="NAME")
    parser.add_argument("--batch-sizes", default=BATCHES, type=positive_numbers, metavar="1,8")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.model_name, arguments.batch_sizes)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
