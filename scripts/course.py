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


# LESSONS
class Lesson:
    """A lesson's file, and its card: the lines Run, Needs, Makes and Expect of its docstring."""

    def __init__(self, path):
        self.path = path
        self.name = f"{path.parent.name}/{path.stem}"
        self.text = path.read_text(encoding="utf-8")
        words = ast.get_docstring(ast.parse(self.text))
        self.title = words.splitlines()[0]
        self.card = dict(re.findall(r"^(Run|Needs|Makes|Expect): +(.+)$", words, re.MULTILINE))
        self.needs = re.findall(r"models/[\w./-]+", self.card["Needs"])  # files
        self.makes = re.findall(r"models/[\w./-]+", self.card["Makes"])

    def constants(self):
        """Return the constants that the lesson sets to plain values."""
        constants = {}
        for node in ast.parse(self.text).body:
            with contextlib.suppress(ValueError, AttributeError):  # no plain value, or no name
                constants[node.targets[0].id] = ast.literal_eval(node.value)
        return constants

    def has_seed(self):
        """True if it depends on one seed. A lesson with TRIALS uses several seeds itself."""
        return "SEED" in self.constants() and "TRIALS" not in self.constants()

    def hash_code(self):
        """Return eight digits that change with the code, not with comments or docstrings."""
        tree = ast.parse(self.text)
        for node in ast.walk(tree):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef
            if isinstance(node, kinds) and ast.get_docstring(node):
                node.body = node.body[1:]
        return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]

    def hash_work(self):
        """Return eight digits that change with the work, not with the words that are printed."""
        tree = ast.parse(self.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = ""
        return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]


def find_lessons(root=ROOT):
    """Return {name: lesson} in the order of the course."""
    lessons = {}
    for level in LEVELS:
        for path in sorted((root / "src" / level).glob("[0-9][0-9]_*.py")):
            lessons[f"{level}/{path.stem}"] = Lesson(path)
    return lessons


def find_makers(root=ROOT):
    """Return {file: the lesson that makes it}."""
    return {file: lesson for lesson in find_lessons(root).values() for file in lesson.makes}


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


# RECORDS: {"lessons", "seeds", "predictions" or "settings": {lesson: what its last run gave}}.
@functools.cache
def describe_machine():
    """Return what a record says of this machine: one line, the versions, and a GPU's driver."""
    import torch

    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        cpu = re.search(r"model name\s*: (.+)", information.read_text() + f"model name: {cpu}")[1]
    gpu = "Apple GPU" if torch.backends.mps.is_available() else "no GPU"
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.check_output(query, text=True).splitlines()[0]
    return {"machine": f"{cpu}, {os.cpu_count()} cores, {gpu}", **versions}


def read_records(root=ROOT):
    return json.loads((root / RECORDS).read_text(encoding="utf-8"))


def write_json(content, path):
    """Write a temporary file, then rename it. Ctrl-C never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def keep(kind, name, entry, root=ROOT):
    """Put an entry into the records, with date and machine. It replaces an older one."""
    records = read_records(root)
    entries = records[kind] | {name: {"date": str(date.today()), **describe_machine(), **entry}}
    records[kind] = dict(sorted(entries.items()))
    write_json(records, root / RECORDS)


def capture_path(name, root=ROOT):
    return root / "tests" / "outputs" / f"{name}.txt"
