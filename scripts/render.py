"""Write recorded outputs, figures and code into the documents, or check that they agree.

    uv run scripts/render.py             fill the marked places of the documents
    uv run scripts/render.py --check     say what is not true; exit with 1 if anything is not

A marked place is a comment such as `<!-- run basics/02_tensors -->`, followed by what this script
writes there and by `<!-- end -->`. Everything outside of the marks is written by hand.
"""

import argparse
import hashlib
import json
import re
import sys
import textwrap

from claims import CLAIMS, PREDICTIONS
from course import (
    LEVELS,
    PICTURES,
    ROOT,
    broken_promises,
    capture_path,
    files_in,
    find_lessons,
    find_record,
    first_line,
    has_seed,
    hash_code,
    hash_work,
    makers_and_users,
    name_of,
    parse_number,
    read_capture,
    read_card,
    read_constants,
    read_records,
    read_result,
    read_words,
    stamp,
)

DOCUMENTS = ["README.md", "CHEATSHEET.md", "models/README.md"]
PLACE = re.compile(r"(<!-- (\w+) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!-- = (\S+) (\S+) -->).*?(<!-- -->)")
EXCERPT = re.compile(r"^ *# README: start\n(.*?)^ *# README: end$", re.DOTALL | re.MULTILINE)


# TABLES: each returns the lines of a Markdown table.
def minutes(seconds):
    return f"{seconds} s" if seconds < 100 else f"{seconds / 60:.0f} min"


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
        "files": files_table,
        "glossary": glossary_table,
        "results": results_table,
    }
    return tables[name](root, records)


# MARKED PLACES
def find_excerpt(name, root=ROOT):
    """Return the lines of a lesson that are its idea, between its two README comments."""
    text = (root / "src" / f"{name}.py").read_text(encoding="utf-8")
    return textwrap.dedent(EXCERPT.search(text)[1]).rstrip()


def fill_run(words, root, records):
    """Return the command, what it takes and makes, its last line or lines, and the whole output."""
    name, *count = words.split()
    card = read_card(root / "src" / f"{name}.py")
    machine, entry = find_record("lessons", name, records)
    output = read_capture(name, root)[1].rstrip()
    parts = [f"`{card['Run']}`", f"{minutes(entry['seconds'])} on {machine}"]
    if files := files_in(card["Makes"]):
        parts.append("makes " + ", ".join(f"`{file}`" for file in files))
    last = output.splitlines()[-int(count[0] if count else 1) :]
    lines = [" · ".join(parts) + " · prints:", "", "```text", *last, "```"]
    if len(last) < len(output.splitlines()):
        lines += ["", "<details><summary>Full output</summary>", "", "```text", output, "```", ""]
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


# CHECK
def check_captures(lesson, records, root):
    """Return what is untrue of a lesson's recorded runs, on all machines."""
    name = name_of(lesson)
    untruths = []
    for record in records:
        machine = record["machine"]
        entry = record["lessons"].get(name)
        if not entry:
            continue
        if not capture_path(name, machine, root).exists():
            untruths.append(f"{name} has no recorded output")
            continue
        line, output = capture_path(name, machine, root).read_text(encoding="utf-8").split("\n", 1)
        if line != first_line(machine, entry):
            untruths.append(f"{name}: its recorded output and its record name other runs")
        if output.splitlines()[-1:] != [entry["result"]]:
            untruths.append(f"{name}: its recorded output and its record have other results")
        if entry["code"] != hash_code(lesson):
            untruths.append(f"{name} has changed since its output was recorded")
        for broken in broken_promises(read_card(lesson)["Expect"], output):
            untruths.append(f"{name}, recorded output: {broken}")
        for picture, digits in entry["pictures"].items():
            file = root / PICTURES / picture
            if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest()[:8] != digits:
                untruths.append(f"{name}: {picture} is not the recorded picture")
    return untruths


def check_seeds(lesson, records):
    name = name_of(lesson)
    _, seeds = find_record("seeds", name, records)
    if not seeds:
        return [f"{name} has no record of five seeds"] if has_seed(lesson) else []
    untruths = []
    if len(seeds["results"]) < 5:
        untruths.append(f"{name} has no record of five seeds")
    if seeds["work"] != hash_work(lesson):
        untruths.append(f"{name} has changed since its five seeds were recorded")
    for seed, line in enumerate(seeds["results"]):
        for broken in broken_promises(read_card(lesson)["Expect"], line):
            untruths.append(f"{name}, seed {seed}: {broken}")
    return untruths


def check_settings(lesson, records):
    """Say so if other settings than the lesson's did best on the validation images."""
    _, chosen = find_record("settings", name_of(lesson), records)
    best = {key: value for key, value in chosen["best"].items() if key.isupper()} if chosen else {}
    if best.items() <= read_constants(lesson).items():
        return []
    return [f"{name_of(lesson)}: on the validation images, other settings were better: {best}"]


def check_predictions(records, root):
    untruths = []
    for name, edit, expect in PREDICTIONS:
        _, entry = find_record("predictions", name, records)
        if not entry or entry["edit"] != edit:
            untruths.append(f"{name}: {edit} has not been tried")
            continue
        if entry["work"] != hash_work(root / "src" / f"{name}.py"):
            untruths.append(f"{name} has changed since {edit} was tried")
        for broken in broken_promises(expect, entry["result"]):
            untruths.append(f"{name} with {edit}: {broken}")
    return untruths


def find_untruths(root=ROOT):
    """Return a sentence for all that documents, captures and cards say and that is not so."""
    untruths = []
    records = read_records(root)
    for lesson in find_lessons(root):
        if not find_record("lessons", name_of(lesson), records)[1]:
            untruths.append(f"{name_of(lesson)} has no recorded run")
        untruths += check_captures(lesson, records, root)
        untruths += check_seeds(lesson, records)
        untruths += check_settings(lesson, records)
    untruths += check_predictions(records, root)
    if any(" has no recorded " in text or "has not been tried" in text for text in untruths):
        return untruths  # the documents cannot be rendered
    for document in DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        if render(text, root) != text:
            untruths.append(f"{document} differs from the records: uv run scripts/render.py")
    return untruths


def main(check):
    if check:
        untruths = find_untruths()
        if untruths:
            sys.exit("\n".join(untruths))
        print("Every document says what the records say, and every promise is kept.")
        return
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing, say what is untrue")
    main(parser.parse_args().check)
