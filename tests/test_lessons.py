"""Every lesson once, quickly, by the command that a learner types; then everything that can go wrong."""

import gzip
import hashlib
import http.server
import re
import resource
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from itertools import groupby

import pytest
import records
import run_course
import torch
from conftest import LESSONS, REAL_DATA, ROOT, copy_course, load_lesson, run

NAMES = [records.name_of(lesson) for lesson in LESSONS]
DEVICE_SHOWS = {  # in other words than numbers, so that only runs on a like machine compare
    "basics/01_verify_gpu",
    "basics/02_tensors",
    "basics/05_first_nn",
    "intermediate/05_gpu_training",
    "advanced/05_memory_management",
    "advanced/08_multi_gpu",
    "advanced/02_model_optimization",
    "advanced/04_gpu_vs_cpu_benchmark",
    "advanced/06_inference_comparison",
    "advanced/11_inference_engines",
    "advanced/16_faster_or_not",
    "advanced/17_where_a_gpu_pays",
    "advanced/18_export",
    "advanced/19_latency_and_memory",
}


MASKS = {  # what may differ between two runs of a lesson
    r"models/quick/": "models/",
    r".* (stand in|downloading it)\n": "",
    r"-stand-in": "",  # a real Ollama has a plain version
    r"(?m)^(A|  PyTorch|  Ollama): .*(\n   .*)*": r"\1: TEXT",
    r"data = .+": "data = DATA",
    r"(?m)^(eager|TF32|\w+ autocast|channels_last|torch\.compile|TorchScript|AOTInductor"
    r"|CUDA graphs|ONNX Runtime|TensorRT|int8 torch\S+|compile time in)[^|\n]*\|.*": "ROW",
    r"\): (faster|slower|no difference)": "): VERDICT",
    r": (faster from batch \d+ on|not faster to the end)": ": CROSSING",
    r"Cannot load gpt2: .*\n": "",
    r"(Sample|Temperature [\d.]+|Top-p [\d.]+|Greedy|Next|Before|After): .*": r"\1: TEXT",
    r"(validation loss [\d.]+) \| .*": r"\1 | TEXT",
    r"no difference|dropout (helps|hurts)|\b(faster|slower|better|worse|undecided)\b": "VERDICT",
    r"aten::\w+": "aten::OPERATION",
    r"is near .*": "is near WORDS",
    r", device='[\w:]+'": "",
    r"\b(cuda|mps|cpu|meta)\b(:\d)?": "DEVICE",
    r"[-+]?\d[\d.,]*": "#",
    r" +": " ",
}


OTHER_TORCH = {r"\w+Backward\d": "BACKWARD"}  # what may differ besides between its versions


def masked(output, masks=MASKS):
    """The words of an output without its numbers; lines that become equal in a row count once."""
    for pattern, replacement in masks.items():
        output = re.sub(pattern, replacement, output)
    return [line for line, _ in groupby(line.strip() for line in output.splitlines())]


# SMOKE: in the order of the course, each on what the ones before it have saved.
@pytest.mark.parametrize("name", NAMES)
def test_quick_run_prints_the_recorded_words(course, name):
    lesson = ROOT / "src" / f"{name}.py"
    with run_course.served(lesson, course / "models" / "quick" / "gpt2_mini") as environment:
        quick = run(course, name, "--quick", env=environment)
    assert quick.returncode == 0, quick.stderr
    card, on_gpu = records.read_card(lesson), records.describe_gpu() != "no GPU"
    machine, capture = records.read_capture(name, on_gpu=on_gpu)
    for file in records.files_in(card["Makes"]):
        assert (course / file.replace("models/", "models/quick/")).stat().st_size > 0
        assert not (course / file).exists(), "a quick run must not replace what a full run made"
    promised = {promise.split()[0] for promise in card["Expect"].split(", ")}
    assert promised <= set(records.read_result(quick.stdout))
    if name not in DEVICE_SHOWS or records.describe_gpu() in machine:
        same = f"torch {torch.__version__}," in machine
        masks = MASKS if same else OTHER_TORCH | MASKS
        assert masked(quick.stdout, masks) == masked(capture, masks)


