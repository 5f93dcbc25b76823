"""Serving: the client under every fault, a model on its way into one file, and who may listen."""

import ast
import contextlib
import copy
import hashlib
import io
import json
import os
import random
import re
import shlex
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
import run_course
import torch
from conftest import ROOT, load_lesson
from hypothesis import given, settings
from hypothesis import strategies as st
from ollama_stand_in import BLOB, VERSION, Echo, Gpt2, StandIn

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
    assert serve.show_answer(parts, "few words", known=50) == ("yes", 40)
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
LINES = {  # where lines are expected, in the place of one object
    "not Ollama": "cannot be read",
    "another API": "ended without its last line",
    "a list": "cannot be read",
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
    assert (FAULTS | MIDWAY | LINES)[fault] in sentence(stop)
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
            letter = lesson.stdout.read(1)
            assert letter, lesson.stderr.read()
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


@settings(max_examples=100, deadline=None, derandomize=True)
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
    def answer(prompt, options):
        for number in range(150):
            time.sleep(0.002)  # so that no token waits for the one before it
            yield f" token{number}"

    class Screen(io.StringIO):
        def write(self, text):
            if re.search(r"token\d", text):
                seen.append(time.perf_counter())
            return len(text)

    monkeypatch.setattr(server.models[f"{MODEL}:latest"].model, "answer", answer)
    client, medians = serve.Ollama(server.url), []
    while len(medians) < 5 and min(medians, default=1) > 0.002:  # a busy machine only ever adds
        seen = []
        server.sent.clear()
        with contextlib.redirect_stdout(Screen()):
            serve.generate(client, "x", MODEL, -1)
        sent = server.sent[: len(seen)]
        assert len(seen) == 150
        medians.append(statistics.median(b - a for a, b in zip(sent, seen, strict=True)))
    assert min(medians) <= 0.002


# ONE FILE: a small GPT-2 with its own tokenizer, and an adapter, as lessons 05 and 07 leave them.
END = "<|endoftext|>"
QUESTIONS = ["What is a tensor?", "What's $(touch pwned) `id`?", "Was ist ein Überläufer?"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder as the course's: models/gpt2_mini, models/gpt2_lora and data/qa.jsonl."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    root = tmp_path_factory.mktemp("Kurs für alle")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(ROOT / "data" / "qa.jsonl")], trainer)
    torch.manual_seed(0)
    size = {"vocab_size": tokenizer.get_vocab_size(), "n_positions": 256, "n_embd": 64}
    config = GPT2Config(**size, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # livelier than a new model, and no zeros in it
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() == 2 else 0.05))
    model.save_pretrained(root / "models" / "gpt2_mini")
    fast = GPT2Tokenizer(tokenizer_object=tokenizer, bos_token=END, eos_token=END)
    fast.save_pretrained(root / "models" / "gpt2_mini")
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules=["c_attn"], fan_in_fan_out=True)
    tuned = get_peft_model(model, adapter)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)  # a new adapter changes nothing
    tuned.peft_config["default"].base_model_name_or_path = "models/gpt2_mini"
    tuned.save_pretrained(root / "models" / "gpt2_lora")
    (root / "data").mkdir()
    rows = [{"question": question, "answer": "?", "held_out": True} for question in QUESTIONS]
    rows.append({"question": "seen in training", "answer": "?", "held_out": False})
    lines = "\n".join(map(json.dumps, rows))
    (root / "data" / "qa.jsonl").write_text(lines + "\n", encoding="utf-8")
    return root


@pytest.fixture
def own(project, monkeypatch):
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    lesson = load_lesson("llm/09_your_model_in_ollama")
    monkeypatch.setattr(lesson, "ROOT", project)
    monkeypatch.setattr(lesson, "LENGTH", 20)
    return lesson


@pytest.fixture(scope="module")
def written(project):
    """The tuned model and its file, as (model, tokenizer, path)."""
    lesson = load_lesson("llm/09_your_model_in_ollama")
    lesson.ROOT = project
    model, tokenizer = lesson.load_model(project / "models" / "gpt2_lora")
    path = project / "tuned.gguf"
    lesson.write_gguf(path, model, tokenizer, "f32")
    return model, tokenizer, path


