"""Overfitting and dropout: measure the gap between what a network knows by heart and what it knows.

Run:    uv run src/intermediate/03_overfitting_dropout.py
Needs:  nothing
Makes:  models/plots/03_overfitting_dropout.png
Expect: noise_train >= 99 %, dropout_train >= 99.5 %, noise_test <= 53 %, rule_test >= 93 %

A network with thousands of parameters can learn twenty coin tosses by heart, and will then know
nothing about the twenty-first. The gap between training and test accuracy gives it away.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, LEARNING_RATE, DROPOUT, REPEATS, SEED = 200, 1e-3, 0.5, 10, 42
TASKS = {  # name: number of training samples, share of the labels that are tossed
    "20 coin tosses": (20, 1.0),
    "20 of the rule": (20, 0.0),
    "200 of the rule": (200, 0.0),
    "200, 40 % tossed": (200, 0.4),
}


# DATA: ten numbers to each sample. The rule labels it by its sum; noise tosses a coin instead.
def make_noisy_samples(count, noise):
    """Return inputs [count, 10] and labels [count], of which the share called noise is tossed."""
    inputs = torch.randn(count, 10)
    labels = (inputs.sum(dim=1) > 0).float()
    tossed = torch.rand(count) < noise
    labels[tossed] = torch.randint(2, (count,)).float()[tossed]
    return inputs.to(DEVICE), labels.to(DEVICE)


# MODEL: dropout sets half of the neurons to zero, others at each step, so that none can rely on
# another. model.eval() switches it off. With dropout=0 it does nothing.
class DropoutNet(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.fc1 = nn.Linear(10, 128)
        self.fc2 = nn.Linear(128, 128)
        self.fc3 = nn.Linear(128, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):  # [N, 10]
        x = self.dropout(F.relu(self.fc1(x)))  # [N, 128]
        x = self.dropout(F.relu(self.fc2(x)))  # [N, 128]
        return self.fc3(x).squeeze(1)  # [N], logits


# TRAIN: all samples at once, far longer than they deserve.
def train(model, inputs, labels, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    model.train()
    for _ in range(epochs):
        loss = F.binary_cross_entropy_with_logits(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# EVALUATE: on the samples that it learned, and on as many new ones as make a steady percentage.
@torch.inference_mode()
def evaluate(model, inputs, labels):
    model.eval()
    return ((model(inputs) > 0) == labels).float().mean().item()


# COMPARE: one network is an anecdote, so every number is a mean over REPEATS data sets.
def measure(count, noise, dropout, epochs, repeats):
    """Return the train and the test accuracies [repeats] of networks trained on count samples."""
    train_accuracies, test_accuracies = [], []
    for seed in range(SEED, SEED + repeats):
        torch.manual_seed(seed)
        samples, model = make_noisy_samples(count, noise), DropoutNet(dropout).to(DEVICE)
        train(model, *samples, epochs)
        train_accuracies.append(evaluate(model, *samples))
        test_accuracies.append(evaluate(model, *make_noisy_samples(2000, noise)))
    return train_accuracies, test_accuracies


def judge(plain, dropped):
    """Say whether dropout changed the test accuracy, by more than twice the standard error."""
    gains = [after - before for before, after in zip(plain, dropped, strict=True)]
    error = stdev(gains) / len(gains) ** 0.5
    verdict = "no difference"
    if abs(mean(gains)) > 2 * error:
        verdict = "dropout helps" if mean(gains) > 0 else "dropout hurts"
    print(f"  dropout changes the test by {mean(gains):+.1%} ± {2 * error:.1%}: {verdict}")


# PICTURE: solid is the test, pale is what the training claimed.
def draw(results):
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for place, (train_accuracies, test_accuracies) in enumerate(results.values()):
        colour = f"C{place % 2}"
        axes.bar(place, mean(train_accuracies), color=colour, alpha=0.3)
        axes.bar(place, mean(test_accuracies), yerr=stdev(test_accuracies), color=colour)
    axes.set_xticks(range(len(results)), [f"{task}\n{name}" for task, name in results], fontsize=6)
    axes.set_ylabel("accuracy: pale train, solid test")
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
    results = {}
    for task, (count, noise) in tqdm(TASKS.items(), leave=False, disable=None):
        tqdm.write(task)
        for name, dropout in {"no dropout": 0.0, "dropout": DROPOUT}.items():
            outcome = measure(
                count, noise, dropout, 30 if quick else EPOCHS, 3 if quick else REPEATS
            )
            results[task, name] = outcome
            train_mean, test_mean = mean(outcome[0]), mean(outcome[1])
            tqdm.write(
                f"  {name:10} train {train_mean:6.1%} | test {test_mean:6.1%} "
                f"± {stdev(outcome[1]):.1%} | gap {train_mean - test_mean:6.1%}"
            )
        judge(results[task, "no dropout"][1], results[task, "dropout"][1])
    models = ROOT / ("models/quick" if quick else "models")
    save(draw(results).savefig, models / "plots" / "03_overfitting_dropout.png")
    noise_train, noise_test = map(mean, results["20 coin tosses", "no dropout"])
    dropout_train = mean(results["200 of the rule", "dropout"][0])
    rule_test = mean(results["200 of the rule", "no dropout"][1])
    print(
        f"Result: noise_train = {noise_train:.1%}, dropout_train = {dropout_train:.1%}, "
        f"noise_test = {noise_test:.1%}, rule_test = {rule_test:.1%}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 30 epochs, 3 repeats")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