def test_masking_hides_numbers_but_no_words():
    assert masked("Loss: 0.41\nLoss: 0.32\n") == masked("Loss: 7\n")
    assert masked("Loss: 0.41\n") != masked("Error: 0.41\n")


@pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")
def test_full_cnn_keeps_its_promise_on_real_digits(tmp_path):
    course = copy_course(tmp_path, with_data=True)
    full = run(course, "intermediate/02_cnn")
    card = records.read_card(ROOT / "src" / "intermediate" / "02_cnn.py")
    assert records.broken_promises(card["Expect"], full.stdout) == [], full.stderr
    assert records.read_result(full.stdout)["test_accuracy"] < 99.5, "too good to be true"


# FLAGS: a mistyped one ends with exit code 2 and the right ones, before any work is done.
@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_flag_exits_2(monkeypatch, capsys, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quik"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "src" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "--quick" in capsys.readouterr().err


# FULL: the lessons that take seconds keep their promise here and now.
SECONDS = ["basics/06_training", "basics/07_activations", "basics/08_classifier"]


@pytest.mark.parametrize("name", [*SECONDS, "intermediate/01_save_load"])
def test_a_full_run_keeps_its_promise(name, tmp_path, capsys):
    lesson = load_lesson(name)
    lesson.ROOT = tmp_path
    lesson.main()
    card = records.read_card(ROOT / "src" / f"{name}.py")
    assert records.broken_promises(card["Expect"], capsys.readouterr().out) == []


# CHECKPOINTS: whatever is wrong with one, a sentence says so and names the command that makes it.
class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def spoiled_checkpoint(kind, path):
    model = load_lesson("intermediate/01_save_load").SimpleNet()
    if kind == "missing":
        return
    if kind == "a folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not a checkpoint")
    elif kind == "another network's":
        torch.save(load_lesson("intermediate/02_cnn").CNN().state_dict(), path)
    elif kind == "other shapes":
        torch.save({name: tensor[:1] for name, tensor in model.state_dict().items()}, path)
    elif kind == "a whole module":
        torch.save(torch.nn.Linear(1, 8), path)
    elif kind == "a number":
        torch.save(42, path)
    elif kind == "malicious":
        torch.save({"layer1.weight": RunsCode(path.with_suffix(".proof"))}, path)
    else:
        torch.save(model.state_dict(), path)
        path.write_bytes(path.read_bytes()[: int(kind.removeprefix("cut at "))])


