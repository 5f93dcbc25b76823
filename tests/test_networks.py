"""The networks are the ones that the course describes: sizes, names and mathematics."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_lesson
from course import read_result
from torch import nn


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("lesson", "network", "arguments", "parameters"),
    [
        ("basics/05_first_nn", "SimpleNeuralNetwork", (), 41),
        ("basics/06_training", "LinearNet", (), 25),
        ("basics/08_classifier", "Classifier", (), 65),
        ("basics/09_mnist", "MLP", (), 109_386),
        ("intermediate/01_save_load", "SimpleNet", (), 25),
        ("intermediate/02_cnn", "CNN", (), 52_138),
        ("intermediate/02_cnn", "CNN", (5,), 51_813),
        ("intermediate/03_overfitting_dropout", "DropoutNet", (0.5,), 18_049),
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


def test_relu_and_pooling_may_change_places():
    """Weights that were trained with the other order give the same logits."""
    cnn = load_lesson("intermediate/02_cnn").CNN()
    images = torch.rand(16, 1, 28, 28)
    x = F.relu(F.max_pool2d(cnn.conv1(images), 2))
    x = F.relu(F.max_pool2d(cnn.conv2(x), 2))
    swapped = cnn.fc2(F.relu(cnn.fc1(x.flatten(1))))
    torch.testing.assert_close(cnn(images), swapped)


def test_two_linear_layers_are_one_straight_line():
    model = load_lesson("basics/06_training").LinearNet()
    x = torch.tensor([[0.0], [1.0], [2.0], [100.0]])
    y = model(x).flatten()
    torch.testing.assert_close(y[2] - y[1], y[1] - y[0])
    torch.testing.assert_close(y[3] - y[0], 100 * (y[1] - y[0]))


def test_the_two_networks_of_activations_differ_in_the_relu_alone():
    linear, bent = load_lesson("basics/07_activations").make_networks()
    assert count(linear) == count(bent) == 25
    ours = zip(linear.parameters(), bent.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in ours)
    assert [type(layer) for layer in bent] == [nn.Linear, nn.ReLU, nn.Linear]


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


def test_schedules_move_the_learning_rate_as_documented():
    lesson = load_lesson("intermediate/04_lr_scheduler")
    torch.manual_seed(0)
    data = lesson.make_samples(64), lesson.make_samples(64)
    rates = {}
    for name in lesson.SCHEDULES:
        model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).to(lesson.DEVICE)
        rates[name] = lesson.train(model, name, *data, epochs=8)
    assert rates["fixed"] == [0.1] * 8
    assert rates["StepLR"] == pytest.approx([0.1] * 4 + [0.05] * 4)
    assert rates["CosineAnnealingLR"] == sorted(rates["CosineAnnealingLR"], reverse=True)
    assert max(rates["OneCycleLR"]) == pytest.approx(0.1, rel=0.1)
    assert rates["OneCycleLR"][0] < 0.01 > rates["OneCycleLR"][-1]
    assert all(0 < rate <= 0.1 + 1e-9 for values in rates.values() for rate in values)


def test_a_plateau_halves_the_rate():
    lesson = load_lesson("intermediate/04_lr_scheduler")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = lesson.make_schedule("ReduceLROnPlateau", optimizer, epochs=8)
    rates = []
    for loss in (3.0, 2.0, 2.0, 2.0, 1.0):
        schedule.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


# SAVE AND LOAD: "equal" means every bit.
def run_save_load(lesson, tmp_path, capsys):
    lesson.ROOT = tmp_path
    lesson.main(quick=True)
    return read_result(capsys.readouterr().out)


def test_one_other_bit_in_a_reloaded_network_is_seen(tmp_path, capsys):
    lesson = load_lesson("intermediate/01_save_load")
    assert run_save_load(lesson, tmp_path, capsys)["reloaded_equal"] == "True"
    load = lesson.load

    def load_almost(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            bias = model.layer1.bias
            bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
        return model

    lesson.load = load_almost
    assert run_save_load(lesson, tmp_path, capsys)["reloaded_equal"] == "False"


@pytest.mark.parametrize("forgotten", ["optimizer", "model"])
def test_training_that_goes_on_without_a_part_of_its_state_is_seen(
    tmp_path, capsys, monkeypatch, forgotten
):
    lesson = load_lesson("intermediate/01_save_load")
    assert run_save_load(lesson, tmp_path, capsys)["resumed_equal"] == "True"

    kind = lesson.SimpleNet if forgotten == "model" else torch.optim.Adam
    whole = kind.load_state_dict
    loads = []

    def forget_once(self, state):  # the second load is the one of the reloaded network
        loads.append(state)
        if len(loads) > 1:
            whole(self, state)

    monkeypatch.setattr(kind, "load_state_dict", forget_once)
    assert run_save_load(lesson, tmp_path, capsys)["resumed_equal"] == "False"


def test_a_stopped_training_goes_on_in_a_new_process(tmp_path):
    """Stop after 100 steps and leave; another process goes on and prints the same losses."""
    lesson = load_lesson("intermediate/01_save_load")
    lesson.ROOT = tmp_path
    torch.manual_seed(lesson.SEED)
    model = lesson.SimpleNet().to(lesson.DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    lesson.train(model, optimizer, 100)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 100}
    lesson.save(checkpoint, tmp_path / "training.pth")
    losses = lesson.train(model, optimizer, 100)
    code = (
        "import sys, torch; from conftest import load_lesson\n"
        "lesson = load_lesson('intermediate/01_save_load')\n"
        "model = lesson.SimpleNet().to(lesson.DEVICE)\n"
        "optimizer = torch.optim.Adam(model.parameters(), lr=0.01)\n"
        "state = torch.load(sys.argv[1], weights_only=True)\n"
        "model.load_state_dict(state['model'])\n"
        "optimizer.load_state_dict(state['optimizer'])\n"
        "print(state['step'], lesson.train(model, optimizer, 200 - state['step']))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-c", code, tmp_path / "training.pth"]
    resumed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    if lesson.DEVICE.type == "cpu":
        assert resumed.stdout == f"100 {losses}\n"
    else:
        assert resumed.stdout.startswith("100 [")


# GPU TRAINING: each of the three that stays behind is an error, and digits are not called coats.
def test_what_stays_behind_is_an_error(capsys):
    lesson = load_lesson("intermediate/05_gpu_training")
    lesson.show_mistakes(torch.rand(8, 1, 28, 28), torch.zeros(8, dtype=torch.long))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("device" in line for line in lines)


@pytest.mark.skipif(not (ROOT / "data/MNIST/SOURCE").exists(), reason="MNIST is not in data/")
def test_digits_are_not_called_coats(tmp_path, capsys, monkeypatch):
    lesson = load_lesson("intermediate/05_gpu_training")
    home = tmp_path / "data" / "FashionMNIST"
    home.mkdir(parents=True)
    (home / "raw").symlink_to(ROOT / "data" / "MNIST" / "raw")
    (home / "SOURCE").write_text("5,000 digits of MNIST")
    lesson.ROOT = tmp_path
    monkeypatch.setattr(lesson.subprocess, "run", lambda *arguments, **options: None)
    monkeypatch.setattr(lesson, "compare_loaders", lambda *arguments: None)
    lesson.main(quick=True)
    output = capsys.readouterr().out
    assert re.search(r"Sample: \d, predicted: \d\n", output)
    assert output.endswith("data = 5,000 digits of MNIST\n")


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
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho No devices were found\n")
    assert lesson.find_driver() == (None, "No devices were found")


def test_verify_gpu_finds_a_wrong_product(monkeypatch):
    lesson = load_lesson("basics/01_verify_gpu")
    assert lesson.check_product()
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor + 0.01)
    assert not lesson.check_product()
