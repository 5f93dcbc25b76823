"""Transfer, honestly: find out when a network helps with digits that it has never seen.

Run:    uv run src/advanced/09_transfer_honestly.py
Needs:  nothing
Makes:  models/plots/09_transfer_honestly.png
Expect: frozen_1000 <= -2 %, tuned_10 >= 0.5 %, data = MNIST

A network that was trained on all ten digits proves nothing by telling five of them apart. This one
learns 0 to 4 only, and then has to read 5 to 9 after 10, 100 or 1,000 examples of each.
"""

import argparse
import contextlib
import copy
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
TRIALS, BATCH_SIZE, SEED = 5, 50, 42
SLOW, FAST = [2e-3, 6e-3, 2e-2], [2e-2, 6e-2, 2e-1]  # learning rates to choose from
STEPS = {10: 60, 100: 120, 1000: 300}  # so many training steps for so many images of each digit
SCRATCH = "from scratch"
WAYS = {SCRATCH: SLOW, "last layer only": FAST, "all layers": SLOW}


# DATA: MNIST as in basics/09_mnist.py; small digits once each, so that none is in two splits.
def read_images(name, part):
    """Read images [N, 1, 28, 28] in 0..1 and labels [N]; OSError or ValueError if the files are bad."""
    file = ROOT / "data" / name / "raw" / part
    labels = np.fromfile(f"{file}-labels-idx1-ubyte", np.uint8)[8:]  # behind the header
    images = np.fromfile(f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(len(labels), 1, 28, 28)
    if not len(labels):
        raise ValueError(f"{file} is empty")
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()


def read_digits():
    """Return (images, labels) to learn from, the same to test on, and the name of the data set."""
    try:
        return read_images("MNIST", "train"), read_images("MNIST", "t10k"), "MNIST"
    except (OSError, ValueError):
        print("No MNIST in data/ (uv run src/basics/09_mnist.py brings it): small digits stand in")
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # [N, 1, 8, 8]
        images = F.pad(F.interpolate(images, size=20, mode="bilinear"), (4, 4, 4, 4))
        labels, name = torch.tensor(digits.target), "scikit-learn digits"
        return (images[:1437], labels[:1437]), (images[1437:], labels[1437:]), name


def part_in_two(images, labels):
    """Return the digits 0 to 4, and the digits 5 to 9 as classes 0 to 4."""
    images, labels, new = images.to(DEVICE), labels.to(DEVICE), (labels >= 5).to(DEVICE)
    return (images[~new], labels[~new]), (images[new], labels[new] - 5)


def draw_sample(images, labels, count):
    """Return count images of each class, drawn at random; fewer where there are not so many."""
    places = [(labels == digit).nonzero().flatten() for digit in range(5)]
    picks = torch.cat([place[torch.randperm(len(place))[:count]] for place in places])
    return images[picks], labels[picks]


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


# TRAIN: three ways to begin, then one loop for all.
def begin(way, backbone):
    model = CNN() if way == SCRATCH else copy.deepcopy(backbone)
    if way == "last layer only":
        model.requires_grad_(False)
    model.fc2 = nn.Linear(64, 5)
    return model.to(DEVICE, memory_format=torch.channels_last)


def train(model, images, labels, rate, steps):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for batch in torch.randint(len(labels), (steps, BATCH_SIZE), device=DEVICE):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


# EVALUATE: a rate is chosen on validation images; the test images only see what came of it.
@torch.inference_mode()
def evaluate(model, images, labels):
    predicted = torch.cat([model(chunk).argmax(dim=1) for chunk in images.split(1000)])
    return (predicted == labels).float().mean().item()


def compare_ways(backbone, count, steps, pool, validation, test, trials):
    """Return {way: test accuracy in each trial}; in a trial all ways learn the same images."""
    sample, rates, scores = draw_sample(*pool, count), {}, {way: [] for way in WAYS}
    for way, choice in WAYS.items():
        models = {rate: train(begin(way, backbone), *sample, rate, steps) for rate in choice}
        rates[way] = max(models, key=lambda rate: evaluate(models[rate], *validation))
    for _ in range(trials):
        sample = draw_sample(*pool, count)
        for way in WAYS:
            model = train(begin(way, backbone), *sample, rates[way], steps)
            scores[way].append(evaluate(model, *test))
    tqdm.write(f"{len(sample[1]) // 5} of each")
    for way, values in scores.items():
        gains = [value - other for value, other in zip(values, scores[SCRATCH], strict=True)]
        verdict = "better" if min(gains) > 0 else "worse" if max(gains) < 0 else "undecided"
        spread = f"{np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})"
        against = "" if way == SCRATCH else f" | {np.mean(gains):+.1%} {verdict}"
        tqdm.write(f"  {way:15} {spread}, rate {rates[way]}{against}")
    return scores


# PICTURE: every trial is a dot, every mean a corner of the line.
def draw(results):
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for way, colour in zip(WAYS, ["C0", "C3", "C2"], strict=True):
        scores = [trials[way] for trials in results.values()]  # [counts, trials]
        axes.plot(list(results), scores, ".", color=colour, alpha=0.4)
        axes.plot(list(results), np.mean(scores, axis=1), color=colour, label=way)
    axes.set(xscale="log", xlabel="images of each digit", ylabel="test accuracy, digits 5 to 9")
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
    torch.manual_seed(SEED)
    *splits, source = read_digits()
    (old, pool), (old_test, test) = (part_in_two(*part) for part in splits)
    share, trials = (20, 1) if quick else (1, TRIALS)
    cut, test = len(pool[1]) // 10 // share, [part[: len(part) // share] for part in test]
    validation, pool = zip(*(part.tensor_split([cut]) for part in pool), strict=True)
    backbone = train(begin(SCRATCH, None), *old, rate=1e-2, steps=900 // share)
    print(f"It learned 0 to 4: {evaluate(backbone, *old_test):.1%} right. Now 5 to 9:")
    results = {
        count: compare_ways(backbone, count, steps // share, pool, validation, test, trials)
        for count, steps in tqdm(STEPS.items(), leave=False, disable=None)
    }
    models = ROOT / ("models/quick" if quick else "models")
    save(draw(results).savefig, models / "plots" / "09_transfer_honestly.png")
    gains = [
        f"{name}_{count} = {np.mean(scores[way]) - np.mean(scores[SCRATCH]):+.1%}"
        for name, way in (("frozen", "last layer only"), ("tuned", "all layers"))
        for count, scores in results.items()
    ]
    print(f"Result: {', '.join(gains)}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: few steps, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
