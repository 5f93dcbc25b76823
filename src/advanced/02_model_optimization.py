"""Model optimisation: one network in nine forms, and whether it is still the same network.

Run:    uv run src/advanced/02_model_optimization.py
Needs:  models/mnist_cnn.pth
Makes:  models/mnist_cnn_scripted.pt, models/mnist_cnn_int8.pth, models/mnist_cnn.onnx
Expect: forms >= 6, outside_tolerance = 0, worst_accuracy >= 98.3 %, int8_smaller >= 65 %, data = MNIST

A smaller or faster form of a network is worth nothing if it answers otherwise. So each form shows here
how far its logits are from the plain network's. 16_faster_or_not.py loads what you keep, and times it.
"""

import argparse
import contextlib
import copy
import io
import logging
import math
import os
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


# DATA: read_images as in basics/09_mnist.py; here only the test images are needed.
def read_images(name, part):
    """Read images [N, 1, 28, 28] in 0..1 and labels [N]; OSError or ValueError if the files are bad."""
    file = ROOT / "data" / name / "raw" / part
    labels = np.fromfile(f"{file}-labels-idx1-ubyte", np.uint8)[8:]  # behind the header
    images = np.fromfile(f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(len(labels), 1, 28, 28)
    if not len(labels):
        raise ValueError(f"{file} is empty")
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()


def load_test_images():
    """Return the test images, their labels and the name of the data set."""
    try:
        return *read_images("MNIST", "t10k"), "MNIST"
    except (OSError, ValueError):  # intermediate/02_cnn.py downloads it, where it can
        print("MNIST is not in data/: scikit-learn's digits stand in")
    from sklearn.datasets import load_digits

    digits = load_digits()  # 02_cnn.py trains on the first 1437
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # [N, 1, 8, 8]
    images = F.pad(F.interpolate(images, size=20, mode="bilinear"), (4, 4, 4, 4))
    return images[1437:], torch.tensor(digits.target[1437:]), "scikit-learn digits"


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


# FORMS: each takes a copy of the network and some images; it returns what to call, what to ship.
def pack(model):
    torch.save(model.state_dict(), file := io.BytesIO())
    return file.getvalue()


def channels_last(model, images):
    return model.to(memory_format=torch.channels_last), pack(model)


def bf16_autocast(model, images):
    return torch.autocast(DEVICE.type, dtype=torch.bfloat16)(lambda x: model(x)), pack(model)


def compiled(model, images):
    return torch.compile(model, fullgraph=True, dynamic=True), pack(model)


def torchscript(model, images):  # as the notes have it: deprecated
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        scripted = torch.jit.script(model)
        torch.jit.save(scripted, file := io.BytesIO())
    print(f"PyTorch says: {said[0].message if said else 'nothing against torch.jit'}")
    return scripted, file.getvalue()


def export(model, images):
    batch = torch.export.Dim("batch", min=1, max=4096)  # without it, no other batch size fits
    return torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))


def aot_inductor(model, images):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/mnist_cnn.pt2"
        torch._inductor.aoti_compile_and_package(export(model, images), package_path=path)
        return torch._inductor.aoti_load_package(path), Path(path).read_bytes()


def onnx_runtime(model, images):
    import onnxruntime

    program = torch.onnx.export(export(model, images), verbose=False)
    content = program.model_proto.SerializeToString()
    wanted = f"{DEVICE.type.upper()}ExecutionProvider"
    here = wanted if wanted in onnxruntime.get_available_providers() else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(content, providers=[here])
    print(f"ONNX Runtime computes with its {session.get_providers()[0]}")
    return lambda x: torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0]), content


def int8_torch_ao(model, images):  # as the notes have it: deprecated, and for a CPU only
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return model, pack(model)


def int8_torchao(model, images):  # its successor
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
    return model, pack(model)


FORMS = {  # name: (what makes it, how far a logit may be from the plain network's, its file)
    "eager": (lambda model, images: (model, pack(model)), 1e-3, None),  # the batch alone moves bits
    "channels_last": (channels_last, 1e-3, None),
    "bf16 autocast": (bf16_autocast, 0.5, None),
    "torch.compile": (compiled, 1e-3, None),
    "TorchScript": (torchscript, 1e-3, "mnist_cnn_scripted.pt"),
    "AOTInductor": (aot_inductor, 1e-3, None),
    "ONNX Runtime": (onnx_runtime, 1e-3, "mnist_cnn.onnx"),
    "int8 torch.ao": (int8_torch_ao, 1.0, None),
    "int8 torchao": (int8_torchao, 1.0, "mnist_cnn_int8.pth"),
}
NOT_QUICK = "torch.compile", "AOTInductor"  # a C++ compiler takes longer than all the rest


# CHECK: the same test images for every form, and the reason where this machine cannot run one.
@torch.inference_mode()
def answer(call, images):
    return torch.cat([call(chunk).float().cpu() for chunk in images.split(BATCHES[-1])])


def check_form(name, model, images, labels, expected):
    """Return what to call, what to ship, the accuracy (None if it does not run), and the row."""
    (make, allowed, _), start = FORMS[name], time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what concerns the learner is printed
            call, content = make(copy.deepcopy(model), images)
            parts = [answer(call, images[:batch]) for batch in BATCHES]  # some compile only now
        seconds, logits = time.perf_counter() - start, answer(call, images)
    except Exception as error:  # no package, no compiler, another batch size than it was made for
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return None, None, None, f"not run: {reason:.75}"
    gaps = [part - expected[: len(part)] for part in [*parts, logits]]
    difference = torch.cat(gaps).abs().max().item()
    accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
    same = (logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item()
    verdict = "kept" if difference <= allowed else "BROKEN"  # nan is broken too
    row = f"{seconds:5.1f} s | {len(content) / 1024:5.1f} | {accuracy:8.2%} | {same:8.2%} | "
    return call, content, accuracy, f"{row}{difference:14.6f} | {allowed:.3f} {verdict}"


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


def main(quick=False):
    torch.backends.cudnn.allow_tf32 = False  # or a GPU's plain network would round its numbers too
    logging.disable(logging.WARNING)  # the exporters' notes to their own developers
    models = ROOT / ("models/quick" if quick else "models")
    command = f"uv run src/intermediate/02_cnn.py{' --quick' if quick else ''}"
    model = load(CNN().to(DEVICE), models / "mnist_cnn.pth", command)
    images, labels, source = load_test_images()
    images, labels = images[: 1000 if quick else None].to(DEVICE), labels[: 1000 if quick else None]
    expected, sizes, accuracies, broken = answer(model, images), {}, [], 0
    print("Form          | made in |   KiB | accuracy | as eager | largest Δlogit | allowed")
    for name, (_, _, file_name) in FORMS.items():
        if quick and name in NOT_QUICK:
            print(f"{name:13} | not run: --quick leaves its compiler out")
            continue
        _, content, accuracy, row = check_form(name, model, images, labels, expected)
        print(f"{name:13} | {row}")
        if content:
            sizes[name] = len(content)
            accuracies.append(accuracy)
            broken += row.endswith("BROKEN")
        if file_name and row.endswith("kept"):
            save(lambda file, content=content: file.write(content), models / file_name)
    smaller = 1 - sizes.get("int8 torchao", math.nan) / sizes["eager"]
    print(f"int8: 71 % smaller in the notes, here {smaller:.0%}")
    print(
        f"Result: forms = {len(sizes)}, outside_tolerance = {broken}, "
        f"worst_accuracy = {min(accuracies):.2%}, int8_smaller = {smaller:.0%}, data = {source}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: no compilers, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
