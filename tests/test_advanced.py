"""Transfer and pipelines: what stays frozen, what may not leak, and which pictures must be read."""

import copy
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REAL_DATA, ROOT, load_lesson
from PIL import Image
from torch import nn

TRANSFER, HONEST, ONCE = "01_transfer_learning", "09_transfer_honestly", "14_features_once"
INFERENCE, TRAINING = "03_inference_pipeline", "15_training_pipeline"


def advanced(name):
    return load_lesson(f"advanced/{name}")


def small_training_set(count=64):
    torch.manual_seed(0)
    return torch.rand(count, 1, 28, 28), torch.arange(count) % 5


# TRANSFER
def test_only_the_new_layer_learns_and_it_has_325_parameters():
    lesson = advanced(TRANSFER)
    images, labels = (part.to(lesson.DEVICE) for part in small_training_set())
    model = lesson.CNN().to(lesson.DEVICE)
    before = copy.deepcopy(model.state_dict())
    backbone, old_layer = lesson.take_apart(model)
    features = lesson.compute_features(backbone, images)
    assert features.shape == (64, 64)
    assert not features.requires_grad
    layer = nn.Linear(64, 5, device=lesson.DEVICE)
    first = layer.weight.detach().clone()
    lesson.train(layer, features, labels, epochs=2)
    model.fc2 = layer
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 325
    assert not torch.equal(layer.weight, first)
    assert torch.equal(old_layer.weight, before["fc2.weight"])
    for name, tensor in model.state_dict().items():
        assert name.startswith("fc2") or torch.equal(tensor, before[name]), name


