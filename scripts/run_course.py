"""Run the course, record what it prints, and check that every document tells the truth.

    uv run scripts/run_course.py list               every lesson, and whether its files are there
    uv run scripts/run_course.py record [LESSON...]  full runs; their outputs go to tests/outputs/
    uv run scripts/run_course.py seeds [LESSON...]  five seeds each; results go to data/results/
    uv run scripts/run_course.py render             write outputs and tables into the documents
    uv run scripts/run_course.py check              say what is not true; exit 1 if anything is not

A LESSON is a part of its path, such as 02_cnn; without one, all lessons are meant, in their order.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["basics", "intermediate", "advanced", "llm"]
DOCUMENTS = ["README.md", "CHEATSHEET.md", "models/README.md"]
CLAIMS = [  # what the notes report: in words, in their number, and where this course measures it
    ("y = 2x + 1 at x = 10", "21.00", "basics/06_training", "at_10"),
    ("two clusters, training points", "100 %", "basics/08_classifier", "train_accuracy"),
    ("MNIST, flat network", "97.59 %", "basics/09_mnist", "test_accuracy"),
    ("its parameters", "109,386", "basics/09_mnist", "parameters"),
    ("MNIST, CNN", "98.79 %", "intermediate/02_cnn", "test_accuracy"),
    ("its parameters", "52,138", "intermediate/02_cnn", "parameters"),
    ("20 coin tosses, test", "58 %", "intermediate/03_overfitting_dropout", "noise_test"),
    ("200 samples of a rule, test", "97.80 %", "intermediate/03_overfitting_dropout", "rule_test"),
    ("retrained for digits 0 to 4", "99.77 %", "advanced/01_transfer_learning", "test_accuracy"),
    ("parameters retrained", "650", "advanced/01_transfer_learning", "trainable"),
    ("int8 file smaller by", "71 %", "advanced/02_model_optimization", "int8_smaller"),
    ("parameters of a block of width 8", "776", "llm/03_transformer_block", "block"),
    ("parameters of GPT-2 small", "117 M", "llm/03_transformer_block", "gpt2_small"),
    ("parameters of MiniGPT", "25,103", "llm/04_mini_gpt", "parameters"),
    ("its loss", "0.16 to 0.28", "llm/04_mini_gpt", "loss"),
    ("trained by LoRA in GPT-2, rank 8", "294,912", "llm/07_finetune_lora", "gpt2_trainable"),
    ("the same at rank 64", "2.4 M", "llm/11_lora_by_hand", "gpt2_rank_64"),
]
MARKER = re.compile(r"(<!-- (output|table) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def find_lessons(root=ROOT):
    """Return every lesson's path, in the order of the course."""
    return [
        path for level in LEVELS for path in sorted((root / "src" / level).glob("[0-9][0-9]_*"))
    ]


def name_of(lesson):
    return f"{lesson.parent.name}/{lesson.stem}"


def read_card(lesson):
    """Return the card in a lesson's docstring: Title, Run, Needs, Makes and Expect."""
    text = ast.get_docstring(ast.parse(lesson.read_text(encoding="utf-8")))
    card = dict(re.findall(r"^(Run|Needs|Makes|Expect): +(.+)$", text, re.MULTILINE))
    return {"Title": text.splitlines()[0], **card}


def files_in(field):
    """Return the files that a card's Needs or Makes names."""
    return re.findall(r"models/[\w./]+", field)


def parse_number(text):
    """Read 98.5 %, 52,138 or 0.05 as a number; return any other text as it is."""
    plain = text.strip().replace(",", "").removesuffix("%").strip()
    return float(plain) if re.fullmatch(r"[-+]?\d+(\.\d+)?", plain) else text.strip()


