"""Transfer learning: teach a trained network a new task by training only its last layer.

Run:    uv run src/advanced/01_transfer_learning.py
Needs:  models/mnist_cnn.pth
Makes:  nothing
Expect: test_accuracy >= 99.5%, trainable = 325, data = MNIST

All layers except the last turn an image into 64 numbers, its features. We freeze these layers, so
the features of an image never change. We compute them once and train a new last layer on them.
"""

import argparse
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
def load_classes(train, limit=None):
    """Return images [N, 1, 28, 28] in 0..1 and labels [N] of the new task, on the device."""
    dataset = datasets.MNIST(ROOT / "data", train=train)
    wanted = dataset.targets < CLASSES
    images = dataset.data[wanted][:limit].unsqueeze(1) / 255  # [N, 28, 28] -> [N, 1, 28, 28]
    return images.to(DEVICE), dataset.targets[wanted][:limit].to(DEVICE)


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
    except Exception as error:  # no such file, or it does not hold this network's weights
        sys.exit(f"Cannot load {path} ({type(error).__name__}). Make it with: uv run {lesson}")
    return model.eval()


# TRAIN: only the parameters that are not frozen get a gradient, so only they change.
def train(model, inputs, labels, epochs):
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        batches = torch.randperm(len(labels), device=DEVICE).split(BATCH_SIZE)
        for batch in batches:
            loss = F.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
        print(f"Epoch {epoch}/{epochs} | Loss: {total_loss / len(batches):.4f}")


def main(quick=False):
    torch.manual_seed(SEED)
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    images, labels = load_classes(train=True, limit=2000 if quick else None)
    test_images, test_labels = load_classes(train=False)
    path = ROOT / ("models/quick" if quick else "models") / "mnist_cnn.pth"
    lesson = "src/intermediate/02_cnn.py" + (" --quick" if quick else "")
    model = load(CNN().to(DEVICE, memory_format=torch.channels_last), path, lesson)
    epochs = 1 if quick else EPOCHS

    old_layer = model.fc2
    model.fc2 = nn.Identity()  # returns its input: the 64 features
    model.requires_grad_(False)  # freezes all layers that are left
    test_features = torch.cat([model(chunk) for chunk in test_images.split(250)])  # [N, 64]

    new_layer = nn.Linear(64, CLASSES, device=DEVICE)
    start = time.perf_counter()
    features = torch.cat([model(chunk) for chunk in images.split(250)])
    print(f"Images {list(images.shape)} -> features {list(features.shape)}, stored")
    train(new_layer, features, labels, epochs)
    seconds = time.perf_counter() - start

    print("For comparison, without stored features:")
    whole = nn.Sequential(model, nn.Linear(64, CLASSES, device=DEVICE))
    start = time.perf_counter()
    train(whole, images, labels, epochs)
    gain = (time.perf_counter() - start) / seconds

    # The old layer knows these digits, too. Of its ten logits, only the first five count.
    accuracy = (new_layer(test_features).argmax(dim=1) == test_labels).float().mean()
    old_answers = old_layer(test_features)[:, :CLASSES].argmax(dim=1)
    old_accuracy = (old_answers == test_labels).float().mean()
    print(f"Test accuracy: new layer {accuracy:.2%}, old layer {old_accuracy:.2%}")
    count = sum(parameter.numel() for parameter in new_layer.parameters())
    result = f"test_accuracy = {accuracy:.2%}, trainable = {count}, gain_by_storing = {gain:.2f}"
    print(f"Result: {result}, data = {(ROOT / 'data/MNIST/SOURCE').read_text()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except subprocess.CalledProcessError:  # get_data.py has said why
        sys.exit(1)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
