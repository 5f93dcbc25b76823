"""The networks are the ones that the course describes: their sizes, their names, their mathematics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import load_lesson
from torch import nn


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("lesson", "network", "arguments", "parameters"),
    [
        ("basics/05_first_nn", "SimpleNeuralNetwork", (), 41),
        ("basics/06_training", "LinearNet", (), 25),
        ("basics/07_activations", "NonLinearNet", (), 25),
        ("basics/08_classifier", "Classifier", (), 65),
        ("basics/09_mnist", "MLP", (), 109_386),
        ("intermediate/01_save_load", "SimpleNet", (), 25),
        ("intermediate/02_cnn", "CNN", (), 52_138),
        ("intermediate/02_cnn", "CNN", (5,), 51_813),
        ("intermediate/03_overfitting_dropout", "DropoutNet", (0.5,), 18_049),
        ("intermediate/04_lr_scheduler", "SumNet", (), 97),
    ],
)
def test_parameter_counts(lesson, network, arguments, parameters):
    assert count(getattr(load_lesson(lesson), network)(*arguments)) == parameters


def test_cnn_state_dict_has_the_names_that_others_expect():
    shapes = {
        name: tuple(t.shape)
        for name, t in load_lesson("intermediate/02_cnn").CNN().state_dict().items()
    }
    assert shapes == {
        "conv1.weight": (8, 1, 3, 3),
        "conv1.bias": (8,),
        "conv2.weight": (16, 8, 3, 3),
        "conv2.bias": (16,),
        "fc1.weight": (64, 784),
        "fc1.bias": (64,),
        "fc2.weight": (10, 64),
        "fc2.bias": (10,),
    }


class TextbookCNN(nn.Module):
    """The order of the reference notes: ReLU before pooling."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(784, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def test_pooling_before_relu_changes_nothing():
    ours, theirs = load_lesson("intermediate/02_cnn").CNN(), TextbookCNN()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(16, 1, 28, 28)
    torch.testing.assert_close(ours(images), theirs(images))


def test_two_linear_layers_are_one_straight_line():
    model = load_lesson("basics/06_training").LinearNet()
    x = torch.tensor([[0.0], [1.0], [2.0], [100.0]])
    y = model(x).flatten()
    torch.testing.assert_close(y[2] - y[1], y[1] - y[0])
    torch.testing.assert_close(y[3] - y[0], 100 * (y[1] - y[0]))


def test_logits_and_bce_with_logits_equal_sigmoid_and_bce():
    model = load_lesson("basics/08_classifier").Classifier()
    points, labels = torch.randn(20, 2), torch.randint(2, (20,)).float()
    logits = model(points)
    expected = F.binary_cross_entropy(torch.sigmoid(logits), labels)
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(logits, labels), expected)


def test_dropout_is_off_in_evaluation_and_on_in_training():
    torch.manual_seed(0)
    model = load_lesson("intermediate/03_overfitting_dropout").DropoutNet(0.5)
    inputs = torch.randn(32, 10)
    assert not torch.equal(model.train()(inputs), model(inputs))
    assert torch.equal(model.eval()(inputs), model(inputs))
    plain = load_lesson("intermediate/03_overfitting_dropout").DropoutNet(0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.train()(inputs), model(inputs))


def test_noise_labels_know_nothing_of_the_rule():
    lesson = load_lesson("intermediate/03_overfitting_dropout")
    torch.manual_seed(0)
    for noise, expected in ((0.0, 1.0), (0.4, 0.8), (1.0, 0.5)):
        inputs, labels = lesson.make_noisy_samples(20_000, noise)
        agreement = ((inputs.sum(dim=1) > 0) == labels).float().mean().item()
        assert agreement == pytest.approx(expected, abs=0.02)


def test_dropout_verdict_needs_more_than_chance(capsys):
    lesson = load_lesson("intermediate/03_overfitting_dropout")
    for gains, verdict in (
        ([0.02, -0.02, 0.01, -0.01], "no difference"),
        ([0.02, 0.03, 0.02, 0.03], "dropout helps"),
        ([-0.02, -0.03, -0.02, -0.03], "dropout hurts"),
    ):
        lesson.judge([0.5] * 4, [0.5 + gain for gain in gains])
        assert verdict in capsys.readouterr().out


def test_schedules_move_the_learning_rate_as_documented():
    lesson = load_lesson("intermediate/04_lr_scheduler")
    torch.manual_seed(0)
    data = lesson.make_samples(64), lesson.make_samples(64)
    rates = {
        name: lesson.train(lesson.SumNet().to(lesson.DEVICE), make, *data, epochs=8)
        for name, make in lesson.SCHEDULES.items()
    }
    assert rates["fixed"] == [0.1] * 8
    assert rates["StepLR"] == pytest.approx([0.1] * 4 + [0.05] * 4)
    assert rates["CosineAnnealingLR"] == sorted(rates["CosineAnnealingLR"], reverse=True)
    assert max(rates["OneCycleLR"]) == pytest.approx(0.1, rel=0.1)
    assert rates["OneCycleLR"][0] < 0.01 > rates["OneCycleLR"][-1]
    assert all(0 < rate <= 0.1 + 1e-9 for values in rates.values() for rate in values)


def test_reloading_gives_the_same_bits_and_tells_other_ones():
    lesson = load_lesson("intermediate/01_save_load")
    model = lesson.SimpleNet()
    other = copy.deepcopy(model)
    assert lesson.compare_tensors(model, other) == "identical"
    with torch.no_grad():
        other.layer1.bias[3] = torch.nextafter(other.layer1.bias[3], torch.tensor(9.0))
    assert lesson.compare_tensors(model, other) == "different"


# VERIFY: the advice fits the fault.
@pytest.mark.parametrize(
    ("build", "driver", "visible", "advice"),
    [
        ("12.8", None, None, None),
        (None, "550.163.01", None, "built without CUDA"),
        ("13.0", "550.163.01", None, "Driver 550.163.01 is too old for CUDA 13.0, which needs 580"),
        ("12.8", "470.42", None, "too old for CUDA 12.8, which needs 525"),
        ("12.8", "550.163.01", "", "CUDA_VISIBLE_DEVICES= may hide"),
        ("12.8", "550.163.01", None, "The driver answers, but"),
    ],
)
def test_verify_gpu_says_what_to_do(monkeypatch, tmp_path, build, driver, visible, advice):
    lesson = load_lesson("basics/01_verify_gpu")
    if lesson.DEVICE.type != "cpu":
        pytest.skip("a GPU is here and works: there is nothing to advise")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if driver:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {driver}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", build)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found, failure = lesson.find_driver()
    assert (found, failure) == (driver, None)
    problem = lesson.find_problem(found, failure, card=bool(driver))
    assert (advice is None and problem is None) or advice in problem


def test_verify_gpu_tells_a_broken_driver_from_none(monkeypatch, tmp_path):
    lesson = load_lesson("basics/01_verify_gpu")
    if lesson.DEVICE.type != "cpu":
        pytest.skip("a GPU is here and works: there is nothing to advise")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lesson.find_driver() == (None, None)
    assert lesson.find_problem(None, None, card=False) is None
    assert "no driver" in lesson.find_problem(None, None, card=True)
    words = "Failed to initialize NVML: Driver/library version mismatch"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho {words!r}\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert lesson.find_driver() == (None, words)
    assert words in lesson.find_problem(None, words, card=True)
