"""Choose learning rate and batch size of the two MNIST lessons, without the test images.

    uv run scripts/choose_settings.py

Each setting trains three times on the first 50,000 training images, and is judged by its mean
accuracy on the other 10,000. The records keep what was tried, and a test compares the lessons
with it.
"""

import contextlib
import importlib.util
import itertools
import os

import torch
from course import ROOT, keep
from torch.utils.data import DataLoader, Subset

LESSONS = ["basics/09_mnist", "intermediate/02_cnn"]
LEARNING_RATES = [3e-3, 7e-3, 1.5e-2, 3e-2]
BATCH_SIZES = [64, 128]
SEEDS = 3
TRAINING = 50_000  # images; the rest is for validation


def load_lesson(name):
    spec = importlib.util.spec_from_file_location("lesson", ROOT / "src" / f"{name}.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def judge(lesson, seed):
    """Train once as the lesson does; return the accuracy on the validation images."""
    torch.manual_seed(seed)
    if hasattr(lesson, "CNN"):
        images, labels = lesson.load_mnist(train=True)
        model = lesson.CNN().to(lesson.DEVICE, memory_format=torch.channels_last)
        lesson.train(model, images[:TRAINING], labels[:TRAINING], lesson.EPOCHS)
        correct = (lesson.predict(model, images[TRAINING:]) == labels[TRAINING:]).sum().item()
    else:
        dataset = lesson.make_dataset(train=True)
        images, labels = dataset.tensors
        model = lesson.MLP().to(lesson.DEVICE)
        chosen = Subset(dataset, range(TRAINING))
        lesson.train(model, DataLoader(chosen, lesson.BATCH_SIZE, shuffle=True), lesson.EPOCHS)
        correct = lesson.evaluate(model, images[TRAINING:], labels[TRAINING:])
    return correct / (len(images) - TRAINING)


def main():
    for name in LESSONS:
        lesson = load_lesson(name)
        tried = []
        for rate, size in itertools.product(LEARNING_RATES, BATCH_SIZES):
            lesson.LEARNING_RATE = rate
            lesson.BATCH_SIZE = size
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                accuracy = sum(judge(lesson, seed) for seed in range(SEEDS)) / SEEDS
            accuracy = round(accuracy, 5)
            tried.append({"LEARNING_RATE": rate, "BATCH_SIZE": size, "accuracy": accuracy})
            print(f"{name}: learning rate {rate}, batch {size}: {accuracy:.2%}", flush=True)
        best = max(tried, key=lambda setting: setting["accuracy"])
        keep("settings", name, {"best": best, "tried": tried})


if __name__ == "__main__":
    main()
