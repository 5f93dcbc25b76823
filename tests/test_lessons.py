"""What can go wrong in a lesson: flags, checkpoints, full disks, Ctrl-C, terminals."""

import io
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    LESSONS,
    REAL_DATA,
    ROOT,
    copy_course,
    load_lesson,
    obey_permissions,
    run,
)
from course import broken_promises, read_result


@pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")
def test_full_cnn_keeps_its_promise_on_real_digits(tmp_path):
    course = copy_course(tmp_path, with_data=True)
    full = run(course, "intermediate/02_cnn")
    expect = LESSONS["intermediate/02_cnn"].card["Expect"]
    assert broken_promises(expect, full.stdout) == [], full.stderr
    assert read_result(full.stdout)["test_accuracy"] < 99.5, "too good to be true"


# FLAGS: a mistyped one ends with exit code 2 and the right ones, before any work is done.
@pytest.mark.parametrize("name", LESSONS)
def test_a_mistyped_flag_exits_2(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quik"])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # pytest's is no stream
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "src" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "--quick" in capsys.readouterr().err


# FULL: the lessons that take seconds keep their promise here and now.
SECONDS = ["basics/06_training", "basics/07_activations", "basics/08_classifier"]


@pytest.mark.parametrize("name", [*SECONDS, "intermediate/01_save_load"])
def test_a_full_run_keeps_its_promise(name, tmp_path, capsys):
    lesson = load_lesson(name)
    lesson.ROOT = tmp_path
    lesson.main()
    assert broken_promises(LESSONS[name].card["Expect"], capsys.readouterr().out) == []


# CHECKPOINTS: whatever is wrong with one, a sentence says so and names the command that makes it.
class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def spoil_checkpoint(kind, path):
    model = load_lesson("intermediate/01_save_load").SimpleNet()
    match kind:
        case "missing":
            return
        case "a folder":
            path.mkdir()
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("this is not a checkpoint")
        case "another network's":
            torch.save(load_lesson("intermediate/02_cnn").CNN().state_dict(), path)
        case "other shapes":
            torch.save({name: tensor[:1] for name, tensor in model.state_dict().items()}, path)
        case "model and optimizer":
            torch.save({"model": model.state_dict(), "step": 100}, path)
        case "a whole model":
            torch.save(torch.nn.Linear(1, 8), path)
        case "TorchScript":
            torch.jit.save(torch.jit.script(torch.nn.Linear(1, 8)), path)
        case "a number":
            torch.save(42, path)
        case "malicious":
            torch.save({"layer1.weight": RunsCode(path.with_suffix(".proof"))}, path)
        case _:
            torch.save(model.state_dict(), path)
            path.write_bytes(path.read_bytes()[: int(kind.removeprefix("cut at "))])


KINDS = ["missing", "a folder", "empty", "text", "another network's", "other shapes", "a number"]
KINDS += ["model and optimizer", "a whole model", "TorchScript", "malicious"]
KINDS += ["cut at 1", "cut at 100", "cut at 1000", "cut at 2000"]


@pytest.mark.filterwarnings("ignore:.*TorchScript", "ignore:.*torch.jit")
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_checkpoint_ends_with_a_true_sentence(tmp_path, kind):
    lesson, path = load_lesson("intermediate/01_save_load"), tmp_path / "spoiled.pth"
    spoil_checkpoint(kind, path)
    with pytest.raises(SystemExit) as stop:
        lesson.main(quick=True, file=path)
    sentence = stop.value.code
    assert sentence.startswith(f"Cannot load {path} (")
    assert ("(FileNotFoundError)" in sentence) == (kind == "missing")
    assert "damaged" not in sentence, "another kind of file need not be damaged"
    assert sentence.endswith("uv run src/intermediate/01_save_load.py --quick")
    assert "\n" not in sentence
    assert not path.with_suffix(".proof").exists(), "code from the file was run"


@pytest.mark.parametrize("kind", ["missing", "text", "another network's"])
def test_a_spoiled_checkpoint_exits_1_without_a_traceback(course, tmp_path, kind):
    path = tmp_path / "spoiled.pth"
    spoil_checkpoint(kind, path)
    spoiled = run(course, "intermediate/01_save_load", "--load", path)
    assert spoiled.returncode == 1
    assert len(spoiled.stderr.strip().splitlines()) == 1
    assert str(path) in spoiled.stderr


def test_a_good_checkpoint_loads_by_flag(course, tmp_path):
    path = tmp_path / "good.pth"
    model = load_lesson("intermediate/01_save_load").SimpleNet()
    torch.save(model.state_dict(), path)
    loaded = run(course, "intermediate/01_save_load", "--load", path)
    expected = model(torch.tensor([[10.0]])).item()
    assert f"x = 10: predicted {expected:.2f}" in loaded.stdout


# SAVING: a full disk, a folder that cannot be written, Ctrl-C and kill -9 leave the old file whole.
def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # as if the disk were full then


@pytest.mark.parametrize("fault", ["full disk", "unwritable"])
def test_a_failed_save_keeps_the_old_file(tmp_path, fault):
    course = copy_course(tmp_path, with_data=False)
    quick = course / "models" / "quick"
    quick.mkdir(parents=True)
    (quick / "simplenet.pth").write_bytes(b"the old one")
    if fault == "unwritable":
        quick.chmod(0o555)
    spoil = full_disk if fault == "full disk" else obey_permissions
    failed = run(course, "intermediate/01_save_load", "--quick", preexec_fn=spoil)
    quick.chmod(0o755)
    assert failed.returncode == 1
    sentence = r"Stopped: \w+Error\(.*\)\. Finished files are unchanged\.\n"
    assert re.fullmatch(sentence, failed.stderr)
    assert list(quick.glob("*.part")) == []
    assert (quick / "simplenet.pth").read_bytes() == b"the old one"


def test_ctrl_c_ends_with_one_line_and_keeps_the_old_file(tmp_path):
    course = copy_course(tmp_path, with_data=True)
    old = course / "models" / "mnist_cnn.pth"
    old.parent.mkdir()
    old.write_bytes(b"the old one")
    lesson = course / "src" / "intermediate" / "02_cnn.py"
    text = lesson.read_text(encoding="utf-8")
    lesson.write_text(text.replace("BATCH_SIZE = 64", "BATCH_SIZE = 1000"), encoding="utf-8")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-u", lesson], **pipes) as process:
        assert any(line.startswith("Epoch 1") for line in process.stdout), "it trains"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "Stopped: KeyboardInterrupt(). Finished files are unchanged.\n"
    assert old.read_bytes() == b"the old one"


SAVE_FOR_EVER = """
import importlib.util, pathlib, sys, torch
spec = importlib.util.spec_from_file_location("lesson", sys.argv[1])
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
lesson.ROOT = pathlib.Path(sys.argv[2])
model = torch.nn.Linear(1000, 1000)
while True:
    lesson.save(model.state_dict(), lesson.ROOT / "kept.pth")
"""


def test_kill_9_never_leaves_half_a_checkpoint(tmp_path):
    lesson = ROOT / "src" / "intermediate" / "02_cnn.py"
    for delay in (0.05, 0.11, 0.17):
        command = [sys.executable, "-u", "-c", SAVE_FOR_EVER, lesson, tmp_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert "Saved" in saver.stdout.readline()
            time.sleep(delay)
            saver.kill()
        weights = torch.load(tmp_path / "kept.pth", weights_only=True)["weight"]
        assert weights.shape == (1000, 1000)


def test_two_copies_at_once_do_not_disturb_each_other(tmp_path):
    course = copy_course(tmp_path, with_data=False)
    command = [sys.executable, course / "src" / "intermediate" / "01_save_load.py", "--quick"]
    pair = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for lesson in pair:
        _, errors = lesson.communicate(timeout=120)
        assert lesson.returncode == 0, errors
    made = LESSONS["intermediate/01_save_load"].makes
    left = [path.name for path in (course / "models" / "quick").iterdir()]
    assert sorted(left) == sorted(file.removeprefix("models/") for file in made)


# TERMINALS: not every one can show what a model writes.
TERMINALS = [("llm/04_mini_gpt", "ascii"), ("llm/04_mini_gpt", "latin-1")]
TERMINALS += [("llm/05_pretrain_gpt2", "ascii")]  # whatever this shows, latin-1 can show


@pytest.mark.parametrize(("name", "encoding"), TERMINALS)
def test_generated_text_is_printed_in_every_encoding(course, name, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    quick = run(course, name, "--quick", env=environment, encoding=encoding)
    assert quick.returncode == 0, quick.stderr
    assert "Result: " in quick.stdout


# INSTALL: what decides which versions a learner gets.
def test_uv_files_fix_the_versions():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'exclude-newer = "\d{4}-\d\d-\d\dT', project)
    tracked = shutil.which("git") and subprocess.run(
        ["git", "ls-files", "uv.lock"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert not tracked or tracked.stdout == ""
