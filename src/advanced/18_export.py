"""Export: write a network into a file that needs no Python, and check that it answers alike.

Run:    uv run src/advanced/18_export.py
Needs:  models/mnist_cnn.pth
Makes:  models/mnist_cnn_scripted.pt, models/mnist_cnn.onnx
Expect: forms >= 3, outside_tolerance = 0, worst_accuracy >= 98.3 %, data = MNIST

A state_dict holds numbers; what to do with them is written in Python. An exported file holds both, so a
server or a phone can run it alone. If the export leaves something behind, the answers differ: so compare.
"""

import argparse
import contextlib
import copy
import io
import logging
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
BATCHES, TOLERANCE = (1, 512), 1e-3  # of a logit: another batch alone moves the last bits
ANY_BATCH = ({0: torch.export.Dim("batch", min=1, max=4096)},)  # without it, no other size fits


# DATA: as in intermediate/02_cnn.py, which downloads it; here only the test images are needed.
def load_test_images():
    """Return the test images [N, 1, 28, 28] in 0..1, their labels [N] and the name of the data set."""
    file = ROOT / "data" / "MNIST" / "raw" / "t10k"
    with contextlib.suppress(OSError, ValueError):  # not there, or not whole
        labels = np.fromfile(f"{file}-labels-idx1-ubyte", np.uint8)[8:]  # behind the header
        images = np.fromfile(f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 1, 28, 28)
        if len(images) == len(labels) > 0:
            return torch.from_numpy(images) / 255, torch.from_numpy(labels).long(), "MNIST"
    print("MNIST is not in data/: scikit-learn's digits stand in")
    from sklearn.datasets import load_digits

    digits = load_digits()  # 02_cnn.py trains on the first 1437
    images = torch.tensor(digits.images[1437:, None] / 16, dtype=torch.float32)  # [N, 1, 8, 8]
    images = F.pad(F.interpolate(images, size=20, mode="bilinear"), (4, 4, 4, 4))
    return images, torch.tensor(digits.target[1437:]), "scikit-learn digits"


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


# FORMS: each returns what to call, and what is to be shipped, from which the call was loaded.
def eager(model, images):
    torch.save(model.state_dict(), file := io.BytesIO())
    return model, file.getvalue()


def torchscript(model, images):  # as the notes have it: deprecated
    with warnings.catch_warnings(record=True, action="always") as said:
        torch.jit.save(torch.jit.script(model), file := io.BytesIO())
    print(f"PyTorch says: {said[0].message if said else 'nothing against torch.jit'}")
    return torch.jit.load(io.BytesIO(file.getvalue()), map_location=DEVICE), file.getvalue()


def aot_inductor(model, images):  # compiled, for this kind of machine only
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/mnist_cnn.pt2"
        program = torch.export.export(model, (images[:2],), dynamic_shapes=ANY_BATCH)
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        return torch._inductor.aoti_load_package(path), Path(path).read_bytes()


def onnx_runtime(model, images):  # for every language that has an ONNX runtime
    from onnxruntime import InferenceSession, get_available_providers

    program = torch.onnx.export(model, (images[:2],), dynamic_shapes=ANY_BATCH, verbose=False)
    content = program.model_proto.SerializeToString()
    session = InferenceSession(content, providers=get_available_providers())
    return lambda x: torch.from_numpy(session.run(None, {"x": x.cpu().numpy()})[0]), content


FORMS = {  # name: (what makes it, its file)
    "eager": (eager, None),
    "TorchScript": (torchscript, "mnist_cnn_scripted.pt"),
    "AOTInductor": (aot_inductor, None),
    "ONNX Runtime": (onnx_runtime, "mnist_cnn.onnx"),
}
NOT_QUICK = ["AOTInductor"]  # a C++ compiler takes longer than all the rest


# CHECK: the same test images for every form, and the reason where this machine cannot run one.
@torch.inference_mode()
def answer(call, images):
    logits = [call(chunk).float().cpu() for chunk in images.split(BATCHES[-1])]
    return torch.cat(logits).view(len(images), 10)  # an error, unless each image has its answer


def check_form(make, allowed, model, images, labels, expected):
    """Return what to call, what to ship, the accuracy (None if it does not run), and the row."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings(action="ignore"):  # what concerns the learner is printed
            call, content = make(copy.deepcopy(model), images)
            parts = [answer(call, images[:batch]) for batch in BATCHES]  # some compile only now
        seconds, logits = time.perf_counter() - start, answer(call, images)
    except Exception as error:  # no package, no compiler, another batch size than it was made for
        return None, None, None, f"not run: {type(error).__name__}: {error}".partition("\n")[0][:86]
    gaps = torch.cat([part - expected[: len(part)] for part in [*parts, logits]])
    difference, answers = gaps.abs().max().item(), logits.argmax(dim=1)
    accuracy = (answers == labels).float().mean().item()
    same = (answers == expected.argmax(dim=1)).float().mean().item()
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
    models, count = (ROOT / "models/quick", 1000) if quick else (ROOT / "models", None)
    command = f"uv run src/intermediate/02_cnn.py{' --quick' if quick else ''}"
    model = load(CNN().to(DEVICE), models / "mnist_cnn.pth", command)
    images, labels, source = load_test_images()
    images, labels = images[:count].to(DEVICE), labels[:count]
    expected, accuracies, broken = answer(model, images), [], 0
    print("Form          | made in |   KiB | accuracy | as eager | largest Δlogit | allowed")
    for name, (make, path) in FORMS.items():
        if quick and name in NOT_QUICK:
            print(f"{name:13} | not run: --quick leaves its compiler out")
            continue
        _, content, accuracy, row = check_form(make, TOLERANCE, model, images, labels, expected)
        print(f"{name:13} | {row}")
        accuracies += [accuracy] if content else []
        broken += row.endswith("BROKEN")
        if path and row.endswith("kept"):
            save(lambda file, content=content: file.write(content), models / path)
    result = f"forms = {len(accuracies)}, outside_tolerance = {broken}"
    print(f"Result: {result}, worst_accuracy = {min(accuracies):.2%}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: no compilers, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
