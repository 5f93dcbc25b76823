"""Model optimization: run one network in eight versions and compare accuracy, size and speed.

Run:    uv run src/advanced/02_model_optimization.py
Needs:  models/mnist_cnn.pth
Makes:  models/mnist_cnn_scripted.pt, models/mnist_cnn.onnx, models/mnist_cnn_int8.pth
Expect: versions >= 6, wrong = 0, worst_accuracy >= 98.3%, int8_smaller >= 65%, data = MNIST

A smaller or faster version of a network is useless if it answers differently. So we first compare
each version with the original network. Only correct versions are timed, and only their files kept.
"""

import argparse
import copy
import logging
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
from torchvision import datasets

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
ROUNDS = 21
VERSIONS = ["eager", "channels_last", "bf16 autocast", "torch.compile", "TorchScript"]
VERSIONS += ["AOTInductor", "ONNX Runtime", "int8 torchao"]
COMPILED = ["torch.compile", "AOTInductor"]  # --quick leaves out what needs a C++ compiler
# How much the logits may differ: 16 and 8 bits round more than 32; 0.0001 for the others.
ALLOWED = {"bf16 autocast": 5e-3, "int8 torchao": 1.5e-2}
FILES = {"TorchScript": "mnist_cnn_scripted.pt", "ONNX Runtime": "mnist_cnn.onnx"}
FILES["int8 torchao"] = "mnist_cnn_int8.pth"


# MODEL: the network of intermediate/02.
class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [N, 8, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 16, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 16, 7, 7] -> [N, 784] -> [N, 64]
        return self.fc2(x)  # [N, 10], a logit (a score before softmax) per digit


def load(model, path, lesson):
    """Load the weights in path into model, or stop and name the lesson that makes the file."""
    try:
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    except Exception as error:  # no such file, or it does not hold this network's weights
        sys.exit(f"Cannot load {path} ({type(error).__name__}). Make it with: uv run {lesson}")
    return model.eval()


# VERSIONS: each is a function from images to logits. Some write a file, and are loaded from it.
def convert_model(version, model, images, file):
    """Return a version of the model, which may change; images are an example of the input."""
    any_batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)  # accept 1 to 4,096 images
    match version:
        case "eager":  # the original network, as PyTorch runs it
            return model
        case "channels_last":  # the channels of a pixel lie side by side in memory
            return model.to(memory_format=torch.channels_last)
        case "bf16 autocast":  # 16 bits instead of 32 when that is safe
            return torch.autocast(images.device.type, torch.bfloat16)(model.forward)
        case "torch.compile":  # new machine code, made at the first call
            return torch.compile(model, fullgraph=True, dynamic=True)
        case "TorchScript":  # a file that needs no Python; deprecated
            torch.jit.script(model).save(file)
            return torch.jit.load(file, map_location=images.device)
        case "AOTInductor":  # compiled ahead of time, for this kind of machine only
            program = torch.export.export(model, (images,), dynamic_shapes=any_batch)
            torch._inductor.aoti_compile_and_package(program, package_path=str(file))
            return torch._inductor.aoti_load_package(str(file))
        case "ONNX Runtime":  # a file for every language with such a runtime
            program = torch.onnx.export(model, (images,), dynamic_shapes=any_batch, verbose=False)
            program.save(file)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            # Idle threads sleep, so they do not slow the other versions.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = onnxruntime.InferenceSession(file, options, ["CPUExecutionProvider"])

            def run_in_onnx(x):
                return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

            return run_in_onnx
        case "int8 torchao":  # the linear layers in 8 bits; older tutorials use torch.quantization
            quantize_(model, Int8DynamicActivationInt8WeightConfig(version=2))
            return model


# MEASURE: the versions take turns, because a machine's speed changes (advanced/05).
def time_in_turn(calls, seconds=2.0):
    """Return {name: [seconds per call, one number for each round]}."""
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            times[name].append(timer.blocked_autorange(min_run_time=seconds / ROUNDS).median)
    return times


def compare(base, other):
    """Return how many times as fast other is, its 95% interval (bootstrap, Efron 1979), verdict."""
    base, other = np.array(base), np.array(other)
    random = np.random.default_rng(0)
    ratios = []
    for _ in range(1000):
        picks = random.integers(len(base), size=len(base))  # some rounds twice, some never
        ratios.append(np.median(base[picks]) / np.median(other[picks]))
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as printed: 1.004 counts as 1.00
    verdict = "no difference"
    if low > 1:
        verdict = "faster"
    elif high < 1:
        verdict = "slower"
    return np.median(base) / np.median(other), low, high, verdict


