"""GPU training: move the right three things to the device, and feed it fast enough.

Run:    uv run src/intermediate/05_gpu_training.py
Needs:  nothing
Makes:  nothing
Expect: test_accuracy >= 86 %, parameters = 109,386, data = FashionMNIST

The model, the images and the labels must all live on the device that computes. Then the question is
who waits for whom: a GPU that is fed too slowly spends its life waiting for the CPU.
"""

import argparse
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, BATCH_SIZE, LEARNING_RATE, WORKERS, SEED = 5, 64, 3e-3, 2, 42


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


# MODEL: as in basics/09_mnist.py.
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


# MISTAKES: forget one of the three, and read what PyTorch says.
def show_mistakes(images, labels):
    # Without a GPU the "meta" device plays its part: it knows shapes but holds no numbers.
    device = DEVICE if DEVICE.type != "cpu" else torch.device("meta")
    model, moved = MLP().to(device), images.to(device)
    mistakes = {
        "model left behind": lambda: MLP()(moved),
        "images left behind": lambda: model(images),
        "labels left behind": lambda: F.cross_entropy(model(moved), labels),
        "labels left behind in the test": lambda: model(moved).argmax(dim=1) == labels,
    }
    for name, mistake in mistakes.items():
        try:
            mistake()
        except RuntimeError as error:
            print(f"  {name}: {str(error).splitlines()[0]}")


# MEASURE: how many images a second each way of loading brings to the device.
class FlippedImages(TensorDataset):
    """One image at a time, flipped and shifted at random: work that the CPU does for every image."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return image.roll(torch.randint(-2, 3, (2,)).tolist(), dims=(1, 2)), label


def measure(loader, non_blocking=False):
    """Return the images per second of five passes, sorted, after one that does not count."""
    rates = []
    for _ in range(6):
        start = time.perf_counter()
        for batch in loader:
            [tensor.to(DEVICE, non_blocking=non_blocking) for tensor in batch]
        if DEVICE.type != "cpu":  # a GPU works on by itself: wait for it before reading the clock
            torch.accelerator.synchronize()
        rates.append(len(loader.dataset) / (time.perf_counter() - start))
    return sorted(rates[1:])


def compare_loaders(images, labels):
    tensors, flipped = TensorDataset(images, labels), FlippedImages(images, labels)
    workers = {"num_workers": WORKERS, "persistent_workers": WORKERS > 0}
    settings = {
        "tensors, batch_size=1": (tensors, 1, {}),
        "tensors, batch_size=512": (tensors, 512, {}),
        f"  with num_workers={WORKERS}": (tensors, 512, workers),
        "flipped, batch_size=512": (flipped, 512, {}),
        f"  with num_workers={WORKERS} too": (flipped, 512, workers),
        "  and pin_memory, non_blocking": (flipped, 512, {**workers, "pin_memory": True}),
    }
    for name, (data, batch_size, options) in settings.items():
        pinned = "pin_memory" in options
        if pinned and DEVICE.type != "cuda":
            print(f"  {name:31} needs a CUDA device: not measured")
            continue
        rates = measure(DataLoader(data, batch_size, shuffle=True, **options), non_blocking=pinned)
        print(f"  {name:31} {rates[2]:9,.0f} images/s ({rates[0]:,.0f} to {rates[-1]:,.0f})")


# TRAIN: the model has moved already; images and labels follow, batch by batch.
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


# EVALUATE: images and labels go to the device here too.
@torch.inference_mode()
def evaluate(model, images, labels):
    return (model(images.to(DEVICE)).argmax(dim=1) == labels.to(DEVICE)).float().mean().item()


def main(quick=False):
    torch.manual_seed(SEED)
    train_data, test_data, source = load_images("FashionMNIST", limit=2000 if quick else None)
    print(f"Training on {DEVICE}. Forget to move one of the three, and PyTorch says:")
    show_mistakes(*(tensor[:8] for tensor in train_data))
    print("How fast the images arrive")
    compare_loaders(*(tensor[:10_000] for tensor in train_data))
    model = MLP().to(DEVICE)
    loader = DataLoader(TensorDataset(*train_data), BATCH_SIZE, shuffle=True)
    train(model, loader, epochs=1 if quick else EPOCHS)
    accuracy = evaluate(model, *test_data)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Result: test_accuracy = {accuracy:.2%}, parameters = {parameters:,}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: one epoch on 2,000 images")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
