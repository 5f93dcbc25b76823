"""Learning rate schedulers: take big steps while far from the answer, small ones when near.

Run:    uv run src/intermediate/04_lr_scheduler.py
Needs:  nothing
Makes:  models/plots/04_lr_scheduler.png
Expect: fixed_loss >= 0.015, scheduled_loss <= 0.020, worst_gain >= 1.2

A fixed learning rate is either too small at the start or too large at the end. A scheduler changes
it after every epoch; four of them and a fixed rate get the same task, network and budget here.
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
from torch.optim import lr_scheduler
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, BATCH_SIZE, LEARNING_RATE, REPEATS, SEED = 20, 32, 0.1, 5, 42
SCHEDULES = {
    "fixed": lambda optimizer, epochs: lr_scheduler.ConstantLR(optimizer, factor=1),
    "StepLR": lambda optimizer, epochs: lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5),
    "ReduceLROnPlateau": lambda optimizer, epochs: lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=1
    ),
    "CosineAnnealingLR": lambda optimizer, epochs: lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=epochs
    ),
    "OneCycleLR": lambda optimizer, epochs: lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs + 1
    ),
}


# DATA: four numbers to a sample; the label says whether their sum is above zero.
def make_samples(count):
    """Return inputs [count, 4] and labels [count]."""
    inputs = torch.randn(count, 4)
    return inputs.to(DEVICE), (inputs.sum(dim=1) > 0).float().to(DEVICE)


# MODEL: small, for the learning rate is all that this lesson is about.
class SumNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 16)
        self.fc2 = nn.Linear(16, 1)

    def forward(self, x):  # [N, 4]
        return self.fc2(F.relu(self.fc1(x))).squeeze(1)  # [N, 16] -> [N], logits


# TRAIN: the scheduler steps once after each epoch; OneCycleLR, too, which elsewhere steps each batch. ReduceLROnPlateau wants to see a loss: one on
# samples that are neither trained nor tested on.
def train(model, make_schedule, train_data, validation_data, epochs):
    """Train and return the learning rate of every epoch."""
    inputs, labels = train_data
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = make_schedule(optimizer, epochs)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        for batch in torch.randperm(len(inputs), device=DEVICE).split(BATCH_SIZE):
            loss = F.binary_cross_entropy_with_logits(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(evaluate(model, *validation_data)[0])
        else:
            schedule.step()
    return rates


@torch.inference_mode()
def evaluate(model, inputs, labels):
    """Return the loss and the accuracy."""
    logits = model(inputs)
    loss = F.binary_cross_entropy_with_logits(logits, labels)
    return loss.item(), ((logits > 0) == labels).float().mean().item()


# COMPARE: the same data and the same first weights for each schedule, REPEATS times over.
def measure(make_schedule, epochs, repeats):
    """Return the last run's learning rates, and the test losses and accuracies [repeats]."""
    losses, accuracies = [], []
    for seed in range(SEED, SEED + repeats):
        torch.manual_seed(seed)
        train_data, validation_data, test_data = map(make_samples, (1000, 500, 5000))
        model = SumNet().to(DEVICE)
        rates = train(model, make_schedule, train_data, validation_data, epochs)
        loss, accuracy = evaluate(model, *test_data)
        losses.append(loss)
        accuracies.append(accuracy)
    return rates, losses, accuracies


# PICTURE: how each schedule moves the learning rate.
def draw(rates):
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in rates.items():
        axes.plot(range(1, len(values) + 1), values, label=name, marker=".")
    axes.set(xlabel="epoch", ylabel="learning rate")
    axes.legend()
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
    epochs, repeats = (4, 2) if quick else (EPOCHS, REPEATS)
    rates, losses = {}, {}
    for name, make_schedule in tqdm(SCHEDULES.items(), leave=False, disable=None):
        rates[name], losses[name], accuracies = measure(make_schedule, epochs, repeats)
        tqdm.write(
            f"{name:17} | learning rate {rates[name][0]:.4f} to {rates[name][-1]:.4f} | test loss "
            f"{mean(losses[name]):.4f} ± {stdev(losses[name]):.4f} | accuracy {mean(accuracies):.1%}"
        )
    models = ROOT / ("models/quick" if quick else "models")
    save(draw(rates).savefig, models / "plots" / "04_lr_scheduler.png")
    fixed, *scheduled = map(mean, losses.values())
    print(
        f"Result: fixed_loss = {fixed:.4f}, scheduled_loss = {mean(scheduled):.4f}, "
        f"worst_gain = {fixed / max(scheduled):.2f}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 4 epochs, 2 repeats")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
