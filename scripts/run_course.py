"""Run the course's lessons, see which are done, or try a change.

uv run scripts/run_course.py list     which lessons are done, missing or stale
uv run scripts/run_course.py run      all lessons that are not done yet, in order
uv run scripts/run_course.py try 06_training --set EPOCHS=100     a changed copy, compared
"""

import argparse
import ast
import contextlib
import difflib
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
    files_in,
    find_lessons,
    hash_code,
    last_line,
    makers_and_users,
    name_of,
    read_capture,
    read_card,
    read_words,
)
from tqdm import tqdm

RUNNING = set()  # the processes of lessons, so that Ctrl-C can stop them


# LESSONS: run one as a learner does.
def needs_stand_in(lesson):
    with socket.socket() as door:
        here = "OLLAMA_HOST" in os.environ or door.connect_ex(("127.0.0.1", 11434)) == 0
    return "running Ollama" in read_card(lesson)["Needs"] and not here


@contextlib.contextmanager
def served(lesson, model):
    """Give a lesson that talks to Ollama the server that runs here, or else the tests' stand-in."""
    if not needs_stand_in(lesson):
        yield dict(os.environ)
        return
    command = [sys.executable, ROOT / "tests" / "ollama_stand_in.py", "--model", model]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as server:
        try:
            yield {**os.environ, "OLLAMA_HOST": server.stdout.readline().strip()}
        finally:
            server.terminate()


def run_lesson(lesson, quick=False, script=None, threads=None):
    """Run a lesson, or its changed copy `script`; return its code, output, errors and seconds."""
    command = [sys.executable, script or lesson]
    if quick:
        command.append("--quick")
    with served(lesson, place("models/smollm2/", quick)) as environment:
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        start = time.perf_counter()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        words = {"encoding": "utf-8", "errors": "replace"}
        environment["PYTHONIOENCODING"] = "utf-8"
        with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **words) as process:
            RUNNING.add(process)
            output, errors = process.communicate()
            RUNNING.discard(process)
    seconds = time.perf_counter() - start
    return {"code": process.returncode, "output": output, "errors": errors, "seconds": seconds}


# STATE: models/runs.json says with which code each lesson ran, when, and on which data.
def place(file, quick):
    return ROOT / (file.replace("models/", "models/quick/", 1) if quick else file)


def notes_path(quick):
    return place("models/runs.json", quick)


def read_notes(quick):
    try:
        notes = json.loads(notes_path(quick).read_text(encoding="utf-8"))
        return {name: note for name, note in notes.items() if note["time"]}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged
        return {}


def write_note(lesson, quick, output):
    """Keep what came of a run. A short test is not held to its card."""
    note = {
        "time": time.time(),
        "code": hash_code(lesson),
        "data": read_words(output).get("data"),
        "broken": [] if quick else broken_promises(read_card(lesson)["Expect"], output),
    }
    path = notes_path(quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    notes = read_notes(quick) | {name_of(lesson): note}
    part.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def changed_at(path):
    """Return when a file, or the newest file in a folder, was written; 0 if there is none."""
    files = path.rglob("*") if path.is_dir() else [path]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0)


def is_made(path):
    """True if a file is there. The folder of a model counts when its configuration is there."""
    return any(path.glob("*config.json")) if path.is_dir() else path.exists()


def data_source(lesson):
    """Return the data set that a lesson promises, and the one that is in data/ now (or None)."""
    promised = re.search(r"\bdata = (\w+)", read_card(lesson)["Expect"])
    if not promised:
        return None, None
    source = ROOT / "data" / promised[1] / "SOURCE"
    return promised[1], source.read_text(encoding="utf-8") if source.exists() else None


def state_of(lesson, quick=False):
    """Return done, missing or stale, and why."""
    makes = [place(file, quick) for file in files_in(read_card(lesson)["Makes"])]
    missing = [path for path in makes if not is_made(path)]
    if missing:
        return "missing", ", ".join(path.relative_to(ROOT).as_posix() for path in missing)
    note = read_notes(quick).get(name_of(lesson))
    made = min((changed_at(path) for path in makes), default=0)
    if note and note["time"] + 1 > made:
        made = note["time"]
        if note["code"] != hash_code(lesson):
            return "stale", "its code has changed"
        wanted, source = data_source(lesson)
        if wanted and source == wanted != note["data"]:
            return "stale", f"it ran on other data: {wanted} is here now"
    elif not makes:
        return "missing", "not run yet"
    elif changed_at(lesson) > made:  # run by hand, before the lesson was changed
        return "stale", "its code is newer"
    for file in files_in(read_card(lesson)["Needs"]):
        path = place(file, quick)
        if not is_made(path) or changed_at(path) > made:
            what = "is newer" if is_made(path) else "is missing"
            return "stale", f"{path.relative_to(ROOT).as_posix()} {what}"
    return "done", ""


