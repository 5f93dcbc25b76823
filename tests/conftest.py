"""What all tests share: the lessons, a copy of the course to run them in, and no network."""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("smoke")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from course import find_lessons
from get_data import find_source

LESSONS = find_lessons()
REAL_DATA = find_source(ROOT / "data" / "MNIST", "MNIST") == "MNIST"
OFFLINE = {  # a proxy that nobody answers: a download fails at once, on every machine
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "HF_HUB_OFFLINE": "1",
}


def pytest_configure(config):
    os.environ.update(OFFLINE)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as behind "&": tests press Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # they share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // workers))


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process waits for one at the end."""
    first = {"test_smoke": 0, "test_smoke_llm": 1, "test_drawing": 2}
    items.sort(key=lambda item: first.get(item.path.stem, 3))


@pytest.fixture(scope="session")
def course(tmp_path_factory):
    """A copy of the lessons, with the data if they are here, in a path with blanks and umlauts."""
    return copy_course(tmp_path_factory.mktemp("Kurs für alle"), with_data=True)


def copy_course(folder, with_data):
    """Copy what a lesson needs to run: src/, the data script, and links to the images in data/."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "get_data.py", folder / "scripts")
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / "qa.jsonl", folder / "data")
    for name in ("MNIST", "FashionMNIST"):
        if with_data and (ROOT / "data" / name / "SOURCE").exists():
            (folder / "data" / name).symlink_to(ROOT / "data" / name)
    return folder


def run(course, lesson, *flags, **options):
    """Run a lesson of a copied course as a learner does, but from another working directory."""
    command = [sys.executable, "-W", "error::DeprecationWarning", "-W", "error::FutureWarning"]
    theirs = ["Importing", "invalid escape sequence"]  # torchao 0.16, within transformers
    theirs += ["'future.no_silent_downcasting", "The copy keyword"]  # pandas 3, within gradio
    for message in theirs:
        command += ["-W", f"ignore:{message}:DeprecationWarning"]
    path = course / "src" / f"{lesson}.py"
    return subprocess.run(
        [*command, path, *flags], check=False, capture_output=True, text=True, cwd="/", **options
    )


@contextlib.contextmanager
def served(lesson, model):
    """Give a lesson that talks to Ollama the stand-in, with the model of a folder as smollm2."""
    if "running Ollama" not in lesson.card["Needs"]:
        yield None
        return
    command = [sys.executable, ROOT / "tests" / "ollama_stand_in.py", "--model", model]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet) as server:
        try:
            yield {**os.environ, "OLLAMA_HOST": server.stdout.readline().strip()}
        finally:
            server.terminate()


def obey_permissions():
    """As a preexec_fn: root gives up its right to write where permissions forbid it."""
    if os.geteuid() == 0:
        drop_from_bounding_set = 24
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            ctypes.CDLL(None).prctl(drop_from_bounding_set, capability, 0, 0, 0)


def load_lesson(name, root=ROOT):
    """Import a lesson as a module; its ROOT is the folder that it lies in."""
    path = root / "src" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
