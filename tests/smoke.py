"""A short test of a lesson prints the same words as its recorded run, and keeps its files apart."""

import re
from itertools import groupby

import torch
from conftest import LESSONS, run, served
from course import capture_path, describe_machine, read_records, read_result

RECORDS = read_records()
DEVICE_SHOWS = {  # in other words than numbers, so that only runs on a like machine compare
    "basics/01_verify_gpu",
    "basics/02_tensors",
    "basics/05_first_nn",
    "intermediate/05_gpu_training",
    "advanced/02_model_optimization",
    "advanced/04_gpu_vs_cpu_benchmark",
    "advanced/06_memory_management",
    "advanced/07_inference_comparison",
    "advanced/08_latency_and_memory",
    "advanced/10_multi_gpu",
}


MASKS = {  # what may differ between two runs of a lesson
    r"models/quick/": "models/",
    r"(Using 5,000 digits|Downloading \w+ into|Download failed|4,000 to train on).*\n": "",
    r"-stand-in|-quick": "",  # a real Ollama has a plain version
    r"(?m)^  [^|\n]+ \| [\d.]+ GB\n": "",  # the models that a server has
    r"(Creating smollm2|  Not compared:) .*\n": "",
    r"(?m)^\[\d+ tokens read.*$": "COUNTERS",
    r"(?m)^(A|  PyTorch|  Ollama): .*(\n   .*)*": r"\1: TEXT",
    r"data = .+": "data = DATA",
    r"next_token = '.*'": "next_token = TOKEN",
    r"(?m)^(eager|TF32|\w+ autocast|channels_last|torch\.compile|TorchScript|AOTInductor"
    r"|CUDA graphs|ONNX Runtime|TensorRT|int8 torch\S+|compile time in)[^|\n]*\|.*": "ROW",
    r"\): (faster|slower|no difference)": "): VERDICT",
    r"not faster at the largest size|faster at every measured size above \d+": "CROSSING",
    r"(Sample|Temperature [\d.]+|Next): .*": r"\1: TEXT",
    r"(Before|After|Question|Glossary): .*": r"\1: TEXT",
    r"(validation loss [\d.]+) \| .*": r"\1 | TEXT",
    r"no difference|\b(faster|slower)\b": "VERDICT",
    r"aten::\w+": "aten::OPERATION",
    r"is near .*": "is near WORDS",
    r", device='[\w:]+'": "",
    r"\b(cuda|mps|cpu|meta)\b(:\d)?": "DEVICE",
    r"[-+]?\d[\d.,]*": "#",
    r" +": " ",
}


OTHER_TORCH = {r"\w+Backward\d": "BACKWARD"}  # what may differ besides between its versions


def masked(output, masks=MASKS):
    """The words of an output without its numbers; lines that become equal in a row count once."""
    for pattern, replacement in masks.items():
        output = re.sub(pattern, replacement, output)
    return [line for line, _ in groupby(line.strip() for line in output.splitlines())]


def check_quick_run(course, name):
    """Run a lesson on what those before it have saved; compare its words with the recorded ones."""
    lesson = LESSONS[name]
    with served(lesson, course / "models" / "quick" / "smollm2") as environment:
        quick = run(course, name, "--quick", env=environment)
    assert quick.returncode == 0, quick.stderr
    capture = capture_path(name).read_text(encoding="utf-8")
    for file in lesson.makes:
        assert (course / file.replace("models/", "models/quick/")).stat().st_size > 0
        assert not (course / file).exists(), "a quick run must not replace what a full run made"
    promised = {promise.split()[0] for promise in lesson.card["Expect"].split(", ")}
    assert promised <= set(read_result(quick.stdout))
    record = RECORDS["lessons"][name]
    gpu = describe_machine()["machine"].split(", ")[-1]
    if name not in DEVICE_SHOWS or gpu in record["machine"]:
        same = record["torch"] == torch.__version__
        masks = MASKS if same else OTHER_TORCH | MASKS
        assert masked(quick.stdout, masks) == masked(capture, masks)
