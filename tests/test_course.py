"""The runner: a course of three small lessons meets everything that can happen to a real one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import course
import pytest
import record
import render
import run_course
import torch
from conftest import REAL_DATA, ROOT, load_lesson
from torch.utils.data import TensorDataset

LESSON = '''"""{title}: a lesson of a test.

Run:    uv run src/{path}
Needs:  {needs}
Makes:  {makes}
Expect: {expect}
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NUMBER = {number}
PAUSE = 0


def main(quick=False):
    models = ROOT / ("models/quick" if quick else "models")
    time.sleep(PAUSE)
    if (ROOT / "models" / "fail").exists() and "{title}" == "Use":
        sys.exit("It was told to fail.")
    number = int((models / "a.txt").read_text()) if "{needs}" != "nothing" else NUMBER
    if "{makes}" != "nothing":
        models.mkdir(parents=True, exist_ok=True)
        (models / "a.txt").write_text(str(number))
    print("{title} speaks")
    print(f"Result: number = {{number}}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser()
    cli.add_argument("--quick", action="store_true")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
'''
LESSONS = {
    "basics/01_make.py": ("Make", "nothing", "models/a.txt", "number = 1"),
    "basics/02_use.py": ("Use", "models/a.txt", "nothing", "number >= 1"),
    "llm/01_last.py": ("Last", "nothing", "nothing", "number <= 9"),
}


@pytest.fixture
def small(tmp_path):
    """A course of three lessons in a path with a blank, and the command that runs it."""
    root = tmp_path / "a course"
    shutil.copytree(
        ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path, (title, needs, makes, expect) in LESSONS.items():
        (root / "src" / path).parent.mkdir(parents=True, exist_ok=True)
        text = LESSON.format(
            title=title, path=path, needs=needs, makes=makes, expect=expect, number=1
        )
        (root / "src" / path).write_text(text, encoding="utf-8")
    return root


def command(root, *arguments, **options):
    return subprocess.run(
        [sys.executable, root / "scripts" / "run_course.py", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd="/",
        **options,
    )


def states(root, *flags):
    return [line.split()[0] for line in command(root, "list", *flags).stdout.splitlines()]


def change(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


# RUN: in order, each once, and again only what is no longer true.
def test_a_course_runs_once_in_order(small):
    assert states(small) == ["missing"] * 3
    first = command(small, "run")
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0] == "0 done before, 3 to run"
    assert [line.split()[0] for line in lines[1:4]] == [path[:-3] for path in LESSONS]
    assert all(line.endswith("number = 1") for line in lines[1:4])
    assert states(small) == ["done"] * 3
    assert command(small, "run").stdout.startswith("3 done before, 0 to run")
    assert not (small / "models" / "quick").exists()


def test_what_has_changed_is_stale_and_runs_again(small):
    command(small, "run")
    change(small / "src" / "llm" / "01_last.py", "NUMBER = 1", "NUMBER = 2")
    listed = command(small, "list").stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["done", "done", "stale"]
    assert "its code has changed" in listed
    assert "number = 2" in command(small, "run").stdout
    change(small / "src" / "basics" / "01_make.py", "NUMBER = 1", "NUMBER = 7")
    run = command(small, "run")
    assert run.returncode == 1
    assert "basics/01_make: promised number = 1, got 7.0" in run.stderr
    assert states(small) == ["done", "stale", "done"], "its input is newer"
    again = command(small, "run")
    assert "basics/02_use" in again.stdout
    assert "promised number = 1" in again.stderr, "a broken promise is not forgotten"


def test_a_missing_input_is_made_first(small):
    run = command(small, "run", "02_use")
    assert run.returncode == 0, run.stderr
    assert "0 done before, 2 to run" in run.stdout
    assert states(small) == ["done", "done", "missing"]
    (small / "models" / "a.txt").unlink()
    assert states(small)[:2] == ["missing", "stale"]


def test_a_lesson_run_by_hand_counts(small):
    lesson = small / "src" / "basics" / "01_make.py"
    subprocess.run([sys.executable, lesson], check=True, capture_output=True)
    assert states(small)[0] == "done"
    os.utime(lesson, (time.time() + 9, time.time() + 9))
    assert states(small)[0] == "stale"


def test_a_folder_without_a_model_is_not_made_yet(small):
    lesson, folder = small / "src" / "basics" / "01_make.py", small / "models" / "a_model"
    change(lesson, "Makes:  models/a.txt", "Makes:  models/a_model/")
    folder.mkdir(parents=True)
    (folder / "checkpoint.pth").write_bytes(b"so far")  # as an interrupted training leaves it
    assert "missing  uv run src/basics/01_make.py" in command(small, "list").stdout
    (folder / "config.json").write_text("{}")
    os.utime(lesson, (1, 1))
    assert "done     uv run src/basics/01_make.py" in command(small, "list").stdout


def test_a_run_on_other_data_is_repeated_when_the_data_come(small):
    lesson = small / "src" / "llm" / "01_last.py"
    change(lesson, "Expect: number <= 9", "Expect: number <= 9, data = MNIST")
    change(lesson, "number = {number}", "number = {number}, data = 5,000 digits of MNIST")
    run = command(small, "run", "01_last")
    assert run.returncode == 1
    assert "llm/01_last: promised data = MNIST, got 5,000 digits of MNIST" in run.stderr
    assert "data/README.md says how to get them" in run.stderr
    source = small / "data" / "MNIST" / "SOURCE"
    source.parent.mkdir(parents=True)
    source.write_text("5,000 digits of MNIST")
    assert states(small)[2] == "done", "nothing better can be had yet"
    source.write_text("MNIST")
    assert "it ran on other data: MNIST is here now" in command(small, "list").stdout
    change(lesson, "data = 5,000 digits of MNIST", "data = MNIST")
    assert command(small, "run", "01_last").returncode == 0
    assert states(small)[2] == "done"


@pytest.mark.parametrize(
    "path",
    ["src/llm/01_last.py", "llm/01_last.py", "./src/llm/01_last", "/home/me/src/llm/01_last"],
)
def test_a_lesson_may_be_named_by_its_path(small, path):
    assert "1 to run\nllm/01_last" in command(small, "run", path).stdout


def test_whoever_reads_only_the_first_lines_sees_no_traceback(small):
    reader, writer = os.pipe()
    os.close(reader)
    listed = subprocess.run(
        [sys.executable, "-u", small / "scripts" / "run_course.py", "list"],
        check=False,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert listed.stderr == ""


def test_a_quick_course_keeps_to_its_own_folder(small):
    run = command(small, "run", "--quick")
    assert run.returncode == 0, run.stderr
    assert states(small, "--quick") == ["done"] * 3
    assert states(small) == ["missing"] * 3
    assert [path.name for path in (small / "models").iterdir()] == ["quick"]


# FAILURES: shown in full, named at the end, and made up for by the same command.
def test_a_lesson_that_needs_a_server_is_left_out_without_one(small):
    environment = {key: value for key, value in os.environ.items() if key != "OLLAMA_HOST"}
    lesson = small / "src" / "llm" / "01_last.py"
    change(lesson, "Needs:  nothing", "Needs:  a running Ollama (scripts/ollama.sh start)")
    run = command(small, "run", env=environment)
    assert run.returncode == 0, run.stderr
    assert "llm/01_last is left out: it needs a server (scripts/ollama.sh start)" in run.stdout
    assert states(small) == ["done", "done", "missing"]
    served = environment | {"OLLAMA_HOST": "anywhere"}
    assert "llm/01_last " in command(small, "run", env=served).stdout


@pytest.mark.parametrize("flags", [[], ["--keep-going"]])
def test_a_failure_is_shown_and_can_be_repeated(small, flags):
    (small / "models").mkdir()
    (small / "models" / "fail").touch()
    run = command(small, "run", *flags)
    assert run.returncode == 1
    assert "basics/02_use failed with exit code 1. It said:\nIt was told to fail." in run.stdout
    assert run.stderr.strip().splitlines()[-1] == "basics/02_use failed: It was told to fail."
    assert states(small) == ["done", "missing", "done" if flags else "missing"]
    (small / "models" / "fail").unlink()
    assert command(small, "run").returncode == 0
    assert states(small) == ["done"] * 3


@pytest.mark.parametrize("to", ["the group", "the runner alone"])
def test_ctrl_c_stops_the_lesson_and_leaves_a_course_that_goes_on(small, to):
    change(small / "src" / "basics" / "02_use.py", "PAUSE = 0", "PAUSE = 60")
    line = [sys.executable, "-u", small / "scripts" / "run_course.py", "run"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, start_new_session=True, **options) as runner:
        assert any(line.startswith("basics/01_make") for line in runner.stdout)
        time.sleep(0.5)
        if to == "the group":
            os.killpg(runner.pid, signal.SIGINT)
        else:
            runner.send_signal(signal.SIGINT)
        _, errors = runner.communicate(timeout=20)
    assert runner.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("Stopped.")
    assert "Traceback" not in errors
    assert states(small) == ["done", "missing", "missing"]
    change(small / "src" / "basics" / "02_use.py", "PAUSE = 60", "PAUSE = 0")
    assert command(small, "run").stdout.startswith("1 done before, 2 to run")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"basics/01_make": 3}'])
def test_damaged_notes_cost_a_run_and_no_traceback(small, content):
    command(small, "run", "01_make")
    (small / "models" / "runs.json").write_text(content)
    assert command(small, "list").returncode == 0
    assert command(small, "run").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "03_none"], 1, "No lesson is called 03_none"),
        (["try", "basics", "--set", "NUMBER=1"], 2, "try wants one lesson and a change"),
        (["try", "--set", "NUMBER=1"], 2, "try wants one lesson and a change"),
        (
            ["try", "02_use", "--set", "NUMBER=1"],
            1,
            "models/a.txt is missing. Make it with: uv run src/basics/01_make.py",
        ),
        (["try", "01_last", "--set", "SIZE=1"], 1, "sets no SIZE. It sets ROOT, NUMBER, PAUSE."),
        (["try", "01_last", "--set", "NUMBER"], 1, "--set wants NAME=VALUE"),
        (["try", "01_last", "--set", "NUMBER=1+"], 1, "--set wants NAME=VALUE"),
        (["try", "01_last", "--set", "NUMBER=abc"], 1, "--set wants NAME=VALUE"),
        (["try", "01_lost", "--set", "NUMBER=1"], 1, "No lesson is called 01_lost"),
        (["try", "01_last"], 2, "try wants one lesson and a change"),
        (["walk"], 2, "invalid choice"),
        (["run", "--quik"], 2, "--quik"),
        ([], 2, "required"),
    ],
)
def test_a_mistyped_command_ends_with_a_sentence(small, arguments, code, words):
    run = command(small, *arguments)
    assert run.returncode == code
    assert words in run.stderr
    assert "Traceback" not in run.stderr


# TRY: a copy is changed and run, and what it makes stays out of models/.
def keep_capture(root, name):
    path = root / "tests" / "outputs" / f"{name}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("Result: number = 1\n", encoding="utf-8")


def test_a_try_says_what_has_changed_and_replaces_nothing(small):
    keep_capture(small, "basics/01_make")
    command(small, "run", "01_make")
    tried = command(small, "try", "01_make", "--set", "NUMBER=5")
    assert tried.returncode == 0, tried.stderr
    assert "Result: number = 5" in tried.stdout
    assert tried.stdout.splitlines()[-1] == "Without the change, it was: Result: number = 1"
    assert (small / "models" / "a.txt").read_text() == "1"
    assert (small / "models" / "scratch" / "01_make" / "models" / "a.txt").read_text() == "5"
    assert "NUMBER = 5" not in (small / "src" / "basics" / "01_make.py").read_text()
    assert states(small)[0] == "done"


def test_a_quick_try_reads_what_quick_runs_have_made(small):
    keep_capture(small, "basics/02_use")
    tried = command(small, "try", "02_use", "--set", "PAUSE=0", "--quick")
    assert tried.returncode == 1
    assert "models/quick/a.txt is missing. Make it with: uv run src/basics/01_make.py --quick" in (
        tried.stderr
    )
    command(small, "run", "--quick", "01_make")
    tried = command(small, "try", "02_use", "--set", "PAUSE=0", "--quick")
    assert tried.returncode == 0, tried.stderr
    assert "Result: number = 1\n" in tried.stdout


def test_a_try_that_fails_says_so(small):
    broken = command(small, "try", "01_last", "--set", "PAUSE=[]")
    assert broken.returncode == 1
    assert "Your copy ended with exit code 1." in broken.stderr


# RECORDS: what is written down, and the documents that are made of it.
def write_records(root, lessons):
    kept = {"lessons": lessons, "seeds": {}, "predictions": {}, "settings": {}}
    (root / course.RECORDS).parent.mkdir(parents=True)
    (root / course.RECORDS).write_text(json.dumps(kept), encoding="utf-8")


def test_a_record_holds_what_a_run_measured(small, monkeypatch):
    monkeypatch.setattr(run_course, "ROOT", small)
    first, _, last = course.find_lessons(small).values()
    write_records(small, {})
    record.record_lesson(last, small)
    entry = course.read_records(small)["lessons"]["llm/01_last"]
    assert entry["result"] == "Result: number = 1"
    assert entry["code"] == last.hash_code()
    assert entry["machine"] == course.describe_machine()["machine"]
    output = course.capture_path("llm/01_last", small).read_text(encoding="utf-8")
    assert output == "Last speaks\nResult: number = 1\n"
    change(first.path, "NUMBER = 1", "NUMBER = 2")
    with pytest.raises(SystemExit, match="not recorded: promised number = 1"):
        record.record_lesson(first, small)


@pytest.mark.parametrize(
    ("promise", "ours", "seeds", "verdict"),
    [
        ("number >= 97.59%", "97.50%", ["97.60%"], "97.60% | holds"),
        ("number >= 97.8%", "95.1%", ["95.2%", "94.8%"], "94.8% to 95.2% | does not hold"),
        ("number >= 1.4", "1.07 to 1.48", [], "one run | holds"),
        ("number >= 1.4", "0.97 to 1.08", [], "one run | does not hold"),
        ("number >= 86", "none", [], "one run | not measured"),
    ],
)
def test_a_claim_holds_if_a_run_reaches_it(monkeypatch, promise, ours, seeds, verdict):
    monkeypatch.setattr(render, "CLAIMS", f"words | claimed | a/lesson | {promise}")
    kept = {"lessons": {"a/lesson": {"result": f"Result: number = {ours}"}}}
    kept["seeds"] = {"a/lesson": {"results": [f"Result: number = {seed}" for seed in seeds]}}
    row = render.results_table("all", None, kept)[-1]
    assert row == f"| words, `a/lesson` | claimed | {ours} | {verdict} |"


def test_a_constant_is_set_below_its_own_line():
    text = "A = 1\nB = A + 1\nprint(A, B)\n"
    changed = run_course.set_constant(text, "A=5")
    assert changed == "A = 1\nA = 5\nB = A + 1\nprint(A, B)\n"


def test_hashes_ignore_comments_and_docstrings_and_one_of_them_words(tmp_path):
    file = tmp_path / "lesson.py"
    codes, works = [], []
    for word, code in (
        ("A", 'print("a")  # b'),
        ("B", 'print("a")'),
        ("B", 'print("c")'),
        ("B", 'print("a", 1)'),
    ):
        file.write_text(f'"""{word}: c.\n\nNeeds: nothing\nMakes: nothing\n"""\n{code}\n')
        codes.append(course.Lesson(file).hash_code())
        works.append(course.Lesson(file).hash_work())
    assert codes[0] == codes[1]
    assert len(set(codes)) == 3
    assert works[0] == works[1] != works[3]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ('print("Make', 'print("Make speaks")'),
        ("if (ROOT", 'if (ROOT / "models" / "fail").exists() and "Make" == "Use":\n    sys.exit('),
        ("NUMBER ... PAUSE", "NUMBER = 1\nPAUSE = 0"),
    ],
)
def test_an_excerpt_and_values_are_filled_in(small, words, code):
    entry = {"result": "Result: number = 7, share = 9.10%", "seconds": 59}
    write_records(small, {"basics/01_make": entry, "basics/02_use": entry, "llm/01_last": entry})
    text = f"<!-- code basics/01_make {words} -->\nold\n<!-- end -->\n"
    text += "It is <!-- = basics/01_make share -->0%<!-- --> now,"
    text += " after <!-- = basics minutes -->9 min<!-- -->."
    filled = render.render(text, small)
    assert f"```python\n{code}" in filled
    assert "It is <!-- = basics/01_make share -->9.10%<!-- --> now," in filled
    assert filled.endswith("after <!-- = basics minutes -->2 min<!-- -->.")
    assert render.render(filled, small) == filled


@pytest.mark.parametrize("words", ["print('none", "NUMBER ... none", "none ... PAUSE"])
def test_an_excerpt_that_is_not_in_the_lesson_is_named(small, words):
    with pytest.raises(SystemExit, match="^No statements of src/basics/01_make.py begin with: "):
        render.fill_code(f"basics/01_make {words}", small, {})


def test_a_stopped_record_leaves_the_old_ones_whole(small, monkeypatch):
    write_records(small, {"basics/01_make": {"seconds": 3}})
    before = (small / course.RECORDS).read_text(encoding="utf-8")

    def stop(path, text, **options):
        path.write_bytes(text[:9].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(type(small), "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        course.keep("lessons", "basics/02_use", {"seconds": 4}, small)
    assert (small / course.RECORDS).read_text(encoding="utf-8") == before


def test_the_check_of_the_documents_ends_with_its_verdict(monkeypatch):
    for stale, code in (([], 0), (["README.md differs"], "README.md differs")):
        monkeypatch.setattr(render, "find_stale", lambda stale=stale: stale)
        with pytest.raises(SystemExit) as stop:
            render.main(check=True)
        assert stop.value.code == code


# SABOTAGE: a lesson that does its work wrongly cannot keep its promise.
def shuffle_labels(lesson):
    make_dataset = lesson.make_dataset

    def shuffled(train):
        images, labels = make_dataset(train).tensors
        order = torch.randperm(len(labels)) if train else torch.arange(len(labels))
        return TensorDataset(images, labels[order])

    lesson.make_dataset = shuffled


def shift_labels(lesson):
    make_dataset = lesson.make_dataset

    def shifted(train):
        images, labels = make_dataset(train).tensors
        return TensorDataset(images, labels if train else (labels + 1) % 10)

    lesson.make_dataset = shifted


def raise_learning_rate(lesson):
    lesson.LEARNING_RATE *= 10


def stay_in_training_mode(lesson):
    lesson.DropoutNet.eval = lambda model: model


SABOTAGE = {
    "nothing": ("basics/09_mnist", lambda lesson: None, None),
    "learning rate times 10": ("basics/09_mnist", raise_learning_rate, "test_accuracy"),
    "shuffled labels": ("basics/09_mnist", shuffle_labels, "test_accuracy"),
    "labels off by one": ("basics/09_mnist", shift_labels, "test_accuracy"),
    "evaluated in training mode": (
        "intermediate/03_overfitting_dropout",
        stay_in_training_mode,
        "dropout_train",
    ),
}


@pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")
@pytest.mark.parametrize("sabotage", SABOTAGE.values(), ids=SABOTAGE)
def test_a_sabotaged_lesson_breaks_its_promise(tmp_path, capsys, sabotage):
    name, spoil, value = sabotage
    lesson = load_lesson(name)
    spoil(lesson)
    original = course.find_lessons()[name]
    run_course.make_copy(original, [], tmp_path)
    lesson.ROOT = tmp_path
    lesson.main()
    broken = course.broken_promises(original.card["Expect"], capsys.readouterr().out)
    assert [promise.split()[1] for promise in broken] == ([value] if value else [])
