"""Serve with Ollama: ask a model that runs as a server, and notice whatever goes wrong on the way.

Run:    uv run src/llm/08_serve_ollama.py
Needs:  a running Ollama (scripts/ollama.sh start, then scripts/ollama.sh pull tinyllama)
Makes:  nothing
Expect: messages = 6

A script loads a model, answers and forgets it. A server loads it once and answers whoever asks,
over HTTP, one token at a time. It remembers nothing that was said: a conversation is a list of
messages that you keep, and send whole with every question.
"""

import argparse
import json
import os
import re
import shlex
import sys

import requests

MODEL, LENGTH = "tinyllama", 40  # which model, and at most how many tokens an answer has
TIMEOUT = (5, 300)  # seconds to connect, and to wait for more: loading a large model takes minutes
PROMPT = "What is backpropagation? One sentence."
QUESTIONS = ["What is a neural network?", "How does it learn?", "What can go wrong?"]
COUNTERS = ("prompt_eval_count", "eval_count", "eval_duration")  # tokens, tokens, nanoseconds
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


# CONNECT: to this machine, unless OLLAMA_HOST or --url names another.
def server_url(address):
    """Read an address as the ollama command reads OLLAMA_HOST: each part of it may be missing."""
    form = r"(?:(https?)://)?(\[[\da-fA-F:]+\]|[\w.-]*)(?::(\d{1,5}))?/?"
    if not (match := re.fullmatch(form, address.strip("\"' "))):
        sys.exit(f"{address!r} is no server's address; one looks like http://127.0.0.1:11434")
    port = match[3] or {"http": 80, "https": 443}.get(match[1], 11434)
    return f"{match[1] or 'http'}://{match[2] or '127.0.0.1'}:{port}"


def printable(text):
    """Drop what moves the cursor, rings the bell or hides text: a server may send anything."""
    return "".join(letter for letter in str(text) if letter.isprintable() or letter in "\n\t")


class Ollama:
    """A session with an Ollama server; whatever goes wrong there ends in one sentence here."""

    def __init__(self, url):
        self.url, self.session = url, requests.Session()  # one connection for all requests
        self.session.trust_env = False  # a proxy has no business between this machine and itself

    def send(self, path, content=None):
        """Return the response to a request, its body not yet read."""
        options = {"timeout": TIMEOUT, "stream": True, "allow_redirects": False, "json": content}
        try:
            ask = self.session.post if content else self.session.get
            response = ask(self.url + path, **options)
            if response.status_code == 200:
                return response
            error = json.loads(response.content)["error"]
            error = printable(error["message"] if isinstance(error, dict) else error)
        except requests.ReadTimeout:
            sys.exit(f"{self.url} takes requests but was silent for {TIMEOUT[1]} s: restart it.")
        except requests.RequestException:
            sys.exit(f"No server answers at {self.url}. Start one: scripts/ollama.sh start")
        except UNREADABLE:
            sys.exit(f"{self.url} is no Ollama server: its status is {response.status_code}.")
        if response.status_code == 404 and content:
            pull = f"scripts/ollama.sh pull {shlex.quote(content['model'])}"
            there = ", ".join(name for name, _ in self.list_models()) or "none yet"
            sys.exit(f"{self.url}: {error}. Get it: {pull} (the server has: {there})")
        if response.status_code == 400:
            sys.exit(f"The server refuses the request: {error}. Send less, or raise num_ctx.")
        sys.exit(f"The server failed with status {response.status_code}: {error}. Try it again.")

    def read(self, pick, path, content=None):
        """Return what pick takes from the JSON that answers a request."""
        try:
            return pick(json.loads(self.send(path, content).content))
        except (*UNREADABLE, requests.RequestException):
            sys.exit(f"{self.url} is no Ollama server, or broke off: {path} cannot be read.")

    def list_models(self):
        """Return the models that the server has, as (name, bytes)."""
        return self.read(
            lambda answer: [(printable(m["name"]), int(m["size"])) for m in answer["models"]],
            "/api/tags",
        )

    def stream(self, path, content):
        """Yield (thought, text, counters) from each line of an answer, as it arrives."""
        done, response = False, self.send(path, content)
        try:
            for line in filter(None, response.iter_lines()):
                part = json.loads(line)
                if "error" in part:  # the status was 200 when the answer began
                    sys.exit(f"\nThe server stopped with an error: {printable(part['error'])}")
                message = part.get("message", part)  # chat wraps what generate does not
                text = message.get("content", message.get("response")) or ""
                thought, done = message.get("thinking") or "", part.get("done", False)
                yield thought + "", text + "", [int(part.get(name) or 0) for name in COUNTERS]
        except UNREADABLE:
            sys.exit("\nThe server sent a line that cannot be read; what came before it is above.")
        except requests.RequestException:
            sys.exit("\nThe connection broke off or fell silent; what had arrived is above.")
        if not done:
            sys.exit("\nThe answer ended without its last line; what had arrived is above.")


