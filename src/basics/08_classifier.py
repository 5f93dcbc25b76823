"""Classifier: sort points into two classes, with a probability for each answer.

Run:    uv run src/basics/08_classifier.py
Needs:  nothing
Makes:  models/plots/basics-08_classifier.png
Expect: train_accuracy = 100.00%, test_accuracy >= 98.5%

The network gives one number for each point, the logit. The sigmoid function turns the logit into a
probability. Where the probability is 50%, the answer changes: this line is the decision boundary.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 1000
LEARNING_RATE = 0.01
SEED = 42


# DATA: two clouds of points. Class 0 is around (2, 2), and class 1 is around (6, 6).
def make_clouds(count):
    points = torch.cat([torch.randn(count, 2) + 2, torch.randn(count, 2) + 6])  # [2 * count, 2]
    labels = torch.cat([torch.zeros(count), torch.ones(count)])  # [2 * count]
    return points.to(DEVICE), labels.to(DEVICE)


# MODEL: the last layer gives a logit. A logit above 0 means class 1.
class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(2, 16)
        self.layer2 = nn.Linear(16, 1)

    def forward(self, x):  # [N, 2]
        return self.layer2(torch.relu(self.layer1(x))).squeeze(1)  # [N, 16] -> [N, 1] -> [N]


# TRAIN: only the loss is new. It applies sigmoid and logarithm in one step, which is more exact.
def train(model, points, labels, epochs):
    loss_function = nn.BCEWithLogitsLoss()  # binary cross-entropy
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        logits = model(points)  # [N]
        loss = loss_function(logits, labels)  # small if the right class is probable
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 200 == 0:
            print(f"Epoch {epoch:4d} | Loss: {loss.item():.4f}")


def measure_accuracy(logits, labels):
    return ((logits > 0) == labels).float().mean().item()


# PICTURE: the probability at every place, and the sigmoid with the logits of all points on it.
@torch.inference_mode()
def draw(model, points, labels):
    figure = Figure(figsize=(8, 3.5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    ticks = torch.linspace(-1, 9, 200)
    logits = model(torch.cartesian_prod(ticks, ticks).to(DEVICE)).cpu()  # [40000], at every place
    probability = logits.sigmoid().reshape(200, 200).T
    style = {"c": labels.cpu(), "cmap": "coolwarm", "edgecolors": "white", "zorder": 3}
    left.contourf(ticks, ticks, probability, levels=20, cmap="coolwarm", alpha=0.7)
    left.contour(ticks, ticks, probability, levels=[0.5], colors="black")
    left.scatter(*points.T.cpu(), **style)
    left.set_title("points and decision boundary")
    right.plot(logits, logits.sigmoid(), ".", color="gray", ms=1)
    right.scatter(model(points).cpu(), model(points).sigmoid().cpu(), **style)
    right.set(title="logit -> sigmoid -> probability", xlabel="logit", ylabel="P(class 1)")
    return figure


def main(quick=False):
    torch.manual_seed(SEED)
    points, labels = make_clouds(50)
    model = Classifier().to(DEVICE)
    train(model, points, labels, epochs=200 if quick else EPOCHS)
    for point in ([2.0, 2.0], [6.0, 6.0], [1.5, 2.5], [4.0, 4.0]):
        probability = model(torch.tensor([point], device=DEVICE)).sigmoid().item()
        print(f"  Point {point}: class {probability > 0.5:d}, P(class 1) = {probability:.2%}")
    path = ROOT / ("models/quick" if quick else "models") / "plots/basics-08_classifier.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(model, points, labels).savefig(path)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")
    train_accuracy = measure_accuracy(model(points), labels)
    points, labels = make_clouds(1000)  # new points
    test_accuracy = measure_accuracy(model(points), labels)
    print(f"Result: train_accuracy = {train_accuracy:.2%}, test_accuracy = {test_accuracy:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