# CHECK: first compare the logits. Only if they are right, keep the file and measure the speed.
@torch.inference_mode()
def predict(call, images):
    batches = [images[:1], *images.split(512)]  # one image alone, then all
    return torch.cat([call(batch).float().cpu() for batch in batches])  # [1 + N, 10]


def measure(version, model, images, labels, models, quick):
    """Make a version and print its row; return numbers of the row, or None if it cannot run."""
    if version == "ONNX Runtime":
        images = images.cpu()  # this package runs on the CPU only, and so does its eager
    eager = copy.deepcopy(model).to(images.device)
    network = copy.deepcopy(eager)
    with tempfile.TemporaryDirectory(dir=models) as folder:
        file = Path(folder, FILES.get(version, "not_kept.pt2"))
        try:
            call = convert_model(version, network, images[:2], file)
            logits = predict(call, images)
        except Exception as error:  # no package, no compiler, or the wrong kind of device
            print(f"{version:13} | not run: {error!r:.80}")
            return None
        if not file.exists():
            torch.save(network.state_dict(), file)
        size = file.stat().st_size
        expected = predict(eager, images)
        # The length of the error, as a part of the length of the logits.
        difference = ((logits - expected).norm() / expected.norm()).item()
        allowed = ALLOWED.get(version, 0.0001)
        is_right = difference <= allowed  # False if the difference is not a number
        if is_right and version in FILES:
            file.replace(models / file.name)
    accuracy = (logits[1:].argmax(dim=1) == labels).float().mean().item()
    text = f"{version:13} | {images.device.type:4} | {accuracy:8.2%} | {difference:8.4%}"
    if is_right:
        speeds = []
        for batch in (images[:1], images[:512]):
            calls = {"eager": partial(eager, batch), "version": partial(call, batch)}
            with torch.inference_mode():  # as a server would: PyTorch records nothing
                times = time_in_turn(calls, seconds=0.1 if quick else 1.0)
            _, low, high, _ = compare(times["eager"], times["version"])
            speeds.append(f"{low:.2f} to {high:.2f}")
        print(f"{text} | {speeds[0]} | {speeds[1]} | {size / 1024:.0f} KiB")
    else:
        speeds = ["not measured"]
        print(f"{text} | WRONG: only {allowed:.2%} is allowed")
    return {"accuracy": accuracy, "is_right": is_right, "size": size, "speeds": speeds}


def main(quick=False):
    torch.backends.cudnn.allow_tf32 = False  # use full float32 precision on a GPU
    logging.disable(logging.WARNING)  # hide messages of the exporters
    warnings.simplefilter("ignore")  # the comments above say what is deprecated
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    test = datasets.MNIST(ROOT / "data", train=False)
    images = test.data[: 100 if quick else None].unsqueeze(1).to(DEVICE) / 255  # [N, 1, 28, 28]
    models = ROOT / ("models/quick" if quick else "models")
    lesson = "src/intermediate/02_cnn.py" + (" --quick" if quick else "")
    model = load(CNN().to(DEVICE), models / "mnist_cnn.pth", lesson).requires_grad_(False)

    print("Version       | on   | accuracy | logits   | as fast: 1   | 512 images   | file")
    rows = {}
    for version in VERSIONS:
        if not quick or version not in COMPILED:
            row = measure(version, model, images, test.targets[: len(images)], models, quick)
            if row:
                rows[version] = row
    wrong = sum(not row["is_right"] for row in rows.values())
    worst = min(row["accuracy"] for row in rows.values())
    result = f"versions = {len(rows)}, wrong = {wrong}, worst_accuracy = {worst:.2%}"
    if "TorchScript" in rows:
        result += f", torchscript = {rows['TorchScript']['speeds'][0]}"
    if "int8 torchao" in rows:
        result += f", int8_smaller = {1 - rows['int8 torchao']['size'] / rows['eager']['size']:.0%}"
    print(f"Result: {result}, data = {(ROOT / 'data/MNIST/SOURCE').read_text()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except subprocess.CalledProcessError:  # get_data.py has said why
        sys.exit(1)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
