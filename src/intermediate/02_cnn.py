"""Convolutional network: read handwritten digits without losing their shape.

Run:    uv run src/intermediate/02_cnn.py
Needs:  nothing
Makes:  models/mnist_cnn.pth, models/plots/02_cnn.png
Expect: test_accuracy >= 98.5 %, parameters = 52,138, data = MNIST

A flat network sees 784 unrelated numbers. A convolution slides one small filter over the whole
picture, so a stroke learned in one corner is recognised in every other corner.
"""

import argparse
import contextlib
import os
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 2, 64, 1.5e-2, 42


# DATA: as in basics/09_mnist.py.
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


# MODEL: two banks of filters look for strokes, then two linear layers name the digit.
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


@torch.inference_mode()
def show_shapes(model, image):
    print("Input shape:    ", image.shape)
    maps = model.conv1(image)
    print("After conv1:    ", maps.shape)
    print("conv1's filters:", model.conv1.weight.shape)
    print("After pooling:  ", F.max_pool2d(maps, 2).shape)
    print("Output shape:   ", model(image).shape)


# TRAIN: the data are small enough to live on the device, so a batch is one indexing operation.
# The learning rate climbs for a fifth of the steps, then falls to almost 0: see 04_lr_scheduler.py.
def train(model, images, labels, epochs):
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps = epochs * -(-len(images) // BATCH_SIZE)  # rounded up
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2, anneal_strategy="linear"
    )
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=DEVICE)
        batches = torch.randperm(len(images), device=DEVICE).split(BATCH_SIZE)
        for batch in tqdm(batches, f"Epoch {epoch}", leave=False, disable=None):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch)  # loss.item() would make a GPU wait at every step
        print(f"Epoch {epoch}/{epochs} | Loss: {total.item() / len(images):.4f}")


# EVALUATE: the test digits are used once, when training is over.
@torch.inference_mode()
def predict(model, images):
    model.eval()
    return torch.cat([model(chunk).argmax(dim=1) for chunk in images.split(1000)])


# PICTURE: the eight filters that it learned, and sixteen digits that it still gets wrong.
def draw(model, images, labels, predicted):
    wrong = (predicted != labels).nonzero().flatten()[:16]
    figure = Figure(figsize=(8, 4), layout="constrained")
    for place, axes in enumerate(figure.subplots(3, 8).flat):
        axes.axis("off")
        if place < 8:
            axes.imshow(model.conv1.weight[place, 0].detach().cpu().numpy(), cmap="coolwarm")
        elif place - 8 < len(wrong):
            digit = wrong[place - 8]
            axes.imshow(images[digit, 0].cpu().numpy(), cmap="gray_r")
            axes.set_title(f"{labels[digit]} read as {predicted[digit]}", fontsize=8)
    figure.suptitle("The filters of conv1, and digits that it gets wrong", fontsize=10)
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
    train_data, test_data, source = load_images("MNIST", limit=2000 if quick else None)
    model = CNN().to(DEVICE, memory_format=torch.channels_last)  # convolves fastest in this layout
    images, labels = (tensor.to(DEVICE) for tensor in train_data)  # [N, 1, 28, 28], [N]
    show_shapes(model, images[:1])
    train(model, images, labels, epochs=1 if quick else EPOCHS)
    images, labels = (tensor.to(DEVICE) for tensor in test_data)
    predicted = predict(model, images)
    accuracy = (predicted == labels).float().mean().item()
    models = ROOT / ("models/quick" if quick else "models")
    save(lambda file: torch.save(model.state_dict(), file), models / "mnist_cnn.pth")
    save(draw(model, images, labels, predicted).savefig, models / "plots" / "02_cnn.png")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Result: test_accuracy = {accuracy:.2%}, parameters = {parameters:,}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 2,000 images, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
