"""What the other scripts share: the lessons with their cards, and what was recorded of them.

A lesson's docstring is its card: Run, Needs, Makes and Expect. tests/outputs/ keeps what a full run
printed (a capture). data/results/records.json keeps its figures, and on which machine it ran.
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
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["basics", "intermediate", "advanced", "llm"]
PICTURES = "data/results/pictures"  # the recorded plots, which the README shows
RECORDS = "data/results/records.json"


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
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hash_tree(tree)


def hash_work(lesson):
    """Return eight digits that change with a lesson's work, not with the words that it prints."""
    tree = ast.parse(lesson.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return hash_tree(tree)


# RECORDS: {"lessons", "seeds", "predictions" or "settings": {lesson: what its last run gave}}.
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
    machine = {
        "machine": f"{cpu}, {os.cpu_count()} cores, {describe_gpu()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine["driver"] = subprocess.check_output(query, text=True).splitlines()[0]
    return machine


def read_records(root=ROOT):
    return json.loads((root / RECORDS).read_text(encoding="utf-8"))


def keep(kind, name, entry, root=ROOT):
    """Put an entry into the records, with date and machine. It replaces an older one."""
    records = read_records(root)
    entries = records[kind] | {name: {"date": str(date.today()), **describe_machine(), **entry}}
    records[kind] = dict(sorted(entries.items()))
    part = root / f"{RECORDS}.part"
    part.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    part.replace(root / RECORDS)  # Ctrl-C never leaves half of all records


def capture_path(name, root=ROOT):
    return root / "tests" / "outputs" / f"{name}.txt"


def read_capture(name, root=ROOT):
    return capture_path(name, root).read_text(encoding="utf-8")