def test_features_and_last_layer_are_the_whole_network():
    lesson = advanced(TRANSFER)
    images, _ = small_training_set()
    model = lesson.CNN().to(lesson.DEVICE)
    expected = model(images.to(lesson.DEVICE))
    backbone, layer = lesson.take_apart(model)
    logits = layer(lesson.compute_features(backbone, images.to(lesson.DEVICE)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-3)


def test_the_old_layer_is_asked_for_five_digits_only_and_taken_out_again():
    lesson = advanced(TRANSFER)
    model, old = lesson.CNN(5), nn.Linear(64, 10)
    nn.init.zeros_(old.weight)
    old.bias.data = torch.tensor([0.0, 0, 0, 1, 0, 9, 9, 9, 9, 9])  # sure of 5 to 9, else of 3
    new = model.fc2
    assert (
        lesson.evaluate(model, old, torch.rand(4, 1, 28, 28), torch.tensor([3, 3, 3, 0]))[1] == 0.75
    )
    assert model.fc2 is new


@pytest.mark.parametrize("content", [None, b"", b"text", "five classes"])
def test_transfer_without_a_trained_network_says_how_to_make_one(tmp_path, content):
    lesson = advanced(TRANSFER)
    lesson.ROOT, path = tmp_path, tmp_path / "models" / "quick" / "mnist_cnn.pth"
    path.parent.mkdir(parents=True)
    if content == "five classes":
        torch.save(lesson.CNN(5).state_dict(), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        lesson.main(quick=True)
    assert "uv run src/intermediate/02_cnn.py --quick" in stop.value.code
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("name", [TRANSFER, TRAINING])
def test_small_digits_stand_in_without_a_download(tmp_path, capsys, name):
    lesson = advanced(name)
    lesson.ROOT = tmp_path
    torch.save(lesson.CNN().state_dict(), tmp_path / "mnist_cnn.pth")
    (tmp_path / "models" / "quick").mkdir(parents=True)
    (tmp_path / "mnist_cnn.pth").rename(tmp_path / "models" / "quick" / "mnist_cnn.pth")
    lesson.main(quick=True)
    output = capsys.readouterr().out
    assert output.splitlines()[0].endswith("stand in")
    assert output.rstrip().endswith("data = scikit-learn digits")


# FEATURES ONCE
def test_training_on_features_is_training_the_frozen_network():
    lesson = advanced(ONCE)
    images, labels = (part.to(lesson.DEVICE) for part in small_training_set(200))
    frozen = lesson.make_network(freeze=True)
    other = lesson.train_on_features(copy.deepcopy(frozen), images, labels, 3)
    before = frozen.fc2.weight.detach().clone()
    lesson.train(frozen, images, labels, 3)
    assert not torch.equal(before, frozen.fc2.weight), "it learned"
    torch.testing.assert_close(other.fc2.weight, frozen.fc2.weight, atol=1e-3, rtol=1e-2)


def test_all_layers_learn_where_nothing_is_frozen():
    lesson = advanced(ONCE)
    images, labels = (part.to(lesson.DEVICE) for part in small_training_set())
    model = lesson.make_network(freeze=False)
    before = copy.deepcopy(model.state_dict())
    lesson.train(model, images, labels, 1)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# TRANSFER, HONESTLY
@pytest.fixture
def honest(monkeypatch):
    torch.manual_seed(0)
    return advanced(HONEST)


def test_the_backbone_never_sees_the_digits_that_it_is_tested_on(honest):
    images = torch.arange(1000.0).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    labels = torch.arange(1000) % 10
    (old, old_labels), (new, new_labels) = honest.part_in_two(images, labels)
    assert set(labels[old[:, 0, 0, 0].long().cpu()].tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(labels[new[:, 0, 0, 0].long().cpu()] - 5, new_labels.cpu())
    assert (
        sorted(old_labels.unique().tolist()) == sorted(new_labels.unique().tolist()) == [*range(5)]
    )


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_a_sample_has_as_many_images_of_each_class_and_none_twice(honest, count):
    labels = torch.arange(2000) % 5
    images, classes = honest.draw_sample(torch.arange(2000), labels, count)
    assert classes.bincount().tolist() == [min(count, 400)] * 5
    assert len(images.unique()) == len(images)
    assert torch.equal(labels[images], classes)


@pytest.mark.parametrize(
    ("way", "learning", "kept"),
    [
        ("from scratch", 51_813, False),
        ("last layer only", 325, True),
        ("all layers", 51_813, True),
    ],
)
def test_the_ways_differ_in_where_they_begin_and_what_may_change(honest, way, learning, kept):
    backbone = honest.CNN(5).to(honest.DEVICE)
    model = honest.begin(way, backbone)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learning
    assert torch.equal(model.conv1.weight, backbone.conv1.weight) == kept
    assert not torch.equal(model.fc2.weight, backbone.fc2.weight)
    before = copy.deepcopy(backbone.state_dict())
    images, labels = (part.to(honest.DEVICE) for part in small_training_set())
    honest.train(model, images, labels, 1e-2, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    changed = not torch.equal(model.conv1.weight, before["conv1.weight"])
    assert changed == (way != "last layer only")


def test_rates_are_chosen_without_the_test_images(honest, monkeypatch, capsys):
    asked = []
    pool, validation, test = (small_training_set(count) for count in (50, 20, 10))
    move = [[part.to(honest.DEVICE) for part in data] for data in (pool, validation, test)]

    def evaluate(model, images, labels):
        asked.append(len(labels))
        return 0.5

    monkeypatch.setattr(honest, "evaluate", evaluate)
    scores = honest.compare_ways(honest.CNN(), 5, 1, *move, trials=2)
    assert asked == [20] * 9 + [10] * 6, "three rates for each way; then two trials of each"
    assert {way: len(values) for way, values in scores.items()} == dict.fromkeys(honest.WAYS, 2)
    assert capsys.readouterr().out.count("undecided") == 2, "equal scores favour nobody"


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.02, 0.01, 0.03], "better"),
        ([-0.02, -0.01, -0.03], "worse"),
        ([0.2, -0.01, 0.3], "undecided"),
    ],
)
def test_a_verdict_needs_every_trial(honest, monkeypatch, capsys, gains, verdict):
    results = iter([0.5] * 9 + [0.5 + gain for each in gains for gain in (0, each, each)])
    monkeypatch.setattr(honest, "evaluate", lambda *_: next(results))
    data = [part.to(honest.DEVICE) for part in small_training_set(20)]
    honest.compare_ways(honest.CNN(), 2, 1, data, data, data, trials=3)
    assert capsys.readouterr().out.count(verdict) == 2


