"""Serving: the client under every fault, a model on its way into one file, and who may listen."""

import ast
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
import torch
from conftest import ROOT, load_lesson
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_stand_in import BLOB, VERSION, Echo, StandIn

REAL = os.environ.get("OLLAMA_HOST")  # a real server, which must have this model:
MODEL = os.environ.get("OLLAMA_TEST_MODEL", "tinyllama")
BOTH = ["llm/08_serve_ollama", "llm/09_your_model_in_ollama"]


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    lesson = load_lesson("llm/08_serve_ollama")
    monkeypatch.setattr(lesson, "TIMEOUT", (1, 0.5))
    return lesson


@pytest.fixture
def server():
    with StandIn({MODEL: Echo()}) as server:
        yield server


@pytest.fixture
def any_server():
    """The URL of the real server if there is one, else of the stand-in."""
    if REAL:
        yield load_lesson("llm/08_serve_ollama").server_url(REAL)
        return
    with StandIn({MODEL: Echo()}) as server:
        yield server.url


def direct():
    session = requests.Session()
    session.trust_env = False  # the tests' proxy is a dead one
    return session


# SHAPES: Ollama's published API (docs/openapi.yaml and api/types.go), field by field. A ? marks what
# it leaves out when it is empty. The stand-in must have no other fields; a newer Ollama may.
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
MESSAGE = {"role": str, "content": str, "thinking?": str}
USAGE = {"prompt_tokens": int, "completion_tokens": int, "total_tokens": int}
CHOICE = {"index": int, "message": {"role": str, "content": str}, "finish_reason": str}
OPENAI = {"id": str, "object": str, "created": int, "model": str, "system_fingerprint": str}
SHAPES = {
    "/api/version": {"version": str},
    "/api/tags": {"models": [LISTED | {"modified_at": str}]},
    "/api/ps": {"models": [LISTED | {"expires_at": str, "size_vram": int, "context_length": int}]},
    "/api/show": {
        "modelfile": str,
        "parameters?": str,
        "template": str,
        "details": DETAILS,
        "model_info": dict,
        "capabilities": list,
        "modified_at": str,
    },
    "/api/generate": {"response": str, "thinking?": str} | ENDS,
    "/api/chat": {"message": MESSAGE} | ENDS,
    "/v1/chat/completions": OPENAI | {"choices": [CHOICE], "usage": USAGE},
}
FEW = {"num_predict": 4, "temperature": 0}
HELLO = [{"role": "user", "content": "Say hello"}]
ASKED = {
    "/api/show": {},
    "/api/generate": {"prompt": "Say hello", "options": FEW},
    "/api/chat": {"messages": HELLO, "options": FEW},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 4},
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
    session = direct()
    session.post(f"{any_server}/api/generate", json={"model": MODEL}).raise_for_status()
    if path not in ASKED:
        parts = [session.get(any_server + path).json()]
    else:
        request = {"model": MODEL, "stream": stream} | ASKED[path]
        answer = session.post(any_server + path, json=request)
        assert answer.status_code == 200, answer.text
        if stream and path.startswith("/v1/"):
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            assert events.pop() == "[DONE]"
            assert all("delta" in json.loads(event)["choices"][0] for event in events)
            return
        parts = [json.loads(line) for line in answer.text.splitlines()]
    for part in parts:
        assert differences(SHAPES[path], part) == []
    if path in ("/api/tags", "/api/ps"):
        assert parts[0]["models"], "an empty list would have any shape"
    if path in ("/api/generate", "/api/chat"):
        assert len(parts) > 1 if stream else len(parts) == 1, "streaming is asked for, or not"
        assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
        assert parts[-1]["eval_count"] > 0
        assert parts[-1]["done_reason"] in ("stop", "length")


def test_differences_are_found():
    shape = {"a": int, "b?": [{"c": str}]}
    assert differences(shape, {"a": 1}) == []
    assert differences(shape, {"a": True}) == [".a is True"]
    assert differences(shape, {"a": 1, "b": [{"c": 2}]}) == [".b?[].c is 2"]
    assert differences(shape, {}) == [".a is missing"]


@pytest.mark.parametrize(
    ("path", "request_", "status", "words"),
    [
        ("/api/generate", {"model": "no-such-model", "prompt": "x"}, 404, "not found"),
        ("/api/chat", {"model": "no-such-model", "messages": HELLO}, 404, "not found"),
        ("/api/chat", {"model": "", "messages": HELLO}, 400, "model is required"),
        ("/api/show", {"model": "no-such-model"}, 404, "not found"),
        ("/api/create", {"model": "nothing-to-make-it-of"}, 400, "neither 'from' or 'files'"),
        ("/v1/chat/completions", {"model": "no-such-model", "messages": HELLO}, 404, "not found"),
    ],
)
def test_refusals_have_ollamas_shapes(any_server, path, request_, status, words):
    answer = direct().post(any_server + path, json=request_ | {"stream": False})
    error = answer.json()["error"]
    error = error["message"] if path.startswith("/v1/") else error
    assert answer.status_code == status
    assert words in error


