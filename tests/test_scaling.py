"""Memory, profiler, processes: what is counted is what is kept, and no process is left behind."""

import json
import math
import os
import re
import runpy
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

MEMORY = "advanced/06_memory_management"
PROFILING = "advanced/09_profiling"
PROCESSES = "advanced/10_multi_gpu"
PAST = "advanced/11_past_one_machine"
reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# MEMORY
@pytest.fixture
def memory():
    torch.manual_seed(0)
    return load_lesson(MEMORY)


@pytest.mark.parametrize(
    ("work", "size"),
    [
        (lambda x: x + x, 0),
        (lambda x: x.exp(), 40_000),
        (lambda x: x.exp() * x.exp().T, 80_000),
        (lambda x: x * x, 0),
        (lambda x: x * x.T, 0),
        (lambda x: (x + 1) * (x + 1).T, 80_000),
        (lambda x: (y := x + 1) * y.T, 40_000),  # two views of one storage
    ],
)
def test_each_storage_counts_once_and_known_tensors_do_not_count(memory, monkeypatch, work, size):
    class Work(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = torch.nn.Parameter(torch.randn(100, 100))

        def forward(self, images):
            return work(self.x)

    monkeypatch.setattr(memory.F, "cross_entropy", lambda result, labels: result.sum())
    _, kept = memory.batch_gradients(Work().to(memory.DEVICE), *memory.make_images(1))
    assert kept == size


def test_bytes_kept_grow_with_the_batch_and_can_be_added_up_by_hand(memory):
    model = memory.build_deep_network()
    _, four = memory.batch_gradients(model, *memory.make_images(4))
    _, eight = memory.batch_gradients(model, *memory.make_images(8))
    assert eight == pytest.approx(2 * four, rel=0.02)
    maps = 4 * 16 * 14 * 14 * 4  # bytes of 4 images' maps: the first one, then conv's and ReLU's
    assert four == pytest.approx((1 + 4 * 4) * maps, rel=0.02)


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(memory, parts):
    """Also if the last part is smaller, such as 7 images in 2 parts."""
    model = memory.build_deep_network().double()
    images, labels = memory.make_images(7)
    whole, _ = memory.batch_gradients(model, images.double(), labels)
    ours, _ = memory.batch_gradients(model, images.double(), labels, parts)
    torch.testing.assert_close(ours, whole)


def test_dividing_by_the_number_of_parts_is_wrong_if_the_last_part_is_smaller(memory):
    model = memory.build_deep_network().double()
    images, labels = memory.make_images(7)
    whole, _ = memory.batch_gradients(model, images.double(), labels)
    model.zero_grad()
    for part, answers in zip(images.split(4), labels.split(4), strict=True):
        (F.cross_entropy(model(part.double()), answers) / 2).backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert (ours - whole).abs().max() > 1e-3 * whole.abs().max()


def test_checkpointing_keeps_less_and_changes_no_gradient(memory):
    model = memory.build_deep_network()
    batch = memory.make_images(4)
    expected, all_kept = memory.batch_gradients(model, *batch)
    gradients, kept = memory.batch_gradients(model, *batch, checkpointing=True)
    assert kept < 0.3 * all_kept
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("parts", [4, 8])
def test_the_methods_keep_what_the_readme_says(memory, monkeypatch, parts):
    monkeypatch.setattr(memory, "PARTS", parts)
    shares, differences = memory.compare_methods(memory.build_deep_network(), 16)
    assert shares["plain"] == 1
    assert differences["plain"] == 0
    assert shares["accumulation"] == pytest.approx(1 / parts, rel=0.02)
    assert differences["accumulation"] < 0.01
    assert shares["checkpointing"] < 0.3
    assert differences["checkpointing"] < 0.01
    assert shares["bf16 autocast"] == pytest.approx(0.5, abs=0.05)


def test_checkpointing_computes_a_third_more(memory, capsys):
    memory.compare_methods(memory.build_deep_network(), 64)
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    operations = {row[0]: float(row[-1].replace(",", "")) for row in rows[1:]}
    assert operations["checkpointing"] == pytest.approx(4 / 3 * operations["plain"], rel=0.1)
    assert operations["accumulation"] == operations["plain"]


def test_adam_keeps_two_numbers_for_each_weight(memory, capsys):
    model = memory.build_deep_network()
    memory.show_memory(model, [8])
    rows = re.findall(r"keeps +(\d+) kB", capsys.readouterr().out)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e3
    assert [float(row) for row in rows] == pytest.approx([weights, 2 * weights], abs=1)


def test_a_full_memory_halves_the_parts_until_they_fit(memory, capsys):
    model = memory.build_deep_network()
    images, labels = memory.make_images(16)
    whole, needed = memory.batch_gradients(model, images, labels)
    assert memory.fit_into_memory(model, images, labels, 1.1 * needed) == 1
    assert memory.fit_into_memory(model, images, labels, 0.3 * needed) == 4
    assert capsys.readouterr().out.count("simulated limit") == 2
    ours = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-3)


