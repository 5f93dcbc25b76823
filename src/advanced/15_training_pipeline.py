"""Training pipeline: wrap training in a class that another program can import and command.

Run:    uv run src/advanced/15_training_pipeline.py
Needs:  nothing
Makes:  models/mnist_pipeline.pth
Expect: test_accuracy >= 98.5 %, reloaded = identical, data = MNIST

Training and inference are two programs that share one file: advanced/03_inference_pipeline.py reads
what this one saves. Importing a class starts no training; only calling it does.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 2, 64, 1.5e-2, 42


# DATA: as in advanced/01_transfer_learning.py.
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


# TRAIN and SAVE: what must survive between two calls lies in self; errors are for the caller.
class MNISTTrainingPipeline:
    def __init__(self, num_classes=10, lr=LEARNING_RATE):
        self.model = CNN(num_classes).to(DEVICE, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.lr = lr
        print(f"Training pipeline ready | device: {DEVICE}")

    def train(self, epochs=EPOCHS, data=None):
        """Train on data, a pair of images and labels, or else on MNIST; again, to train on."""
        images, labels = (part.to(DEVICE) for part in data or load_local_images()[0])
        steps = epochs * -(-len(labels) // BATCH_SIZE)  # rounded up
        schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, self.lr, total_steps=steps)
        self.model.train()
        for epoch in range(1, epochs + 1):
            total = torch.zeros((), device=DEVICE)
            batches = torch.randperm(len(labels), device=DEVICE).split(BATCH_SIZE)
            for batch in tqdm(batches, f"Epoch {epoch}", leave=False, disable=None):
                loss = F.cross_entropy(self.model(images[batch]), labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                schedule.step()
                total += loss.detach() * len(batch)
            print(f"Epoch {epoch}/{epochs} | Loss: {total.item() / len(labels):.4f}")

    def save(self, path):
        """Write beside path, then rename: see intermediate/01_save_load.py."""
        part = Path(f"{path}.{os.getpid()}.part")
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(self.model.state_dict(), file)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


# EVALUATE: as the inference program will: a new network, with what the file holds.
@torch.inference_mode()
def evaluate(model, images, labels):
    model.eval()
    logits = torch.cat([model(chunk.to(DEVICE)) for chunk in images.split(1000)]).cpu()
    return logits, (logits.argmax(dim=1) == labels).float().mean().item()


def main(quick=False):
    torch.manual_seed(SEED)
    train_data, test_data, source = load_local_images()
    trainer = MNISTTrainingPipeline()
    few = [part[: 2000 if quick else None] for part in train_data]
    trainer.train(1 if quick else EPOCHS, few)
    path = ROOT / ("models/quick" if quick else "models") / "mnist_pipeline.pth"
    try:
        trainer.save(path)
    except (OSError, RuntimeError) as error:
        sys.exit(f"Cannot write {path}: {error}. Make room or mend its permissions.")
    print(f"Saved {path.relative_to(ROOT).as_posix()}")
    reloaded = CNN().to(DEVICE, memory_format=torch.channels_last)
    reloaded.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    expected, _ = evaluate(trainer.model, *test_data)
    logits, accuracy = evaluate(reloaded, *test_data)
    same = "identical" if torch.equal(logits, expected) else "different"
    print(f"Result: test_accuracy = {accuracy:.2%}, reloaded = {same}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 2,000 images, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
