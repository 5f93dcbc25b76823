"""Walk through the course, and check that every document tells the truth.

    uv run scripts/run_course.py list                which lessons are done, missing or stale
    uv run scripts/run_course.py run                 all lessons that are not done yet, in order
    uv run scripts/run_course.py try 06_training     change a copy of a lesson, and see what differs
    uv run scripts/run_course.py check               say what is not true; exit 1 if anything is not

For those who write the course; each takes --only, as run does:

    uv run scripts/run_course.py record              full runs; keeps what they print and measure
    uv run scripts/run_course.py seeds               five seeds of each lesson that has one
    uv run scripts/run_course.py predict             tries the predictions of the README
    uv run scripts/run_course.py readme              writes the records into the documents
"""

import argparse
import ast
import contextlib
import difflib
import functools
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from datetime import date
from pathlib import Path

from records import (
    DOCUMENTS,
    PICTURE,
    PREDICTIONS,
    ROOT,
    broken_promises,
    capture_path,
    draw_course,
    files_in,
    find_lessons,
    find_record,
    find_untruths,
    first_line,
    has_seed,
    hash_code,
    hash_records,
    hash_work,
    makers_and_users,
    name_of,
    read_capture,
    read_card,
    read_record,
    read_records,
    read_result,
    render,
    write_record,
)
from tqdm import tqdm

RUNNING = set()  # processes, to be stopped with this one
WRITING = threading.Lock()


# LESSONS: run one as a learner does, and watch it.
@contextlib.contextmanager
def served(lesson, model=ROOT / "models" / "gpt2_mini"):
    """Give a lesson that talks to Ollama the one that is here, or else the tests' stand-in.

    The stand-in answers from a model of this course; its version, which the lesson prints, says so.
    """
    if not needs_stand_in(lesson):
        yield dict(os.environ)
        return
    command = [sys.executable, ROOT / "tests" / "ollama_stand_in.py", "--model", model]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}  # its bars would stand between the lessons' lines
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as server:
        try:
            yield {**os.environ, "OLLAMA_HOST": server.stdout.readline().strip()}
        finally:
            server.terminate()


def needs_stand_in(lesson):
    with socket.socket() as door:
        here = "OLLAMA_HOST" in os.environ or door.connect_ex(("127.0.0.1", 11434)) == 0
    return "running Ollama" in read_card(lesson)["Needs"] and not here


def run_lesson(lesson, quick=False, script=None, threads=None, flags=()):
    """Run a lesson, or its changed copy `script`; return a dictionary of what came of it:

    code, output, errors, seconds, and peak_memory: the MB of its largest process.
    """
    command = [sys.executable, script or lesson, *(["--quick"] if quick else []), *flags]
    model = ROOT / "models" / ("quick" if quick else "") / "gpt2_mini"
    with (
        served(lesson, model) as environment,
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
    ):
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, cwd=ROOT, env=environment)
        RUNNING.add(process)
        _, status, usage = os.wait4(process.pid, 0)
        RUNNING.discard(process)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, and kilobytes elsewhere
        texts = [(file.seek(0), file.read())[1] for file in (output, errors)]
    return {
        "code": process.returncode,
        "output": texts[0],
        "errors": texts[1],
        "seconds": seconds,
        "peak_memory": usage.ru_maxrss / unit,
    }


def last_line(text):
    return (text.rstrip().splitlines() or ["it said nothing"])[-1]


def run_or_exit(lesson, **options):
    run = run_lesson(lesson, **options)
    if run["code"]:
        sys.exit(f"{name_of(lesson)} failed with exit code {run['code']}:\n{run['errors']}")
    return run


# STATE: models/runs.json notes of which code and which inputs a lesson's files were made.
def notes_path(quick):
    return ROOT / "models" / ("quick" if quick else "") / "runs.json"


def read_notes(quick):
    try:
        notes = json.loads(notes_path(quick).read_text(encoding="utf-8"))
        return {name: note for name, note in notes.items() if note["time"]}
    except (OSError, ValueError, TypeError, AttributeError):  # none yet, or damaged: nothing known
        return {}


def write_note(lesson, quick, note):
    with WRITING:
        notes = read_notes(quick) | {name_of(lesson): note}
        path = notes_path(quick)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")
        part.replace(path)


def place(file, quick):
    return ROOT / (file.replace("models/", "models/quick/", 1) if quick else file)


def is_made(path):
    """Say whether a file is there; a folder of a model may be there and have no model in it yet."""
    return any(path.glob("*config.json")) if path.is_dir() else path.exists()