def read_back(path):
    """Open a GGUF file with transformers, which knows nothing of the lesson that wrote it."""
    reader = Gpt2(path)
    reader.load()
    return reader.model, reader.tokenizer


def test_the_stand_in_writes_no_bars_between_the_lines_of_the_course(project, capfd, monkeypatch):
    monkeypatch.setattr(run_course, "needs_stand_in", lambda lesson: True)
    with run_course.served("any lesson", project / "models" / "gpt2_mini") as environment:
        body = {"model": "tinyllama", "prompt": "x", "options": {"num_predict": 2}, "stream": False}
        url = f"{environment['OLLAMA_HOST']}/api/generate"
        with requests.Session() as session:
            session.trust_env = False  # no proxy
            assert session.post(url, json=body, timeout=60).json()["done"]
    assert "it/s" not in capfd.readouterr().err


def test_merging_changes_the_model_as_the_adapter_does(project, written):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(project / "models" / "gpt2_mini")
    ids = torch.randint(600, (2, 32))
    with torch.inference_mode():
        before = base(ids).logits
        adapted = PeftModel.from_pretrained(base, project / "models" / "gpt2_lora")(ids).logits
        merged = written[0](ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert (merged - before).abs().max() > 0.1, "the adapter does something"
    assert merged.dtype == torch.float32


def test_every_tensor_is_in_the_file_bit_by_bit(written):
    from gguf import GGMLQuantizationType, GGUFReader

    model, _, path = written
    there = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    state = model.state_dict()
    assert len(there) == len(state)
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
    for theirs, name in ours.items():
        expected = state[theirs].numpy()
        if "c_" in theirs and expected.ndim == 2:
            expected = expected.T
        assert there[name].tensor_type == GGMLQuantizationType.F32
        assert there[name].data.shape == expected.shape
        assert there[name].data.tobytes() == expected.tobytes(), name


def varied_lines():
    """A thousand lines: text, code, digits, blanks, other alphabets, and any characters at all."""
    dice = random.Random(0)
    files = [ROOT / "README.md", *sorted((ROOT / "src").rglob("*.py"))]
    known = [line for file in files for line in file.read_text("utf-8").splitlines() if line]
    lines = dice.sample(known, 500)
    alphabets = ["abcXYZ", "0123456789", " \t\n", ".,;:'!?-_()[]{}<>|/\\", "äößé", "世界", "🙂"]
    for _ in range(500):
        alphabet = "".join(dice.sample(alphabets, 3)) + chr(dice.randrange(0x20, 0xD7FF))
        lines.append("".join(dice.choice(alphabet) for _ in range(dice.randrange(1, 60))))
    return lines


def test_the_file_splits_a_thousand_lines_as_the_tokenizer_does(written):
    _, tokenizer, path = written
    there, lines = read_back(path)[1], varied_lines()
    assert len(lines) == 1000
    assert len(set(lines)) > 900
    for line in lines:
        assert there(line)["input_ids"] == tokenizer(line)["input_ids"], line
    assert there.eos_token_id == tokenizer.eos_token_id == 0


def test_another_reader_gets_the_same_logits(written):
    model, _, path = written
    ids = torch.randint(600, (2, 64))
    with torch.inference_mode():
        assert (model(ids).logits - read_back(path)[0](ids).logits).abs().max() <= 1e-3


ENGINE = """
import {pathToFileURL} from "url";
import fs from "fs";
const [folder, file, input] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(folder + "/dist/index.js"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const {lines, prompt, length} = JSON.parse(fs.readFileSync(input, "utf8"));
const ids = lines.map((line) => model.tokenize(line, true));  // true: with <|endoftext|>
const exact = {flashAttention: false, experimentalKvCacheKeyType: "F32",
    experimentalKvCacheValueType: "F32"};  // by default it attends with 16-bit numbers
const sequence = (await model.createContext({contextSize: 256, ...exact})).getSequence();
const made = [], chances = [];
for (let tokens = model.tokenize(prompt); made.length < length; tokens = [made.at(-1)]) {
    const last = [tokens.at(-1), {generateNext: {token: true, probabilities: true,
        options: {temperature: 0}}}];
    const {next} = (await sequence.controlledEvaluate([...tokens.slice(0, -1), last])).at(-1);
    chances.push([...next.probabilities]);
    made.push(next.token);
}
fs.writeFileSync(input, JSON.stringify({ids, made, chances}));
process.exit(0);
"""


def engine():
    """The folder of node-llama-cpp, a llama.cpp from npm that needs no compiling; skip without."""
    places = [os.environ.get("NODE_LLAMA_CPP"), ROOT / "node_modules" / "node-llama-cpp"]
    for place in filter(None, places):
        if (Path(place) / "dist" / "index.js").exists() and shutil.which("node"):
            return place
    pytest.skip("no node-llama-cpp here: set NODE_LLAMA_CPP=.../node_modules/node-llama-cpp")


class HalfGelu(torch.nn.Module):
    """GELU as llama.cpp has it on a CPU: from a table of 16-bit numbers."""

    def forward(self, x):
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def test_llama_cpp_reads_the_file_and_writes_the_same_tokens(written, tmp_path):
    folder, (model, tokenizer, path) = engine(), written
    lines, prompt, length = varied_lines(), f"Question: {QUESTIONS[0]}\nAnswer:", 20
    (tmp_path / "engine.mjs").write_text(ENGINE)
    exchange = tmp_path / "exchange.json"
    exchange.write_text(json.dumps({"lines": lines, "prompt": prompt, "length": length}))
    command = ["node", tmp_path / "engine.mjs", folder, path, exchange]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    theirs = json.loads(exchange.read_text())
    assert theirs["ids"] == [tokenizer(line)["input_ids"] for line in lines]
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    like_theirs = copy.deepcopy(model)
    for block in like_theirs.transformer.h:
        block.mlp.act = HalfGelu()
    with torch.inference_mode():
        for token, chances in zip(theirs["made"], theirs["chances"], strict=True):
            assert token == int(model(ids).logits[0, -1].argmax()), "the same token as in float32"
            chances = torch.tensor([chance for _, chance in sorted(chances)])
            logs, likely = like_theirs(ids).logits[0, -1].log_softmax(-1), chances > 1e-6
            assert likely.sum() > 100
            assert (chances.log() - logs)[likely].abs().max() <= 1e-3
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


# INTO OLLAMA
def test_ollama_answers_with_the_very_tokens(own, server, project, capsys):
    url = own.server_url(REAL) if REAL else server.url
    own.main(url=url)
    output = capsys.readouterr().out
    result = output.splitlines()[-1]
    assert result.endswith("agreement = 100.00%"), output
    if REAL:
        direct().delete(f"{url}/api/delete", json={"model": "my-gpt2"})
        return
    assert f"server = {VERSION}," in result
    answers = re.findall(r"  (PyTorch|Ollama): +(.*)", output)
    assert len(answers) == 2 * len(QUESTIONS)
    assert len({text for _, text in answers}) == len(QUESTIONS), "different answers, in pairs"
    assert "seen in training" not in output
    for question, (_, text) in zip(QUESTIONS, answers[::2], strict=True):
        options = {"temperature": 0, "num_predict": 20}
        request = {"model": "my-gpt2", "prompt": question, "options": options, "stream": False}
        through = direct().post(f"{url}/api/generate", json=request).json()["response"]
        assert repr(through) == text, "the template makes the same prompt of a bare question"
    show = direct().post(f"{url}/api/show", json={"model": "my-gpt2"}).json()
    modelfile = (project / "models" / "ollama" / "Modelfile").read_text()
    assert f'TEMPLATE """{show["template"]}"""' in modelfile
    stops = [line.removeprefix("PARAMETER ") for line in modelfile.splitlines() if "stop" in line]
    assert show["parameters"].splitlines() == stops == [f'stop "{END}"', 'stop "Question:"']
    assert modelfile.startswith("FROM ./my_gpt2.gguf\n")
    assert (project / "models" / "ollama" / "my_gpt2.gguf").exists()


def test_the_chat_template_makes_the_same_prompt(own, written):
    from gguf import GGUFReader
    from jinja2 import Template

    there = GGUFReader(written[2]).fields["tokenizer.chat_template"].contents()
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": " So."}]
    text = Template(there).render(messages=[*messages, {"role": "user", "content": "How?"}])
    assert text == f"Question: Why?\nAnswer: So.{END}Question: How?\nAnswer:"
    assert Template(there).render(messages=messages[:1]) == own.QUESTION.format("Why?")


def test_the_same_file_is_uploaded_once(own, server, written, monkeypatch):
    monkeypatch.setattr(own, "load_model", lambda folder: written[:2])
    own.main(url=server.url)
    own.main(url=server.url)
    posts = [path for method, path, _ in server.requests if method == "POST"]
    assert sum(bool(BLOB.match(path)) for path in posts) == 1
    assert posts.count("/api/create") == 2


def test_a_base_model_goes_the_same_way(own, server, project, capsys):
    own.main(url=server.url, model=project / "models" / "gpt2_mini")
    assert capsys.readouterr().out.splitlines()[-1].endswith("agreement = 100.00%")


def test_eight_bits_save_much_and_change_little(own, server, project, written, monkeypatch, capsys):
    monkeypatch.setattr(own, "load_model", lambda folder: written[:2])
    own.main(url=server.url)
    own.main(url=server.url, quantize="q8_0")
    results = re.findall(r"bytes = ([\d,]+), agreement = ([\d.]+)", capsys.readouterr().out)
    sizes = [int(size.replace(",", "")) for size, _ in results]
    assert sizes[1] < 0.5 * sizes[0]
    assert float(results[1][1]) > 20, "this model's weights are noise, so 8 bits may cost it tokens"
    back = read_back(project / "models" / "ollama" / "my_gpt2.gguf")[0].state_dict()
    for name, tensor in written[0].state_dict().items():
        difference = (back[name] - tensor).abs().max()
        assert difference <= tensor.abs().max() / 127, name
        assert difference == 0 or tensor.dim() == 2, "only matrices are made small"
    assert torch.equal(back["transformer.wpe.weight"], written[0].transformer.wpe.weight)


def test_a_wrong_answer_is_counted(own, server, written, monkeypatch, capsys):
    monkeypatch.setattr(own, "load_model", lambda folder: written[:2])
    monkeypatch.setattr(own, "ask_torch", lambda *_: "something else altogether")
    own.main(url=server.url)
    share = re.search(r"agreement = ([\d.]+)%", capsys.readouterr().out)[1]
    assert float(share) < 20


def test_an_answer_that_ends_early_agrees_as_far_as_it_goes(
    own, server, written, monkeypatch, capsys
):
    early, late = "tensor tensor", "tensor tensor tensor tensor"
    monkeypatch.setattr(own, "load_model", lambda folder: written[:2])
    monkeypatch.setattr(own, "ask_torch", lambda *_: early)
    monkeypatch.setattr(own, "ask_ollama", lambda *_: ("1", [late, late]))
    own.main(url=server.url)
    share = re.search(r"agreement = ([\d.]+)%", capsys.readouterr().out)[1]
    common, longest = (len(written[1].encode(text)) for text in (early, late + END))
    assert float(share) == pytest.approx(100 * common / longest, abs=0.01)


def test_without_a_server_the_files_and_two_commands_remain(own, server, project, capsys):
    shutil.rmtree(project / "models" / "ollama", ignore_errors=True)
    server.shutdown()
    server.socket.close()
    own.main(url=server.url)
    output = capsys.readouterr().out
    folder = project / "models" / "ollama"
    assert sorted(file.name for file in folder.iterdir()) == ["Modelfile", "my_gpt2.gguf"]
    typed = [line.strip() for line in output.splitlines() if line.startswith("  ollama ")]
    assert [shlex.split(line) for line in typed] == [
        ["ollama", "create", "my-gpt2", "-f", str(folder / "Modelfile")],
        ["ollama", "run", "my-gpt2", QUESTIONS[0]],
    ]
    assert "server = none" in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("agreement = not measured")


@pytest.mark.parametrize("fault", [fault for fault in [*FAULTS, *MIDWAY] if fault != "hangs up"])
def test_a_broken_server_ends_the_import_with_a_sentence(own, server, written, monkeypatch, fault):
    monkeypatch.setitem(own.DIRECT, "timeout", (1, 0.3))
    monkeypatch.setattr(own, "load_model", lambda folder: written[:2])
    server.fault = fault
    with pytest.raises(SystemExit) as stop:
        own.main(url=server.url)
    assert "does not do as Ollama does" in sentence(stop)
    assert "The files are written" in sentence(stop)


def spoil(folder, kind):
    adapter = folder / "adapter_config.json"
    card = json.loads(adapter.read_text())
    if kind == "missing":
        shutil.rmtree(folder)
    elif kind == "no weights":
        (folder / "adapter_model.safetensors").unlink()
    elif kind == "cut off":
        (folder / "adapter_model.safetensors").write_bytes(b"half")
    elif kind == "not JSON":
        adapter.write_text("{")
    elif kind == "no base":
        adapter.write_text(json.dumps(card | {"base_model_name_or_path": "models/nowhere"}))
    elif kind == "unnamed base":
        adapter.write_text(json.dumps(card | {"base_model_name_or_path": None}))
    elif kind == "not GPT-2":
        from transformers import LlamaConfig, LlamaForCausalLM

        size = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=1)).save_pretrained(folder)
        adapter.unlink()


