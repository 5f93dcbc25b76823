"""Learning-rate schedules: start with large steps, and end with small ones.

Run:    uv run src/intermediate/04_lr_scheduler.py
Needs:  nothing
Makes:  models/plots/intermediate-04_lr_scheduler.png
Expect: fixed_loss >= 0.015, scheduled_loss <= 0.020, worst_gain >= 1.2

The learning rate sets the size of each training step. Large steps are fast at first, but at the end
they jump over the best weights. The four schedules here change the rate, and end with small steps.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.optim import lr_scheduler

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 20
BATCH_SIZE = 32
LEARNING_RATE = 0.1
REPEATS = 5  # each result is the mean of this many networks, each with its own samples
SEED = 42
SCHEDULES = ["fixed", "StepLR", "ReduceLROnPlateau", "CosineAnnealingLR", "OneCycleLR"]


# SCHEDULE: each object changes the optimizer's learning rate when its step() is called.
def make_schedule(name, optimizer, epochs):
    match name:
        case "StepLR":  # half the rate after every four epochs
            return lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
        case "ReduceLROnPlateau":  # half the rate if the loss has not improved for two epochs
            return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
        case "CosineAnnealingLR":  # along a cosine, almost to zero
            return lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs)
        case "OneCycleLR":  # up, then down; without + 1, the last rate is almost 0
            return lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs + 1)
        case "fixed":  # the same rate in each epoch
            return lr_scheduler.ConstantLR(optimizer, factor=1)


# DATA: four random numbers. Their label is 1 if their sum is positive.
def make_samples(count):
    inputs = torch.randn(count, 4)
    return inputs.to(DEVICE), (inputs.sum(dim=1) > 0).float().to(DEVICE)  # [count, 4], [count]


# TRAIN: the schedule steps once after each epoch. ReduceLROnPlateau looks at the validation loss,
# which is the loss on samples that are used neither for training nor for the test.
def train(model, name, train_data, validation_data, epochs):
    """Train, and return the learning rate of each epoch."""
    inputs, labels = train_data
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = make_schedule(name, optimizer, epochs)
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        for batch in torch.randperm(len(inputs), device=DEVICE).split(BATCH_SIZE):
            loss = F.binary_cross_entropy_with_logits(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if name == "ReduceLROnPlateau":
            schedule.step(evaluate(model, *validation_data))
        else:
            schedule.step()
    return rates


@torch.inference_mode()
def evaluate(model, inputs, labels):
    return F.binary_cross_entropy_with_logits(model(inputs), labels).item()


# MEASURE: each seed gives the same samples and first weights to every schedule.
def measure(name, epochs, repeats):
    """Return the learning rate of each epoch, and the test loss of each network."""
    losses = []
    for seed in range(SEED, SEED + repeats):
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1), nn.Flatten(0)]
        model = nn.Sequential(*layers).to(DEVICE)  # [N, 4] -> [N, 16] -> [N, 1] -> [N], logits
        rates = train(model, name, make_samples(1000), make_samples(500), epochs)
        losses.append(evaluate(model, *make_samples(5000)))
    return rates, losses


# PICTURE: how each schedule moves the learning rate, and the test loss of each network.
def draw(rates, losses):
    figure = Figure(figsize=(8, 3.5), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for name in rates:
        left.plot(range(1, len(rates[name]) + 1), rates[name], ".-")
        right.plot(losses[name], [name] * len(losses[name]), "o", alpha=0.5)
        right.plot(mean(losses[name]), name, "k|", ms=16)
    left.set(title="learning rate", xlabel="epoch")
    right.set(title="test losses, and their mean", xlim=(0, None))
    right.invert_yaxis()
    return figure


def main(quick=False):
    torch.set_num_threads(1)  # these networks are too small to gain from more threads
    rates = {}
    losses = {}
    for name in SCHEDULES:
        rates[name], losses[name] = measure(name, 4 if quick else EPOCHS, 2 if quick else REPEATS)
        first, *_, last = rates[name]
        change = f"rate {first:.4f}, at most {max(rates[name]):.4f}, at the end {last:.4f}"
        spread = f"{mean(losses[name]):.4f} ± {stdev(losses[name]):.4f}"
        print(f"{name:17} | {change} | test loss {spread}")

    plots = ROOT / ("models/quick/plots" if quick else "models/plots")
    plots.mkdir(parents=True, exist_ok=True)
    draw(rates, losses).savefig(plots / "intermediate-04_lr_scheduler.png")
    fixed = mean(losses["fixed"])
    scheduled = [mean(losses[name]) for name in SCHEDULES if name != "fixed"]
    gain = f"scheduled_loss = {mean(scheduled):.4f}, worst_gain = {fixed / max(scheduled):.2f}"
    print(f"Result: fixed_loss = {fixed:.4f}, {gain}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
