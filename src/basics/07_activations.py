"""Activations: let a network follow a curve instead of a straight line.

Run:    uv run src/basics/07_activations.py
Needs:  nothing
Makes:  models/plots/basics-07_activations.png
Expect: linear_loss >= 1.4, relu_loss <= 0.05, parameters = 25

Two linear layers are still one straight line. An activation function between them bends the line: a
ReLU adds one kink for each neuron. Eight kinks are enough for a parabola, without a new parameter.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 1000
LEARNING_RATE = 0.01
SEED = 42
FUNCTIONS = {"ReLU": torch.relu, "Sigmoid": torch.sigmoid, "Tanh": torch.tanh}


# MODEL: two networks from the same random weights. nn.Sequential calls one layer after the other.
def make_networks():
    torch.manual_seed(SEED)
    without_activation = nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1))
    torch.manual_seed(SEED)
    with_relu = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
    return without_activation.to(DEVICE), with_relu.to(DEVICE)


# TRAIN: the five steps of basics/06.
def train(model, x, y, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return F.mse_loss(model(x), y).item()


# PICTURE: three activation functions, and what the two networks learned.
@torch.inference_mode()
def draw(linear, bent, x, y):
    figure = Figure(figsize=(8, 3.5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for name, function in FUNCTIONS.items():
        left.plot(2 * x.cpu(), function(2 * x).cpu(), lw=2, label=name)
    left.set(title="activation functions", ylim=(-1.4, 2.4))
    right.plot(x.cpu(), y.cpu(), color="#4C8BE0", alpha=0.4, lw=8, label="data: y = x²")
    right.plot(x.cpu(), linear(x).cpu(), "--", color="#F08C2E", lw=2, label="without activation")
    right.plot(x.cpu(), bent(x).cpu(), color="#F08C2E", lw=2, label="with ReLU")
    right.set_title("what each network learned")
    left.legend()
    right.legend()
    return figure


def main(quick=False):
    numbers = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 3.0], device=DEVICE)
    print("Input:  ", numbers)
    for name, function in FUNCTIONS.items():
        print(f"{name}:".ljust(8), function(numbers))
    x = torch.linspace(-2, 2, 100, device=DEVICE)[:, None]  # [100, 1]
    linear, bent = make_networks()
    linear_loss = train(linear, x, x**2, epochs=100 if quick else EPOCHS)
    print(f"Fit y = x² without activation: loss {linear_loss:.4f}")
    relu_loss = train(bent, x, x**2, epochs=100 if quick else EPOCHS)
    print(f"Fit y = x² with ReLU: loss {relu_loss:.4f}")

    path = ROOT / ("models/quick" if quick else "models") / "plots/basics-07_activations.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(linear, bent, x, x**2).savefig(path)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")
    parameters = sum(parameter.numel() for parameter in bent.parameters())
    losses = f"linear_loss = {linear_loss:.4f}, relu_loss = {relu_loss:.4f}"
    print(f"Result: {losses}, parameters = {parameters}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
