"""Run the course's lessons, see which are done, or try a change.

uv run scripts/run_course.py list          which lessons are done, missing or stale
uv run scripts/run_course.py run           all lessons that are not done yet, in order
uv run scripts/run_course.py run basics llm/02                  only these, and what they need
uv run scripts/run_course.py try 06_training --set EPOCHS=100   a changed copy of a lesson
"""

import argparse
import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed, wait

from course import (
    ROOT,
    broken_promises,
    capture_path,
    find_lessons,
    find_makers,
    last_line,
    read_words,
    write_json,
)
from tqdm import tqdm

RUNNING = set()  # the processes of lessons, so that Ctrl-C can stop them


def run_lesson(lesson, quick=False, script=None, threads=None):
    """Run a lesson, or its changed copy `script`; return its code, output, errors and seconds."""
    command = [sys.executable, script or lesson.path]
    if quick:
        command.append("--quick")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, errors="replace", **pipes) as process:
        RUNNING.add(process)
        output, errors = process.communicate()
        RUNNING.discard(process)
    seconds = time.perf_counter() - start
    return {"code": process.returncode, "output": output, "errors": errors, "seconds": seconds}


# STATE: models/runs.json says with which code each lesson ran, when, and on which data.
def place(file, quick):
    return ROOT / (file.replace("models/", "models/quick/", 1) if quick else file)


def read_notes(quick):
    try:
        notes = json.loads(place("models/runs.json", quick).read_text(encoding="utf-8"))
        return {name: note for name, note in notes.items() if note["time"]}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def write_note(lesson, quick, output):
    """Keep what came of a run. A short test is not held to its card."""
    note = {
        "time": time.time(),
        "code": lesson.hash_code(),
        "data": read_words(output).get("data"),
        "broken": [] if quick else broken_promises(lesson.card["Expect"], output),
    }
    write_json(read_notes(quick) | {lesson.name: note}, place("models/runs.json", quick))


def changed_at(path):
    """Return when a file, or the newest file in a folder, was written; 0 if there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0)


def is_made(path):
    """True if a file is there. The folder of a model counts when its configuration is there."""
    return any(path.glob("*config.json")) if path.is_dir() else path.exists()


def find_missing(files, quick):
    """Return those of a card's files that are not there."""
    paths = [place(file, quick) for file in files]
    return [path.relative_to(ROOT).as_posix() for path in paths if not is_made(path)]


def state_of(lesson, quick=False):
    """Return done, missing or stale, and why."""
    if missing := find_missing(lesson.makes, quick):
        return "missing", ", ".join(missing)
    note = read_notes(quick).get(lesson.name)
    made = min((changed_at(place(file, quick)) for file in lesson.makes), default=0)
    if note and note["time"] + 1 > made:
        made = note["time"]
        if note["code"] != lesson.hash_code():
            return "stale", "its code has changed"
        wanted = re.search(r"\bdata = (\w+)", lesson.card["Expect"] + ", data = none")[1]
        source = ROOT / "data" / wanted / "SOURCE"
        if note["data"] != wanted and source.exists() and source.read_text() == wanted:
            return "stale", f"it ran on other data: {wanted} is here now"
    elif made == 0:
        return "missing", "not run yet"
    elif changed_at(lesson.path) > made:  # run by hand, before the lesson was changed
        return "stale", "its code is newer"
    if missing := find_missing(lesson.needs, quick):
        return "stale", f"{', '.join(missing)} is missing"
    newer = [file for file in lesson.needs if changed_at(place(file, quick)) > made]
    return ("stale", f"{newer[0]} is newer") if newer else ("done", "")


# RUN
def find_todo(lessons, quick):
    """Return the lessons that are not done, with those that make what they need, in order."""
    makers = find_makers()
    wanted = set(lessons)
    todo = {}
    for name, lesson in reversed(find_lessons().items()):  # a file is made before it is needed
        if name in wanted and state_of(lesson, quick)[0] != "done":
            todo[name] = lesson
            wanted.update(makers[file].name for file in lesson.needs)
    return dict(reversed(todo.items()))


