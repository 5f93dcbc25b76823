"""MNIST: train a fully connected network to read handwritten digits, batch by batch.

Run:    uv run src/basics/09_mnist.py
Needs:  nothing
Makes:  nothing
Expect: test_accuracy >= 97.5%, parameters = 109,386, data = MNIST

MNIST has 60,000 images to learn from and 10,000 others for the test. A step with all of them would
change the weights only once. So a DataLoader shuffles the images and returns 64 at a time: this is
a batch. The network makes one training step per batch. One pass over all batches is an epoch.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 5
BATCH_SIZE = 64
LEARNING_RATE = 7e-3  # in the first epoch: each epoch has half the rate of the one before
SEED = 42


# DATA: a data set returns one image and its label for each index.
def make_dataset(train):
    """Return a data set of images [1, 28, 28] in 0..1 and their labels."""
    mnist = datasets.MNIST(ROOT / "data", train=train)
    images = mnist.data.unsqueeze(1) / 255  # [N, 28, 28], 0..255 -> [N, 1, 28, 28], 0..1
    return TensorDataset(images, mnist.targets)


# MODEL: a multi-layer perceptron (MLP). The 28 x 28 pixels become one row of 784 numbers.
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


# TRAIN: cross-entropy applies softmax itself, so the network returns logits.
def train(model, loader, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        for images, labels in tqdm(loader, f"Epoch {epoch}", leave=False, disable=None):
            logits = model(images.to(DEVICE))  # [64, 1, 28, 28] -> [64, 10]
            loss = F.cross_entropy(logits, labels.to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        schedule.step()
        print(f"Epoch {epoch}/{epochs} | Loss: {total_loss / len(loader):.4f}")


# EVALUATE: use the test images once, after training.
@torch.inference_mode()
def evaluate(model, images, labels):
    model.eval()  # training is over: this matters to layers such as dropout (intermediate/03)
    predicted = model(images.to(DEVICE)).argmax(dim=1)  # [N]: the digit with the highest logit
    return (predicted == labels.to(DEVICE)).sum().item()


def main(quick=False):
    torch.manual_seed(SEED)
    # This script puts MNIST into data/ if it is not there.
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    dataset = make_dataset(train=True)
    if quick:
        dataset = Subset(dataset, range(2000))
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True)
    images, labels = next(iter(loader))
    print(f"One epoch: {len(dataset):,} images in {len(loader)} batches")
    print(f"One batch: images {tuple(images.shape)}, labels {tuple(labels.shape)}")
    model = MLP().to(DEVICE)
    train(model, loader, epochs=1 if quick else EPOCHS)

    images, labels = make_dataset(train=False).tensors
    correct = evaluate(model, images, labels)
    print(f"Correct: {correct:,} of {len(images):,} test images")
    accuracy = correct / len(images)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = (ROOT / "data/MNIST/SOURCE").read_text()
    print(f"Result: test_accuracy = {accuracy:.2%}, parameters = {parameters:,}, data = {source}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test with 2,000 images")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except subprocess.CalledProcessError:  # get_data.py has said why
        sys.exit(1)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
