"""Convolutional network: train one to recognize handwritten digits.

Run:    uv run src/intermediate/02_cnn.py
Needs:  nothing
Makes:  models/mnist_cnn.pth, models/plots/intermediate-02_cnn.png
Expect: test_accuracy >= 98.5%, parameters = 52,138, data = MNIST

A fully connected network has a separate weight for each of the 784 pixels. A convolution slides one
small filter over the image, so the same filter can detect a stroke anywhere.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision import datasets
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 2
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-2  # the peak: the schedule raises the rate to this value, then lowers it
SEED = 42


# DATA: the images need 188 MB as float32, so we copy them to the device once.
def load_mnist(train):
    """Return images [N, 1, 28, 28] in 0..1 and labels [N], on the device."""
    dataset = datasets.MNIST(ROOT / "data", train=train)
    images = dataset.data.unsqueeze(1).to(DEVICE) / 255  # [N, 28, 28] -> [N, 1, 28, 28]
    return images, dataset.targets.to(DEVICE)


# MODEL: two layers of filters detect strokes, then two linear layers name the digit.
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
        return self.fc2(x)  # [N, 10], a logit (a score before softmax) per digit


# TRAIN: select each batch by its indices. intermediate/04 explains the schedule. This one raises
# the rate for a fifth of all steps. It also could change Adam's averages, which we leave alone.
def train(model, images, labels, epochs):
    steps = epochs * math.ceil(len(images) / BATCH_SIZE)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        batches = torch.randperm(len(images), device=DEVICE).split(BATCH_SIZE)
        for batch in tqdm(batches, f"Epoch {epoch}", leave=False, disable=None):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()  # loss.item() would make Python wait for the GPU
        print(f"Epoch {epoch}/{epochs} | Loss: {total_loss / len(batches):.4f}")


# EVALUATE: use the test images once, after training.
@torch.inference_mode()
def predict(model, images):
    model.eval()  # training is over: this matters to layers such as dropout (intermediate/03)
    return torch.cat([model(chunk).argmax(dim=1) for chunk in images.split(1000)])


# PICTURE: the eight filters of conv1, and sixteen digits that the network gets wrong.
def draw(model, images, labels, predicted):
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots(3, 8, subplot_kw={"xticks": [], "yticks": []}).flatten()
    filters = model.conv1.weight.detach().cpu().numpy()[:, 0]  # [8, 3, 3]
    limit = abs(filters).max()  # one color scale for all filters
    for axis, weights in zip(axes[:8], filters, strict=True):
        axis.imshow(weights, cmap="coolwarm", vmin=-limit, vmax=limit)
    wrong = (predicted != labels).nonzero().flatten()[:16]
    for axis, index in zip(axes[8:], wrong, strict=False):
        axis.imshow(images[index, 0].cpu().numpy(), cmap="gray_r")
        axis.set_title(f"{labels[index]} read as {predicted[index]}", fontsize=8)
    return figure


# SAVE: write a temporary file, then rename it. A crash never leaves half a checkpoint.
def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:  # an open file reports a full disk as OSError
            torch.save(state, file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


def main(quick=False):
    torch.manual_seed(SEED)
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    images, labels = load_mnist(train=True)
    count = 2000 if quick else len(images)
    model = CNN().to(DEVICE, memory_format=torch.channels_last)  # the fastest layout here
    train(model, images[:count], labels[:count], epochs=1 if quick else EPOCHS)

    images, labels = load_mnist(train=False)
    predicted = predict(model, images)
    accuracy = (predicted == labels).float().mean().item()
    models = ROOT / ("models/quick" if quick else "models")
    save(model.state_dict(), models / "mnist_cnn.pth")
    (models / "plots").mkdir(exist_ok=True)
    draw(model, images, labels, predicted).savefig(models / "plots/intermediate-02_cnn.png")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    source = (ROOT / "data/MNIST/SOURCE").read_text()
    print(f"Result: test_accuracy = {accuracy:.2%}, parameters = {parameters:,}, data = {source}")


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
