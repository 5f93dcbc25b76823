"""Features once: measure what it saves not to compute again what never changes.

Run:    uv run src/advanced/14_features_once.py
Needs:  nothing
Makes:  nothing
Expect: same_answers >= 99 %

Frozen layers give the same 64 numbers for a picture in every epoch. Training can push every picture
through them in every epoch, or do it once and then train the last layer on a small table.
"""

import argparse
import copy
import math
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
IMAGES, CLASSES, EPOCHS, BATCH_SIZE, LEARNING_RATE = 256, 5, [1, 3, 10], 64, 3e-3


# MODEL: as in intermediate/02_cnn.py.
class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # [N, 8, 14, 14]; pooled first: 4x less to ReLU
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [N, 16, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 64]
        return self.fc2(x)  # [N, 10], one logit per digit


def make_network(freeze):
    model = CNN(CLASSES)
    model.requires_grad_(not freeze)
    model.fc2.requires_grad_(True)
    return model.to(DEVICE, memory_format=torch.channels_last)


# TRAIN: the same loop, on images through the network or on features through the last layer.
def train(model, inputs, labels, epochs):
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=LEARNING_RATE, fused=True)
    for _ in range(epochs):
        for start in range(0, len(labels), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            loss = F.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def train_on_features(model, images, labels, epochs):
    layer, model.fc2 = model.fc2, nn.Identity()  # hands on what it gets: 64 features
    features = torch.cat([model(chunk) for chunk in images.split(1000)])
    model.fc2 = train(layer, features, labels, epochs)
    return model


# CHECK: the same steps either way, so the same network.
def compare_answers(images, labels):
    """Return the share of images that both ways of training give the same class."""
    frozen = make_network(freeze=True)
    other = train_on_features(copy.deepcopy(frozen), images, labels, max(EPOCHS))
    answers = [
        model(images).argmax(dim=1) for model in (train(frozen, images, labels, max(EPOCHS)), other)
    ]
    return (answers[0] == answers[1]).float().mean().item()


# MEASURE: every candidate in turn, so that what disturbs the machine disturbs them all alike.
def time_block(call, count):
    """Return the seconds that each of count calls takes."""
    synchronize = torch.get_device_module(DEVICE).synchronize  # a GPU works on after a call is back
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def time_in_turn(calls, seconds=2.0, rounds=21):
    """Return {name: seconds per call, [rounds]}; each call runs for `seconds` or longer in all."""
    counts = {}
    for name, call in calls.items():  # warm up until it no longer gets faster
        before, now, count = math.inf, time_block(call, 1), 1
        while now < 0.9 * before or now * count < seconds / rounds:
            count = max(count, math.ceil(seconds / rounds / now))
            before, now = now, time_block(call, count)
        counts[name] = count
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_block(call, counts[name]))
    return times


def compare(base, other):
    """Return how many times as fast other is, the bootstrap's 95 % interval of that, and a verdict."""
    base, other = np.array(base), np.array(other)
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))  # Efron 1979
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


# COMPARE: freezing spares the way back through the layers; features spare the way there as well.
def show_speed(free, frozen, images, labels, epochs, seconds, rounds):
    """Print what each way takes, and return how many times faster features are than freezing."""
    calls = {
        "all layers learn": lambda: train(free, images, labels, epochs),
        "frozen": lambda: train(frozen, images, labels, epochs),
        "features once": lambda: train_on_features(frozen, images, labels, epochs),
    }
    times = time_in_turn(calls, seconds, rounds)
    print(f"Epochs: {epochs}, over {len(images)} images")
    for name, values in times.items():
        low, middle, high = np.percentile(values, [25, 50, 75]) * 1e3
        print(f"  {name:16} {middle:6.1f} ms ({low:.1f} to {high:.1f})")
    for name in ("all layers learn", "frozen"):
        ratio, low, high, verdict = compare(times[name], times["features once"])
        print(f"  features against {name}: {ratio:.2f} x ({low:.2f} to {high:.2f}), {verdict}")
    return ratio


def main(quick=False):
    count = 64 if quick else IMAGES
    images = torch.rand(count, 1, 28, 28, device=DEVICE)  # noise takes as long as digits do
    labels = torch.randint(CLASSES, (count,), device=DEVICE)
    same = compare_answers(images, labels)
    print(f"Trained either way, the two networks give {same:.1%} of the images the same class")
    free, frozen = make_network(freeze=False), make_network(freeze=True)
    effort = (0.02, 3) if quick else (2.0, 21)  # seconds for each way, rounds
    gains = [show_speed(free, frozen, images, labels, epochs, *effort) for epochs in EPOCHS]
    print(f"Result: same_answers = {same:.1%}, gain_over_frozen = {gains[-1]:.2f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: few images, short rounds")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
