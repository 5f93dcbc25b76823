"""Choose the learning rate and the batch size of the two MNIST lessons, without the test images.

    uv run scripts/choose_settings.py

Each setting trains three times on the first 50,000 training images, and is judged by its mean accuracy on
the other 10,000. What was tried goes into this machine's record, and run_course.py check compares the lessons with it.
"""

import contextlib
import importlib.util
import itertools
import os
from datetime import date

import torch
from records import ROOT, describe_machine, read_record, write_record
from torch.utils.data import DataLoader, TensorDataset

LESSONS = ("basics/09_mnist", "intermediate/02_cnn")
LEARNING_RATES, BATCH_SIZES, SEEDS, KEPT_BACK = (3e-3, 7e-3, 1.5e-2, 3e-2), (64, 128), 3, 10_000


def load_lesson(name):
    spec = importlib.util.spec_from_file_location("lesson", ROOT / "src" / f"{name}.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def judge(lesson, seed):
    """Train once as the lesson does; return the accuracy on the images kept back."""
    torch.manual_seed(seed)
    images, labels = lesson.read_images("MNIST", "train")
    train, kept = (
        (images[:-KEPT_BACK], labels[:-KEPT_BACK]),
        (images[-KEPT_BACK:], labels[-KEPT_BACK:]),
    )
    if hasattr(lesson, "CNN"):
        model = lesson.CNN().to(lesson.DEVICE, memory_format=torch.channels_last)
        lesson.train(model, *(tensor.to(lesson.DEVICE) for tensor in train), lesson.EPOCHS)
    else:
        model = lesson.MLP().to(lesson.DEVICE)
        loader = DataLoader(TensorDataset(*train), lesson.BATCH_SIZE, shuffle=True)
        lesson.train(model, loader, lesson.EPOCHS)
    with torch.inference_mode():
        predicted = model.eval()(kept[0].to(lesson.DEVICE)).argmax(dim=1).cpu()
    return (predicted == kept[1]).float().mean().item()


def main():
    for name in LESSONS:
        lesson, tried = load_lesson(name), []
        for rate, size in itertools.product(LEARNING_RATES, BATCH_SIZES):
            lesson.LEARNING_RATE, lesson.BATCH_SIZE = rate, size
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                accuracies = [judge(lesson, seed) for seed in range(SEEDS)]
            accuracy = round(sum(accuracies) / SEEDS, 5)
            tried.append({"LEARNING_RATE": rate, "BATCH_SIZE": size, "accuracy": accuracy})
            print(f"{name}: learning rate {rate}, batch {size}: {accuracy:.2%}", flush=True)
        best = max(tried, key=lambda setting: setting["accuracy"])
        machine = describe_machine()
        record = read_record(machine["machine"])
        entry = {"date": str(date.today()), "torch": machine["torch"], "best": best, "tried": tried}
        record["settings"] = record.get("settings", {}) | {name: entry}
        write_record(record)


if __name__ == "__main__":
    main()
