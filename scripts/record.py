"""Record what lessons print and measure, on an idle machine. For those who write the course.

    uv run scripts/record.py lessons         full runs: their outputs, figures and pictures
    uv run scripts/record.py seeds           five seeds of each lesson that depends on one
    uv run scripts/record.py predictions     the predictions of the README, tried

Each takes --only LESSON. Afterwards `uv run scripts/render.py` writes the documents.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from claims import PREDICTIONS
from course import (
    PICTURES,
    ROOT,
    broken_promises,
    capture_path,
    describe_machine,
    files_in,
    first_line,
    has_seed,
    hash_code,
    hash_work,
    keep,
    last_line,
    name_of,
    read_card,
    read_words,
)
from run_course import choose, link_inputs, make_copy, run_lesson

RUN_SEED = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lesson", sys.argv[1])
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
lesson.SEED = int(sys.argv[2]) * getattr(lesson, "REPEATS", 1)  # no seed is used twice
lesson.ROOT = pathlib.Path(sys.argv[3])
lesson.main()
"""


def run_or_exit(lesson, **options):
    run = run_lesson(lesson, **options)
    if run["code"]:
        sys.exit(f"{name_of(lesson)} failed with exit code {run['code']}:\n{run['errors']}")
    return run


def new_entry(lesson):
    machine = describe_machine()
    versions = {key: machine[key] for key in ("driver", "torch", "python")}
    return {"date": str(date.today()), **versions, "work": hash_work(lesson)}


def keep_pictures(lesson, root):
    """Copy a lesson's plots to data/results/pictures/; return {file name: eight digits}."""
    pictures = {}
    for file in files_in(read_card(lesson)["Makes"]):
        if file.endswith(".png"):
            target = root / PICTURES / Path(file).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / file, target)
            pictures[target.name] = hashlib.sha256(target.read_bytes()).hexdigest()[:8]
    return pictures


def record_lesson(lesson, root=ROOT):
    """Run a lesson in full, and keep what it printed if that fulfills its card."""
    name = name_of(lesson)
    machine = describe_machine()["machine"]
    run = run_or_exit(lesson)
    broken = broken_promises(read_card(lesson)["Expect"], run["output"])
    if broken:
        sys.exit(f"{name} is not recorded: {'; '.join(broken)}")
    result = last_line(run["output"])
    entry = new_entry(lesson) | {
        "code": hash_code(lesson),
        "seconds": round(run["seconds"]),
        "data": read_words(run["output"]).get("data"),
        "result": result,
        "pictures": keep_pictures(lesson, root),
    }
    path = capture_path(name, machine, root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{first_line(machine, entry)}\n{run['output']}", encoding="utf-8")
    keep("lessons", name, entry, root)
    print(f"{name}: {entry['seconds']} s, {result}", flush=True)


def record_seeds(lesson):
    """Run a lesson with seeds 0 to 4, away from models/, and keep its results."""
    results = []
    for seed in range(5):
        with tempfile.TemporaryDirectory() as folder:
            link_inputs(lesson, Path(folder))
            command = [sys.executable, "-c", RUN_SEED, str(lesson), str(seed), folder]
            results.append(last_line(subprocess.check_output(command, text=True)))
        print(f"{name_of(lesson)}, seed {seed}: {results[-1]}", flush=True)
    keep("seeds", name_of(lesson), new_entry(lesson) | {"results": results})


def record_prediction(lesson, edit, expect):
    """Run a changed copy of a lesson, and keep its result if it is the predicted one."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_or_exit(lesson, script=make_copy(lesson, [edit], Path(folder)))
    broken = broken_promises(expect, run["output"])
    if broken:
        sys.exit(f"{name_of(lesson)} with {edit}: {'; '.join(broken)}")
    result = last_line(run["output"])
    keep("predictions", name_of(lesson), new_entry(lesson) | {"edit": edit, "result": result})
    print(f"{name_of(lesson)} with {edit}: {result}", flush=True)


def main(what, only):
    for lesson in choose(only):
        if what == "lessons":
            record_lesson(lesson)
        if what == "seeds" and has_seed(lesson):
            record_seeds(lesson)
        for name, edit, expect in PREDICTIONS:
            if what == "predictions" and name == name_of(lesson):
                record_prediction(lesson, edit, expect)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["lessons", "seeds", "predictions"])
    parser.add_argument("--only", nargs="+", metavar="LESSON", help="a part of a path")
    arguments = parser.parse_args()
    try:
        main(arguments.what, arguments.only)
    except KeyboardInterrupt:
        sys.exit("Stopped. What was recorded is kept.")
