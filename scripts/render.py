"""Write recorded outputs, figures and code into the documents, or check that they agree.

    uv run scripts/render.py             fill the marked places of the documents
    uv run scripts/render.py --check     name the documents that differ; exit with 1 if one does

A marked place is a comment such as `<!-- run basics/02_tensors -->`, followed by what this script
writes there and by `<!-- end -->`. Everything outside of the marks is written by hand.
"""

import argparse
import ast
import json
import re
import sys
import textwrap

from claims import CLAIMS, PREDICTIONS
from course import (
    ROOT,
    Lesson,
    broken_promises,
    capture_path,
    find_lessons,
    parse_number,
    read_records,
    read_words,
)

DOCUMENTS = ["README.md", "CHEATSHEET.md", "models/README.md"]
PLACE = re.compile(r"(<!-- (\w+) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
UP_TO = re.compile(r"[\d.]+ to ")  # an interval such as 1.07 to 1.48 counts by its upper end
VALUE = re.compile(r"(<!-- = (\S+) (\S+) -->).*?(<!-- -->)")


# TABLES: each returns the lines of a Markdown table.
def minutes(seconds):
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def lessons_table(level, root, records):
    rows = ["| lesson | what you do | runs |", "|---|---|---|"]
    total = 0
    for name, lesson in find_lessons(root).items():
        if name.startswith(f"{level}/"):
            title, sentence = lesson.title.split(": ", 1)
            seconds = records["lessons"][name]["seconds"]
            short = name.partition("_")[0]
            link = f"[`{short}`](#{short.replace('/', '-')}) {title}"
            rows.append(f"| {link} | {sentence.rstrip('.')} | {minutes(seconds)} |")
            total += seconds
    return [*rows, f"| all of them | | {minutes(total)} |"]


def files_table(words, root, records):
    rows = ["| file | made by | needed by |", "|---|---|---|"]
    lessons = find_lessons(root).values()
    for maker in lessons:
        for file in maker.makes:
            users = ", ".join(f"`{user.name}`" for user in lessons if file in user.needs) or "–"
            rows.append(f"| `{file}` | `{maker.card['Run']}` | {users} |")
    return rows


def glossary_table(words, root, records):
    rows = ["| term | meaning | lesson |", "|---|---|---|"]
    lines = (root / "data" / "qa.jsonl").read_text(encoding="utf-8").splitlines()
    for entry in sorted(map(json.loads, lines), key=lambda entry: entry["term"].lower()):
        link = f"[`{entry['lesson']}`](#{entry['lesson'].replace('/', '-')})"
        rows.append(f"| **{entry['term']}** | {entry['answer']} | {link} |")
    return rows


def results_table(words, root, records):
    """What the reference notes report on their L4, beside the recorded run and the five seeds."""
    rows = [
        "| result | reference notes (L4) | recorded run | five seeds | claim |",
        "|---|---|---|---|---|",
    ]
    for text, claimed, name, promise in (line.split(" | ") for line in CLAIMS.splitlines()):
        field = promise.split()[0]
        result = records["lessons"][name]["result"]
        seeds = records["seeds"].get(name, {"results": []})["results"]
        printed = read_words(result)[field]
        values = sorted({read_words(line)[field] for line in seeds}, key=parse_number)
        spread = " to ".join(dict.fromkeys([*values[:1], *values[-1:]])) or "one run"
        verdict = "does not hold"
        if printed == "none":
            verdict = "not measured"
        elif any(not broken_promises(promise, UP_TO.sub("", line)) for line in [result, *seeds]):
            verdict = "holds"
        rows.append(f"| {text}, `{name}` | {claimed} | {printed} | {spread} | {verdict} |")
    return rows


# MARKED PLACES
def fill_code(words, root, records):
    """Return statements of a lesson, named by their first words, as a block of code.

    `intermediate/02_cnn def forward` is a function, and `basics/02_tensors a = ... print("Dev` are
    all statements from the first that begins so to the next that begins with the last words.
    """
    name, words = words.split(" ", 1)
    first, _, last = words.partition(" ... ")
    text = (root / "src" / f"{name}.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    nodes.sort(key=lambda node: node.lineno)
    starts = [node for node in nodes if lines[node.lineno - 1].strip().startswith(first)]
    rest = [node for node in nodes if starts and node.lineno > starts[0].lineno]
    ends = [node for node in rest if lines[node.lineno - 1].strip().startswith(last)]
    if not starts or (last and not ends):
        sys.exit(f"No statements of src/{name}.py begin with: {words}")
    start = starts[0]
    end = ends[0] if last else start
    code = textwrap.dedent("\n".join(lines[start.lineno - 1 : end.end_lineno]))
    return ["```python", code, "```"]


def wrap_lines(lines):
    """Break the lines that a page cannot show without scrolling, such as a model's answers."""
    return [textwrap.fill(line, 110, subsequent_indent="    ") for line in lines]


def fill_run(words, root, records):
    """Return the command, what it takes and makes, some lines of its output, and all of it.

    `basics/02_tensors` shows the last line, `basics/02_tensors 3 5-7` the lines 3 and 5 to 7.
    """
    name, *ranges = words.split()
    lesson = Lesson(root / "src" / f"{name}.py")
    entry = records["lessons"][name]
    printed = capture_path(name, root).read_text("utf-8").rstrip().splitlines()
    place = "" if entry["machine"].endswith("no GPU") else f" on {entry['machine']}"
    parts = [f"`{lesson.card['Run']}`", minutes(entry["seconds"]) + place]
    files = [f"`{file}`" for file in lesson.makes if not file.endswith(".png")]
    if files:
        parts.append("makes " + ", ".join(files))
    shown = [] if ranges else printed[-1:]
    for first, _, last in (numbers.partition("-") for numbers in ranges):
        shown += printed[int(first) - 1 : int(last or first)]
    lines = [" · ".join(parts) + " · prints:", "", "```text", *wrap_lines(shown), "```"]
    if len(shown) < len(printed):
        lines += ["", "<details><summary>Full output</summary>", ""]
        lines += ["```text", *wrap_lines(printed), "```", ""]
        lines.append("</details>")
    return lines


def fill_try(name, root, records):
    """Return the command that tries a prediction, and what it gave."""
    edit, expect = next(rest for first, *rest in PREDICTIONS if first == name)
    field = expect.split()[0]
    value = read_words(records["predictions"][name]["result"])[field]
    command = f"uv run scripts/run_course.py try {name} --set {edit}"
    return [f"`{command}` · recorded: `{field} = {value}`"]


def fill_stamps(words, root, records):
    """Return a line for each machine and day on which lessons were recorded."""
    stamps = set()
    for entry in records["lessons"].values():
        driver = f", driver {entry['driver']}" if "driver" in entry else ""
        versions = f"torch {entry['torch']}, Python {entry['python']}"
        stamps.add(f"<sub>Recorded {entry['date']}, {entry['machine']}{driver}, {versions}</sub>")
    return sorted(stamps)


KINDS = {  # the first word of a mark: what fills it
    "lessons": lessons_table,
    "files": files_table,
    "glossary": glossary_table,
    "results": results_table,
    "code": fill_code,
    "run": fill_run,
    "try": fill_try,
    "stamps": fill_stamps,
}


def render(text, root=ROOT):
    """Return a document with each marked place filled; nothing else changes."""
    records = read_records(root)

    def fill_place(match):
        start, kind, words, end = match.groups()
        return start + "\n".join(KINDS[kind](words, root, records)) + "\n" + end

    def fill_value(match):
        start, name, field, end = match.groups()
        if field == "minutes":  # of all lessons whose name begins so
            begin = tuple(name.split(","))
            runs = [run for other, run in records["lessons"].items() if other.startswith(begin)]
            return start + minutes(sum(run["seconds"] for run in runs)) + end
        return f"{start}{read_words(records['lessons'][name]['result'])[field]}{end}"

    return VALUE.sub(fill_value, PLACE.sub(fill_place, text))


def find_stale(root=ROOT):
    """Return a sentence for each document that differs from lessons and records."""
    stale = []
    for document in DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        if render(text, root) != text:
            stale.append(f"{document} differs from the records: uv run scripts/render.py")
    return stale


def main(check):
    if check:
        sys.exit("\n".join(find_stale()) or 0)
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, name what differs")
    main(parser.parse_args().check)