def data_of(lesson):
    """Return the folder of the data set on which a lesson gives its promise, or None."""
    name = re.search(r"\bdata = (\w+)", read_card(lesson)["Expect"])
    return name and ROOT / "data" / name[1]


def data_came(lesson, since, broken=()):
    """Say whether a lesson that ran on a stand-in, at the time `since`, has its real data now."""
    data = data_of(lesson)
    images = data and data / "raw" / "train-images-idx3-ubyte"
    if not images or not images.exists():
        return False
    return images.stat().st_mtime > since or any("data = " in promise for promise in broken)


def inputs_of(lesson):
    """Return the files that a lesson reads; the stand-in for Ollama needs a model to answer from."""
    needs = files_in(read_card(lesson)["Needs"])
    return needs + ["models/gpt2_mini/"] * (not needs and needs_stand_in(lesson))


def hash_files(path):
    """Return eight digits that change with a file, or with any file of a folder; None without."""
    if not path.exists():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def state_of(lesson, quick=False):
    """Return done, missing or stale, and why; a lesson run by hand is judged by its files' dates."""
    makes = [place(file, quick) for file in files_in(read_card(lesson)["Makes"])]
    missing = [path for path in makes if not is_made(path)]
    if missing:
        return "missing", ", ".join(path.relative_to(ROOT).as_posix() for path in missing)
    note = read_notes(quick).get(name_of(lesson))
    made = min((path.stat().st_mtime for path in makes), default=0)
    if not note or made > note["time"] + 1:  # made by hand since
        if not makes:
            return "missing", "not run by `run` yet"
        inputs = [place(file, quick) for file in inputs_of(lesson)]
        newer = [
            path for path in [lesson, *inputs] if path.exists() and path.stat().st_mtime > made
        ]
        if newer:
            return "stale", f"{newer[0].relative_to(ROOT).as_posix()} is newer"
        return ("stale", "its data are newer") if data_came(lesson, made) else ("done", "")
    if note["code"] != hash_code(lesson):
        return "stale", "its code has changed"
    for file, digits in note["inputs"].items():
        if hash_files(place(file, quick)) != digits:
            return "stale", f"{file} has changed"
    newer = data_came(lesson, note["time"], note.get("broken", []))
    return ("stale", "its data are newer") if newer else ("done", "")


def show_list(lessons, quick):
    for lesson in lessons:
        state, why = state_of(lesson, quick)
        print(f"{state:8} {read_card(lesson)['Run']:52} {why}".rstrip())


def make_note(lesson, output, quick):
    """Return what models/runs.json keeps of a run: a quick one is not held to the promise."""
    expect = read_card(lesson)["Expect"]
    return {
        "time": time.time(),
        "code": hash_code(lesson),
        "inputs": {file: hash_files(place(file, quick)) for file in inputs_of(lesson)},
        "result": last_line(output),
        "broken": [] if quick else broken_promises(expect, output),
    }


# RUN
def with_makers(lessons, quick):
    """Return the lessons that are not done, and before them those that make what they miss."""
    makers = {file: maker for file, (maker, _) in makers_and_users().items()}
    wanted, order = [], find_lessons()

    def want(lesson):
        if lesson not in wanted:
            wanted.append(lesson)
            for file in inputs_of(lesson):
                if state_of(makers[file], quick)[0] != "done":
                    want(makers[file])

    for lesson in lessons:
        if state_of(lesson, quick)[0] != "done":
            want(lesson)
    return sorted(wanted, key=order.index)


