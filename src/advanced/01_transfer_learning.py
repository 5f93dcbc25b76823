"""Transfer learning: teach a trained network a new task by its last layer alone.

Run:    uv run src/advanced/01_transfer_learning.py
Needs:  models/mnist_cnn.pth
Makes:  models/mnist_transfer.pth
Expect: test_accuracy >= 99.5 %, trainable = 325, data = MNIST

All layers but the last turn a picture into 64 numbers, its features. They are frozen, so the
features of a picture never change: compute them once, then train a tiny layer on them.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CLASSES, EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 5, 3, 64, 3e-3, 42


# DATA: as in basics/09_mnist.py, without the download: the lesson that made the network did it.
def read_images(name, part):
    """Read images [N, 1, 28, 28] in 0..1 and labels [N]; OSError or ValueError if the files are bad."""
    file = ROOT / "data" / name / "raw" / part
    labels = np.fromfile(f"{file}-labels-idx1-ubyte", np.uint8)[8:]  # behind the header
    images = np.fromfile(f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(len(labels), 1, 28, 28)
    if not len(labels):
        raise ValueError(f"{file} is empty")
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()


def read_small_digits():
    """Enlarge scikit-learn's 8 x 8 digits: 1,437 to train on, 42 times over, and 360 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)  # [N, 1, 8, 8]
    images = F.pad(F.interpolate(images, size=20, mode="bilinear"), (4, 4, 4, 4))
    labels = torch.tensor(digits.target)
    train = images[:1437].repeat(42, 1, 1, 1), labels[:1437].repeat(42)
    return train, (images[1437:], labels[1437:])


def load_local_images():
    """Return (images, labels) for training, the same for testing, and the name of the data set."""
    try:
        return read_images("MNIST", "train"), read_images("MNIST", "t10k"), "MNIST"
    except (OSError, ValueError):
        print("No MNIST in data/ (uv run src/basics/09_mnist.py brings it): small digits stand in")
        return *read_small_digits(), "scikit-learn digits"


def keep_classes(images, labels, limit=None):
    """Return the images of the classes 0 to 4, and their labels, on the device."""
    wanted = (labels < CLASSES).nonzero().flatten()[:limit]
    return images[wanted].to(DEVICE), labels[wanted].to(DEVICE)


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


# LOAD: as in intermediate/01_save_load.py.
def load(model, path, command):
    """Load the state_dict in path into model; exit with a sentence that names the command to type."""
    try:
        state = torch.load(path, map_location=DEVICE, weights_only=True)
    except FileNotFoundError:
        sys.exit(f"{path} is missing. Make it with: {command}")
    except Exception as error:  # a damaged file can fail in a dozen ways
        sys.exit(f"{path} is damaged ({type(error).__name__}). This makes a good one: {command}")
    try:
        model.load_state_dict(state)
    except Exception as error:  # other names, other shapes, or no state_dict at all
        sys.exit(
            f"{path} is not this network's ({type(error).__name__}). This makes one that fits: {command}"
        )
    return model.eval()


# FREEZE: Identity hands on what it gets, so without its last layer the network answers in features.
def take_apart(model):
    """Return the network without its last layer, frozen, and that layer."""
    last, model.fc2 = model.fc2, nn.Identity()
    return model.requires_grad_(False), last


# FEATURES: each image goes through the frozen layers once, not once in every epoch.
def compute_features(backbone, images):
    return torch.cat([backbone(chunk) for chunk in images.split(1000)])  # [N, 64]


# TRAIN: the last layer only, on features; the learning rate was chosen on 5,000 images kept back.
def train(layer, features, labels, epochs):
    optimizer = torch.optim.Adam(layer.parameters(), LEARNING_RATE, fused=True)
    for epoch in range(1, epochs + 1):
        total = torch.zeros((), device=DEVICE)
        for batch in torch.randperm(len(labels), device=DEVICE).split(BATCH_SIZE):
            loss = F.cross_entropy(layer(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(batch)
        print(f"Epoch {epoch}/{epochs} | Loss: {total.item() / len(labels):.4f}")


# EVALUATE: the old layer knows these digits, too; asked only for 0 to 4, how good is it?
@torch.inference_mode()
def evaluate(model, old_layer, images, labels):
    model.eval()
    new = (model(images).argmax(dim=1) == labels).float().mean().item()
    model.fc2, layer = old_layer, model.fc2
    old = (model(images)[:, :CLASSES].argmax(dim=1) == labels).float().mean().item()
    model.fc2 = layer
    return new, old


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
    train_data, test_data, source = load_local_images()
    images, labels = keep_classes(*train_data, limit=2000 if quick else None)
    models = ROOT / ("models/quick" if quick else "models")
    command = f"uv run src/intermediate/02_cnn.py{' --quick' if quick else ''}"
    model = load(CNN().to(DEVICE), models / "mnist_cnn.pth", command)
    backbone, old_layer = take_apart(model)
    features = compute_features(backbone, images)
    print(f"Images {tuple(images.shape)} -> features {tuple(features.shape)}, once")
    layer = nn.Linear(64, CLASSES, device=DEVICE)
    train(layer, features, labels, epochs=1 if quick else EPOCHS)
    model.fc2 = layer
    for name, parameter in model.named_parameters():
        state = "trained" if parameter.requires_grad else "frozen"
        print(f"  {name:12} {parameter.numel():6,} parameters, {state}")
    accuracy, before = evaluate(model, old_layer, *keep_classes(*test_data))
    print(f"Test accuracy on digits 0 to 4: {accuracy:.2%}; the old layer's: {before:.2%}")
    save(lambda file: torch.save(model.state_dict(), file), models / "mnist_transfer.pth")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"Result: test_accuracy = {accuracy:.2%}, trainable = {trainable}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 2,000 images, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
