"""The labs: what is counted is what is kept, no saving changes a gradient, and no process is left behind."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_lesson
from torch import nn

MEMORY, SAVINGS = "advanced/05_memory_management", "advanced/12_memory_savings"
PROFILING, PROCESSES = "advanced/07_profiling", "advanced/08_multi_gpu"
PAST = "advanced/13_past_one_machine"


# MEMORY
@pytest.fixture
def memory(monkeypatch):
    torch.manual_seed(0)
    lesson = load_lesson(MEMORY)
    monkeypatch.setattr(lesson, "DEPTH", 3)
    return lesson


def test_each_storage_counts_once_and_what_was_there_not_at_all(memory):
    x = torch.randn(100, 100, requires_grad=True)
    for work, size in (
        (lambda: x + x, 0),
        (lambda: x.exp(), 40_000),
        (lambda: x.exp() * x.exp().T, 80_000),
        (lambda: x * x, 0),
    ):
        with memory.count_kept([x]) as kept:
            result = work()
        assert sum(kept.values()) == size
        del result
    with memory.count_kept([]) as kept:
        result = x * x.T  # two views of one storage
    assert sum(kept.values()) == 40_000
    del result


def test_bytes_kept_grow_with_the_batch_and_can_be_added_up_by_hand(memory):
    model = memory.DeepCNN().to(memory.DEVICE)
    four, eight = (memory.compute_gradients(model, *memory.make_images(n)) for n in (4, 8))
    assert eight == pytest.approx(2 * four, rel=0.02)
    maps = 4 * 16 * 14 * 14 * 4  # bytes of 4 images' maps: the first one, then conv's and ReLU's
    assert four == pytest.approx((1 + 3 * 4) * maps, rel=0.02)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(memory, parts):
    """Also where the last part is smaller, as 7 images in 2 parts; the notes' division is wrong there."""
    model = memory.DeepCNN().to(memory.DEVICE).double()
    images, labels = memory.make_images(7)
    memory.compute_gradients(model, images.double(), labels)
    whole = gradients(model)
    memory.compute_gradients(model, images.double(), labels, parts)
    for ours, theirs in zip(gradients(model), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_notes_division_is_wrong_where_the_last_part_is_smaller(memory):
    model = memory.DeepCNN().to(memory.DEVICE).double()
    images, labels = memory.make_images(7)
    memory.compute_gradients(model, images.double(), labels)
    whole = gradients(model)
    model.zero_grad()
    for some, answers in zip(images.split(4), labels.split(4), strict=True):
        (F.cross_entropy(model(some.double()), answers) / 2).backward()
    assert any(
        not torch.allclose(ours, theirs, rtol=1e-3)
        for ours, theirs in zip(gradients(model), whole, strict=True)
    )


def test_checkpointing_keeps_less_and_changes_no_gradient():
    torch.manual_seed(0)
    lesson = load_lesson(SAVINGS)
    plain, recompute = (lesson.DeepCNN(again).to(lesson.DEVICE) for again in (False, True))
    recompute.load_state_dict(plain.state_dict())
    batch = lesson.make_images(4)
    kept = [lesson.compute_gradients(model, *batch) for model in (plain, recompute)]
    assert kept[1] < 0.3 * kept[0]
    assert lesson.largest_difference(plain, recompute) < 1e-5
    next(recompute.parameters()).grad.mul_(2)
    assert lesson.largest_difference(plain, recompute) > 0.01, "a wrong gradient is seen"


def test_a_full_memory_halves_the_parts_until_they_fit(memory, capsys):
    model = memory.DeepCNN().to(memory.DEVICE)
    images, labels = memory.make_images(16)
    needed = memory.compute_gradients(model, images, labels)
    whole = gradients(model)
    assert memory.fit_into_memory(model, images, labels, 1.1 * needed) == 1
    assert memory.fit_into_memory(model, images, labels, 0.3 * needed) == 4
    assert capsys.readouterr().out.count("simulated limit") == 2
    for ours, theirs in zip(gradients(model), whole, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)


def test_a_memory_that_holds_no_image_ends_with_a_sentence(memory):
    with pytest.raises(SystemExit, match="Not even one image"):
        memory.fit_into_memory(
            memory.DeepCNN().to(memory.DEVICE), *memory.make_images(4), limit=1000
        )


@pytest.mark.parametrize("text", ["", "a", "16,,32", "0", "7", "-16,8", "1.5", "16;32"])
def test_bad_batch_sizes_are_refused_in_a_sentence(memory, text):
    with pytest.raises(SystemExit) as stop:
        memory.read_sizes(text)
    assert repr(text) in stop.value.code
    assert memory.read_sizes("16, 32") == [16, 32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_card_runs_out_of_memory_and_the_lesson_goes_on(capsys):
    load_lesson(MEMORY).main(quick=True)
    shown = capsys.readouterr().out
    assert "CUDA out of memory" in shown
    assert "simulated" not in shown
    assert "out_of_memory = survived" in shown


# PROFILING
@pytest.fixture
def profiling():
    lesson = load_lesson(PROFILING)
    lesson.ROOT = Path("/nowhere")
    torch.manual_seed(0)
    return lesson


def test_mended_faults_leave_the_weights_as_they_are(profiling):
    images, labels = torch.randint(256, (40, 28, 28)).byte(), torch.randint(10, (40,))
    moved = images.to(profiling.DEVICE), labels.to(profiling.DEVICE)
    item, detach = torch.Tensor.item, torch.Tensor.detach
    slow, slow_loss = profiling.train(images, labels, 8, profiling.scale_each, item)
    well, loss = profiling.train(*moved, 8, profiling.scale, detach)
    large, _ = profiling.train(*moved, 40, profiling.scale, detach)
    assert loss == pytest.approx(slow_loss, rel=1e-5)
    for ours, theirs, others in zip(*(m.parameters() for m in (slow, well, large)), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not torch.allclose(ours, others), "larger batches are other training"


def test_the_profiler_sees_each_fault_and_its_trace_can_be_read(profiling, capsys, recwarn):
    images, labels = torch.randint(256, (256, 28, 28)).byte(), torch.randint(10, (256,))
    item = torch.Tensor.item
    trace, waits = profiling.look(
        lambda: profiling.train(images, labels, 8, profiling.scale_each, item)
    )
    assert waits == 32
    shown = capsys.readouterr().out
    assert all(part in shown for part in ("prepare", "transfer"))
    assert "aten::copy_" in shown or "aten::_to_copy" in shown
    events = json.loads(trace)["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("prepare") == 32
    assert names.count("aten::item") == 32
    assert "aten::copy_" in names
    assert not [warning for warning in recwarn if "rofiler" in str(warning.message)]
    _, waits = profiling.look(
        lambda: profiling.train(images, labels, 8, profiling.scale, torch.Tensor.detach)
    )
    assert waits == 1, "the sum, once"


# PROCESSES
@pytest.fixture
def processes(monkeypatch):
    lesson = load_lesson(PROCESSES)
    monkeypatch.setattr(lesson, "DEVICE", torch.device("cpu"))
    return lesson


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_shares_of_all_processes_are_the_batch_each_point_once(processes, ranks):
    data = torch.arange(100.0)[:, None], torch.arange(100)
    whole = processes.share_of_batch(data, 3, 5 * ranks)[1].tolist()
    shares = [
        processes.share_of_batch(data, 3, 5, rank, ranks)[1].tolist() for rank in range(ranks)
    ]
    assert [point for share in shares for point in share] == whole
    assert len(set(whole)) == 5 * ranks


def test_averaged_gradients_of_the_shares_are_the_gradient_of_the_batch(processes):
    data = processes.make_labelled_points()
    model, _ = processes.build("one process", torch.float64)

    def gradient(points, labels):
        return torch.autograd.grad(F.cross_entropy(model(points), labels), model.parameters())

    whole = gradient(*processes.share_of_batch(data, 1, 30))
    parts = [gradient(*processes.share_of_batch(data, 1, 10, rank, 3)) for rank in range(3)]
    for expected, *shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(shares) / 3, expected)


@pytest.mark.parametrize("lesson", [PROCESSES, PAST])
@pytest.mark.parametrize("count", [1, 0, -2])
def test_too_few_processes_are_refused_in_a_sentence(lesson, count):
    with pytest.raises(SystemExit, match="--processes must be 2 or more"):
        load_lesson(lesson).main(processes=count)


def descendants_of(mark):
    """Return the processes that carry a mark: a variable that all of them inherit."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"COURSE_TEST={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # ended meanwhile
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_after_ctrl_c_or_kill(blow):
    mark = f"{os.getpid()}-{blow}"
    command = [sys.executable, ROOT / "src" / f"{PROCESSES}.py", "--quick"]
    lesson = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"COURSE_TEST": mark}
    )
    deadline = time.monotonic() + 120
    while len(descendants_of(mark)) < 4:  # the lesson, torchrun, and two that it has started
        assert time.monotonic() < deadline
        assert lesson.poll() is None, "it ended too early"
        time.sleep(0.1)
    lesson.send_signal(blow)
    _, errors = lesson.communicate(timeout=60)
    assert lesson.returncode == 1
    assert errors.strip().splitlines()[-1] == "Stopped; all processes have ended."
    assert descendants_of(mark) == []


WORKER = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {deed}
time.sleep(100)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("deed", ["raise ValueError", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_is_left_when_one_fails_and_the_rest_sleep(tmp_path, monkeypatch, deed):
    lesson, worker = load_lesson(PAST), tmp_path / "worker with blanks.py"
    worker.write_text(WORKER.format(deed=deed))
    mark = f"{os.getpid()}-{len(deed)}"
    monkeypatch.setattr(lesson, "__file__", str(worker))
    monkeypatch.setenv("COURSE_TEST", mark)
    code, _, errors = lesson.launch(2)
    assert code == 1
    assert "Root Cause" in errors
    assert descendants_of(mark) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hang_is_ended(tmp_path, monkeypatch):
    lesson, worker = load_lesson(PAST), tmp_path / "worker.py"
    worker.write_text("import time; time.sleep(1000)")
    monkeypatch.setattr(lesson, "__file__", str(worker))
    mark = f"{os.getpid()}-hang"
    monkeypatch.setenv("COURSE_TEST", mark)

    class Impatient(lesson.Popen):
        def communicate(self, timeout):
            return super().communicate(timeout=8)

    monkeypatch.setattr(lesson, "Popen", Impatient)
    with pytest.raises(SystemExit, match="hung"):
        lesson.launch(2)
    assert descendants_of(mark) == []


def test_seven_billion_parameters_are_those_of_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig())
    assert load_lesson(PAST).count_seven_b() == sum(p.numel() for p in llama.parameters())


def test_a_restart_that_forgets_its_momentum_would_be_noticed():
    """The promise of equal weights after a restart is no empty one: without momentum they differ."""
    lesson = load_lesson(PAST)
    data, ends = lesson.make_labelled_points(), []
    for forget in (False, True):
        model, optimizer = lesson.build_small()
        for step in range(15):
            if step == 10 and forget:
                optimizer = torch.optim.SGD(model.parameters(), lesson.LEARNING_RATE, momentum=0.9)
            lesson.averaged_step(model, optimizer, *lesson.share_of_batch(data, step, 64))
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    assert not math.isclose((ends[0] - ends[1]).abs().max().item(), 0, abs_tol=1e-6)