class Course:
    """Runs lessons in their order: one at a time in full, one more than there are cores if quick."""

    def __init__(self, lessons, quick, keep_going):
        self.lessons, self.quick, self.keep_going = lessons, quick, keep_going
        self.jobs = min(4, os.cpu_count() + 1) if quick else 1  # a full run measures: alone
        self.ended = {lesson: threading.Event() for lesson in lessons}
        self.started, self.runs, self.stopped = {}, {}, False

    def run(self, lesson):
        """Run a lesson as soon as those are through that make what it needs."""
        makers = {file: maker for file, (maker, _) in makers_and_users().items()}
        for file in inputs_of(lesson):
            if makers[file] in self.ended:
                self.ended[makers[file]].wait()
        try:
            if self.stopped:
                return
            self.started[lesson] = time.perf_counter()
            threads = max(1, os.cpu_count() // self.jobs) if self.jobs > 1 else None
            run = run_lesson(lesson, self.quick, threads=threads)
            self.stopped |= bool(run["code"]) and not self.keep_going
            if not run["code"]:
                write_note(lesson, self.quick, make_note(lesson, run["output"], self.quick))
            self.runs[lesson] = run
        finally:
            self.ended[lesson].set()

    def progress(self, weights):
        """Return how much is done: a lesson that runs counts by its time, and never as all done."""
        now = time.perf_counter()
        running = [lesson for lesson in [*self.started] if not self.ended[lesson].is_set()]
        parts = [min(now - self.started[lesson], 0.95 * weights[lesson]) for lesson in running]
        return sum(weights[lesson] for lesson in [*self.runs]) + sum(parts), running


def show_run(lesson, run, verbose, write):
    """Write one line on a lesson; all that it printed if it failed."""
    if run["code"]:
        write(f"{name_of(lesson)} failed with exit code {run['code']}. It said:")
    if run["code"] or verbose:
        write((run["output"] + run["errors"]).rstrip())
    if not run["code"]:
        result = last_line(run["output"]).removeprefix("Result: ")
        write(f"{name_of(lesson):36} {run['seconds']:4.0f} s   {result}")


def expected_seconds(lesson, quick):
    _, entry = find_record("lessons", name_of(lesson), read_records())
    return 5 if quick or not entry else max(1, entry["seconds"])


def run_course(lessons, quick=False, keep_going=False, verbose=False):
    """Run what is not done; return a sentence for every lesson that failed or broke its promise."""
    todo = with_makers(lessons, quick)
    course = Course(todo, quick, keep_going)
    weights = {lesson: expected_seconds(lesson, quick) for lesson in todo}
    print(f"{len(set(lessons) - set(todo))} done before, {len(todo)} to run")
    layout, shown = "{desc:32} {percentage:3.0f}% {bar} {elapsed}, {remaining} left", set()
    with (
        ThreadPoolExecutor(course.jobs) as pool,
        tqdm(total=sum(weights.values()), bar_format=layout, smoothing=0, disable=None) as bar,
    ):
        futures = [pool.submit(course.run, lesson) for lesson in todo]
        try:
            while not all(future.done() for future in futures) or len(shown) < len(course.runs):
                wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
                done, running = course.progress(weights)
                bar.set_description_str(", ".join(lesson.stem for lesson in running)[:32])
                bar.update(done - bar.n)
                for lesson in [lesson for lesson in todo if lesson in course.runs]:
                    if lesson not in shown:
                        show_run(lesson, course.runs[lesson], verbose, bar.write)
                        shown.add(lesson)
        except KeyboardInterrupt:
            course.stopped = True
            wait(
                futures, timeout=2
            )  # who shares our terminal got the Ctrl-C too, and ends by itself
            for process in [*RUNNING]:
                process.send_signal(signal.SIGINT)
            raise
    for future in futures:
        future.result()  # an error of our own, not of a lesson, must not be lost
    wrong, notes = [], read_notes(quick)
    for lesson in dict.fromkeys([*todo, *lessons]):
        run = course.runs.get(lesson, {"code": 0})
        if run["code"]:
            wrong.append(f"{name_of(lesson)} failed: {last_line(run['errors'])}")
            continue
        broken = notes.get(name_of(lesson), {}).get("broken", [])
        if any("data = " in promise for promise in broken) and not data_of(lesson).exists():
            wrong.append(
                f"{name_of(lesson)}: it ran on stand-in digits, which cannot keep its promise; "
                f"data/README.md says how to get {data_of(lesson).name}"
            )
            continue
        wrong += [f"{name_of(lesson)}: {promise}" for promise in broken]
    return wrong


# RECORD
@functools.cache
def describe_machine():
    """Ask a process of its own: with PyTorch in this one, every lesson would seem to need its memory."""
    code = "import json, records; print(json.dumps(records.describe_machine()))"
    command = [sys.executable, "-c", code]
    return json.loads(subprocess.check_output(command, cwd=Path(__file__).parent, text=True))


def record(lessons):
    """Make a full run of each lesson and keep its output, if it keeps the card's promise."""
    machine = describe_machine()
    for lesson in lessons:
        name, run = name_of(lesson), run_or_exit(lesson)
        if broken := broken_promises(read_card(lesson)["Expect"], run["output"]):
            sys.exit(f"{name} is not recorded: {'; '.join(broken)}")
        result = last_line(run["output"])
        entry = {
            **new_entry(machine, lesson),
            "code": hash_code(lesson),
            "seconds": round(run["seconds"]),
            "peak_memory_mb": round(run["peak_memory"]),
            "data": read_result(result).get("data"),
            "result": result,
        }
        path = capture_path(name, machine["machine"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            f"{first_line(machine['machine'], entry)}\n{run['output']}", encoding="utf-8"
        )
        keep("lessons", name, entry)
        print(f"{name}: {result}", flush=True)


def new_entry(machine, lesson):
    versions = {key: machine[key] for key in ("driver", "torch", "python")}
    return {"date": str(date.today()), **versions, "work": hash_work(lesson)}


def keep(kind, name, entry):
    """Put an entry into this machine's record, in the order of the course."""
    whole = read_record(describe_machine()["machine"])
    order = [name_of(lesson) for lesson in find_lessons()]
    entries = whole[kind] | {name: entry}
    whole[kind] = {name: entries[name] for name in order if name in entries}
    write_record(whole)


SEEDED_RUN = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("lesson", sys.argv[1])
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
lesson.SEED = int(sys.argv[2]) * getattr(lesson, "REPEATS", 1)
lesson.ROOT = pathlib.Path(sys.argv[3])
lesson.main()
"""


def link_inputs(lesson, folder, quick=False):
    """Give a folder what a lesson reads, so that it can run there and leaves models/ alone."""
    (ROOT / "data").mkdir(exist_ok=True)
    needs = [place(file, quick) for file in files_in(read_card(lesson)["Needs"])]
    for path in [ROOT / "data", *needs]:
        link = folder / path.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)


def record_seeds(lessons):
    """Run each lesson that has a SEED with seeds 0 to 4, away from models/, and keep the results."""
    for lesson in lessons:
        if not has_seed(lesson):
            continue
        lines = []
        for seed in range(5):
            with tempfile.TemporaryDirectory() as folder:
                link_inputs(lesson, Path(folder))
                command = [sys.executable, "-c", SEEDED_RUN, str(lesson), str(seed), folder]
                lines.append(subprocess.check_output(command, text=True).splitlines()[-1])
            print(f"{name_of(lesson)} seed {seed}: {lines[-1]}", flush=True)
        keep("seeds", name_of(lesson), {**new_entry(describe_machine(), lesson), "results": lines})


# TRY
def set_constant(text, name, value):
    """Return a lesson's text with `NAME = value` in a line of its own, below where NAME is set."""
    known = {}
    for line in (node for node in ast.parse(text).body if isinstance(node, ast.Assign)):
        for node in ast.walk(line):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                known[node.id] = line.end_lineno
    if name not in known:
        sys.exit(f"This lesson sets no {name}. It sets {', '.join(known)}.")
    lines = text.splitlines(keepends=True)
    lines.insert(known[name], f"{name} = {value}\n")
    return "".join(lines)


def make_copy(lesson, edits, folder, quick=False):
    """Copy a lesson, with its constants edited, into a folder of its own; return the copy's path.

    Its ROOT is that folder, with links to what it needs, so no try replaces a trained model.
    """
    link_inputs(lesson, folder, quick)
    copy = folder / lesson.relative_to(ROOT)
    text = lesson.read_text(encoding="utf-8")
    for edit in edits:
        name, sign, value = edit.partition("=")
        try:
            words = [node.id for node in ast.walk(ast.parse(value)) if isinstance(node, ast.Name)]
        except SyntaxError:
            sign = ""
        if not sign or any(not re.search(rf"\b{word}\b", text) for word in words):
            sys.exit(f"--set wants NAME=VALUE, such as EPOCHS=1, not {edit}")
        text = set_constant(text, name, value)
    if edits or not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    return copy


def try_lesson(lesson, edits, quick, flags):
    needs = files_in(read_card(lesson)["Needs"])
    if missing := [file for file in needs if not is_made(place(file, quick))]:
        maker, flag = makers_and_users()[missing[0]][0], " --quick" * quick
        path = place(missing[0], quick).relative_to(ROOT)
        sys.exit(f"{path} is missing. Make it with: {read_card(maker)['Run']}{flag}")
    scratch = f"{lesson.stem}_set" if edits else lesson.stem  # what you edit by hand stays yours
    copy = make_copy(lesson, edits, ROOT / "models" / "scratch" / scratch, quick)
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    shown = copy.relative_to(ROOT)
    if not edits and not flags and editor and sys.stdin.isatty():
        subprocess.run([*shlex.split(editor), copy], check=False)
    if copy.read_bytes() == lesson.read_bytes() and not flags:
        print(f"Your copy is {shown}, and nothing in it has changed yet.")
        print(
            "Edit it and run this command again, or add --set NAME=VALUE, or -- and a flag of its."
        )
        return
    print(f"Running {shown}")
    run = run_lesson(lesson, quick, copy, flags=flags)
    print(run["output"] + run["errors"])
    if run["code"]:
        again = "" if edits else f"; delete {shown} to begin anew"
        sys.exit(f"Your copy ended with exit code {run['code']}{again}.")
    _, output = read_capture(name_of(lesson))
    before, after = read_result(output), read_result(run["output"])
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, "nothing"), after.get(name, "nothing")
        print(
            f"{name:24} recorded {old!s:>14}   yours {new!s:>14}{'' if old == new else '   changed'}"
        )


def predict(lessons):
    """Try each prediction of the README; keep what came of those that were right."""
    wrong = []
    for name, edit, expect in PREDICTIONS:
        lesson = ROOT / "src" / f"{name}.py"
        if lesson not in lessons:
            continue
        with tempfile.TemporaryDirectory() as folder:
            run = run_or_exit(lesson, script=make_copy(lesson, [edit], Path(folder)))
        if broken := broken_promises(expect, run["output"]):
            wrong.append(f"{name} with {edit}: {'; '.join(broken)}")
            continue
        result = last_line(run["output"])
        entry = {**new_entry(describe_machine(), lesson), "edit": edit, "result": result}
        keep("predictions", name, entry)
        print(f"{name} with {edit}: {result}", flush=True)
    if wrong:
        sys.exit("\n".join(wrong))


def write_documents():
    import matplotlib

    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        (ROOT / document).write_text(render(text), encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "course", "svg.fonttype": "none"}):
        about = {"Date": None, "Description": hash_records()}
        draw_course().savefig(ROOT / PICTURE, metadata=about)


