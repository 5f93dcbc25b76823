"""Save and load: keep what a network has learned, and get exactly that back.

Run:    uv run src/intermediate/01_save_load.py
Needs:  nothing
Makes:  models/simplenet.pth
Expect: reloaded = identical, largest_error <= 0.05

A trained network is its numbers. Its state_dict names each tensor of them; saved to a file and
loaded into a network of the same shape, it makes that network the same to the last bit.
"""

import argparse
import contextlib
import io
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, LEARNING_RATE, SEED = 2000, 0.01, 42


# MODEL: one number in, eight neurons with a ReLU, one number out.
class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(1, 8)
        self.layer2 = nn.Linear(8, 1)

    def forward(self, x):
        return self.layer2(torch.relu(self.layer1(x)))


# TRAIN: y = 2x + 1 again, from the same five points as in basics/06_training.py.
def train(model, epochs):
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], device=DEVICE)  # [5, 1]
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        loss = F.mse_loss(model(x), 2 * x + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"Trained: loss {loss.item():.4f}")


# SAVE: as in basics/07_activations.py: beside the target first, so an old file survives a failure.
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


# LOAD: weights_only=True reads tensors and plain containers, and never runs code from the file.
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


# COMPARE: every tensor of the reloaded network, bit for bit.
def compare_tensors(model, reloaded):
    others = reloaded.state_dict()
    for name, tensor in model.state_dict().items():
        print(f"  {name:14} {tuple(tensor.shape)!s:7} equal: {torch.equal(tensor, others[name])}")
    same = all(torch.equal(tensor, others[name]) for name, tensor in model.state_dict().items())
    return "identical" if same else "different"


# DANGER: a pickle may name any function to call while it is read. This one only wants to print.
class Trap:
    def __reduce__(self):
        return print, ("If you can read this, loading the file has run its code.",)


def show_trap():
    file = io.BytesIO()
    torch.save(Trap(), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        print(f"A file with code in it: refused ({type(error).__name__})")


@torch.inference_mode()
def predict(model):
    inputs = [6.0, 7.0, 10.0, -10.0]  # the last is far from the five points that it learned
    predictions = model(torch.tensor(inputs, device=DEVICE)[:, None]).flatten().tolist()
    for x, prediction in zip(inputs, predictions, strict=True):
        print(f"  x = {x:.0f}: predicted {prediction:.2f}, expected {2 * x + 1:.0f}")
    return max(abs(y - 2 * x - 1) for x, y in zip(inputs[:3], predictions, strict=False))


def main(quick=False, file=None):
    command = f"uv run src/intermediate/01_save_load.py{' --quick' if quick else ''}"
    if file:  # only load and predict: all that another program needs
        predict(load(SimpleNet().to(DEVICE), file, command))
        return
    torch.manual_seed(SEED)
    model = SimpleNet().to(DEVICE)
    train(model, epochs=200 if quick else EPOCHS)
    path = ROOT / ("models/quick" if quick else "models") / "simplenet.pth"
    save(lambda file: torch.save(model.state_dict(), file), path)
    reloaded = load(SimpleNet().to(DEVICE), path, command)
    outcome = compare_tensors(model, reloaded)
    show_trap()
    print("Predictions of the reloaded network for y = 2x + 1")
    print(f"Result: reloaded = {outcome}, largest_error = {predict(reloaded):.2f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 200 epochs, models/quick/")
    cli.add_argument("--load", dest="file", type=Path, help="only load this file and predict")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