def read_result(output):
    """Return the names and values of an output's last line, 'Result: name = value, ...'."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("Result: "):
        return {}
    return {
        name: parse_number(value)
        for name, value in (part.split(" = ") for part in lines[-1][8:].split(", "))
    }


def broken_promises(card, output):
    """Return the predicates of a card's Expect that an output's Result line does not fulfil."""
    result, broken = read_result(output), []
    for promise in card["Expect"].split(", "):
        name, sign, wanted = promise.split(" ", 2)
        value, wanted = result.get(name), parse_number(wanted)
        comparable = isinstance(value, float) == isinstance(wanted, float) and value is not None
        if (
            not comparable
            or not {"=": value == wanted, ">=": value >= wanted, "<=": value <= wanted}[sign]
        ):
            broken.append(f"promised {promise}, got {value}")
    return broken


def describe_gpu():
    import torch

    if torch.backends.mps.is_available():
        return "Apple GPU"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def hash_code(lesson):
    """Return eight digits that change with any change of a lesson."""
    return hashlib.sha256(lesson.read_bytes()).hexdigest()[:8]


def describe_machine():
    """Return one line on when, where and with what a run was made."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(
            r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text() + "model name: " + cpu
        )[1]
    return (
        f"{date.today()}, {cpu}, {os.cpu_count()} cores, {describe_gpu()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def capture_path(lesson, root=ROOT):
    return root / "tests" / "outputs" / lesson.parent.name / f"{lesson.stem}.txt"


def read_capture(lesson, root=ROOT):
    """Return a recorded run as (machine, output)."""
    machine, output = capture_path(lesson, root).read_text(encoding="utf-8").split("\n", 1)
    return machine, output


def machine_of(stamp):
    """Return the part of a record's first line that names the day, the machine and the versions."""
    return re.match(r".*Python [\d.]+", stamp)[0]


def read_seconds(stamp):
    return int(re.search(r", (\d+) s, code", stamp)[1])


@contextlib.contextmanager
def served(lesson, model=ROOT / "models" / "gpt2_mini"):
    """Give a lesson that talks to Ollama the one that is here, or else the tests' stand-in.

    The stand-in answers from a model of this course; its version, which the lesson prints, says so.
    """
    talks = "running Ollama" in read_card(lesson)["Needs"]
    with socket.socket() as door:
        here = "OLLAMA_HOST" in os.environ or door.connect_ex(("127.0.0.1", 11434)) == 0
    if not talks or here:
        yield dict(os.environ)
        return
    command = [sys.executable, ROOT / "tests" / "ollama_stand_in.py", "--model", model]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield {**os.environ, "OLLAMA_HOST": server.stdout.readline().strip()}
        finally:
            server.terminate()


def run_lesson(lesson, *flags):
    """Run a lesson and return its output; exit with its error when it fails."""
    command = [sys.executable, lesson, *flags]
    with served(lesson) as environment:
        run = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=ROOT, env=environment
        )
    if run.returncode:
        sys.exit(f"{name_of(lesson)} failed with exit code {run.returncode}:\n{run.stderr}")
    return run.stdout


def record(lessons):
    """Make a full run of each lesson and keep its output, if it keeps the card's promise."""
    for lesson in lessons:
        start = time.perf_counter()
        output = run_lesson(lesson)
        seconds = f"{time.perf_counter() - start:.0f} s"
        if broken := broken_promises(read_card(lesson), output):
            sys.exit(f"{name_of(lesson)} is not recorded: {'; '.join(broken)}")
        path = capture_path(lesson)
        path.parent.mkdir(parents=True, exist_ok=True)
        stamp = f"{describe_machine()}, {seconds}, code {hash_code(lesson)}"
        path.write_text(f"{stamp}\n{output}", encoding="utf-8")
        print(f"{name_of(lesson)}: {output.splitlines()[-1]}", flush=True)


