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
    LEVELS,
    ROOT,
    files_in,
    find_lessons,
    find_record,
    makers_and_users,
    name_of,
    parse_number,
    read_capture,
    read_card,
    read_records,
    read_result,
    read_words,
    stamp,
)

DOCUMENTS = ["README.md", "CHEATSHEET.md", "models/README.md"]
PLACE = re.compile(r"(<!-- (\w+) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- = (\S+) (\S+) -->).*?(<!-- -->)")


# TABLES: each returns the lines of a Markdown table.
def minutes(seconds):
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


PARTS = {  # the rows of the map: a heading of the README, and what its lessons teach
    "Basics": "tensors, layers, gradients, training; a first network that reads digits",
    "Intermediate": "saving, convolutions, overfitting, learning rates, training on a GPU",
    "Advanced": "transfer learning, smaller and faster models, reading your own pictures",
    "The measuring lab": "timing, memory, profiling, several processes: what really helps",
    "Language models": "attention, GPT-2, fine-tuning, and your own model in Ollama",
}
LAB = range(4, 13)  # advanced/04 to 12


def part_of(lesson):
    if lesson.parent.name == "advanced" and int(lesson.stem[:2]) in LAB:
        return "The measuring lab"
    return "Language models" if lesson.parent.name == "llm" else lesson.parent.name.capitalize()


def map_table(root, records):
    rows = ["| part | what you learn | lessons | to read | to run |", "|---|---|---|---|---|"]
    for part, words in PARTS.items():
        lessons = [lesson for lesson in find_lessons(root) if part_of(lesson) == part]
        entries = [find_record("lessons", name_of(lesson), records)[1] for lesson in lessons]
        read = f"{len(lessons) / 4:.1f} h"  # a quarter of an hour each
        run = minutes(sum(entry["seconds"] for entry in entries))
        link = f"[{part}](#{part.lower().replace(' ', '-')})"
        rows.append(f"| {link} | {words} | {len(lessons)} | {read} | {run} |")
    return rows


def lessons_table(level, root, records):
    rows = ["| lesson | what you do | runs |", "|---|---|---|"]
    total = 0
    for lesson in find_lessons(root):
        if lesson.parent.name == level:
            title, sentence = read_card(lesson)["Title"].split(": ", 1)
            _, entry = find_record("lessons", name_of(lesson), records)
            link = f"[`{level}/{lesson.stem[:2]}`](#{level}-{lesson.stem[:2]}) {title}"
            rows.append(f"| {link} | {sentence.rstrip('.')} | {minutes(entry['seconds'])} |")
            total += entry["seconds"]
    return [*rows, f"| all of them | | {minutes(total)} |"]


def files_table(root, records):
    rows = ["| file | made by | needed by |", "|---|---|---|"]
    for file, (maker, users) in makers_and_users(root).items():
        needed = ", ".join(f"`{name_of(user)}`" for user in users) or "–"
        rows.append(f"| `{file}` | `{read_card(maker)['Run']}` | {needed} |")
    return rows


def glossary_table(root, records):
    rows = ["| term | meaning | lesson |", "|---|---|---|"]
    lines = (root / "data" / "qa.jsonl").read_text(encoding="utf-8").splitlines()
    for entry in sorted(map(json.loads, lines), key=lambda entry: entry["term"].lower()):
        link = f"[`{entry['lesson']}`](#{entry['lesson'].replace('/', '-')})"
        rows.append(f"| **{entry['term']}** | {entry['answer']} | {link} |")
    return rows


def holds(claimed, printed, seeds):
    """Say whether a claim shows here. Numbers are compared as the claim rounds them."""
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", claimed.replace(",", ""))]
    ours = parse_number(printed)
    if not isinstance(ours, float):  # a 95% interval, such as 1.07 to 1.48, or none
        low, _, high = printed.partition(" to ")
        if not high:
            return "not measured"
        inside = float(low) <= numbers[0] <= float(high)
        return "within the interval" if inside else "does not hold"
    low = min([ours, *seeds])
    high = max([ours, *seeds])
    if " to " in claimed:
        return "holds" if low <= numbers[1] else "does not hold"
    scale = 1e6 if claimed.endswith("M") else 1
    rounding = scale / 10 ** len(claimed.rstrip(" %Mx").partition(".")[2]) / 2
    if claimed.endswith("%") and "." in claimed:  # an accuracy: more is better
        return "reached" if high >= numbers[0] - rounding else "not reached"
    return "holds" if abs(ours - numbers[0] * scale) <= rounding else "does not hold"