def test_no_small_digit_is_in_two_splits(honest, tmp_path, capsys):
    honest.ROOT = tmp_path
    (images, _), (test, _), source = honest.read_digits()
    assert source == "scikit-learn digits"
    assert (len(images), len(test)) == (1437, 360)
    assert len(torch.cat([images, test]).flatten(1).unique(dim=0)) >= 1790, "no copies"


# INFERENCE
@pytest.fixture(scope="module")
def lesson():
    return advanced(INFERENCE)


@pytest.fixture(scope="module")
def seven():
    """A drawn 7, [60, 40]: 255 is ink."""
    picture = np.zeros((60, 40), np.uint8)
    picture[8:14, 8:32] = 255
    for row in range(14, 52):
        picture[row, 30 - row // 3 : 35 - row // 3] = 255
    return picture


def fitted(lesson, image):
    batch, problems = lesson.prepare([image])
    assert problems == {}
    return batch[0, 0]


def rgba(gray, alpha):
    return np.stack([gray, gray, gray, alpha], axis=-1).astype(np.uint8)


KINDS = {  # the same 7, light on dark unless it says otherwise
    "L": Image.fromarray,
    "black on white": lambda p: Image.fromarray(255 - p),
    "RGB": lambda p: Image.fromarray(p).convert("RGB"),
    "1 bit": lambda p: Image.fromarray(p).convert("1"),
    "1 bit, black on white": lambda p: Image.fromarray(255 - p).convert("1"),
    "palette": lambda p: Image.fromarray(p).convert("RGB").quantize(4),
    "CMYK": lambda p: Image.fromarray(255 - p).convert("CMYK"),
    "YCbCr": lambda p: Image.fromarray(p).convert("RGB").convert("YCbCr"),
    "gray with alpha": lambda p: Image.fromarray(p).convert("LA"),
    "16 bit": lambda p: Image.fromarray(p.astype(np.uint16) * 257),
    "16 bit, black on white": lambda p: Image.fromarray((255 - p).astype(np.uint16) * 257),
    "32 bit": lambda p: Image.fromarray(p.astype(np.int32) * 1000),
    "float": lambda p: Image.fromarray(p.astype(np.float32) / 255),
    "black ink, nothing under it": lambda p: Image.fromarray(rgba(0 * p, p)),
    "white ink, nothing under it": lambda p: Image.fromarray(rgba(0 * p + 255, p)),
    "faint": lambda p: Image.fromarray((120 - p // 8).astype(np.uint8)),
    "array": lambda p: p,
    "0/1 mask": lambda p: p > 0,
    "array [H, W, 3]": lambda p: np.stack([p] * 3, axis=2),
    "array [H, W, 4]": lambda p: rgba(0 * p, p),
    "16 bit array": lambda p: p.astype(np.uint16) * 257,
    "big-endian array": lambda p: p.astype(">u2"),
    "tensor [H, W]": torch.from_numpy,
    "tensor [1, H, W]": lambda p: torch.from_numpy(p)[None] / 255,
    "tensor [3, H, W]": lambda p: torch.from_numpy(p).expand(3, -1, -1),
    "standardised tensor": lambda p: (torch.from_numpy(p)[None] / 255 - 0.1307) / 0.3081,
    "bfloat16 with gradient": lambda p: torch.tensor(
        p / 255, dtype=torch.bfloat16, requires_grad=True
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_shows_the_same_digit(lesson, seven, kind):
    torch.testing.assert_close(
        fitted(lesson, KINDS[kind](seven)), fitted(lesson, seven), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif", "webp", "jpg"])
def test_files_are_read(lesson, seven, tmp_path, suffix):
    path = tmp_path / f"a digit, ä.{suffix}"
    Image.fromarray(255 - seven).save(path)
    tolerance = 0.25 if suffix in ("jpg", "webp") else 0.02
    for name in (path, str(path)):
        torch.testing.assert_close(
            fitted(lesson, name), fitted(lesson, seven), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize(("tag", "turn"), [(1, 0), (3, 180), (6, 90), (8, 270)])
def test_a_camera_held_sideways_is_turned_back(lesson, seven, tmp_path, tag, turn):
    photo, exif = Image.fromarray(seven).rotate(turn, expand=True), Image.Exif()
    exif[0x0112] = tag
    photo.save(tmp_path / "photo.png", exif=exif)
    torch.testing.assert_close(
        fitted(lesson, tmp_path / "photo.png"), fitted(lesson, seven), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("page", [(60, 40), (60, 300), (400, 60), (900, 1200)])
def test_page_and_place_do_not_matter_and_nothing_is_stretched(lesson, seven, page):
    canvas = np.zeros(page, np.uint8)
    canvas[page[0] - 60 :, page[1] - 40 :] = seven
    picture = fitted(lesson, 255 - canvas)
    torch.testing.assert_close(picture, fitted(lesson, seven), atol=0.02, rtol=0)
    ink = picture > 0.5
    height, width = ink.any(dim=1).sum().item(), ink.any(dim=0).sum().item()
    assert height == 20
    assert width == pytest.approx(20 * 24 / 44, abs=1), "as wide as it was drawn"


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (3, 9), (2, 2), (5000, 7)])
def test_odd_sizes_are_no_trouble(lesson, shape):
    image = np.zeros(shape)
    image.flat[image.size // 2] = 1
    assert fitted(lesson, image[None]).shape == (28, 28)


def test_an_mnist_image_stays_as_it_is_whichever_way_round(lesson):
    torch.manual_seed(0)
    image = F.pad(torch.rand(20, 20), (4, 4, 4, 4))
    image = (image - image.min()) / (image.max() - image.min())
    torch.testing.assert_close(fitted(lesson, image), image)
    torch.testing.assert_close(fitted(lesson, 1 - image), image)


@pytest.fixture
def pipeline(lesson, tmp_path):
    torch.manual_seed(0)
    torch.save(lesson.CNN().state_dict(), tmp_path / "mnist_cnn.pth")
    return lesson.MNISTInferencePipeline(tmp_path / "mnist_cnn.pth")


def test_results_have_the_notes_keys_and_are_the_networks_answers(lesson, pipeline, seven):
    result = pipeline.predict(seven)
    logits = pipeline.model(fitted(lesson, seven)[None, None].to(lesson.DEVICE))
    expected = logits.softmax(dim=1)[0].tolist()
    assert set(result) == {"digit", "confidence", "all_probs"}
    assert result["all_probs"] == pytest.approx(expected, abs=1e-5)
    assert result["digit"] == expected.index(max(expected))
    assert result["confidence"] == max(result["all_probs"])
    assert pipeline.predict_batch([]) == []
    last = pipeline.predict_batch([seven] * 1001)[1000]
    assert last["all_probs"] == pytest.approx(expected, abs=1e-4)


def spoiled_file(kind, folder):
    path = folder / f"{kind}.png"
    if kind == "a folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a picture")
    elif kind == "cut off":
        Image.effect_noise((50, 50), 90).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif kind == "blank":
        Image.new("L", (40, 40), 255).save(path)
    elif kind == "too large":
        header = b"IHDR" + (200_000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
        check = zlib.crc32(header).to_bytes(4, "big")
        path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + check + b"\0" * 20)
    return path


BAD_FILES = ["missing", "a folder", "empty", "text", "cut off", "blank", "too large"]
BAD_VALUES = {
    "NaN": np.full((28, 28), np.nan),
    "inf": torch.full((1, 28, 28), float("inf")),
    "empty": np.zeros((0, 28)),
    "one number": np.float32(7),
    "one row": np.zeros(784),
    "a batch": torch.rand(2, 1, 28, 28),
    "seven channels": np.random.default_rng(0).random((28, 28, 7)),
    "blank": torch.ones(28, 28),
    "almost blank": np.random.default_rng(0).integers(245, 255, (90, 90), dtype=np.uint8),
    "nothing": None,
    "a dictionary": {"digit": 7},
    "words": [["a", "b"], ["c", "d"]],
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_and_the_others_are_answered(pipeline, seven, tmp_path, kind):
    bad = spoiled_file(kind, tmp_path)
    first, result, last = pipeline.predict_batch([seven, bad, seven])
    assert "error" not in first
    assert first["all_probs"] == last["all_probs"]
    assert str(bad) in result["error"]
    assert result["digit"] is None
    assert set(result) == {"digit", "confidence", "all_probs", "error"}
    with pytest.raises(ValueError, match="cannot be read"):
        pipeline.predict(bad)


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_a_bad_value_is_counted_and_the_others_are_answered(pipeline, seven, kind):
    first, result = pipeline.predict_batch([seven, BAD_VALUES[kind]])
    assert "error" not in first
    assert result["error"].startswith("Image 2 cannot be read: ")
    assert "\n" not in result["error"]


def test_a_batch_of_nothing_but_bad_images_is_answered(pipeline):
    assert all("error" in result for result in pipeline.predict_batch([None, "none.png"]))


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_a_pipeline_without_a_network_says_how_to_make_one(lesson, tmp_path, content):
    path = tmp_path / "quick" / "mnist_cnn.pth"
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"uv run src/intermediate/02_cnn.py --quick") as error:
        lesson.MNISTInferencePipeline(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("files", "code"), [(["7.png"], 0), (["7.png", "none.png", "7.png"], 1)])
def test_own_files_are_classified_by_flag(
    lesson, pipeline, seven, tmp_path, monkeypatch, capsys, files, code
):
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "mnist_cnn.pth").rename(tmp_path / "models" / "mnist_cnn.pth")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(seven).save("7.png")
    with pytest.raises(SystemExit) as stop:
        lesson.main(image=files)
    assert stop.value.code == code
    output = capsys.readouterr().out
    assert output.count("7.png: ") == files.count("7.png")
    assert output.count("none.png cannot be read") == files.count("none.png")


@pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")
def test_real_digits_pass_unchanged(lesson):
    images, _ = lesson.read_images("MNIST", "t10k")
    batch, problems = lesson.prepare(images[:500])
    assert problems == {}
    assert (batch - images[:500]).abs().max() < 0.05, "not all of them have a pixel of full ink"


IMPORTER = """
import importlib.util, sys

def load(path):
    spec = importlib.util.spec_from_file_location("pipeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

training, inference = load(sys.argv[1]), load(sys.argv[2])
import numpy, torch
trainer = training.MNISTTrainingPipeline(lr=0.001)
trainer.train(epochs=1, data=(torch.rand(64, 1, 28, 28), torch.arange(64) % 10))
trainer.save("mine.pth")
pipeline = inference.MNISTInferencePipeline("mine.pth")
picture = numpy.eye(50)
expected = trainer.model(inference.prepare([picture])[0].to(training.DEVICE)).argmax().item()
assert pipeline.predict(picture)["digit"] == expected
print("imported, trained, saved, loaded, asked")
"""


def test_another_program_imports_both_pipelines(tmp_path):
    files = [ROOT / "src" / "advanced" / f"{name}.py" for name in (TRAINING, INFERENCE)]
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", IMPORTER, *files]
    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("Training pipeline ready"), (
        "importing it printed and trained nothing"
    )
    assert lines[-1] == "imported, trained, saved, loaded, asked"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pth"]


# TRAINING
def test_training_twice_goes_on_where_it_stopped():
    torch.manual_seed(0)
    lesson = advanced(TRAINING)
    trainer, data = lesson.MNISTTrainingPipeline(), small_training_set()
    trainer.train(5, data)
    weights, steps = trainer.model.fc2.weight, trainer.optimizer.state
    before = weights.detach().clone()
    trainer.train(3, data)
    assert not torch.equal(weights, before)
    assert steps[weights]["step"].item() == 8


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    lesson = advanced(TRAINING)
    path = tmp_path / "model.pth"
    path.write_bytes(b"the old one")

    def fail(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(lesson.torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        lesson.MNISTTrainingPipeline().save(path)
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