SEEDED_RUN = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lesson", sys.argv[1])
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
lesson.SEED = int(sys.argv[2]) * getattr(lesson, "REPEATS", 1)
lesson.ROOT = pathlib.Path(sys.argv[3])
lesson.main()
"""


def has_seed(lesson):
    """Say whether a lesson depends on one seed; one that has TRIALS repeats itself with several."""
    text = lesson.read_text(encoding="utf-8")
    found = re.search(r"^[A-Z_, ]*\bSEED = ", text, re.MULTILINE)
    return found is not None and not re.search(r"^[A-Z_, ]*\bTRIALS\b", text, re.MULTILINE)


def try_seeds(lessons):
    """Run each lesson that has a SEED with seeds 0 to 4, away from models/, and keep the results."""
    path = ROOT / "data" / "results" / "seeds.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for lesson in lessons:
        if not has_seed(lesson):
            continue
        lines = []
        for seed in range(5):
            with tempfile.TemporaryDirectory() as folder:
                (ROOT / "data").mkdir(exist_ok=True)
                Path(folder, "data").symlink_to(ROOT / "data")
                for file in files_in(read_card(lesson)["Needs"]):
                    Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
                    Path(folder, file).symlink_to(ROOT / file)
                command = [sys.executable, "-c", SEEDED_RUN, str(lesson), str(seed), folder]
                lines.append(subprocess.check_output(command, text=True).splitlines()[-1])
            print(f"{name_of(lesson)} seed {seed}: {lines[-1]}", flush=True)
        results[name_of(lesson)] = {"machine": describe_machine(), "results": lines}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def read_seeds(root=ROOT):
    path = root / "data" / "results" / "seeds.json"
    return json.loads(path.read_text()) if path.exists() else {}


def lessons_table(root):
    rows, total = ["| lesson | makes | result of the recorded run | took |", "|---|---|---|---|"], 0
    for lesson in find_lessons(root):
        card = read_card(lesson)
        stamp, output = read_capture(lesson, root)
        result, seconds = output.splitlines()[-1].removeprefix("Result: "), read_seconds(stamp)
        total += seconds
        makes = "<br>".join(f"`{file}`" for file in files_in(card["Makes"])) or "–"
        title = card["Title"].split(":")[0]
        title = f"[{title}](#{lesson.stem})<br>`{card['Run']}`"
        rows.append(f"| {title} | {makes} | {result} | {seconds} s |")
    return [
        *rows,
        f"| all of them | | | {total / 60:.0f} min |",
        "",
        f"<sub>{machine_of(stamp)}</sub>",
    ]


def files_table(root):
    rows = ["| file | made by | needed by |", "|---|---|---|"]
    cards = {lesson: read_card(lesson) for lesson in find_lessons(root)}
    for card in cards.values():
        for file in files_in(card["Makes"]):
            users = [
                f"`{name_of(user)}`"
                for user, other in cards.items()
                if file in files_in(other["Needs"])
            ]
            rows.append(f"| `{file}` | `{card['Run']}` | {', '.join(users) or '–'} |")
    return rows


def results_table(root):
    """What the notes report on their L4, beside the recorded run and the five seeds of each lesson."""
    rows = [
        "| | the notes (L4) | recorded run | five seeds: mean (lowest to highest) |",
        "|---|---|---|---|",
    ]
    seeds, machines = read_seeds(root), set()
    for claim, theirs, name, value in CLAIMS:
        machine, output = read_capture(root / "src" / f"{name}.py", root)
        shown = re.search(rf"\b{value} = (.+?)(, |$)", output.splitlines()[-1])[1]
        record = seeds.get(name, {"machine": machine, "results": []})
        ours = [read_result(line)[value] for line in record["results"]] or [
            read_result(output)[value]
        ]
        decimals = len(shown.rstrip("%").partition(".")[2])
        mean, low, high = (
            f"{n:,.{decimals}f}" for n in (sum(ours) / len(ours), min(ours), max(ours))
        )
        spread = "always the same" if low == high else f"{mean} ({low} to {high})"
        spread = spread if record["results"] else "one run"
        rows.append(f"| {claim}, `{name}` | {theirs} | {shown} | {spread} |")
        machines |= {machine_of(machine), machine_of(record["machine"])}
    return [*rows, "", *(f"<sub>Measured {machine}</sub>" for machine in sorted(machines))]


TABLES = {"lessons": lessons_table, "files": files_table, "results": results_table}


def render(text, root=ROOT):
    """Return a document with each marked place filled from the records; nothing else changes."""

    def fill(match):
        start, kind, name, end = match.groups()
        if kind == "table":
            return "\n".join([start.rstrip("\n"), *TABLES[name](root), end])
        machine, output = read_capture(root / "src" / f"{name}.py", root)
        return f"{start}```text\n{output.rstrip()}\n```\n<sub>Recorded {machine_of(machine)}</sub>\n{end}"

    return MARKER.sub(fill, text)


def find_untruths(root=ROOT):
    """Return a sentence for everything that the documents, captures and cards say and is not so."""
    untruths, seeds, recorded = [], read_seeds(root), True
    for lesson in find_lessons(root):
        card = read_card(lesson)
        if not capture_path(lesson, root).exists():
            untruths.append(f"{name_of(lesson)} has no recorded output")
            recorded = False  # so the documents cannot be rendered
            continue
        machine, output = read_capture(lesson, root)
        if not re.match(r"\d{4}-\d\d-\d\d, .+, torch \d.+, Python 3.+, \d+ s, ", machine):
            untruths.append(f"{name_of(lesson)}: the recorded output does not say when and where")
            recorded = False
            continue
        if not machine.endswith(f", code {hash_code(lesson)}"):
            untruths.append(f"{name_of(lesson)} has changed since its output was recorded")
        if has_seed(lesson) and len(seeds.get(name_of(lesson), {}).get("results", [])) < 5:
            untruths.append(f"{name_of(lesson)} has no record of five seeds")
        for broken in broken_promises(card, output):
            untruths.append(f"{name_of(lesson)}, recorded output: {broken}")
        for seed, line in enumerate(seeds.get(name_of(lesson), {}).get("results", [])):
            for broken in broken_promises(card, line):
                untruths.append(f"{name_of(lesson)}, seed {seed}: {broken}")
    for document in DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        if recorded and render(text, root) != text:
            untruths.append(f"{document} differs from the records: run_course.py render")
    return untruths


def show_list(lessons):
    for lesson in lessons:
        card = read_card(lesson)
        missing = [file for file in files_in(card["Makes"]) if not (ROOT / file).exists()]
        print(f"{card['Run']:50} {'missing ' + ', '.join(missing) if missing else 'done'}")


def main():
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("task", choices=["list", "record", "seeds", "render", "check"])
    cli.add_argument("lesson", nargs="*", help="a part of a lesson's path, such as 02_cnn")
    arguments = cli.parse_args()
    lessons = [
        lesson
        for lesson in find_lessons()
        if not arguments.lesson or any(part in name_of(lesson) for part in arguments.lesson)
    ]
    if not lessons:
        cli.error(f"no lesson is called {' or '.join(arguments.lesson)}; try: run_course.py list")
    if arguments.task == "list":
        show_list(lessons)
    elif arguments.task == "record":
        record(lessons)
    elif arguments.task == "seeds":
        try_seeds(lessons)
    elif arguments.task == "render":
        for document in DOCUMENTS:
            text = (ROOT / document).read_text(encoding="utf-8")
            (ROOT / document).write_text(render(text), encoding="utf-8")
    elif untruths := find_untruths():
        sys.exit("\n".join(untruths))
    else:
        print("Every document says what the records say, and every promise is kept.")


if __name__ == "__main__":
    main()