def results_table(root, records):
    """What the reference notes report on their L4, beside the recorded run and the five seeds."""
    rows = [
        "| result | reference notes (L4) | recorded run | five seeds: mean (range) | claim |",
        "|---|---|---|---|---|",
    ]
    for text, claimed, name, field in CLAIMS:
        printed = read_words(find_record("lessons", name, records)[1]["result"])[field]
        _, seeds = find_record("seeds", name, records)
        values = [read_result(line)[field] for line in seeds["results"]] if seeds else []
        spread = "one run"
        if values:
            decimals = len(printed.rstrip("%").partition(".")[2])
            spread = f"{sum(values) / len(values):,.{decimals}f}"
            spread += f" ({min(values):,.{decimals}f} to {max(values):,.{decimals}f})"
            if min(values) == max(values):
                spread = "always the same"
        verdict = holds(claimed, printed, values)
        rows.append(f"| {text}, `{name}` | {claimed} | {printed} | {spread} | {verdict} |")
    return rows


def fill_table(name, root, records):
    if name in LEVELS:
        return lessons_table(name, root, records)
    tables = {
        "map": map_table,
        "files": files_table,
        "glossary": glossary_table,
        "results": results_table,
    }
    return tables[name](root, records)


# MARKED PLACES
def find_excerpt(words, root=ROOT):
    """Return statements of a lesson, named by their first words.

    `intermediate/02_cnn def forward` is a function, and `basics/02_tensors a = ... print("Dev` are
    all statements from the first that begins so to the next that begins with the last words.
    """
    name, words = words.split(" ", 1)
    first, _, last = words.partition(" ... ")
    text = (root / "src" / f"{name}.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    starts = [node for node in nodes if lines[node.lineno - 1].lstrip().startswith(first)]
    start = min(starts, key=lambda node: node.lineno)
    ends = [node for node in nodes if lines[node.lineno - 1].lstrip().startswith(last)]
    end = min((node for node in ends if node.lineno > start.lineno), key=lambda node: node.lineno)
    end = end if last else start
    return textwrap.dedent("\n".join(lines[start.lineno - 1 : end.end_lineno]))


def wrap_lines(lines, width=110):
    """Break the lines that a page cannot show without scrolling, such as a model's answers."""
    wrapped = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 4)
        if len(line) > width:
            wrapped += textwrap.wrap(line, width, subsequent_indent=indent)
        else:
            wrapped.append(line)
    return wrapped


def fill_run(words, root, records):
    """Return the command, what it takes and makes, some lines of its output, and all of it.

    `basics/02_tensors` shows the last line, `basics/02_tensors 3 5-7` the lines 3 and 5 to 7.
    """
    name, *ranges = words.split()
    card = read_card(root / "src" / f"{name}.py")
    machine, entry = find_record("lessons", name, records)
    printed = read_capture(name, root)[1].rstrip().splitlines()
    place = "" if machine.endswith("no GPU") else f" on {machine}"
    parts = [f"`{card['Run']}`", minutes(entry["seconds"]) + place]
    files = [f"`{file}`" for file in files_in(card["Makes"]) if not file.endswith(".png")]
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
    _, entry = find_record("predictions", name, records)
    field = expect.split()[0]
    command = f"uv run scripts/run_course.py try {name} --set {edit}"
    return [f"`{command}` · recorded: `{field} = {read_words(entry['result'])[field]}`"]


def render(text, root=ROOT):
    """Return a document with each marked place filled; nothing else changes."""
    records = read_records(root)

    def fill_place(match):
        start, kind, words, end = match.groups()
        if kind == "table":
            lines = fill_table(words, root, records)
        elif kind == "code":
            lines = ["```python", find_excerpt(words, root), "```"]
        elif kind == "run":
            lines = fill_run(words, root, records)
        elif kind == "try":
            lines = fill_try(words, root, records)
        elif kind == "stamps":
            names = [name_of(lesson) for lesson in find_lessons(root)]
            stamps = {stamp(*find_record("lessons", name, records)) for name in names}
            lines = [f"<sub>Recorded {line}</sub>" for line in sorted(stamps)]
        return start + "\n".join(lines) + "\n" + end

    def fill_value(match):
        start, name, field, end = match.groups()
        result = find_record("lessons", name, records)[1]["result"]
        return f"{start}{read_words(result)[field]}{end}"

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
