"""The rules of the house: cards, copies, records and documents agree, and a lie is found out."""

import ast
import json
import re
import shutil
import subprocess
import sys

import course
import pytest
import records
import render
from conftest import LESSONS, ROOT

# Each lesson writes its own version of these functions.
OWN = {"main", "train", "evaluate", "draw", "predict", "measure", "generate"}


def trees():
    return {name: ast.parse(lesson.text) for name, lesson in LESSONS.items()}


def test_cards_name_the_real_command_and_what_they_promise():
    for name, lesson in LESSONS.items():
        assert list(lesson.card) == ["Run", "Needs", "Makes", "Expect"], name
        assert lesson.card["Run"] == f"uv run src/{name}.py"
        assert re.fullmatch(r"[\w-].+: .+\.", lesson.title), name


def test_every_need_is_made_by_an_earlier_lesson_and_nothing_is_made_twice():
    made = []
    for name, lesson in LESSONS.items():
        assert set(lesson.needs) <= set(made), name
        made += lesson.makes
    assert len(made) == len(set(made))


def same_name_other_code(trees):
    first_seen, drifted = {}, []
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name not in OWN:
                if ast.get_docstring(node):
                    node.body = node.body[1:]
                first, code = first_seen.setdefault(node.name, (name, ast.dump(node)))
                if ast.dump(node) != code:
                    drifted.append(f"{node.name}: {name} differs from {first}")
    return drifted


def test_same_name_means_same_code():
    assert same_name_other_code(trees()) == []


def test_a_drifted_copy_is_found():
    drifted = trees()
    name = "intermediate/05_gpu_training"
    text = LESSONS[name].text.replace("nn.Linear(784, 128)", "nn.Linear(784, 129)")
    drifted[name] = ast.parse(text)
    assert same_name_other_code(drifted) == [f"MLP: {name} differs from basics/09_mnist"]