def test_a_memory_that_holds_no_image_ends_with_a_sentence(memory):
    with pytest.raises(SystemExit, match="Not even one image"):
        memory.fit_into_memory(memory.build_deep_network(), *memory.make_images(4), limit=1000)


@pytest.mark.parametrize("text", ["", "a", "16,,32", "0", "7", "-16,8", "1.5", "16;32"])
def test_bad_batch_sizes_are_a_mistake_of_usage(memory, monkeypatch, capsys, text):
    monkeypatch.setattr(sys, "argv", ["lesson", f"--batch-sizes={text}"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "src" / f"{MEMORY}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "argument --batch-sizes: " in capsys.readouterr().err
    assert memory.read_sizes("16, 32") == [16, 32]


# PROFILING
@pytest.fixture
def profiling(tmp_path):
    lesson = load_lesson(PROFILING)
    lesson.ROOT = tmp_path
    torch.manual_seed(0)
    return lesson


def make_bytes(count):
    return torch.randint(256, (count, 28, 28)).byte(), torch.randint(10, (count,))


def test_repaired_faults_do_not_change_the_weights(profiling):
    images, labels = make_bytes(40)
    moved = images.to(profiling.DEVICE), labels.to(profiling.DEVICE)
    slow = profiling.train(profiling.build_network(), images, labels, 8, True, True)
    repaired = profiling.train(profiling.build_network(), *moved, 8, False, False)
    large = profiling.train(profiling.build_network(), *moved, 40, False, False)
    torch.testing.assert_close(repaired, slow)
    assert not torch.allclose(large, slow), "larger batches are a different training"


def test_the_profiler_sees_each_fault_and_its_trace_can_be_read(profiling, capsys, recwarn):
    images, labels = make_bytes(256)
    slow = {"images": images, "labels": labels, "batch_size": 8, "one_by_one": True, "wait": True}
    recorded, waits, _ = profiling.show_profile(slow)
    assert waits == 32
    shown = capsys.readouterr().out
    assert all(part in shown for part in profiling.PARTS)
    path = profiling.ROOT / "models" / "trace.json"
    profiling.save_trace(recorded, path)
    assert [file.name for file in path.parent.iterdir()] == ["trace.json"]
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("prepare") == 32
    assert names.count("aten::item") == 32
    assert names.count("aten::copy_") >= 4 * 256, "image by image"
    assert not [warning for warning in recwarn if "rofiler" in str(warning.message)]
    repaired = slow | {"one_by_one": False, "wait": False}
    _, waits, _ = profiling.show_profile(repaired)
    assert waits == 1, "once, for the sum"


def test_a_trace_that_cannot_be_written_leaves_the_old_file(profiling):
    path = profiling.ROOT / "trace.json"
    path.write_text("the old one")

    class FullDisk:
        def export_chrome_trace(self, name):
            Path(name).write_text("half")
            raise OSError("No space left on device")

    with pytest.raises(OSError):
        profiling.save_trace(FullDisk(), path)
    assert path.read_text() == "the old one"


# PROCESSES
@pytest.fixture
def processes(monkeypatch):
    lesson = load_lesson(PROCESSES)
    monkeypatch.setattr(lesson, "DEVICE", torch.device("cpu"))
    return lesson


def act_as(monkeypatch, lesson, rank, ranks):
    monkeypatch.setattr(lesson.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(lesson.dist, "get_world_size", lambda: ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_shares_of_all_processes_are_the_batch(processes, monkeypatch, ranks):
    whole, _ = processes.take_share("one process", 3, 5 * ranks)
    shares = []
    for rank in range(ranks):
        act_as(monkeypatch, processes, rank, ranks)
        shares.append(processes.take_share("DDP", 3, 5 * ranks)[0])
    assert {len(share) for share in shares} == {5}
    assert torch.equal(torch.cat(shares), whole)


def test_averaged_gradients_of_the_shares_are_the_gradient_of_the_batch(processes, monkeypatch):
    model, _ = processes.build("one process")

    def gradient(points, labels):
        return torch.autograd.grad(F.cross_entropy(model(points), labels), model.parameters())

    whole = gradient(*processes.take_share("one process", 1, 30))
    parts = []
    for rank in range(3):
        act_as(monkeypatch, processes, rank, 3)
        parts.append(gradient(*processes.take_share("FSDP2", 1, 30)))
    for expected, *shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(shares) / 3, expected)


@pytest.mark.parametrize("lesson", [PROCESSES, PAST])
@pytest.mark.parametrize("count", [1, 0, -2])
def test_too_few_processes_are_refused_in_a_sentence(lesson, count):
    with pytest.raises(SystemExit, match="--processes must be 2 or more"):
        load_lesson(lesson).main(processes=count)


UNNAMED = """
import os, socket, sys
socket.sethostname("no-such-host.invalid")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run_without_a_name(lesson, *flags):
    """Run a lesson where the host name has no address; skip if that needs more rights."""
    unshare = ["unshare", "--user", "--map-root-user", "--uts", sys.executable, "-c", UNNAMED]
    lookup = "import socket; socket.getaddrinfo(socket.gethostname(), 1)"
    try:
        probe = subprocess.run(
            [*unshare, "-c", lookup], check=False, capture_output=True, text=True
        )
    except OSError as error:
        pytest.skip(f"no unshare here: {error}")
    if "gaierror" not in probe.stderr:
        pytest.skip(f"a host name without an address is not possible here: {probe.stderr[-200:]}")
    command = [*unshare, ROOT / "src" / f"{lesson}.py", *flags]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


def test_processes_meet_on_a_machine_whose_name_has_no_address():
    trained = run_without_a_name(PROCESSES, "--quick")
    assert trained.returncode == 0, trained.stderr
    assert "Result: ddp_difference = 0.000000" in trained.stdout


def test_the_planned_crash_happens_on_a_machine_whose_name_has_no_address():
    crashed = run_without_a_name(PAST, "--quick", "--processes", "3")
    assert crashed.returncode == 0, crashed.stderr
    assert "3 processes begin at step 5" in crashed.stdout
    assert "process 2 is killed at step 12" in crashed.stdout
    assert "trains alone from step 10" in crashed.stdout
    assert "restart_difference = 0.000000000" in crashed.stdout


FAILS_AT_ONCE = "raise RuntimeError('cannot connect')"
FAILS_LATER = """
import os, signal
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)  # the first attempt is as planned
raise RuntimeError("cannot connect")
"""
ENDS_IN_PEACE = "print('no crash at all')"


@pytest.mark.parametrize("text", [FAILS_AT_ONCE, FAILS_LATER, ENDS_IN_PEACE])
def test_a_failed_start_does_not_count_as_the_planned_crash(tmp_path, monkeypatch, capsys, text):
    lesson, worker = load_lesson(PAST), tmp_path / "worker.py"
    worker.write_text(text)
    monkeypatch.setattr(lesson, "__file__", str(worker))
    with pytest.raises(SystemExit, match="did not fail as planned"):
        lesson.main(quick=True)
    assert "Result" not in capsys.readouterr().out


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


@reads_proc
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
    assert errors.strip().splitlines()[-1] == "Stopped. All processes have ended."
    assert descendants_of(mark) == []


WORKER = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    {deed}
time.sleep(100)
"""


@reads_proc
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


def test_a_restart_that_forgets_its_momentum_would_be_noticed(tmp_path):
    """Equal weights after a restart prove something: without the momentum they differ."""
    lesson, ends = load_lesson(PAST), []
    for forget in (False, True):
        model, optimizer = lesson.build_small()
        for step in range(15):
            if step == 10:
                lesson.save_state(model, optimizer, step, tmp_path / "checkpoint.pth")
                model, optimizer = lesson.build_small()
                assert lesson.resume(model, optimizer, tmp_path / "checkpoint.pth") == 10
                if forget:
                    optimizer.state.clear()
            lesson.train_step(model, optimizer, step, 64)
        ends.append(nn.utils.parameters_to_vector(model.parameters()))
    assert not math.isclose((ends[0] - ends[1]).abs().max().item(), 0, abs_tol=1e-6)
    undisturbed, optimizer = lesson.build_small()
    for step in range(15):
        lesson.train_step(undisturbed, optimizer, step, 64)
    assert torch.equal(nn.utils.parameters_to_vector(undisturbed.parameters()), ends[0])
