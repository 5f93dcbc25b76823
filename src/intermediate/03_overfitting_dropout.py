"""Overfitting and dropout: measure how much a network memorizes, and how much it understands.

Run:    uv run src/intermediate/03_overfitting_dropout.py
Needs:  nothing
Makes:  models/plots/intermediate-03_overfitting_dropout.png
Expect: noise_train >= 99%, dropout_train >= 99.5%, noise_test <= 53%, rule_test >= 93%

A network with 18,049 parameters can memorize twenty coin tosses, but cannot predict the next one.
This is overfitting: the accuracy is high on the training samples, and lower on new samples.
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
EPOCHS = 200
LEARNING_RATE = 1e-3
DROPOUT = 0.5  # the share of the neurons that dropout sets to zero
REPEATS = 10  # each result is the mean of this many networks, each with its own samples
SEED = 42
TASKS = {  # name: (number of training samples, share of the labels that a coin decides)
    "20 coin tosses": (20, 1.0),
    "20 labels by the rule": (20, 0.0),
    "200 labels by the rule": (200, 0.0),
    "200 labels, 40% tossed": (200, 0.4),
}


# DATA: ten numbers, labeled 1 if their sum is positive. A coin labels the share `noise` of them.
def make_noisy_samples(count, noise):
    inputs = torch.randn(count, 10)
    labels = (inputs.sum(dim=1) > 0).float()  # [count]
    tossed = torch.rand(count) < noise
    labels[tossed] = torch.randint(2, (count,)).float()[tossed]
    return inputs.to(DEVICE), labels.to(DEVICE)


# MODEL: in training, dropout sets random neurons to zero, so that none can rely on another one.
class DropoutNet(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.fc1 = nn.Linear(10, 128)
        self.fc2 = nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 1)
        self.dropout = nn.Dropout(dropout)  # model.eval() switches it off

    def forward(self, x):  # [N, 10]
        x = self.dropout(F.relu(self.fc1(x)))  # [N, 128]
        x = self.dropout(F.relu(self.fc2(x)))  # [N, 128]
        return self.fc3(x).squeeze(1)  # [N], logits


@torch.inference_mode()
def evaluate(model, inputs, labels):
    model.eval()
    return ((model(inputs) > 0) == labels).float().mean().item()


# TRAIN: each seed gives the same training samples and first weights, with dropout or without. With
# fused=True, Adam changes all weights in one call.
def train_and_evaluate(count, noise, dropout, quick):
    accuracies = []
    for seed in range(SEED, SEED + (3 if quick else REPEATS)):
        torch.manual_seed(seed)
        inputs, labels = make_noisy_samples(count, noise)
        model = DropoutNet(dropout).to(DEVICE)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
        for _ in range(30 if quick else EPOCHS):  # each step uses all samples
            loss = F.binary_cross_entropy_with_logits(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        training_accuracy = evaluate(model, inputs, labels)
        test_accuracy = evaluate(model, *make_noisy_samples(2000, noise))  # new samples
        accuracies.append([training_accuracy, test_accuracy])
    return torch.tensor(accuracies)  # [repeats, 2]


# PICTURE: a bar from the test accuracy to the training accuracy. A long bar is overfitting.
def draw(results):
    figure = Figure(figsize=(8, 3.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    for (task, name), accuracies in results.items():
        training, test = accuracies.mean(dim=0).tolist()
        color = "#F08C2E" if name == "dropout" else "#78818D"
        axes.barh(f"{task}, {name}", training - test, 0.3, left=test, color=color, alpha=0.4)
        axes.plot(test, f"{task}, {name}", "o", color=color)
    axes.axvline(0.5, color="gray", ls="--")
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on new samples (circle) and on training samples (end of the bar)")
    return figure


def main(quick=False):
    torch.set_num_threads(1)  # these networks are too small to gain from more threads
    results = {}
    for task, (count, noise) in TASKS.items():
        print(task)
        for name, dropout in {"no dropout": 0.0, "dropout": DROPOUT}.items():
            results[task, name] = train_and_evaluate(count, noise, dropout, quick)
            train, test = results[task, name].mean(dim=0)
            print(f"  {name:10} train {train:6.1%} | test {test:6.1%} | gap {train - test:6.1%}")
        changes = results[task, "dropout"][:, 1] - results[task, "no dropout"][:, 1]  # [repeats]
        margin = 2 * changes.std() / len(changes) ** 0.5  # chance alone can move the mean so far
        print(f"  dropout changes the test accuracy by {changes.mean():+.1%} ± {margin:.1%}")

    plots = ROOT / ("models/quick/plots" if quick else "models/plots")
    plots.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(plots / "intermediate-03_overfitting_dropout.png")
    noise_train, noise_test = results["20 coin tosses", "no dropout"].mean(dim=0)
    dropout_train, _ = results["200 labels by the rule", "dropout"].mean(dim=0)
    _, rule_test = results["200 labels by the rule", "no dropout"].mean(dim=0)
    train_result = f"noise_train = {noise_train:.1%}, dropout_train = {dropout_train:.1%}"
    print(f"Result: {train_result}, noise_test = {noise_test:.1%}, rule_test = {rule_test:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
