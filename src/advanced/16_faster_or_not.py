"""Faster or not: the nine forms of one network, timed beside the plain one.

Run:    uv run src/advanced/16_faster_or_not.py
Needs:  models/mnist_cnn.pth, models/mnist_cnn_scripted.pt, models/mnist_cnn_int8.pth, models/mnist_cnn.onnx
Makes:  nothing
Expect: forms >= 6, outside_tolerance = 0

What a form gains depends on the batch: with one image, a call is mostly what surrounds the arithmetic;
with 512, it is the arithmetic. So both are timed, and nothing is called faster that luck could explain.
"""

import argparse
import copy
import logging
import math
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCHES = 1, 512


# LOAD: the network of intermediate/02_cnn.py; load as in intermediate/01_save_load.py.
class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [N, 8, 14, 14]; pooled first: 4x less to ReLU
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [N, 16, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 64]
        return self.fc2(x)  # [N, 10], one logit per digit


def load(model, path, command):
    """Load the state_dict in path into model; exit with a sentence that names the command to type."""
    try:
        state = torch.load(path, map_location=DEVICE, weights_only=True)
    except FileNotFoundError:
        sys.exit(f"{path} is missing. Make it with: {command}")
    except Exception as error:  # a damaged file can fail in a dozen ways
        sys.exit(f"{path} is damaged ({type(error).__name__}). This makes a good one: {command}")
    try:
        model.load_state_dict(state)
    except Exception as error:  # other names, other shapes, or no state_dict at all
        sys.exit(
            f"{path} is not this network's ({type(error).__name__}). This makes one that fits: {command}"
        )
    return model.eval()


# FORMS: what 02_model_optimization.py has shipped is loaded, the rest made here; each returns a call.
def make_channels_last(model, path):
    return model.to(memory_format=torch.channels_last)


def make_bf16(model, path):
    return torch.autocast(DEVICE.type, torch.bfloat16)(lambda x: model(x))


def make_compiled(model, path):
    return torch.compile(model, dynamic=True)


def load_torchscript(model, path):
    return torch.jit.load(path, map_location=DEVICE)


def make_aot_inductor(model, path):
    batch, images = torch.export.Dim("batch", min=1, max=4096), torch.rand(2, 1, 28, 28)
    program = torch.export.export(model, (images.to(DEVICE),), dynamic_shapes=({0: batch},))
    with tempfile.TemporaryDirectory() as package:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{package}/cnn.pt2")
        return torch._inductor.aoti_load_package(path)


def load_onnx(model, path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # no more than PyTorch has
    # Idle threads that spin would keep a core busy, and slow down whatever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    wanted = f"{DEVICE.type.upper()}ExecutionProvider"
    here = wanted if wanted in onnxruntime.get_available_providers() else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(path, options, providers=[here])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0])


def make_torch_ao(model, path):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def load_torchao(model, path):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    return load(model, path, "uv run src/advanced/02_model_optimization.py")


FORMS = {  # name: (what makes it, its file in models/, how far a logit may be from the plain one's)
    "eager": (lambda model, path: model, None, 1e-3),
    "channels_last": (make_channels_last, None, 1e-3),
    "bf16 autocast": (make_bf16, None, 0.5),
    "torch.compile": (make_compiled, None, 1e-3),
    "TorchScript": (load_torchscript, "mnist_cnn_scripted.pt", 1e-3),
    "AOTInductor": (make_aot_inductor, None, 1e-3),
    "ONNX Runtime": (load_onnx, "mnist_cnn.onnx", 1e-3),
    "int8 torch.ao": (make_torch_ao, None, 1.0),
    "int8 torchao": (load_torchao, "mnist_cnn_int8.pth", 1.0),
}
NOT_QUICK = "torch.compile", "AOTInductor"  # a C++ compiler takes longer than all the rest


@torch.inference_mode()
def make_forms(model, folder, images, quick):
    """Print which forms run and whether they still answer alike; return {form: call}, how many do not."""
    calls, broken, expected = {}, 0, model(images)
    for name, (make, file, allowed) in FORMS.items():
        path = folder / file if file else None
        try:
            if quick and name in NOT_QUICK:
                raise RuntimeError("--quick leaves its compiler out")
            if path and not path.exists():
                raise RuntimeError(f"{file} is missing; 02_model_optimization.py makes it")
            # Compilers and quantisers want ordinary tensors, none of inference_mode's.
            with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore")  # what is deprecated, 02 says
                call = make(copy.deepcopy(model), path)
            call(images[:1])  # some compile for this size too
            difference = (call(images).float().to(DEVICE) - expected).abs().max().item()
        except Exception as error:
            print(f"{name:13} | not run: {error}".partition("\n")[0][:99])
            continue
        kept = difference <= allowed  # nan is not
        calls[name], broken = call, broken + (not kept)
        verdict = "as before" if kept else "BROKEN: is it of another network? Run 02 again"
        print(f"{name:13} | largest Δlogit {difference:.6f} {verdict}")
    return calls, broken


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


@torch.inference_mode()
def measure(calls, images, **amount):
    """Print how long each form takes; return {form: how it compares with eager, in words}."""
    runs = {name: lambda call=call: call(images) for name, call in calls.items()}
    times, words = time_in_turn(runs, **amount), {}
    print(f"Batch of {len(images):4} | ms (middle half)            | times as fast as eager (95 %)")
    for name, own in times.items():
        low, middle, high = np.percentile(own, [25, 50, 75]) * 1e3
        ratio, least, most, verdict = compare(times["eager"], own)
        words[name] = f"{ratio:.2f} ({least:.2f} to {most:.2f}): {verdict}"
        print(f"{name:13} | {f'{middle:.3f} ({low:.3f} to {high:.3f})':27} | {words[name]}")
    return words


def main(quick=False):
    torch.backends.cudnn.allow_tf32 = False  # or a GPU's plain network would round its numbers too
    logging.disable(logging.WARNING)  # the compilers' notes to their own developers
    models = ROOT / ("models/quick" if quick else "models")
    command = f"uv run src/intermediate/02_cnn.py{' --quick' if quick else ''}"
    model = load(CNN().to(DEVICE), models / "mnist_cnn.pth", command)
    torch.manual_seed(0)
    images = torch.rand(max(BATCHES), 1, 28, 28, device=DEVICE)
    calls, broken = make_forms(model, models, images, quick)
    amount = {"seconds": 0.02, "rounds": 5} if quick else {}
    words = [measure(calls, images[:batch], **amount) for batch in BATCHES]
    torchscript = words[0].get("TorchScript", "none (none)")
    print(f"TorchScript, batch of 1: 1.40 in the notes, here {torchscript}")
    gain = torchscript.partition("(")[2].partition(")")[0]
    print(f"Result: forms = {len(calls)}, outside_tolerance = {broken}, torchscript = {gain}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: no compilers, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
