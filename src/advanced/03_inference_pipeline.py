"""Inference pipeline: train a network in one class, and read any picture of a digit with another.

Run:    uv run src/advanced/03_inference_pipeline.py
Needs:  nothing
Makes:  models/mnist_pipeline.pth
Expect: test_accuracy >= 98.5%, scan_accuracy >= 95%, refused = 2, data = MNIST

A network can only read pictures that look like its training images. So the pipeline first makes
every picture look like an MNIST image: one light digit on black, 20 pixels large and centered.
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision import datasets

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 2
BATCH_SIZE = 64
LEARNING_RATE = 1.5e-2  # the highest rate of the schedule
SEED = 42
SIDE = 20  # the longer side of a digit, in pixels


# DATA AND MODEL: as in intermediate/02.
def load_mnist(train):
    """Return images [N, 1, 28, 28] in 0..1 and labels [N], on the device."""
    dataset = datasets.MNIST(ROOT / "data", train=train)
    images = dataset.data.unsqueeze(1).to(DEVICE) / 255  # [N, 28, 28] -> [N, 1, 28, 28]
    return images, dataset.targets.to(DEVICE)


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


# TRAINING: what must survive from one call to the next is kept in self.
class MNISTTrainingPipeline:
    def __init__(self, lr=LEARNING_RATE):
        self.model = CNN().to(DEVICE, memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.lr = lr

    def train(self, epochs=EPOCHS, data=None):
        """Train on images and labels on DEVICE, or on MNIST. A second call continues."""
        images, labels = data or load_mnist(train=True)
        steps = epochs * math.ceil(len(labels) / BATCH_SIZE)
        schedule = OneCycleLR(self.optimizer, self.lr, steps, cycle_momentum=False)
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(labels), device=DEVICE).split(BATCH_SIZE):
                loss = F.cross_entropy(self.model(images[batch]), labels[batch])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                schedule.step()
            print(f"Epoch {epoch}/{epochs} | Loss of the last batch: {loss:.4f}")

    def save(self, path):
        """Write a temporary file, then rename it. A crash never leaves half a checkpoint."""
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:  # an open file reports a full disk as OSError
                torch.save(self.model.state_dict(), file)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


# PREPARE: turn any picture into what MNIST's authors made of their scans.
def to_gray(image):
    """Return the gray values [H, W] of a PIL image, or of a file."""
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    image = ImageOps.exif_transpose(image)  # turn it as the camera was held
    if image.mode not in ("L", "I", "I;16", "F"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    values = np.atleast_3d(np.asarray(image, dtype=np.float32))  # [H, W, channels]
    gray = values[..., :3].mean(axis=2)  # [H, W]
    if values.shape[2] == 4:
        opacity = values[..., 3] / 255
        if opacity.mean() < 0.5:  # only the digit is opaque
            return opacity
        gray[opacity < 1] = np.median(gray)  # a hole in the page
    return gray


def resize(image, factor):
    """Return an image [1, 1, H, W] in another size."""
    size = [max(1, round(factor * side)) for side in image.shape[2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


def find_paper(image):
    """Return the brightness of the paper: what is dark and narrow, such as a stroke, is filled."""
    reach = max(1, max(image.shape) // 6)
    wide = F.pad(image, [2 * reach] * 4, mode="replicate")  # the paper continues
    lightest = F.max_pool2d(wide, 2 * reach + 1, stride=1)
    return -F.max_pool2d(-lightest, 2 * reach + 1, stride=1)


def fit(gray):
    """Return gray values [H, W] as an image [28, 28] that looks like MNIST: ink 1, paper 0."""
    low, high = gray.min(), gray.max()
    if not high - low > 0.05 * max(abs(low), abs(high)):  # also if a value is not a number
        raise ValueError("it is blank")
    page = torch.from_numpy((gray - low) / (high - low)).float()[None, None]  # [1, 1, H, W]
    small = resize(page, min(1, 40 / max(page.shape)))  # to look for paper and ink
    reach = max(small.shape) // 3
    lightest = F.max_pool2d(small, 2 * reach + 1, stride=1, padding=reach)  # around each pixel
    darkest = -F.max_pool2d(-small, 2 * reach + 1, stride=1, padding=reach)
    darkness = lightest + darkest - 2 * small  # above 0: more like the darkest than the lightest
    if darkness.sum() > darkness[..., 1:-1, 1:-1].sum():  # the border is dark: so is the paper
        page = 1 - page
        small = 1 - small
    paper = find_paper(small).clamp(min=0.1)  # with its shadows
    around = F.avg_pool2d(1 - small / paper, 3, stride=1, padding=1)
    digit = around > 0.2 * around.max()  # a speck has little ink around it
    inked = digit.any(dim=2).nonzero()[:, -1]  # the columns with ink
    if (inked.diff() > 1 + 0.1 * digit.any(dim=3).sum()).any():  # a gap: 10% of the height
        raise ValueError("it seems to show several digits, and the network reads one")
    paper = F.interpolate(paper, page.shape[2:], mode="bilinear")
    ink = (1 - page / paper).clamp(min=0) * F.interpolate(digit.float(), page.shape[2:])
    rows, columns = (ink[0, 0] > 0.4 * ink.max()).nonzero(as_tuple=True)
    ink = ink[..., rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    ink = resize(ink, SIDE / max(ink.shape))[0, 0]
    ink = (ink / ink[ink > 0].quantile(0.9)).clamp(max=1)  # a thin pen has become pale
    height, width = ink.shape
    top = 14 - ink.sum(dim=1) @ torch.arange(height).float() / ink.sum()
    left = 14 - ink.sum(dim=0) @ torch.arange(width).float() / ink.sum()
    top = round(top.clamp(0, 28 - height).item())  # the center of mass comes to the middle
    left = round(left.clamp(0, 28 - width).item())
    return F.pad(ink, (left, 28 - width - left, top, 28 - height - top))


# INFERENCE: a program that uses this class must go on after a bad picture, so it never exits.
class MNISTInferencePipeline:
    def __init__(self, model_path):
        self.model = CNN().to(DEVICE, memory_format=torch.channels_last)
        try:
            self.model.load_state_dict(torch.load(model_path, DEVICE, weights_only=True))
        except Exception as error:  # no such file, or not this network's weights
            problem = f"{model_path} cannot be used ({type(error).__name__}). Train a network with"
            raise ValueError(f"{problem}: uv run src/advanced/03_inference_pipeline.py") from error
        self.model.eval()

    def predict(self, image):
        return self.predict_batch([image])[0]

    @torch.inference_mode()
    def predict_batch(self, images):
        """Return {"digit", "confidence", "all_probs"} or {"digit": None, "error"} for each."""
        results = [{"digit": None} for _ in images]
        batch = torch.zeros(len(images), 1, 28, 28)
        for place, image in enumerate(images):
            try:
                batch[place, 0] = fit(to_gray(image))
            except Exception as error:  # each file format fails in its own way
                name = image if isinstance(image, str | os.PathLike) else f"Image {place + 1}"
                results[place]["error"] = f"{name} cannot be read: {error}"
        logits = torch.cat([self.model(chunk.to(DEVICE)) for chunk in batch.split(250)])
        for result, row in zip(results, logits.softmax(dim=1).tolist(), strict=True):
            if "error" not in result:
                confidence = max(row)
                result.update(digit=row.index(confidence), confidence=confidence, all_probs=row)
        return results


# TRY: a digit as a scanner sees it: five times as large, dark on light, not in the middle.
def scan(image):
    page = 230 - 200 / 255 * np.kron(image, np.ones((5, 5)))
    return Image.fromarray(np.pad(page, ((30, 60), (90, 20)), constant_values=230).astype(np.uint8))


def show_answers(names, results):
    """Print the answer or the error for each image; return the number of errors."""
    for name, result in zip(names, results, strict=True):
        answer = f"{name}: {result['digit']}, confidence {result.get('confidence', 0):.2%}"
        print(" ", result.get("error", answer))
    return sum("error" in result for result in results)


def share_right(results, labels):
    digits = [result["digit"] for result in results]
    return np.mean([digit == label for digit, label in zip(digits, labels, strict=True)])


def main(quick=False, image=None, model=None):
    path = ROOT / ("models/quick" if quick else "models") / "mnist_pipeline.pth"
    if image:
        pipeline = MNISTInferencePipeline(model or path)
        sys.exit(1 if show_answers(image, pipeline.predict_batch(image)) else 0)
    torch.manual_seed(SEED)
    subprocess.run([sys.executable, ROOT / "scripts/get_data.py", "MNIST"], check=True)
    images, labels = load_mnist(train=True)
    count = 2000 if quick else len(labels)
    trainer = MNISTTrainingPipeline()
    trainer.train(1 if quick else EPOCHS, (images[:count], labels[:count]))
    trainer.save(path)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")
    pipeline = MNISTInferencePipeline(path)
    test_set = datasets.MNIST(ROOT / "data", train=False)
    places = range(0, len(test_set), 20 if quick else 4)  # every fourth image
    images = [test_set[place][0] for place in places]
    labels = [test_set[place][1] for place in places]
    scans = [scan(image) for image in images]
    mixed = [images[0], "missing.png", scans[1], Image.new("L", (28, 28))]
    refused = show_answers(["as it is", "no file", "scan", "blank"], pipeline.predict_batch(mixed))
    accuracy = share_right(pipeline.predict_batch(images), labels)
    on_scans = share_right(pipeline.predict_batch(scans), labels)
    result = f"test_accuracy = {accuracy:.2%}, scan_accuracy = {on_scans:.2%}, refused = {refused}"
    print(f"Result: {result}, data = {(ROOT / 'data/MNIST/SOURCE').read_text()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    parser.add_argument("--image", nargs="+", metavar="PATH", help="your own files to read")
    parser.add_argument("--model", metavar="PATH", help="with --image: the weights to use")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.image, arguments.model)
    except subprocess.CalledProcessError:  # get_data.py has said why
        sys.exit(1)
    except ValueError as error:
        sys.exit(str(error))
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