KINDS = ["missing", "no weights", "cut off", "not JSON", "no base", "unnamed base", "not GPT-2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_adapter_ends_with_a_sentence(own, project, tmp_path, kind):
    shutil.copytree(project / "models" / "gpt2_lora", tmp_path / "adapter")
    spoil(tmp_path / "adapter", kind)
    with pytest.raises(SystemExit) as stop:
        own.main(model=tmp_path / "adapter", quick=True)
    assert str(tmp_path / "adapter") in sentence(stop)
    assert sentence(stop).endswith("Make it: uv run src/llm/07_finetune_lora.py --quick")


def test_a_failed_write_keeps_the_old_file(own, server, project, monkeypatch, written):
    path = project / "models" / "ollama" / "my_gpt2.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"the old one")
    monkeypatch.setattr(own, "load_model", lambda folder: written[:2])

    def full(self, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own.gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(SystemExit, match="Cannot write .*No space left"):
        own.main(url=server.url)
    assert path.read_bytes() == b"the old one"
    assert not list(path.parent.glob("*.part"))


# TRUST: prompts stay out of shells, names from the server out of the disk, and all on this machine.
NASTY = "$(touch pwned); `touch pwned` | touch pwned & \" ' --"


@pytest.mark.parametrize("name", BOTH)
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
    serve.main(url=server.url, prompt=NASTY)
    bodies = [json.loads(body) for _, path, body in server.requests if path == "/api/generate"]
    assert bodies[-1]["prompt"] == NASTY
    assert list(tmp_path.iterdir()) == []


def test_names_and_texts_of_the_server_are_shown_without_their_tricks(
    server, serve, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    entry = server.models[f"{MODEL}:latest"]
    server.models["../../etc/passwd"] = entry
    server.models["\x1b[2J\x07evil\u202e"] = entry
    entry.model.answer = lambda prompt, options: iter(["a\x1b]0;title\x07b\r", "\u202ec\nd"])
    entry.model.thinking = "\x1b[8mhidden"
    serve.main(url=server.url, prompt="x")
    output = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in output)
    assert "A: a]0;titlebc\n   d" in output
    assert "../../etc/passwd" in output
    assert list(tmp_path.rglob("*")) == [], "nothing is written"


def test_a_creation_takes_no_path_out_of_its_folder(any_server):
    for name in ("/etc/passwd", "../model.gguf"):
        request = {"model": "m", "files": {name: f"sha256:{'0' * 64}"}, "stream": False}
        assert direct().post(f"{any_server}/api/create", json=request).status_code >= 400


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
    "ollama": '[ "$1" = serve ] && { echo "$OLLAMA_HOST" > host; touch up; exec sleep 30; }; true',
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
    pid = int((script.folder / "home with blanks" / ".ollama" / "serve.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    (script.folder / "up").unlink()
    done, _ = script([], "start")
    assert done.returncode == 1
    assert "sudo dnf install podman" in done.stderr


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