KINDS = [
    "missing",
    "a folder",
    "empty",
    "text",
    "another network's",
    "other shapes",
    "a whole module",
]
KINDS += ["a number", "malicious", "cut at 1", "cut at 100", "cut at 1000", "cut at 2000"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_checkpoint_ends_with_a_sentence(tmp_path, kind):
    lesson, path = load_lesson("intermediate/01_save_load"), tmp_path / "spoiled.pth"
    spoiled_checkpoint(kind, path)
    with pytest.raises(SystemExit) as stop:
        lesson.main(quick=True, file=path)
    sentence = stop.value.code
    assert str(path) in sentence
    assert "uv run src/intermediate/01_save_load.py --quick" in sentence
    assert "\n" not in sentence
    assert not path.with_suffix(".proof").exists(), "code from the file was run"


def test_a_spoiled_checkpoint_exits_1_without_a_traceback(course, tmp_path):
    path = tmp_path / "spoiled.pth"
    spoiled_checkpoint("another network's", path)
    spoiled = run(course, "intermediate/01_save_load", "--load", path)
    assert spoiled.returncode == 1
    assert len(spoiled.stderr.strip().splitlines()) == 1
    assert "not this network's" in spoiled.stderr


def test_a_good_checkpoint_loads_by_flag(course, tmp_path):
    path = tmp_path / "good.pth"
    model = load_lesson("intermediate/01_save_load").SimpleNet()
    torch.save(model.state_dict(), path)
    loaded = run(course, "intermediate/01_save_load", "--load", path)
    expected = model(torch.tensor([[10.0]])).item()
    assert f"x = 10: predicted {expected:.2f}" in loaded.stdout


# SAVING: a full disk, a folder that cannot be written, Ctrl-C and kill -9 leave the old file whole.
def refused(name):
    """Make the fault in a copied course's models/quick; return what a run needs to meet it."""

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # as if the disk were full then

    return {"full disk": {"preexec_fn": limit_file_size}, "unwritable": {}}[name]


@pytest.mark.skipif(sys.platform != "linux", reason="uses /proc as a folder that nobody can write")
@pytest.mark.parametrize("fault", ["full disk", "unwritable"])
def test_a_failed_save_keeps_the_old_file(tmp_path, fault):
    course = copy_course(tmp_path, with_data=False)
    if fault == "unwritable":
        (course / "models").symlink_to("/proc")
    else:
        (course / "models" / "quick").mkdir(parents=True)
        (course / "models" / "quick" / "simplenet.pth").write_bytes(b"the old one")
    failed = run(course, "intermediate/01_save_load", "--quick", **refused(fault))
    assert failed.returncode == 1
    assert "Cannot write" in failed.stderr
    assert "Traceback" not in failed.stderr
    if fault == "full disk":
        left = [path.name for path in (course / "models" / "quick").iterdir()]
        assert left == ["simplenet.pth"]
        assert (course / "models" / "quick" / "simplenet.pth").read_bytes() == b"the old one"


def test_ctrl_c_ends_with_one_line_and_keeps_the_old_file(tmp_path):
    course = copy_course(tmp_path, with_data=True)
    old = course / "models" / "mnist_cnn.pth"
    old.parent.mkdir()
    old.write_bytes(b"the old one")
    command = [sys.executable, "-u", course / "src" / "intermediate" / "02_cnn.py"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as lesson:
        assert any(line.startswith("Epoch 1") for line in lesson.stdout), "it trains"
        lesson.send_signal(signal.SIGINT)
        _, errors = lesson.communicate(timeout=60)
    assert lesson.returncode == 1
    assert errors.strip().splitlines()[-1].startswith("Stopped")
    assert "Traceback" not in errors
    assert old.read_bytes() == b"the old one"


SAVE_FOR_EVER = """
import importlib.util, pathlib, sys, torch
spec = importlib.util.spec_from_file_location("lesson", sys.argv[1])
lesson = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson)
lesson.ROOT = pathlib.Path(sys.argv[2])
state = {"weights": torch.zeros(1_000_000)}
while True:
    lesson.save(lambda file: torch.save(state, file), lesson.ROOT / "kept.pth")
"""


def test_kill_9_never_leaves_half_a_checkpoint(tmp_path):
    lesson = ROOT / "src" / "intermediate" / "01_save_load.py"
    for delay in (0.05, 0.11, 0.17):
        command = [sys.executable, "-u", "-c", SAVE_FOR_EVER, lesson, tmp_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
            assert "Saved" in saver.stdout.readline()
            time.sleep(delay)
            saver.kill()
        assert torch.load(tmp_path / "kept.pth", weights_only=True)["weights"].shape == (1_000_000,)


def test_two_copies_at_once_do_not_disturb_each_other(tmp_path):
    course = copy_course(tmp_path, with_data=False)
    command = [sys.executable, course / "src" / "intermediate" / "01_save_load.py", "--quick"]
    pair = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for lesson in pair:
        _, errors = lesson.communicate(timeout=120)
        assert lesson.returncode == 0, errors
    assert [path.name for path in (course / "models" / "quick").iterdir()] == ["simplenet.pth"]


# DATA: a network that is slow, broken or absent neither stops a lesson nor leaves a broken file.
def idx_bytes(array):
    header = struct.pack(">HBB", 0, 8, array.dim()) + struct.pack(f">{array.dim()}I", *array.shape)
    return header + array.numpy().tobytes()


@pytest.fixture
def server(monkeypatch):
    """Serve a tiny MNIST in the place of the real one; server.fault says how badly."""
    from torchvision.datasets import MNIST

    files, resources = {}, []
    for part, count in (("train", 20), ("t10k", 10)):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{part}-{kind}-ubyte.gz"
            files[name] = gzip.compress(idx_bytes(array))
            resources.append((name, hashlib.md5(files[name]).hexdigest()))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files[self.path.strip("/")]
            if self.server.fault == "silent":
                time.sleep(3)
                return
            self.send_response(500 if self.server.fault == "error" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.server.fault == "broken off":
                content = content[: len(content) // 2]
            if self.server.fault == "altered":
                content = bytes(len(content))
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.fault = None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        patient = socket.setdefaulttimeout
        monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patient(seconds / 20))
        yield server
        server.shutdown()
        patient(None)


@pytest.fixture
def mnist(tmp_path):
    lesson = load_lesson("basics/09_mnist")
    lesson.ROOT = tmp_path
    return lesson


def test_a_download_is_kept_and_read(mnist, server, tmp_path):
    train, test, source = mnist.load_images("MNIST")
    assert source == "MNIST"
    assert train[0].shape == (20, 1, 28, 28)
    assert test[1].tolist() == list(range(10))
    assert 0 <= train[0].min() <= train[0].max() <= 1
    server.fault = "error"  # the second time nothing is downloaded
    assert torch.equal(mnist.load_images("MNIST")[0][0], train[0])
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["MNIST"]


@pytest.mark.parametrize("fault", ["silent", "error", "broken off", "altered"])
def test_a_bad_download_leaves_nothing_and_can_be_repeated(mnist, server, tmp_path, capsys, fault):
    server.fault, start = fault, time.monotonic()
    train, test, source = mnist.load_images("MNIST")
    assert time.monotonic() - start < 20
    assert source == "scikit-learn digits"
    assert "stand in" in capsys.readouterr().out
    assert train[0].shape[1:] == test[0].shape[1:] == (1, 28, 28)
    assert list((tmp_path / "data" / "MNIST" / "raw").iterdir()) == []
    server.fault = None
    assert mnist.load_images("MNIST")[2] == "MNIST"


def test_a_damaged_data_file_is_downloaded_anew(mnist, server, tmp_path):
    mnist.load_images("MNIST")
    file = tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    for content in (file.read_bytes()[:-1], b""):
        file.write_bytes(content)
        assert mnist.load_images("MNIST")[2] == "MNIST"
        assert file.stat().st_size == 16 + 20 * 784


def test_without_data_and_network_the_stand_in_says_so(tmp_path):
    course = copy_course(tmp_path, with_data=False)
    offline = run(course, "basics/09_mnist", "--quick")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout.count("stand in") == 1
    assert offline.stdout.rstrip().endswith("data = scikit-learn digits")


@pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")
def test_our_reader_agrees_with_torchvision(tmp_path):
    from torchvision.datasets import MNIST

    lesson = load_lesson("basics/09_mnist")
    (train, _), (test, labels) = (lesson.read_images("MNIST", part) for part in ("train", "t10k"))
    theirs = MNIST(ROOT / "data", train=True), MNIST(ROOT / "data", train=False)
    torch.testing.assert_close(train, theirs[0].data[:, None] / 255)
    torch.testing.assert_close(test, theirs[1].data[:, None] / 255)
    assert torch.equal(labels, theirs[1].targets)


# INSTALL: what decides which versions a learner gets.
def test_uv_files_fix_the_versions():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'exclude-newer = "\d{4}-\d\d-\d\dT', project)
    tracked = shutil.which("git") and subprocess.run(
        ["git", "ls-files", "uv.lock"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert not tracked or tracked.stdout == ""
