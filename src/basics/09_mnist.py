"""MNIST: read real handwritten digits with a flat network, fed by a DataLoader.

Run:    uv run src/basics/09_mnist.py
Needs:  nothing
Makes:  nothing
Expect: test_accuracy >= 97.5 %, parameters = 109,386, data = MNIST

60,000 images to learn from, 10,000 to be tested on. They no longer go through the network all at
once: a DataLoader shuffles them and hands them out in batches, one training step for each batch.
"""

import argparse
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 5, 64, 7e-3, 42


# DATA: MNIST from data/, else from the network, else the small digits that scikit-learn carries.
def read_images(name, part):
    """Read images [N, 1, 28, 28] in 0..1 and labels [N]; OSError or ValueError if the files are bad."""
    file = ROOT / "data" / name / "raw" / part
    labels = np.fromfile(f"{file}-labels-idx1-ubyte", np.uint8)[8:]  # behind the header
    images = np.fromfile(f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(len(labels), 1, 28, 28)
    if not len(labels):
        raise ValueError(f"{file} is empty")
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()


def download_images(name):
    from torchvision import datasets  # takes seconds to import, so only when there is need

    socket.setdefaulttimeout(10)  # a server that falls silent must not hang the lesson
    (ROOT / "data" / name / "raw").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as folder:  # no half file ever in data/
        getattr(datasets, name)(folder, download=True)  # compares every file with its checksum
        for file in Path(folder, name, "raw").iterdir():
            file.replace(ROOT / "data" / name / "raw" / file.name)


def read_small_digits():
    """Enlarge scikit-learn's 8 x 8 digits: 1,437 to train on, 42 times over, and 360 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # [N, 1, 8, 8]
    images = F.pad(F.interpolate(images, size=20, mode="bilinear"), (4, 4, 4, 4))
    labels = torch.tensor(digits.target)
    train = images[:1437].repeat(42, 1, 1, 1), labels[:1437].repeat(42)
    return train, (images[1437:], labels[1437:])


def load_images(name, limit=None):
    """Return (images, labels) for training, the same for testing, and the name of the data set."""
    try:
        try:
            splits = read_images(name, "train"), read_images(name, "t10k")
        except (OSError, ValueError) as problem:  # not there yet, or damaged
            print(f"{name} is not in data/ ({problem}): downloading it")
            download_images(name)
            splits = read_images(name, "train"), read_images(name, "t10k")
    except Exception as error:  # whatever keeps the data away, the lesson goes on
        print(f"No download ({type(error).__name__}): scikit-learn's digits stand in")
        splits, name = read_small_digits(), "scikit-learn digits"
    train, test = [(images[:limit], labels[:limit]) for images, labels in splits]
    return train, test, name


# MODEL: the image as one row of 784 numbers, then three layers.
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(784, 128)
        self.layer2 = nn.Linear(128, 64)
        self.layer3 = nn.Linear(64, 10)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.relu(self.layer1(x.flatten(1)))  # [N, 784] -> [N, 128]
        x = F.relu(self.layer2(x))  # [N, 64]
        return self.layer3(x)  # [N, 10], one logit per digit


# TRAIN: cross-entropy compares the ten logits with the right digit; it applies softmax itself.
# The steps shrink as the network gets better: each epoch has half the learning rate of the last.
# fused=True updates all parameters in one go; disable=None shows the bar on a terminal only.
def train(model, loader, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for images, labels in tqdm(loader, f"Epoch {epoch}", leave=False, disable=None):
            images, labels = images.to(DEVICE), labels.to(DEVICE)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        schedule.step()
        print(f"Epoch {epoch}/{epochs} | Loss: {total / len(loader):.4f}")


# EVALUATE: the test images are used once, when training is over.
@torch.inference_mode()
def evaluate(model, images, labels):
    model.eval()
    predicted = model(images.to(DEVICE)).argmax(dim=1).cpu()  # the digit with the highest logit
    return (predicted == labels).sum().item()


def main(quick=False):
    torch.manual_seed(SEED)
    train_data, test_data, source = load_images("MNIST", limit=2000 if quick else None)
    # The notes decode and convert every image anew at each visit; these are tensors already.
    loader = DataLoader(TensorDataset(*train_data), BATCH_SIZE, shuffle=True)
    images, labels = next(iter(loader))
    print(f"Training images: {len(train_data[0])}, test images: {len(test_data[0])}")
    print(f"One batch: images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    model = MLP().to(DEVICE)
    train(model, loader, epochs=1 if quick else EPOCHS)
    correct, count = evaluate(model, *test_data), len(test_data[0])
    print(f"Correct: {correct} of {count}")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Result: test_accuracy = {correct / count:.2%}, parameters = {parameters:,}, data = {source}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: one epoch on 2,000 images")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