# RUN
def find_todo(lessons, quick):
    """Return the lessons that are not done, each with those that make what it needs."""
    makers = {file: maker for file, (maker, _) in makers_and_users().items()}
    todo = {}

    def want(lesson):
        todo[lesson] = set()
        for file in files_in(read_card(lesson)["Needs"]):
            if makers[file] not in todo and state_of(makers[file], quick)[0] != "done":
                want(makers[file])
            if makers[file] in todo:
                todo[lesson].add(makers[file])

    for lesson in lessons:
        if lesson not in todo and state_of(lesson, quick)[0] != "done":
            want(lesson)
    return {lesson: todo[lesson] for lesson in find_lessons() if lesson in todo}


def show_run(lesson, run, write):
    """Write one line on a lesson that ran, or all that it printed if it failed."""
    if run["code"]:
        write(f"{name_of(lesson)} failed with exit code {run['code']}. It said:")
        write((run["output"] + run["errors"]).rstrip())
        return
    result = last_line(run["output"]).removeprefix("Result: ")
    write(f"{name_of(lesson):36} {run['seconds']:4.0f} s   {result}")


def run_all(todo, quick, keep_going):
    """Run the lessons, each after those it depends on; return {lesson: run}.

    A full run measures, so one lesson runs at a time, in order. Short tests overlap.
    """
    jobs = min(4, os.cpu_count() + 1) if quick else 1
    threads = max(1, os.cpu_count() // jobs) if quick else None
    runs, futures, stop = {}, {}, threading.Event()
    layout = "{desc:32} {n_fmt}/{total_fmt} lessons {bar} {elapsed}"
    with (
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(todo), bar_format=layout, disable=None) as bar,
    ):

        def run_after(lesson, makers):
            wait([futures[maker] for maker in makers])
            if stop.is_set():
                return lesson, None
            bar.set_description_str(lesson.stem[:32])
            run = run_lesson(lesson, quick, threads=threads)
            if run["code"] and not keep_going:
                stop.set()
            return lesson, run

        for lesson, makers in todo.items():
            futures[lesson] = pool.submit(run_after, lesson, makers)
        try:
            for future in as_completed(futures.values()):
                lesson, run = future.result()
                if run is None:
                    continue
                runs[lesson] = run
                if not run["code"]:
                    write_note(lesson, quick, run["output"])
                show_run(lesson, run, bar.write)
                bar.update()
        except KeyboardInterrupt:
            stop.set()
            wait(futures.values(), timeout=2)  # a lesson on our terminal got the Ctrl-C, too
            for process in [*RUNNING]:
                process.send_signal(signal.SIGINT)
            raise
    return runs


def run_course(lessons, quick=False, keep_going=False):
    """Run what is not done; return a sentence for every lesson that failed or broke its promise."""
    todo = find_todo(lessons, quick)
    print(f"{len(set(lessons) - set(todo))} done before, {len(todo)} to run")
    runs = run_all(todo, quick, keep_going)
    notes = read_notes(quick)
    wrong = []
    for lesson in find_lessons():
        if lesson in runs and runs[lesson]["code"]:
            wrong.append(f"{name_of(lesson)} failed: {last_line(runs[lesson]['errors'])}")
        elif lesson in lessons or lesson in todo:
            for promise in notes.get(name_of(lesson), {}).get("broken", []):
                wrong.append(f"{name_of(lesson)}: {promise}")
    if any("promised data = " in sentence for sentence in wrong):
        wrong.append("Promises hold on the real data sets. data/README.md says how to get them.")
    return wrong


# TRY
def link_inputs(lesson, folder, quick=False):
    """Give a folder what a lesson reads, so that it can run there and leaves models/ alone."""
    (ROOT / "data").mkdir(exist_ok=True)
    needs = [place(file, quick) for file in files_in(read_card(lesson)["Needs"])]
    for path in [ROOT / "data", ROOT / "scripts" / "get_data.py", *needs]:
        link = folder / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)