def run_all(todo, quick, keep_going):
    """Run the lessons, each after those it needs; return {name: run}.

    A full run measures, so one lesson runs at a time, in order. Short tests overlap.
    """
    jobs = min(4, os.cpu_count() + 1) if quick else 1
    threads = max(1, os.cpu_count() // jobs) if quick else None
    makers = {file: lesson.name for lesson in todo.values() for file in lesson.makes}
    runs, futures, stop = {}, {}, threading.Event()

    def run_after_makers(lesson):
        wait([futures[makers[file]] for file in lesson.needs if file in makers])
        run = None if stop.is_set() else run_lesson(lesson, quick, threads=threads)
        if run and run["code"] and not keep_going:
            stop.set()
        return lesson, run

    bar = tqdm(total=len(todo), bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}", disable=None)
    with ThreadPoolExecutor(jobs) as pool, bar:
        for name, lesson in todo.items():
            futures[name] = pool.submit(run_after_makers, lesson)
        try:
            for future in as_completed(futures.values()):
                lesson, run = future.result()
                if run:
                    runs[lesson.name] = run
                    bar.write(describe_run(lesson.name, run))
                    bar.update()
                if run and not run["code"]:
                    write_note(lesson, quick, run["output"])
        except KeyboardInterrupt:
            stop.set()
            wait(futures.values(), timeout=2)  # a lesson on our terminal got the Ctrl-C, too
            for process in [*RUNNING]:
                process.send_signal(signal.SIGINT)
            raise
    return runs


def describe_run(name, run):
    """Return one line on a lesson that ran, or all that it printed if it failed."""
    if run["code"]:
        printed = (run["output"] + run["errors"]).rstrip()
        return f"{name} failed with exit code {run['code']}. It said:\n{printed}"
    result = last_line(run["output"]).removeprefix("Result: ")
    return f"{name:36} {run['seconds']:4.0f} s   {result}"


def run_course(lessons, quick, keep_going):
    """Run what is not done; return a sentence for every lesson that failed or broke its promise."""
    todo = find_todo(lessons, quick)
    print(f"{len(set(lessons) - set(todo))} done before, {len(todo)} to run")
    with socket.socket() as door:
        served = "OLLAMA_HOST" in os.environ or door.connect_ex(("127.0.0.1", 11434)) == 0
    for name, lesson in list(todo.items()):
        if "running Ollama" in lesson.card["Needs"] and not served:
            print(f"{name} is left out: it needs a server (scripts/ollama.sh start)")
            del todo[name]
    runs = run_all(todo, quick, keep_going)
    notes = read_notes(quick)
    wrong = []
    for name in find_lessons():
        if name in runs and runs[name]["code"]:
            wrong.append(f"{name} failed: {last_line(runs[name]['errors'])}")
        elif name in lessons or name in todo:
            broken = notes.get(name, {}).get("broken", [])
            wrong += [f"{name}: {promise}" for promise in broken]
    if any("promised data = " in sentence for sentence in wrong):
        wrong.append("Promises hold on the real data sets. data/README.md says how to get them.")
    return wrong


# TRY
def make_copy(lesson, edits, folder, quick=False):
    """Copy a lesson into a folder, with links to what it reads, and set its constants."""
    (ROOT / "data").mkdir(exist_ok=True)
    needs = [place(file, quick) for file in lesson.needs]
    for path in [ROOT / "data", ROOT / "scripts" / "get_data.py", *needs]:
        link = folder / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)
    text = lesson.text
    for edit in edits:
        text = set_constant(text, edit)
    copy = folder / lesson.path.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, encoding="utf-8")
    return copy


def set_constant(text, edit):
    """Return a lesson's text with the edit `NAME=VALUE` below the line that sets NAME."""
    name, _, value = edit.partition("=")
    try:
        ast.literal_eval(value)
    except (SyntaxError, ValueError):
        sys.exit(f"--set wants NAME=VALUE, such as EPOCHS=1, not {edit}")
    known = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            known[line.targets[0].id] = line.end_lineno
    if name not in known:
        sys.exit(f"This lesson sets no {name}. It sets {', '.join(known)}.")
    lines = text.splitlines(keepends=True)
    lines.insert(known[name], f"{name} = {value}\n")
    return "".join(lines)


def try_lesson(lesson, edits, quick):
    for file in lesson.needs:
        for path in find_missing([file], quick):
            command = find_makers()[file].card["Run"] + (" --quick" if quick else "")
            sys.exit(f"{path} is missing. Make it with: {command}")
    copy = make_copy(lesson, edits, ROOT / "models" / "scratch" / lesson.path.stem, quick)
    print(f"Running {copy.relative_to(ROOT)}")
    run = run_lesson(lesson, quick, copy)
    print(run["output"] + run["errors"])
    if run["code"]:
        sys.exit(f"Your copy ended with exit code {run['code']}.")
    print(f"Without the change, it was: {last_line(capture_path(lesson.name).read_text('utf-8'))}")


# COMMAND LINE
def choose(parts):
    """Return {name: lesson} for each path that contains one of the parts; all if there is none."""
    lessons = find_lessons()
    chosen = set()
    for part in parts or [""]:
        part = re.sub(r"^(.*/)?src/", "", part).removesuffix(".py")
        found = {name for name in lessons if part in name}
        if not found:
            every = "All of them: uv run scripts/run_course.py list"
            sys.exit(f"No lesson is called {part}. {every}")
        chosen |= found
    return {name: lesson for name, lesson in lessons.items() if name in chosen}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=["list", "run", "try"])
    parser.add_argument("lessons", nargs="*", help="parts of paths, such as llm or 02_cnn")
    parser.add_argument("--quick", action="store_true", help="short tests, in models/quick/")
    parser.add_argument("--keep-going", action="store_true", help="run: also after a failure")
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help="try: the change")
    command = parser.parse_intermixed_args()  # flags may stand between the lessons
    lessons = choose(command.lessons)
    if command.task == "list":
        for lesson in lessons.values():
            state, why = state_of(lesson, command.quick)
            print(f"{state:8} {lesson.card['Run']:52} {why}".rstrip())
    elif command.task == "try":
        if not command.set or len(lessons) > 1:
            parser.error("try wants one lesson and a change, such as 06_training --set EPOCHS=100")
        [lesson] = lessons.values()
        try_lesson(lesson, command.set, command.quick)
    else:
        if wrong := run_course(lessons, command.quick, command.keep_going):
            sys.exit("\n".join(wrong))
        print("Done: no lesson failed." if command.quick else "Done: every promise is kept.")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command continues with the lessons that are not done.")
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a read-only folder, or a full disk
        sys.exit(f"Stopped: {error}. Finished files are unchanged.")
