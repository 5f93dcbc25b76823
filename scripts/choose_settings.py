"""Choose learning rate and batch size of the MNIST lessons on images that were kept back for it.

    uv run scripts/choose_settings.py    some ten minutes on two cores; writes data/results/settings.json

Ten thousand of the training images stand in for the test images, which are not touched.
"""

import importlib.util
import io
import itertools
import json
from contextlib import redirect_stdout

import torch
from run_course import ROOT, describe_machine
from torch.utils.data import DataLoader, TensorDataset

RATES, BATCHES, SEEDS = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2), (64, 128), (0, 1)
KEPT_BACK = 10_000


def load_lesson(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "src" / f"{name}.py")
    lesson = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lesson)
    return lesson


def validate(lesson, name, images, labels, seed):
    """Train a lesson's network by its own loop without the images kept back; return the accuracy on them."""
    torch.manual_seed(seed)
    known, new = slice(KEPT_BACK, None), slice(KEPT_BACK)
    with redirect_stdout(io.StringIO()):
        if name == "basics/09_mnist":
            model = lesson.MLP().to(lesson.DEVICE)
            data = TensorDataset(images[known], labels[known])
            lesson.train(model, DataLoader(data, lesson.BATCH_SIZE, shuffle=True), lesson.EPOCHS)
        else:
            model = lesson.CNN().to(lesson.DEVICE)
            on_device = images[known].to(lesson.DEVICE), labels[known].to(lesson.DEVICE)
            lesson.train(model, *on_device, lesson.EPOCHS)
    with torch.inference_mode():
        predicted = model.eval()(images[new].to(lesson.DEVICE)).argmax(dim=1).cpu()
    return (predicted == labels[new]).float().mean().item()


def main():
    found = {"machine": describe_machine(), "kept_back": KEPT_BACK}
    for name in ("basics/09_mnist", "intermediate/02_cnn"):
        lesson, rows = load_lesson(name), []
        used = {"learning_rate": lesson.LEARNING_RATE, "batch_size": lesson.BATCH_SIZE}
        images, labels = lesson.read_images("MNIST", "train")
        for rate, batch in itertools.product(RATES, BATCHES):
            lesson.LEARNING_RATE, lesson.BATCH_SIZE = rate, batch
            scores = [validate(lesson, name, images, labels, seed) for seed in SEEDS]
            rows.append({"learning_rate": rate, "batch_size": batch, "accuracies": scores})
            print(f"{name} {rate:g} {batch:4d} {sum(scores) / len(scores):.2%}", flush=True)
        found[name] = {"used": used, "tried": rows}
    (ROOT / "data" / "results" / "settings.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
