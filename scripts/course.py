"""What the other scripts share: the lessons with their cards, and what was recorded of them.

A lesson's docstring is its card: Run, Needs, Makes and Expect. tests/outputs/ keeps what a full run
printed (a capture), and data/results/ one file of figures for each machine (a record).
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["basics", "intermediate", "advanced", "llm"]
PICTURES = "data/results/pictures"  # the recorded plots, which the README shows


# CARDS
def find_lessons(root=ROOT):
    """Return every lesson's path, in the order of the course."""
    lessons = []
    for level in LEVELS:
        lessons += sorted((root / "src" / level).glob("[0-9][0-9]_*.py"))
    return lessons


def name_of(lesson):
    return f"{lesson.parent.name}/{lesson.stem}"


def read_card(lesson):
    """Return a lesson's card: Title, Run, Needs, Makes and Expect."""
    text = ast.get_docstring(ast.parse(lesson.read_text(encoding="utf-8")))
    card = dict(re.findall(r"^(Run|Needs|Makes|Expect): +(.+)$", text, re.MULTILINE))
    return {"Title": text.splitlines()[0], **card}


def files_in(field):
    """Return the files that a card's Needs or Makes names."""
    return re.findall(r"models/[\w./-]+", field)


def makers_and_users(root=ROOT):
    """Return {file: (the lesson that makes it, [the lessons that need it])}."""
    cards = {lesson: read_card(lesson) for lesson in find_lessons(root)}
    found = {}
    for maker, card in cards.items():
        for file in files_in(card["Makes"]):
            users = [user for user in cards if file in files_in(cards[user]["Needs"])]
            found[file] = (maker, users)
    return found


def read_constants(lesson):
    """Return the constants that a lesson sets to plain values."""
    constants = {}
    for node in ast.parse(lesson.read_text(encoding="utf-8")).body:
        with contextlib.suppress(ValueError, AttributeError):  # no plain value, or no name
            constants[node.targets[0].id] = ast.literal_eval(node.value)
    return constants


def has_seed(lesson):
    """True if a lesson depends on one seed. A lesson with TRIALS uses several seeds itself."""
    constants = read_constants(lesson)
    return "SEED" in constants and "TRIALS" not in constants


# RESULTS
def parse_number(text):
    """Read 98.5%, 52,138 or 0.05 as a number; return any other text as it is."""
    plain = text.strip().replace(",", "").removesuffix("%").strip()
    return float(plain) if re.fullmatch(r"[-+]?\d+(\.\d+)?", plain) else text.strip()


def last_line(text):
    lines = text.rstrip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def read_words(output):
    """Return the names and printed values of an output's last line, `Result: name = value, ...`."""
    line = last_line(output)
    if not line.startswith("Result: "):
        return {}
    return dict(part.split(" = ") for part in line.removeprefix("Result: ").split(", "))


def read_result(output):
    return {name: parse_number(value) for name, value in read_words(output).items()}


def broken_promises(expect, output):
    """Return a sentence for each predicate of a card's Expect that an output does not fulfill."""
    result = read_result(output)
    broken = []
    for promise in expect.split(", "):
        name, sign, wanted = promise.split(" ", 2)
        value = result.get(name)
        wanted = parse_number(wanted)
        kept = type(value) is type(wanted)
        if kept:
            kept = {"=": value == wanted, ">=": value >= wanted, "<=": value <= wanted}[sign]
        if not kept:
            broken.append(f"promised {promise}, got {value}")
    return broken


# HASHES
def hash_tree(tree):
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]


def hash_code(lesson):
    """Return eight digits that change with a lesson's code, not with comments or docstrings."""
    tree = ast.parse(lesson.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:]
    return hash_tree(tree)


def hash_work(lesson):
    """Return eight digits that change with a lesson's work, not with the words that it prints."""
    tree = ast.parse(lesson.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return hash_tree(tree)


# MACHINES AND RECORDS
@functools.cache
def describe_gpu():
    import torch

    if torch.backends.mps.is_available():
        return "Apple GPU"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


@functools.cache
def describe_machine():
    """Return what a record says of this machine: one line, the driver, and the versions."""
    import torch

    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        cpu = re.search(r"model name\s*: (.+)", information.read_text() + f"model name: {cpu}")[1]
    driver = None
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.check_output(query, text=True).splitlines()[0]
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {describe_gpu()}",
        "driver": driver,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record_path(machine, root=ROOT):
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return root / "data" / "results" / f"{name}.json"


def read_record(machine, root=ROOT):
    path = record_path(machine, root)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"machine": machine, "lessons": {}, "seeds": {}, "predictions": {}, "settings": {}}


def read_records(root=ROOT):
    """Return all machines' records. Machines with a GPU come first: they take precedence."""
    files = sorted((root / "data" / "results").glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(records, key=lambda record: record["machine"].endswith("no GPU"))


def keep(kind, name, entry, root=ROOT):
    """Put an entry into this machine's record, in the order of the course."""
    machine = describe_machine()["machine"]
    record = read_record(machine, root)
    entries = record[kind] | {name: entry}
    order = [name_of(lesson) for lesson in find_lessons(root)]
    record[kind] = {name: entries[name] for name in order if name in entries}
    write_record(record, root)


def write_record(record, root=ROOT):
    path = record_path(record["machine"], root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def find_record(kind, name, records):
    """Return (machine, entry) of the first machine that has one of the kind for a lesson."""
    for record in records:
        if name in record.get(kind, {}):
            return record["machine"], record[kind][name]
    return None, None


# CAPTURES
def stamp(machine, entry):
    """Return the line that says when, where and with what a record was made."""
    driver = f", driver {entry['driver']}" if entry["driver"] else ""
    versions = f"torch {entry['torch']}, Python {entry['python']}"
    return f"{entry['date']}, {machine}{driver}, {versions}"


def first_line(machine, entry):
    return f"{stamp(machine, entry)}, {entry['seconds']} s, code {entry['code']}"


def capture_path(name, machine, root=ROOT):
    kind = ".txt" if machine.endswith("no GPU") else ".gpu.txt"
    return root / "tests" / "outputs" / f"{name}{kind}"


def read_capture(name, root=ROOT, on_gpu=True):
    """Return a recorded run as (first line, output): the GPU's, if it is there and wanted."""
    file = root / "tests" / "outputs" / f"{name}.gpu.txt"
    if not on_gpu or not file.exists():
        file = file.with_name(file.name.replace(".gpu.txt", ".txt"))
    line, output = file.read_text(encoding="utf-8").split("\n", 1)
    return line, output
