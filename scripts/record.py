"""Record what lessons print and measure, on an idle machine. For those who write the course.

    uv run scripts/record.py lessons         full runs: their outputs, figures and pictures
    uv run scripts/record.py seeds           five seeds of each lesson that depends on one
    uv run scripts/record.py predictions     the predictions of the README, tried

Each takes parts of lessons' paths, too. Afterwards `uv run scripts/render.py` writes the documents.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

from claims import PREDICTIONS
from course import PICTURES, ROOT, broken_promises, capture_path, keep, last_line, read_words
from run_course import choose, make_copy, run_lesson


def run_or_exit(lesson, expect, script=None):
    """Run a lesson, or its changed copy; stop if it fails or does not fulfill `expect`."""
    run = run_lesson(lesson, script=script)
    if run["code"]:
        sys.exit(f"{lesson.name} failed with exit code {run['code']}:\n{run['errors']}")
    if broken := broken_promises(expect, run["output"]):
        sys.exit(f"{lesson.name} is not recorded: {'; '.join(broken)}")
    return run


def keep_pictures(lesson, root):
    """Copy a lesson's plots to data/results/pictures/; return {file name: eight digits}."""
    pictures = {}
    for file in lesson.makes:
        if file.endswith(".png"):
            target = root / PICTURES / Path(file).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, target)
            pictures[target.name] = hashlib.sha256(target.read_bytes()).hexdigest()[:8]
    return pictures


def record_lesson(lesson, root=ROOT):
    """Run a lesson in full, and keep what it printed if that fulfills its card."""
    run = run_or_exit(lesson, lesson.card["Expect"])
    entry = {
        "code": lesson.hash_code(),
        "seconds": round(run["seconds"]),
        "data": read_words(run["output"]).get("data"),
        "result": last_line(run["output"]),
        "pictures": keep_pictures(lesson, root),
    }
    path = capture_path(lesson.name, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run["output"], encoding="utf-8")
    keep("lessons", lesson.name, entry, root)
    print(f"{lesson.name}: {entry['seconds']} s, {entry['result']}", flush=True)


def run_changed(lesson, edit, expect):
    """Run a copy of a lesson with a changed constant, away from models/; return its result."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_or_exit(lesson, expect, make_copy(lesson, [edit], Path(folder)))
    print(f"{lesson.name} with {edit}: {last_line(run['output'])}", flush=True)
    return last_line(run["output"])


def record_seeds(lesson):
    """Run a lesson with five seeds. A lesson that repeats takes the next ones, too."""
    step = lesson.constants().get("REPEATS", 1)
    expect = lesson.card["Expect"]
    results = [run_changed(lesson, f"SEED={step * number}", expect) for number in range(5)]
    keep("seeds", lesson.name, {"work": lesson.hash_work(), "results": results})


def main(what, parts):
    for lesson in choose(parts).values():
        if what == "lessons":
            record_lesson(lesson)
        if what == "seeds" and lesson.has_seed():
            record_seeds(lesson)
        for name, edit, expect in PREDICTIONS:
            if what == "predictions" and name == lesson.name:
                result = run_changed(lesson, edit, expect)
                keep(what, name, {"work": lesson.hash_work(), "edit": edit, "result": result})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lessons", "seeds", "predictions"])
    parser.add_argument("lessons", nargs="*", help="parts of paths, such as llm or 02_cnn")
    arguments = parser.parse_args()
    try:
        main(arguments.what, arguments.lessons)
    except KeyboardInterrupt:
        sys.exit("Stopped. What was recorded is kept.")
