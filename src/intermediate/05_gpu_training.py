"""GPU training: put network, images and labels on one device, and deliver images fast enough.

Run:    uv run src/intermediate/05_gpu_training.py
Needs:  nothing
Makes:  nothing
Expect: test_accuracy >= 86%, parameters = 109,386, data = FashionMNIST

The network, the images and the labels must be on the device that computes. If one of them is not,
PyTorch stops with an error. A GPU also has to wait if the CPU prepares the images too slowly.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 5
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WORKERS = 2  # processes that prepare batches while the device computes
SEED = 42


# MODEL: the multi-layer perceptron of basics/09.
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(784, 128)
        self.layer2 = nn.Linear(128, 64)
        self.layer3 = nn.Linear(64, 10)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.relu(self.layer1(x.flatten(1)))  # [N, 784] -> [N, 128]
        x = F.relu(self.layer2(x))  # [N, 64]
        return self.layer3(x)  # [N, 10], one logit per class


# MISTAKES: forget to move one of the three. Without a GPU, the second device is PyTorch's "meta".
def show_mistakes(images, labels):
    device = DEVICE if DEVICE.type != "cpu" else torch.device("meta")
    model = MLP().to(device)
    attempt("network not moved", MLP(), images.to(device))
    attempt("images not moved", model, images)
    attempt("labels not moved", F.cross_entropy, model(images.to(device)), labels)


def attempt(name, function, *arguments):
    try:
        function(*arguments)
    except RuntimeError as error:
        print(f"  {name}: {str(error).splitlines()[0]}")


# LOADING: images per second that reach the device, in four epochs after two that do not count.
def read_all(loader):
    for images, _ in loader:
        images.to(DEVICE, non_blocking=loader.pin_memory)


def compare_loaders(tensors, pictures):
    workers = {"num_workers": WORKERS, "persistent_workers": WORKERS > 0}
    loaders = {
        "tensors, batch_size=1": DataLoader(tensors),
        "tensors, batch_size=512": DataLoader(tensors, 512),
        f"tensors, num_workers={WORKERS}": DataLoader(tensors, 512, **workers),
        "pictures, batch_size=512": DataLoader(pictures, 512),
        f"pictures, num_workers={WORKERS}": DataLoader(pictures, 512, **workers),
    }
    if DEVICE.type == "cuda":  # memory that the GPU can copy from while Python goes on
        loaders["pictures, pin_memory"] = DataLoader(pictures, 512, pin_memory=True, **workers)
    for name, loader in loaders.items():
        timer = Timer("read_all(loader)", globals={"read_all": read_all, "loader": loader})
        print(f"  {name:26} {len(loader.dataset) / timer.timeit(4).mean:9,.0f} images/s")


# TRAIN: the network is on the device already. The images and the labels follow, batch by batch.
def train(model, loader, epochs):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for epoch in range(1, epochs + 1):
        total_loss = 0.0
        for images, labels in loader:
            images = images.to(DEVICE)
            labels = labels.to(DEVICE)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()  # loss.item() would make Python wait for the GPU
        schedule.step()
        print(f"Epoch {epoch}/{epochs} | Loss: {total_loss / len(loader):.4f}")


def main(quick=False):
    torch.manual_seed(SEED)
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "FashionMNIST"], check=True)
    source = (ROOT / "data/FashionMNIST/SOURCE").read_text()
    pictures = FashionMNIST(ROOT / "data", train=True, transform=ToTensor())
    count = 2000 if quick else len(pictures)
    images = pictures.data[:count].unsqueeze(1) / 255  # [N, 28, 28] -> [N, 1, 28, 28]
    tensors = TensorDataset(images, pictures.targets[:count])
    print(f"Training on {DEVICE}. If one of the three is not moved, PyTorch says:")
    show_mistakes(*tensors[:8])
    sample = range(count // 6)
    compare_loaders(Subset(tensors, sample), Subset(pictures, sample))
    model = MLP().to(DEVICE)
    train(model, DataLoader(tensors, BATCH_SIZE, shuffle=True), epochs=1 if quick else EPOCHS)
    test_set = FashionMNIST(ROOT / "data", train=False)
    with torch.inference_mode():
        predicted = model(test_set.data.unsqueeze(1).to(DEVICE) / 255).argmax(dim=1).cpu()
    names = test_set.classes if source == "FashionMNIST" else "0123456789"
    print(f"Sample: {names[test_set.targets[0]]}, predicted: {names[predicted[0]]}")
    accuracy = (predicted == test_set.targets).float().mean().item()
    parameters = sum(parameter.numel() for parameter in model.parameters())
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