def test_an_unknown_pull_fails_only_after_it_has_begun(any_server):
    answer = direct().post(f"{any_server}/api/pull", json={"model": "no-such-model/at-all"})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert answer.status_code == 200
    assert lines[0] == {"status": "pulling manifest"}
    assert "error" in lines[-1]


def test_a_pull_reports_its_progress(server):
    server.library["phi:latest"] = Echo()
    answer = direct().post(f"{server.url}/api/pull", json={"model": "phi"})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    shape = {"status": str, "digest?": str, "total?": int, "completed?": int}
    assert [differences(shape, line) for line in lines] == [[]] * len(lines)
    assert lines[-1] == {"status": "success"}
    assert "phi:latest" in server.models


def test_only_a_blob_with_the_right_digest_is_taken(any_server):
    data = b"GGUF of a kind"
    digest = hashlib.sha256(data + os.urandom(0)).hexdigest()
    wrong = f"{any_server}/api/blobs/sha256:{hashlib.sha256(b'other').hexdigest()}"
    assert direct().head(f"{any_server}/api/blobs/sha256:{'0' * 64}").status_code == 404
    assert direct().post(wrong, data=data).status_code == 400
    if not REAL:  # the real one would keep it
        assert direct().post(f"{any_server}/api/blobs/sha256:{digest}", data=data).ok
        assert direct().head(f"{any_server}/api/blobs/sha256:{digest}").status_code == 200
        assert not BLOB.fullmatch("/api/blobs/sha256:../../etc/passwd")


# THE CLIENT, when all is well.
def test_the_whole_lesson(any_server, serve, monkeypatch, capsys):
    monkeypatch.setattr(serve, "TIMEOUT", (5, 300))
    serve.main(quick=True, url=any_server, model=MODEL)
    output = capsys.readouterr().out
    assert "messages = 6" in output.splitlines()[-1]
    assert output.count("\n[") == 4, "each streamed answer has its counters"


def test_the_stand_in_says_what_it_is(server, serve, capsys):
    serve.main(quick=True, url=server.url)
    assert VERSION == "0.0.0-stand-in"
    assert capsys.readouterr().out.splitlines()[0] == f"Server: Ollama {VERSION} at {server.url}"


def test_the_client_keeps_the_history_and_one_connection(server, serve):
    serve.main(url=server.url)
    chats = [json.loads(body) for _, path, body in server.requests if path == "/api/chat"]
    assert [len(chat["messages"]) for chat in chats] == [1, 3, 5]
    assert [message["role"] for message in chats[2]["messages"]] == ["user", "assistant"] * 2 + [
        "user"
    ]
    assert chats[2]["messages"][:3] == chats[1]["messages"]
    assert server.connections == 1


def test_tokens_are_shown_as_they_arrive(server, serve, monkeypatch):
    gate, shown = threading.Event(), []

    def answer(prompt, options):
        yield "first"
        assert gate.wait(5), "the client waits for the second token before it shows the first"
        yield " second"

    monkeypatch.setattr(server.models[f"{MODEL}:latest"].model, "answer", answer)
    monkeypatch.setattr(serve, "TIMEOUT", (5, 10))

    class Screen(io.StringIO):
        def write(self, text):
            shown.append(text)
            if "first" in text:
                gate.set()
            return len(text)

    with contextlib.redirect_stdout(Screen()):
        serve.main(url=server.url, prompt="Go")
    assert "".join(shown).count("first second") == 1


def test_thoughts_are_shown_apart_and_not_sent_back(server, serve, capsys):
    server.models[f"{MODEL}:latest"].model.thinking = "hmm let me see"
    serve.main(url=server.url)
    output = capsys.readouterr().out
    assert "Thinking: hmm let me see\nA: You said:" in output
    chats = [body.decode() for _, path, body in server.requests if path == "/api/chat"]
    assert "hmm" not in chats[-1]


def test_a_cut_prompt_is_noticed(server, serve, capsys):
    model = server.models[f"{MODEL}:latest"].model
    serve.main(url=server.url, prompt="one two three four five six seven eight")
    assert "cut" not in capsys.readouterr().out
    model.context = 6
    serve.main(url=server.url, prompt="one two three four five six seven eight")
    assert "cut the prompt: of 8 tokens or more it has read 3." in capsys.readouterr().out