def test_a_lesson_stands_alone_and_is_portable():
    own = {path.stem for path in ROOT.rglob("*.py") if ".venv" not in path.parts} | {
        "src",
        "scripts",
    }
    for lesson in LESSONS.values():
        for node in ast.walk(ast.parse(lesson.text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & own, lesson.name
        forbidden = r"\.cuda\(\)|device\(['\"]cuda|weights_only=False"
        assert not re.search(forbidden, lesson.text), lesson.name


def test_what_takes_seconds_to_import_is_imported_inside_the_guard():
    """Ctrl-C in these seconds ends in the guard's sentence."""
    for name, lesson in LESSONS.items():
        first = ast.parse(lesson.text).body
        froms = {node.module for node in first if isinstance(node, ast.ImportFrom)}
        plain = [node for node in first if isinstance(node, ast.Import)]
        modules = froms | {alias.name for node in plain for alias in node.names}
        assert not {module.split(".")[0] for module in modules} & {"transformers", "peft"}, name


def test_the_readme_shows_the_lines_that_are_a_lessons_idea():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in LESSONS:
        marks = re.findall(rf"<!-- code ({name} .+?) -->", readme)
        assert marks, name
        for mark in marks:
            _, excerpt, _ = render.fill_code(mark, ROOT, {})
            assert 4 <= len(excerpt.splitlines()) <= 16, name


def test_top_level_holds_what_was_asked_for_and_nothing_else():
    listed = subprocess.run(
        ["git", "ls-files"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    assert top <= {"pyproject.toml", "README.md", "src", "tests", "models", "data", "scripts"} | {
        "CHEATSHEET.md",
        "LICENSE",
    }


# RECORDS: what the documents show is what a recorded run printed, and it keeps the cards' promises.
def test_documents_tell_the_truth():
    assert records.find_untruths(ROOT) == []


@pytest.fixture
def copy(tmp_path):
    for name in ("src", "tests", "data/results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (*render.DOCUMENTS, "data/qa.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


RECORDS = course.RECORDS
MUTATIONS = {
    "a digit in the README": ("README.md", r"(test_accuracy = 9)\d", r"\g<1>1", "README.md"),
    "a number in a sentence": (
        "README.md",
        r"(<!-- = intermediate/02_cnn test_accuracy -->)\d",
        r"\g<1>1",
        "README.md",
    ),
    "a line of code in the README": ("README.md", r"F\.relu\(self", "F.gelu(self", "README.md"),
    "a line of the glossary": ("data/qa.jsonl", r'("answer": ")', r"\1No. ", "README.md"),
    "a missed promise in a capture": (
        "tests/outputs/intermediate/02_cnn.txt",
        r"test_accuracy = \d+",
        "test_accuracy = 91",
        "promised test_accuracy >= 98.5%",
    ),
    "a digit in a capture": (
        "tests/outputs/basics/06_training.txt",
        r"()\d\.\d",
        r"\g<1>7.7",
        "README.md",
    ),
    "a capture on other data": (
        "tests/outputs/intermediate/02_cnn.txt",
        "data = MNIST",
        "data = 5,000 digits of MNIST",
        "promised data = MNIST",
    ),
    "a line of a lesson": (
        "src/basics/06_training.py",
        r"(?m)^EPOCHS = 1",
        "EPOCHS = 2",
        "has changed since its output was recorded",
    ),
    "a stricter card": ("src/basics/09_mnist.py", ">= 97.5%", ">= 99.5%", "promised test_accuracy"),
    "a digit in a record": (
        RECORDS,
        r'("result": "Result: test_accuracy = 9)8',
        r"\g<1>7",
        "its recorded output and its record have other results",
    ),
    "the time in a record": (RECORDS, r'"seconds": (\d)', r'"seconds": 7\1', "README.md"),
    "a digit in the record of the seeds": (
        RECORDS,
        r'(\[\s+"Result: test_accuracy = 9)8',
        r"\g<1>7",
        "promised test_accuracy",
    ),
    "a prediction that did not come true": (
        RECORDS,
        r'("edit": "NEURONS=16",\s+"result": "Result: parameters = 8)1',
        r"\g<1>2",
        "basics/05_first_nn with NEURONS=16",
    ),
    "the settings that were chosen": (
        "src/intermediate/02_cnn.py",
        "BATCH_SIZE = 64",
        "BATCH_SIZE = 32",
        "other settings were better",
    ),
    "a word in a capture": ("tests/outputs/basics/09_mnist.txt", "Epoch", "Round", "README.md"),
    "another picture": (
        RECORDS,
        r'("intermediate-02_cnn.png": ")....',
        r"\g<1>0000",
        "is not the recorded picture",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_lie_is_found(copy, mutation):
    file, pattern, replacement, complaint = mutation
    text = (copy / file).read_text(encoding="utf-8")
    changed = re.sub(pattern, replacement, text, count=1)
    assert changed != text, "the mutation changes nothing"
    (copy / file).write_text(changed, encoding="utf-8")
    untruths = records.find_untruths(copy)
    assert any(complaint in untruth for untruth in untruths), untruths


def test_an_output_of_a_lesson_that_is_gone_is_found(copy):
    (copy / "tests/outputs/llm/99_gone.txt").write_text("Result: x = 1\n")
    untruths = records.find_untruths(copy)
    assert "llm/99_gone is recorded, but there is no such lesson" in untruths


def test_a_gpus_record_takes_the_place_of_the_cpus(copy):
    name = "advanced/04_gpu_vs_cpu_benchmark"
    kept = course.read_records(copy)
    kept["lessons"][name] |= {"machine": "Some CPU, 8 cores, NVIDIA L4", "driver": "550.0"}
    for file in (copy / course.RECORDS, course.capture_path(name, copy)):
        text = json.dumps(kept) if file.suffix == ".json" else file.read_text(encoding="utf-8")
        file.write_text(text.replace("gpu_at_512 = none", "gpu_at_512 = 81.20 to 90.10"))
    assert any("README.md" in untruth for untruth in records.find_untruths(copy))
    for file in render.DOCUMENTS:
        text = (copy / file).read_text(encoding="utf-8")
        (copy / file).write_text(render.render(text, copy), encoding="utf-8")
    assert records.find_untruths(copy) == []
    readme = (copy / "README.md").read_text(encoding="utf-8")
    assert ", Some CPU, 8 cores, NVIDIA L4, driver 550.0, torch" in readme
    assert f"`{name}` | 86x | 81.20 to 90.10 | one run | holds |" in readme


@pytest.mark.parametrize(
    ("expect", "output", "broken"),
    [
        ("loss <= 0.5", "Result: loss = 0.4", 0),
        ("loss <= 0.5", "Result: loss = 0.6", 1),
        (
            "accuracy >= 98.5%, parameters = 52,138",
            "Result: accuracy = 98.50%, parameters = 52,138",
            0,
        ),
        ("accuracy >= 98.5%", "Result: accuracy = 98.49%", 1),
        ("accuracy >= 98.5%", "no result at all", 1),
        ("data = MNIST", "Result: data = 5,000 digits of MNIST", 1),
        ("loss <= 0.5", "Result: loss = nan", 1),
    ],
)
def test_promises_are_compared_as_numbers(expect, output, broken):
    assert len(course.broken_promises(expect, output)) == broken


def test_readme_has_a_step_for_every_lesson():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in LESSONS:
        assert f"<!-- run {name}" in readme, name


def test_links_inside_the_documents_lead_somewhere():
    for document in render.DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        anchors = set(re.findall(r'<a id="([\w-]+)">', text))
        headings = re.findall(r"(?m)^## ([\w ]+)$", text)
        anchors |= {heading.lower().replace(" ", "-") for heading in headings}
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in anchors, f"{document}: {target}"
            elif not target.startswith("http"):
                assert ((ROOT / document).parent / target.split("#")[0]).exists(), target


def test_cheat_sheet_is_one_page_and_its_code_runs(tmp_path):
    sheet = (ROOT / "CHEATSHEET.md").read_text("utf-8")
    assert len(sheet.splitlines()) <= 200
    blocks = re.findall(r"```python\n(.*?)```", sheet, re.DOTALL)
    assert len(blocks) >= 6
    (tmp_path / "sheet.py").write_text("\n".join(blocks), encoding="utf-8")
    command = [sys.executable, "-W", "error::FutureWarning"]
    command += ["-W", "ignore:`is_gradient_checkpointing`:FutureWarning", "sheet.py"]  # peft's own
    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