def set_constant(text, edit):
    """Return a lesson's text with the edit `NAME=VALUE` below the line that sets NAME."""
    known = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            known[line.targets[0].id] = line.end_lineno
    name, _, value = edit.partition("=")
    try:
        words = [node.id for node in ast.walk(ast.parse(value)) if isinstance(node, ast.Name)]
    except SyntaxError:
        value = ""
    if not value or any(not re.search(rf"\b{word}\b", text) for word in words):
        sys.exit(f"--set wants NAME=VALUE, such as EPOCHS=1, not {edit}")
    if name not in known:
        sys.exit(f"This lesson sets no {name}. It sets {', '.join(known)}.")
    lines = text.splitlines(keepends=True)
    lines.insert(known[name], f"{name} = {value}\n")
    return "".join(lines)


def make_copy(lesson, edits, folder, quick=False):
    """Copy a lesson into a folder, with links to what it needs, and edit its constants."""
    text = lesson.read_text(encoding="utf-8")
    for edit in edits:
        text = set_constant(text, edit)
    link_inputs(lesson, folder, quick)
    copy = folder / lesson.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(text, encoding="utf-8")
    return copy


def try_lesson(lesson, edits, quick):
    for file in files_in(read_card(lesson)["Needs"]):
        path = place(file, quick)
        if not is_made(path):
            command = read_card(makers_and_users()[file][0])["Run"] + (" --quick" if quick else "")
            sys.exit(f"{path.relative_to(ROOT)} is missing. Make it with: {command}")
    copy = make_copy(lesson, edits, ROOT / "models" / "scratch" / lesson.stem, quick)
    print(f"Running {copy.relative_to(ROOT)}")
    run = run_lesson(lesson, quick, copy)
    print(run["output"] + run["errors"])
    if run["code"]:
        sys.exit(f"Your copy ended with exit code {run['code']}.")
    before = read_words(read_capture(name_of(lesson))[1])
    after = read_words(run["output"])
    for name in dict.fromkeys([*before, *after]):
        old = before.get(name, "nothing")
        new = after.get(name, "nothing")
        verdict = "" if old == new else "   changed"
        print(f"{name:24} recorded {old:>14}   yours {new:>14}{verdict}")


# COMMAND LINE
def choose(only):
    """Return the lessons whose path contains one of `only`; all of them if there is none."""
    lessons = find_lessons()
    parts = [re.sub(r"^(.*/)?src/", "", part).removesuffix(".py") for part in only or [""]]
    names = [name_of(lesson) for lesson in lessons]
    for part in parts:
        if not any(part in name for name in names):
            stems = [name.split("/")[1] for name in names]
            close = difflib.get_close_matches(part, [*names, *stems])
            guess = f" Did you mean {close[0]}?" if close else ""
            every = "All of them: uv run scripts/run_course.py list"
            sys.exit(f"No lesson is called {part}.{guess} {every}")
    return [lesson for lesson in lessons if any(part in name_of(lesson) for part in parts)]


def read_command():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in ("list", "run", "try"):
        one = tasks.add_parser(task)
        one.add_argument("--quick", action="store_true", help="short tests, in models/quick/")
        if task != "try":
            part = "a part of a path: llm, or 02_cnn"
            one.add_argument("--only", nargs="+", metavar="LESSON", help=part)
        if task == "run":
            one.add_argument("--keep-going", action="store_true", help="also after a failure")
        if task == "try":
            one.add_argument("lesson", help="a part of a lesson's path, such as 06_training")
            one.add_argument("--set", action="append", required=True, metavar="NAME=VALUE")
    return parser.parse_args()


def main():
    command = read_command()
    if command.task == "try":
        chosen = choose([command.lesson])
        if len(chosen) > 1:
            sys.exit(f"Which one: {', '.join(name_of(lesson) for lesson in chosen)}?")
        try_lesson(chosen[0], command.set, command.quick)
        return
    lessons = choose(command.only)
    if command.task == "list":
        for lesson in lessons:
            state, why = state_of(lesson, command.quick)
            print(f"{state:8} {read_card(lesson)['Run']:52} {why}".rstrip())
        return
    wrong = run_course(lessons, command.quick, command.keep_going)
    if wrong:
        sys.exit("\n".join(wrong))
    print("Done: every lesson ran." if command.quick else "Done: every promise is kept.")


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
