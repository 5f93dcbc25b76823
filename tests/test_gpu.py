"""What only a GPU can show: uv run pytest -m gpu. Without one, every test here is skipped."""

import re

import pytest
import torch
from conftest import load_lesson, run
from course import read_result

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
    assert trained.stdout.count("same device") >= 3
    assert "and pin_memory" in trained.stdout


def test_a_checkpoint_from_the_gpu_loads_on_the_cpu(course):
    assert run(course, "intermediate/02_cnn", "--quick").returncode == 0
    lesson = load_lesson("intermediate/02_cnn", root=course)
    path = course / "models" / "quick" / "mnist_cnn.pth"
    on_cpu, on_gpu = lesson.CNN(), lesson.CNN().to("cuda")
    on_cpu.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    on_gpu.load_state_dict(torch.load(path, map_location="cuda", weights_only=True))
    images = torch.rand(64, 1, 28, 28)
    torch.testing.assert_close(on_gpu(images.cuda()).cpu(), on_cpu(images), atol=2e-2, rtol=2e-2)


# ADVANCED: what these lessons leave out on a CPU, they do here.
def quick_on_gpu(course, name):
    quick = run(course, name, "--quick")
    assert quick.returncode == 0, quick.stderr
    return quick.stdout, read_result(quick.stdout)


def test_transfer_and_versions_run_on_the_gpu(course):
    quick_on_gpu(course, "intermediate/02_cnn")
    assert quick_on_gpu(course, "advanced/01_transfer_learning")[1]["trainable"] == 325
    output, result = quick_on_gpu(course, "advanced/02_model_optimization")
    assert result["wrong"] == 0
    for version in ("eager", "channels_last", "bf16 autocast", "TorchScript"):
        assert re.search(rf"^{version} +\| cuda \|", output, re.MULTILINE)
    assert re.search(r"^ONNX Runtime +\| cpu  \|", output, re.MULTILINE)


def test_the_gpu_stands_against_the_cpu(course):
    _, result = quick_on_gpu(course, "advanced/04_gpu_vs_cpu_benchmark")
    assert re.fullmatch(r"[\d.]+ to [\d.]+", result["gpu_at_32"])
    assert result["largest_difference"] <= 0.0001


def test_versions_that_only_a_gpu_has_keep_their_tolerance(course):
    output, result = quick_on_gpu(course, "advanced/07_inference_comparison")
    assert result["outside_tolerance"] == 0
    for version in ("TF32", "fp16 autocast", "bf16 autocast", "CUDA graphs"):
        assert re.search(rf"^{version} +\| +[\d.]+ s \|", output, re.MULTILINE)


def test_latency_is_measured_with_cuda_graphs(course):
    output, _ = quick_on_gpu(course, "advanced/08_latency_and_memory")
    assert re.search(r"^CUDA graphs +\| +[\d.]+ \| +[\d.]+ \|", output, re.MULTILINE)


def test_an_impatient_clock_shows_less_than_the_gpu_needs(course):
    output, _ = quick_on_gpu(course, "advanced/05_wrong_timings")
    (times_too_long,) = re.findall(r"^no waiting .*\| +([\d.]+)$", output, re.MULTILINE)
    assert float(times_too_long) < 1


def test_a_real_out_of_memory_is_survived(course):
    output, result = quick_on_gpu(course, "advanced/06_memory_management")
    assert result["out_of_memory"] == "survived"
    assert "CUDA out of memory" in output
    assert "simulated" not in output
    assert "MB allocated" in output
    assert "after empty_cache()" in output


def test_the_profiler_sees_the_gpu_work(course):
    output, result = quick_on_gpu(course, "advanced/09_profiling")
    rows = re.findall(r"aten::\w+ +[\d.]+ +([\d.]+)", output)
    assert max(float(milliseconds) for milliseconds in rows) > 0
    assert result["waits_before"] == 32


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_process_trains_on_its_own_gpu(course):
    output, result = quick_on_gpu(course, "advanced/10_multi_gpu")
    assert "2 processes on cuda" in output
    assert result["fsdp_difference"] <= 0.000001


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("llm/06_pretrained_llm", None),  # makes what the others need
        ("llm/07_finetune_lora", None),
        ("llm/11_lora_by_hand", "merged_difference"),
    ],
)
def test_the_pretrained_model_answers_and_is_tuned_on_the_gpu(course, name, small):
    _, result = quick_on_gpu(course, name)
    assert small is None or result[small] <= 0.01


def test_language_models_run_in_sixteen_bits_and_with_a_cache(course):
    assert quick_on_gpu(course, "llm/05_pretrain_gpt2")[1]["validation_loss"] <= 8
    assert quick_on_gpu(course, "llm/10_kv_cache")[1]["same_text"] == "yes"