# ASK: the notes' three calls; tokens are shown while they arrive.
def show_answer(parts, sent, known=0):
    """Print an answer; return its text and how many tokens the server has read for it."""
    whole, label = "", None
    for thought, text, counters in parts:
        read, made, nanoseconds = counters  # the last line has them
        for name, piece in (("Thinking", thought), ("A", text)):
            if piece:
                start = "" if name == label else f"\n{name}: " if label else f"{name}: "
                print(start + printable(piece).replace("\n", "\n   "), end="", flush=True)
                label = name
        whole += text
    speed = made / max(1, nanoseconds) * 1e9
    print(f"\n[{read} tokens read, {made} written, {speed:.1f} tokens/s]")
    fewest = max(known, len(sent.split()))  # a word is a token at least; a conversation grows
    if 0 < read < fewest:
        print(f"The server has cut the prompt: of {fewest} tokens or more it has read {read}.")
    return whole, read


def generate(server, prompt, model, length):
    request = {"model": model, "prompt": prompt, "options": {"num_predict": length}}
    return show_answer(server.stream("/api/generate", request), prompt)


def chat(server, messages, model, length, known=0):
    """Answer the last of the messages in the light of the others."""
    request = {"model": model, "messages": messages, "options": {"num_predict": length}}
    sent = " ".join(message["content"] for message in messages)
    return show_answer(server.stream("/api/chat", request), sent, known)


def converse(server, questions, model, length):
    """Ask one question after the other, each with all that was said before; return the messages."""
    history, read = [], 0
    for question in filter(str.strip, questions):
        print("Q:", question.strip())
        history.append({"role": "user", "content": question.strip()})
        answer, read = chat(server, history, model, length, known=read)
        history.append({"role": "assistant", "content": answer})
    return history


def ask_like_openai(server, prompt, model, length):
    """The same as programs written for OpenAI ask it: another path, and other names."""
    request = {"model": model, "max_tokens": length}
    request["messages"] = [{"role": "user", "content": prompt}]
    answer = server.read(
        lambda answer: printable(answer["choices"][0]["message"]["content"]),
        "/v1/chat/completions",
        request,
    )
    print("A:", answer.replace("\n", "\n   "))


def main(quick=False, url="", model=MODEL, prompt=None, interactive=False):
    length, messages = 10 if quick else LENGTH, []
    server = Ollama(server_url(url or os.environ.get("OLLAMA_HOST", "")))
    version = server.read(lambda answer: printable(answer["version"]), "/api/version")
    print(f"Server: Ollama {version} at {server.url}")
    for name, size in server.list_models():
        print(f"  {name:30s} | {size / 1e9:.3f} GB")
    print(f"Loading {model}; if it is large and cold, this takes a minute ...", flush=True)
    server.read(lambda answer: answer["done"], "/api/generate", {"model": model})  # no prompt yet
    if interactive:
        print("Type your questions, then Ctrl-D.")
        messages = converse(server, sys.stdin, model, length=-1)
    elif prompt:
        generate(server, prompt, model, length=-1)
    else:
        print("Q:", PROMPT)
        generate(server, PROMPT, model, length)
        ask_like_openai(server, PROMPT, model, length)
        messages = converse(server, QUESTIONS, model, length)
    print(f"Result: server = {version}, messages = {len(messages)}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: answers of 10 tokens")
    cli.add_argument("--url", default="", help="the server; else OLLAMA_HOST; else this machine's")
    cli.add_argument("--model", default=MODEL, help=f"a model that the server has: {MODEL}")
    cli.add_argument("--prompt", help="one question of yours, answered at full length")
    cli.add_argument("--chat", dest="interactive", action="store_true", help="a conversation")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a letter that the model writes
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("\nStopped; the server goes on: scripts/ollama.sh stop")
