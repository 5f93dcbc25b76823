"""Activations: see why a network without them cannot bend.

Run:    uv run src/basics/07_activations.py
Needs:  nothing
Makes:  models/plots/07_activations.png
Expect: linear_loss >= 1.4, relu_loss <= 0.05, parameters = 25

Linear layers in a row are still one straight line. A ReLU between them puts a kink into each
neuron's line, and eight kinks are enough to follow a parabola: at no extra parameter.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, LEARNING_RATE, SEED = 1000, 0.01, 42


# LOOK: what each function does to the same six numbers.
def show_functions():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0], device=DEVICE)
    print("Input:  ", x)
    print("ReLU:   ", torch.relu(x))
    print("Sigmoid:", torch.sigmoid(x))
    print("Tanh:   ", torch.tanh(x))


# DATA: a curve that no straight line can follow.
def make_curve():
    x = torch.linspace(-2, 2, 100, device=DEVICE)[:, None]  # [100, 1]
    return x, x**2


# MODEL: twice the same two layers; only the second network has an activation between them.
class LinearNet(nn.Module):  # as in basics/06_training.py
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(1, 8)
        self.layer2 = nn.Linear(8, 1)

    def forward(self, x):
        return self.layer2(self.layer1(x))


class NonLinearNet(LinearNet):
    def forward(self, x):
        return self.layer2(torch.relu(self.layer1(x)))


# TRAIN: both get the same data, the same steps and the same starting weights.
def train(model, x, y, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.mse_loss(model(x), y).item()


# PICTURE: the curve and both attempts at it.
def draw(models, x, y):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x.cpu(), y.cpu(), "k--", label="y = x²")
    for name, model in models.items():
        axes.plot(x.cpu(), model(x).detach().cpu(), label=name)
    axes.legend()
    return figure


# SAVE: write beside the target, then rename, so that no lesson ever meets half a file.
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
    show_functions()
    x, y = make_curve()
    models, losses = {}, {}
    for name, network in {"without activation": LinearNet, "with ReLU": NonLinearNet}.items():
        torch.manual_seed(SEED)
        models[name] = network().to(DEVICE)
        losses[name] = train(models[name], x, y, epochs=100 if quick else EPOCHS)
        print(f"Fit y = x² {name}: loss {losses[name]:.4f}")
    folder = ROOT / ("models/quick/plots" if quick else "models/plots")
    save(draw(models, x, y).savefig, folder / "07_activations.png")
    parameters = sum(parameter.numel() for parameter in models["with ReLU"].parameters())
    linear_loss, relu_loss = losses.values()
    print(
        f"Result: linear_loss = {linear_loss:.4f}, relu_loss = {relu_loss:.4f}, "
        f"parameters = {parameters}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 100 epochs")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