def test_a_conversation_that_shrinks_was_cut(serve, capsys):
    parts = [("", "yes", [40, 1, 1])]
    assert serve.show(parts, "few words", known=50) == ("yes", 40)
    assert "of 50 tokens or more it has read 40" in capsys.readouterr().out


def test_counters_may_be_missing(server, serve, capsys):
    server.fault = "no counters"
    serve.main(url=server.url, prompt="one two three")
    output = capsys.readouterr().out
    assert "[0 tokens read, 0 written, 0.0 tokens/s]" in output
    assert "cut" not in output


def test_a_conversation_at_the_keyboard(server, serve, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n  Who are you?\n"))
    serve.main(url=server.url, interactive=True)
    chats = [json.loads(body) for _, path, body in server.requests if path == "/api/chat"]
    assert [chat["messages"][-1]["content"] for chat in chats] == ["Hello", "Who are you?"]
    assert "messages = 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("127.0.0.1:1234", "http://127.0.0.1:1234"),
        (":1234", "http://127.0.0.1:1234"),
        ("localhost", "http://localhost:11434"),
        ("example.com:80", "http://example.com:80"),
        ("http://example.com", "http://example.com:80"),
        ("https://example.com/", "https://example.com:443"),
        ("https://example.com:1234", "https://example.com:1234"),
        ("[::1]:1234", "http://[::1]:1234"),
        (' "0.0.0.0" ', "http://0.0.0.0:11434"),
    ],
)
def test_addresses_are_read_as_the_ollama_command_reads_them(serve, address, url):
    assert serve.server_url(address) == url


@pytest.mark.parametrize("address", ["ftp://x", "http://a b", "x:port", "a@b:c@d", "file:///etc"])
def test_what_is_no_address_is_refused(serve, address):
    with pytest.raises(SystemExit, match="is no server's address"):
        serve.main(url=address)


# FAULTS: each ends with one sentence and exit code 1, and keeps what had arrived.
FAULTS = {
    "not Ollama": "is no Ollama server",
    "another API": "is no Ollama server",
    "a list": "is no Ollama server",
    "redirect": "is no Ollama server",
    "502 page": "is no Ollama server: its status is 502",
    "400": "The server refuses the request: the prompt is longer than the context",
    "500": "failed with status 500: llama runner has terminated",
    "503": "failed with status 503: server busy",
    "hangs": "was silent for",
    "hangs up": "No server answers at",
}
MIDWAY = {
    "error line": "stopped with an error: an error was encountered",
    "cut off": "broke off",
    "no end": "ended without its last line",
    "hangs midway": "fell silent",
    "malformed": "cannot be read",
    "not an object": "cannot be read",
    "not UTF-8": "cannot be read",
    "wrong types": "cannot be read",
}


def sentence(stop):
    assert isinstance(stop.value.code, str), "exit code 1 and a sentence"
    assert len(stop.value.code.strip().splitlines()) == 1
    return stop.value.code


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_server_ends_with_a_sentence(server, serve, fault):
    server.fault = fault
    with pytest.raises(SystemExit) as stop:
        serve.main(url=server.url)
    assert FAULTS[fault] in sentence(stop)


@pytest.mark.parametrize("fault", [*FAULTS, *MIDWAY])
@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_a_server_that_breaks_later_ends_with_a_sentence(server, serve, capsys, fault, path):
    client = serve.Ollama(server.url)
    messages = [{"role": "user", "content": "one two three four five"}]
    serve.chat(client, messages, MODEL, -1)
    assert "You said: one two three four five" in capsys.readouterr().out
    server.fault = fault
    with pytest.raises(SystemExit) as stop:
        if path == "/api/chat":
            serve.chat(client, messages, MODEL, -1)
        else:
            serve.generate(client, messages[0]["content"], MODEL, -1)
    assert (FAULTS | MIDWAY)[fault] in sentence(stop)
    if fault in MIDWAY:
        assert "You said: one" in capsys.readouterr().out, "what had arrived is kept"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_openai_form_breaks_with_a_sentence_too(server, serve, fault):
    server.fault = fault
    with pytest.raises(SystemExit) as stop:
        serve.ask_like_openai(serve.Ollama(server.url), "x", MODEL, 4)
    assert FAULTS[fault] in sentence(stop)


def test_where_nothing_listens_the_script_that_starts_it_is_named(serve, server):
    server.shutdown()
    server.socket.close()
    with pytest.raises(SystemExit, match=r"No server answers at .*scripts/ollama\.sh start"):
        serve.main(url=server.url)


def test_an_unknown_model_names_the_command_and_what_is_there(serve, server):
    with pytest.raises(SystemExit) as stop:
        serve.main(url=server.url, model="llama3:70b; rm -rf /")
    assert "scripts/ollama.sh pull 'llama3:70b; rm -rf /'" in sentence(stop)
    assert f"(the server has: {MODEL}:latest)" in sentence(stop)


