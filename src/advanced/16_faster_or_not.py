"""Faster or not: a network in eight other forms, timed beside the plain one.

Run:    uv run src/advanced/16_faster_or_not.py
Needs:  nothing
Makes:  nothing
Expect: forms >= 6, outside_tolerance = 0

What a form gains depends on the batch: with one image, a call is mostly what surrounds the arithmetic;
with 512, it is the arithmetic. So both are timed, and only one verdict in twenty should be luck.
"""

import argparse
import copy
import logging
import math
import sys
import tempfile
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import autocast, nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCHES = 1, 512
TOLERANCE = 0.1  # of the largest logit; how far each form really is, 02 and 18 tell


# MODEL: as in intermediate/02_cnn.py; random weights take as long as trained ones.
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


# FORMS: as in 02_model_optimization.py, 11_inference_engines.py and 18_export.py.
def make_aot_inductor(model, images):
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/cnn.pt2")
        return torch._inductor.aoti_load_package(path)


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


def make_torchao(model, images):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    return model


FORMS = {
    "eager": lambda model, images: model,
    "channels_last": lambda model, images: model.to(memory_format=torch.channels_last),
    "bf16 autocast": lambda model, images: autocast(DEVICE.type, torch.bfloat16)(model.forward),
    "torch.compile": lambda model, images: torch.compile(model, fullgraph=True, dynamic=True),
    "TorchScript": lambda model, images: torch.jit.script(model),
    "AOTInductor": make_aot_inductor,
    "ONNX Runtime": run_onnx,
    "int8 torch.ao": lambda model, images: torch.ao.quantization.quantize_dynamic(
        model, {nn.Linear}
    ),
    "int8 torchao": make_torchao,
}
NOT_QUICK = "torch.compile", "AOTInductor", "ONNX Runtime", "int8 torchao"  # the rest takes less


@torch.inference_mode()
def make_forms(model, images, quick):
    """Print which forms run and whether they answer alike; return {form: call}, how many do not."""
    calls, broken, expected = {}, 0, model(images)
    for name, make in FORMS.items():
        try:
            if quick and name in NOT_QUICK:
                raise RuntimeError("--quick leaves it out")
            # Compilers and quantisers want ordinary tensors, none of inference_mode's.
            ignored = warnings.catch_warnings(action="ignore")  # what is deprecated, 02 and 18 say
            with ignored, torch.inference_mode(False), torch.no_grad():
                call = make(copy.deepcopy(model), images)
            gaps = [call(images[:n]).float().to(DEVICE) - expected[:n] for n in BATCHES]
            difference = torch.cat(gaps).abs().max() / expected.abs().max()
        except Exception as error:
            print(f"{name:13} | not run: {error}".partition("\n")[0][:99])
            continue
        kept = difference <= TOLERANCE  # nan is not
        calls[name], broken = call, broken + (not kept)
        print(f"{name:13} | Δ / largest logit {difference:.6f} {'kept' if kept else 'BROKEN'}")
    return calls, broken


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
    torch.manual_seed(0)
    model, images = CNN().eval().to(DEVICE), torch.rand(max(BATCHES), 1, 28, 28, device=DEVICE)
    calls, broken = make_forms(model, images, quick)
    amount = {"seconds": 0.02, "rounds": 5} if quick else {}
    words = [measure(calls, images[:batch], **amount) for batch in BATCHES]
    torchscript = words[0].get("TorchScript", "none (none)")
    print(f"TorchScript, batch of {BATCHES[0]}: {torchscript}; 1.40 in the notes, for one image")
    gain = torchscript.partition("(")[2].partition(")")[0]
    print(f"Result: forms = {len(calls)}, outside_tolerance = {broken}, torchscript = {gain}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: no compilers, less time")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