def shorten(part):
    """Return how a lesson's name begins in this course, of any path that leads to it."""
    return re.sub(r"^(.*/)?src/", "", part).removesuffix(".py")


def choose(lessons, only, start=None):
    """Return the lessons whose path contains one of `only`, from the one that contains `start`."""
    only, start = [shorten(part) for part in only or []], shorten(start or "")
    names = [name_of(lesson) for lesson in lessons]
    for part in [*only, start]:
        if not any(part in name for name in names):
            close = difflib.get_close_matches(
                part, [*names, *(name.split("/")[1] for name in names)]
            )
            guess = f" Did you mean {close[0]}?" if close else ""
            sys.exit(
                f"No lesson is called {part}.{guess} All of them: uv run scripts/run_course.py list"
            )
    if start:
        first = next(i for i, lesson in enumerate(lessons) if start in name_of(lesson))
        lessons = lessons[first:]
    return [
        lesson for lesson in lessons if not only or any(part in name_of(lesson) for part in only)
    ]


def read_command():
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = cli.add_subparsers(dest="task", required=True, metavar="TASK")
    for task in ("list", "run", "record", "seeds", "predict", "try", "readme", "check"):
        one = tasks.add_parser(task)
        if task not in ("readme", "check", "try"):
            part = "a part of a path: llm, or 02_cnn"
            one.add_argument("--only", nargs="+", metavar="LESSON", help=part)
        if task in ("list", "run", "try"):
            one.add_argument("--quick", action="store_true", help="smoke runs, under models/quick/")
        if task == "run":
            one.add_argument("--from", dest="start", metavar="LESSON", help="begin there")
            one.add_argument("--keep-going", action="store_true", help="also after a failure")
            one.add_argument("--verbose", action="store_true", help="show what lessons print")
        if task == "try":
            one.add_argument("lesson", help="a part of a lesson's path, such as 06_training")
            one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
            one.epilog = "What stands behind -- are flags of the lesson's own."
    words = [*sys.argv[1:], "--"]
    dashes = words.index("--")
    command = cli.parse_args(words[:dashes])
    command.flags = words[dashes + 1 : -1]
    if command.flags and command.task != "try":
        cli.error("only try hands on the flags behind --")
    return command


def main():
    command, lessons = read_command(), find_lessons()
    if command.task == "try":
        chosen = choose(lessons, [command.lesson])
        if len(chosen) > 1:
            sys.exit(f"Which one: {', '.join(name_of(lesson) for lesson in chosen)}?")
        try_lesson(chosen[0], command.set, command.quick, command.flags)
        return
    if command.task == "readme":
        write_documents()
        return
    if command.task == "check":
        if untruths := find_untruths():
            sys.exit("\n".join(untruths))
        print("Every document says what the records say, and every promise is kept.")
        return
    lessons = choose(lessons, command.only, getattr(command, "start", None))
    if command.task == "list":
        show_list(lessons, command.quick)
    elif command.task == "run":
        if wrong := run_course(lessons, command.quick, command.keep_going, command.verbose):
            sys.exit("\n".join(wrong))
        print("Done: every lesson ran." if command.quick else "Done: every promise is kept.")
    else:
        {"record": record, "seeds": record_seeds, "predict": predict}[command.task](lessons)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on where this one was.")
    except BrokenPipeError:  # whoever read on, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
