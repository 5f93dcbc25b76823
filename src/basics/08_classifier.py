"""Classifier: decide between two groups, and say how sure you are.

Run:    uv run src/basics/08_classifier.py
Needs:  nothing
Makes:  models/plots/08_classifier.png
Expect: train_accuracy = 100.00 %, test_accuracy >= 98.5 %

The network gives one score, the logit; the sigmoid turns it into a probability, and 0.5 is where the
decision flips. The line on which that happens is the decision boundary, and the picture shows it.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, LEARNING_RATE, SEED = 1000, 0.01, 42


# DATA: two clouds of points, around (2, 2) and around (6, 6).
def make_clouds(points):
    """Return points [2 * points, 2] and labels [2 * points]: 0 for the first cloud, 1 for the second."""
    clouds = torch.cat([torch.randn(points, 2) + 2, torch.randn(points, 2) + 6])
    labels = torch.cat([torch.zeros(points), torch.ones(points)])
    return clouds.to(DEVICE), labels.to(DEVICE)


# MODEL: it ends in a logit, not in a sigmoid: the loss below does both at once, without rounding
# a probability of almost 1 to exactly 1, whose logarithm would be infinite for the other class.
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(2, 16)
        self.layer2 = nn.Linear(16, 1)

    def forward(self, x):  # [N, 2]
        return self.layer2(torch.relu(self.layer1(x))).squeeze(1)  # [N, 16] -> [N]


# TRAIN: the same five steps as before; only the loss is new.
def train(model, points, labels, epochs):
    loss_function = nn.BCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        logits = model(points)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 200 == 0:
            accuracy = ((logits > 0) == labels).float().mean()  # logit 0 is probability 0.5
            print(f"Epoch {epoch:4d} | Loss: {loss.item():.4f} | Accuracy: {accuracy.item():.2%}")


# EVALUATE: a thousand new points from each cloud, and four that you can check by eye.
@torch.inference_mode()
def evaluate(model, points, labels):
    model.eval()  # makes a difference once a network has dropout: intermediate/03
    return ((model(points) > 0) == labels).float().mean().item()


@torch.inference_mode()
def show_probabilities(model):
    points = torch.tensor([[2.0, 2.0], [6.0, 6.0], [1.5, 2.5], [4.0, 4.0]], device=DEVICE)
    for point, probability in zip(points.tolist(), model(points).sigmoid().tolist(), strict=True):
        print(f"  Point {point}: class {int(probability > 0.5)}, P(class 1) = {probability:.2%}")


# PICTURE: the probability everywhere, and the line where the decision flips.
@torch.inference_mode()
def draw(model, points, labels):
    ticks = torch.linspace(-1, 9, 200, device=DEVICE)
    grid = torch.cartesian_prod(ticks, ticks)  # [40000, 2]
    probability = model(grid).sigmoid().reshape(200, 200).T.cpu()
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = axes.contourf(ticks.cpu(), ticks.cpu(), probability, levels=20, cmap="coolwarm")
    figure.colorbar(colours, label="P(class 1)")
    axes.contour(ticks.cpu(), ticks.cpu(), probability, levels=[0.5], colors="black")
    axes.scatter(*points.T.cpu(), c=labels.cpu(), cmap="coolwarm", edgecolors="white", s=20)
    return figure


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
    torch.manual_seed(SEED)
    points, labels = make_clouds(50)
    model = Classifier().to(DEVICE)
    train(model, points, labels, epochs=200 if quick else EPOCHS)
    show_probabilities(model)
    folder = ROOT / ("models/quick/plots" if quick else "models/plots")
    save(draw(model, points, labels).savefig, folder / "08_classifier.png")
    train_accuracy = evaluate(model, points, labels)
    test_accuracy = evaluate(model, *make_clouds(1000))
    print(f"Result: train_accuracy = {train_accuracy:.2%}, test_accuracy = {test_accuracy:.2%}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 200 epochs")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
