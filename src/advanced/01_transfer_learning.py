"""Transfer learning: teach a trained network a new task by training only its last layer.

Run:    uv run src/advanced/01_transfer_learning.py
Needs:  models/mnist_cnn.pth
Makes:  models/mnist_transfer.pth
Expect: test_accuracy >= 99.5%, trainable = 325, data = MNIST

All layers except the last turn an image into 64 numbers, its features. We freeze these layers, so
the features of an image never change. We compute them once and train a new last layer on them.
"""

import argparse
import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
CLASSES = 5  # the new task: tell the digits 0 to 4 apart
EPOCHS = 5
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
SEED = 42


# DATA: the images of the new task, from the data set that the network already knows.
def load_mnist(train):
    """Return images [N, 1, 28, 28] in 0..1 and labels [N], on the device."""
    dataset = datasets.MNIST(ROOT / "data", train=train)
    images = dataset.data.unsqueeze(1).to(DEVICE) / 255  # [N, 28, 28] -> [N, 1, 28, 28]
    return images, dataset.targets.to(DEVICE)


def keep_classes(images, labels, limit=None):
    wanted = (labels < CLASSES).nonzero().flatten()[:limit]
    return images[wanted], labels[wanted]


# MODEL: the network of intermediate/02.
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


def load(model, path, lesson):
    """Load the weights in path into model, or stop and name the lesson that makes the file."""
    try:
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    except FileNotFoundError:
        sys.exit(f"{path} is missing. Make it with: uv run {lesson}")
    except Exception as error:  # another network's weights, or another kind of file
        reason = f"does not hold this network's weights ({type(error).__name__})"
        sys.exit(f"{path} {reason}. Make it with: uv run {lesson}")
    return model.eval()


# FEATURES: without its last layer, the network returns the 64 features of an image.
def compute_features(backbone, images):
    return torch.cat([backbone(chunk) for chunk in images.split(250)])  # [N, 64]


# TRAIN: the layer learns from stored features. For comparison, a copy of the layer learns the usual
# way: the frozen layers compute the features of every batch again, in every epoch.
def read_clock():
    torch.get_device_module(DEVICE).synchronize()  # a GPU may still be working
    return time.perf_counter()


def train(backbone, layer, images, labels, epochs):
    """Train the layer and a copy of it. Return the copy, and how many times as long it took."""
    usual_layer = copy.deepcopy(layer)
    optimizer = torch.optim.Adam([*layer.parameters(), *usual_layer.parameters()], LEARNING_RATE)
    start = read_clock()
    features = compute_features(backbone, images)
    seconds = {"stored": read_clock() - start, "usual": 0}
    print(f"Images {list(images.shape)} -> features {list(features.shape)}, stored")
    for epoch in range(1, epochs + 1):
        batches = torch.randperm(len(labels), device=DEVICE).split(BATCH_SIZE)
        for way in ("usual", "stored"):  # take turns, because a machine's speed changes
            start = read_clock()
            total_loss = torch.zeros((), device=DEVICE)
            for batch in batches:
                if way == "stored":
                    logits = layer(features[batch])
                else:
                    logits = usual_layer(backbone(images[batch]))
                loss = F.cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()  # changes only the layer that this loss used
                total_loss += loss.detach()
            seconds[way] += read_clock() - start
        times = f"{seconds['stored']:.2f} s with stored features, {seconds['usual']:.2f} s without"
        print(f"Epoch {epoch}/{epochs} | Loss: {total_loss / len(batches):.4f} | {times}")
    return usual_layer, seconds["usual"] / seconds["stored"]


# EVALUATE: the old layer also knows the digits 0 to 4. How good are its answers?
def evaluate(layer, features, labels):
    predicted = layer(features)[:, :CLASSES].argmax(dim=1)
    return (predicted == labels).float().mean().item()


# SAVE: write a temporary file, then rename it. A crash never leaves half a checkpoint.
def save(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:  # an open file reports a full disk as OSError
            torch.save(model.state_dict(), file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


def main(quick=False):
    torch.manual_seed(SEED)
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    models = ROOT / ("models/quick" if quick else "models")
    lesson = "src/intermediate/02_cnn.py" + (" --quick" if quick else "")
    network = CNN().to(DEVICE, memory_format=torch.channels_last)  # the fastest layout here
    model = load(network, models / "mnist_cnn.pth", lesson)
    images, labels = keep_classes(*load_mnist(train=True), limit=2000 if quick else None)
    test_images, test_labels = keep_classes(*load_mnist(train=False))

    # README: start
    old_layer = model.fc2
    model.fc2 = nn.Identity()  # returns its input: the 64 features
    model.requires_grad_(False)  # freezes all layers that are left
    new_layer = nn.Linear(64, CLASSES, device=DEVICE)
    test_features = compute_features(model, test_images)
    _, gain = train(model, new_layer, images, labels, epochs=1 if quick else EPOCHS)
    model.fc2 = new_layer
    # README: end
    save(model, models / "mnist_transfer.pth")

    accuracy = evaluate(new_layer, test_features, test_labels)
    old_accuracy = evaluate(old_layer, test_features, test_labels)
    print(f"Test accuracy: new layer {accuracy:.2%}, old layer {old_accuracy:.2%}")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = f"test_accuracy = {accuracy:.2%}, trainable = {trainable}"
    source = (ROOT / "data/MNIST/SOURCE").read_text()
    print(f"Result: {result}, gain_over_frozen = {gain:.2f}, data = {source}")


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
