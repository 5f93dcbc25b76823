"""What only a GPU can show: uv run pytest -m gpu. Without one, every test here is skipped."""

import re

import pytest
import torch
from conftest import load_lesson, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_verify_names_the_gpu(course):
    verified = run(course, "basics/01_verify_gpu")
    assert verified.returncode == 0, verified.stderr
    assert torch.cuda.get_device_name() in verified.stdout
    assert "Result: device = cuda, product = correct" in verified.stdout
    for line in (
        "memory: +[\\d.]+ GiB",
        "compute capability \\d+\\.\\d+",
        "multiprocessors: +\\d+",
    ):
        assert re.search(line, verified.stdout)


def test_two_devices_are_refused_in_the_words_of_cuda(course):
    refused = run(course, "basics/02_tensors")
    assert "Expected all tensors to be on the same device" in refused.stdout
    assert "cuda:0" in refused.stdout


def test_every_mistake_of_gpu_training_is_an_error(course):
    trained = run(course, "intermediate/05_gpu_training", "--quick")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("same device") >= 4
    assert "not measured" not in trained.stdout


def test_a_checkpoint_from_the_gpu_loads_on_the_cpu(course):
    assert run(course, "intermediate/02_cnn", "--quick").returncode == 0
    lesson = load_lesson("intermediate/02_cnn", root=course)
    path = course / "models" / "quick" / "mnist_cnn.pth"
    on_cpu, on_gpu = lesson.CNN(), lesson.CNN().to("cuda")
    on_cpu.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    on_gpu.load_state_dict(torch.load(path, map_location="cuda", weights_only=True))
    images = torch.rand(64, 1, 28, 28)
    torch.testing.assert_close(on_gpu(images.cuda()).cpu(), on_cpu(images), atol=2e-2, rtol=2e-2)