def test_a_cold_model_is_waited_for(serve, server, monkeypatch, capsys):
    monkeypatch.setattr(serve, "TIMEOUT", (0.2, 5))
    server.models[f"{MODEL}:latest"].model.load_seconds = 1
    serve.main(url=server.url, prompt="x")
    assert f"Loading {MODEL}" in capsys.readouterr().out
    assert load_lesson("llm/08_serve_ollama").TIMEOUT == (5, 300)


def test_the_commands_exit_code_is_1_and_there_is_no_traceback(server):
    command = [sys.executable, ROOT / "src" / "llm" / "08_serve_ollama.py", "--url", server.url]
    server.fault = "malformed"
    run = subprocess.run(
        [*command, "--prompt", "a b c d e f"], check=False, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.strip().splitlines() == [
        "The server sent a line that cannot be read; what came before it is above."
    ]
    assert "You said: a" in run.stdout


def test_ctrl_c_ends_with_one_line(server, monkeypatch):
    monkeypatch.setattr(
        server.models[f"{MODEL}:latest"].model,
        "answer",
        lambda prompt, options: (time.sleep(n / 10) or f"token{n} " for n in range(100)),
    )
    command = [sys.executable, "-u", ROOT / "src" / "llm" / "08_serve_ollama.py"]
    with subprocess.Popen(
        [*command, "--url", server.url, "--prompt", "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as lesson:
        shown = ""
        while "token1" not in shown:
            assert (letter := lesson.stdout.read(1)), lesson.stderr.read()
            shown += letter
        lesson.send_signal(signal.SIGINT)
        _, errors = lesson.communicate(timeout=20)
    assert lesson.returncode == 1
    assert errors.strip() == "Stopped; the server goes on: scripts/ollama.sh stop"


class Canned:
    """A response of given bytes."""

    status_code = 200

    def __init__(self, content):
        self.content = content

    def iter_lines(self):
        return iter(self.content.splitlines())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["message", "content", "response", "done", "error", "models", "version"]
            )
            | st.sampled_from(["eval_count", "eval_duration", "thinking", "name", "size"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(anything.map(lambda value: json.dumps(value).encode()) | st.binary(), max_size=4))
def test_no_bytes_that_a_server_sends_cause_a_traceback(lines):
    serve = load_fuzzed()
    client = serve.Ollama("http://127.0.0.1:1")
    client.send = lambda path, content=None: Canned(b"\n".join(lines))
    calls = [
        lambda: serve.generate(client, "x", MODEL, 4),
        lambda: serve.ask_like_openai(client, "x", MODEL, 4),
        client.list_models,
    ]
    for call in calls:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            call()


def load_fuzzed(cache=[]):  # noqa: B006
    if not cache:
        cache.append(load_lesson("llm/08_serve_ollama"))
    return cache[0]


# MANY AT ONCE, AND HOW FAST
def test_a_hundred_chats_at_once_lose_and_mix_up_nothing(server, serve, monkeypatch):
    monkeypatch.setattr(serve, "TIMEOUT", (10, 60))
    histories = {}

    def talk(number):
        client = serve.Ollama(server.url)
        questions = [f"chat {number} turn {turn}" for turn in range(3)]
        histories[number] = serve.converse(client, questions, MODEL, -1)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(100)]
    with contextlib.redirect_stdout(io.StringIO()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(histories) == 100, "none is lost"
    for number, history in histories.items():
        answers = [message["content"] for message in history if message["role"] == "assistant"]
        assert len(answers) == 3
        for turn, answer in enumerate(answers):
            assert f"chat {number} turn {turn}" in answer
            assert set(re.findall(r"chat (\d+)", answer)) == {str(number)}, "none is mixed up"


def test_the_client_adds_at_most_two_milliseconds_to_a_token(server, serve, monkeypatch):
    seen = []

    class Screen(io.StringIO):
        def write(self, text):
            if re.search(r"token\d", text):
                seen.append(time.perf_counter())
            return len(text)

    def answer(prompt, options):
        for number in range(300):
            time.sleep(0.003)  # a quick model; so that no token waits for the one before
            yield f" token{number}"

    monkeypatch.setattr(server.models[f"{MODEL}:latest"].model, "answer", answer)
    client = serve.Ollama(server.url)
    with contextlib.redirect_stdout(Screen()):
        server.sent.clear()
        serve.generate(client, "x", MODEL, -1)
    overheads = [after - before for before, after in zip(server.sent, seen, strict=False)]
    assert len(overheads) == 300
    assert statistics.median(overheads) <= 0.002
