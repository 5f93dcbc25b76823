"""Inference pipeline: go from any picture of a digit to an answer, and survive the bad ones.

Run:    uv run src/advanced/03_inference_pipeline.py
Needs:  models/mnist_cnn.pth
Makes:  nothing
Expect: test_accuracy >= 98.5 %, scan_accuracy >= 95 %, refused = 2, data = MNIST

A network reads only what looks like its training images. So everything is first made to look like
one: a single digit, light on dark, 20 pixels large and centred. What cannot be read is named.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
INK, SIDE, CONTRAST = 0.5, 20, 0.05  # darker is ink; the ink's side in pixels; less is blank


# DATA: the test images that intermediate/02_cnn.py used, or small ones of another size.
def read_images(name, part):
    """Read images [N, 1, 28, 28] in 0..1 and labels [N]; OSError or ValueError if the files are bad."""
    file = ROOT / "data" / name / "raw" / part
    labels = np.fromfile(f"{file}-labels-idx1-ubyte", np.uint8)[8:]  # behind the header
    images = np.fromfile(f"{file}-images-idx3-ubyte", np.uint8)[16:].reshape(len(labels), 1, 28, 28)
    if not len(labels):
        raise ValueError(f"{file} is empty")
    return torch.from_numpy(images).float().div_(255), torch.from_numpy(labels).long()


def read_test_digits():
    try:
        return *read_images("MNIST", "t10k"), "MNIST"
    except (OSError, ValueError):
        print("No MNIST in data/ (uv run src/basics/09_mnist.py brings it): small digits stand in")
        from sklearn.datasets import load_digits

        digits = load_digits()
        return digits.images[1437:] / 16, torch.tensor(digits.target[1437:]), "scikit-learn digits"


# PREPARE: a path, a PIL image, an array or a tensor becomes what MNIST's makers made of their scans.
def to_gray(image):
    """Return an image's gray values [H, W], from whatever kind and mode it has."""
    if isinstance(image, str | os.PathLike):
        with Image.open(image) as file:
            return to_gray(ImageOps.exif_transpose(file))  # turned as the camera was held
    if isinstance(image, torch.Tensor):
        image = image.detach().float().cpu()
    if isinstance(image, Image.Image) and not image.mode.startswith(("I", "F")):  # up to 8 bits
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    values = np.asarray(image, dtype=np.float32)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):  # channels first, as tensors have them
        values = np.moveaxis(values, 0, 2)
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] not in (1, 3, 4) or values.size == 0:
        raise ValueError(f"no image has the shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    gray = values[..., :3].mean(axis=2)
    if values.shape[2] == 4 and values[..., 3].any():  # seen through: lay paper under the ink
        alpha = values[..., 3] / values[..., 3].max()
        ink, white = np.average(gray, weights=alpha), values.max()
        paper = ink if alpha.mean() > 0.5 else 0 if ink > white / 2 else white
        gray = gray * alpha + paper * (1 - alpha)
    return gray


def fit(gray):
    """Return gray values [H, W] as a tensor [28, 28]: ink 1, paper 0, as MNIST places its digits."""
    low, high = gray.min(), gray.max()
    if high - low <= CONTRAST * max(abs(low), abs(high)):
        raise ValueError("it is blank")
    gray = torch.from_numpy((gray - low) / (high - low))
    paper = torch.cat([gray[0], gray[-1], gray[:, 0], gray[:, -1]]).median()  # the border's gray
    if paper > 0.5:  # dark on light
        gray, paper = 1 - gray, 1 - paper
    gray = ((gray - paper) / (1 - paper)).clamp(min=0)
    if gray.shape == (28, 28):
        return gray
    rows, columns = [(gray > INK).any(dim=dim).nonzero().flatten() for dim in (1, 0)]
    gray = gray[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # the ink only
    size = [max(1, round(SIDE * side / max(gray.shape))) for side in gray.shape]  # never stretched
    gray = F.interpolate(gray[None, None], size, mode="bilinear", antialias=True)[0, 0]
    corner = []
    for axis, side in enumerate(size):  # the centre of mass goes to the middle, if there is room
        middle = gray.sum(dim=1 - axis) @ torch.arange(side, dtype=torch.float32) / gray.sum()
        corner.append(min(max(round(14 - middle.item()), 0), 28 - side))
    return F.pad(gray, (corner[1], 28 - size[1] - corner[1], corner[0], 28 - size[0] - corner[0]))


def prepare(images):
    """Return the images as one tensor [N, 1, 28, 28], and {place: sentence} for the bad ones."""
    batch, problems = torch.zeros(len(images), 1, 28, 28), {}
    for place, image in enumerate(images):
        try:
            batch[place, 0] = fit(to_gray(image))
        except Exception as error:  # there are as many ways to be bad as there are formats
            name = image if isinstance(image, str | os.PathLike) else f"Image {place + 1}"
            problems[place] = f"{name} cannot be read: {error}"
    return batch, problems


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


# PREDICT: a class that others import raises its errors, and leaves it to them to exit.
class MNISTInferencePipeline:
    def __init__(self, model_path):
        self.model = CNN().to(DEVICE)
        try:
            self.model.load_state_dict(torch.load(model_path, DEVICE, weights_only=True))
        except Exception as error:  # missing, damaged, or another network's
            problem = f"{model_path} cannot be used ({type(error).__name__}). Make it with: "
            flag = " --quick" if Path(model_path).parent.name == "quick" else ""
            raise ValueError(f"{problem}uv run src/intermediate/02_cnn.py{flag}") from error
        self.model.eval()
        print(f"Inference pipeline ready | device: {DEVICE}")

    def predict(self, image):
        """Return {"digit", "confidence", "all_probs"}; ValueError if the image cannot be read."""
        result = self.predict_batch([image])[0]
        if "error" in result:
            raise ValueError(result["error"])
        return result

    @torch.inference_mode()
    def predict_batch(self, images):
        """Return such a dictionary for each image; a bad one's has the reason under "error"."""
        batch, problems = prepare(images)
        chunks = [self.model(chunk.to(DEVICE)).softmax(dim=1) for chunk in batch.split(1000)]
        return [
            {"digit": None, "confidence": 0.0, "all_probs": [], "error": problems[place]}
            if place in problems
            else {"digit": row.index(max(row)), "confidence": max(row), "all_probs": row}
            for place, row in enumerate(torch.cat(chunks).tolist())
        ]


# TRY: a digit as a scanner sees it: five times as large, dark on light, on an oblong page.
def scan(image):
    page = 230 - 200 * np.kron(np.asarray(image).squeeze(), np.ones((5, 5)))
    return Image.fromarray(np.pad(page, ((30, 60), (90, 20)), constant_values=230).astype(np.uint8))


def show(names, results):
    """Print an answer or an error for each image, and return the number of errors."""
    for name, result in zip(names, results, strict=True):
        answer = f"{name}: {result['digit']}, confidence {result['confidence']:.2%}"
        print(" ", result.get("error", answer))
    return sum("error" in result for result in results)


def main(quick=False, image=None):
    models = ROOT / ("models/quick" if quick else "models")
    pipeline = MNISTInferencePipeline(models / "mnist_cnn.pth")
    if image:
        sys.exit(min(show(image, pipeline.predict_batch(image)), 1))
    *data, source = read_test_digits()
    images, labels = (part[:: 20 if quick else 2] for part in data)  # every second
    mixed = [images[0], "missing.png", scan(images[1]), images[2] * np.nan]
    refused = show(["as it is", "no file", "scan", "NaN"], pipeline.predict_batch(mixed))
    words = []
    for name, batch in {"test": images, "scan": [scan(image) for image in images]}.items():
        digits = np.array([result["digit"] for result in pipeline.predict_batch(batch)])
        words.append(f"{name}_accuracy = {np.mean(digits == labels.numpy()):.2%}")
    print(f"Result: {', '.join(words)}, refused = {refused}, data = {source}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 500 images, models/quick/")
    cli.add_argument("--image", nargs="+", metavar="PATH", help="your own files to classify")
    try:
        main(**vars(cli.parse_args()))
    except ValueError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
