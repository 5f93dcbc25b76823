"""A stand-in for Ollama, for machines that have none: its API, a real small model, and every fault.

    uv run tests/ollama_stand_in.py --port 11434    # serves models/gpt2_mini under the name tinyllama

It listens on 127.0.0.1 only, and its version says what it is. The shapes of its answers follow Ollama's
published API; tests/test_serving.py compares them with it field by field. `fault` makes it misbehave.
"""

import argparse
import hashlib
import json
import re
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "0.0.0-stand-in"
BLOB = re.compile(r"/api/blobs/(sha256:[0-9a-f]{64})")
NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)*(:[\w.-]+)?")
TOO_LONG = (
    "the prompt is longer than the context length currently available to the model; shorten the "
    "prompt, adjust the context length in settings, or use a model with a longer context length"
)


# MODELS: one that repeats words, for tests of the client, and a real one, for tests of the answers.
class Echo:
    """Answers with what it was asked; its tokens are words."""

    family, size, context, load_seconds = "echo", 1_000_000, 4096, 0
    thinking = ""  # said before the answer, as reasoning models do

    def count(self, text):
        return len(text.split())

    def cut(self, text, length):
        return " ".join(text.split()[-length:])

    def answer(self, prompt, options):
        length = options.get("num_predict", -1)
        yield from re.findall(r"\s*\S+", f"You said: {prompt}")[: length if length >= 0 else None]


IMPORTING = threading.Lock()  # two threads that import transformers at once get in each other's way


class Gpt2:
    """GPT-2 from a Hugging Face folder, or from a GGUF file as transformers reads it."""

    family, load_seconds, thinking = "gpt2", 0, ""

    def __init__(self, path):
        self.path, self.lock, self.model = Path(path), threading.Lock(), None
        files = [self.path] if self.path.is_file() else list(self.path.iterdir())
        self.size = sum(file.stat().st_size for file in files)

    def load(self):
        with IMPORTING:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

        with self.lock:
            if self.model is not None:
                return
            options, folder = {}, self.path
            if self.path.is_file():
                fields = read_fields(self.path)
                shape = {
                    theirs: fields[f"gpt2.{ours}"]
                    for theirs, ours in {
                        "n_positions": "context_length",
                        "n_embd": "embedding_length",
                        "n_layer": "block_count",
                        "n_head": "attention.head_count",
                        "layer_norm_epsilon": "attention.layer_norm_epsilon",
                    }.items()
                }
                size = len(fields["tokenizer.ggml.tokens"])
                ends = {f"{end}_token_id": fields[f"tokenizer.ggml.{end}_token_id"] for end in BE}
                folder, options = self.path.parent, {"gguf_file": self.path.name}
                self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
                options["config"] = GPT2Config(vocab_size=size, **shape, **ends)
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(folder)
            options["dtype"] = torch.float32
            self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
            self.context = self.model.config.n_positions

    def count(self, text):
        return len(self.tokenizer(text)["input_ids"])

    def cut(self, text, length):
        return self.tokenizer.decode(self.tokenizer(text)["input_ids"][-length:])

    def answer(self, prompt, options):
        """Yield text as it becomes certain: whole characters, and no beginning of a stop word."""
        import torch

        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"]
        room = self.context - ids.shape[1]
        length = options.get("num_predict", -1)
        length = room if length < 0 else min(length, room)
        temperature, stops = options.get("temperature", 0.8), options.get("stop") or []
        dice = torch.Generator().manual_seed(max(0, options.get("seed", 0)))
        made, shown, past = [], 0, None
        for _ in range(length):
            with self.lock, torch.inference_mode():
                output = self.model(ids, past_key_values=past, use_cache=True)
            logits, past = output.logits[0, -1], output.past_key_values
            if temperature > 0:
                chances, choices = (logits / temperature).softmax(-1).topk(40)
                token = int(choices[torch.multinomial(chances, 1, generator=dice)])
            else:
                token = int(logits.argmax())
            if token == self.model.config.eos_token_id:
                break
            made, ids = [*made, token], torch.tensor([[token]])
            text = self.tokenizer.decode(made)
            for stop in stops:
                if stop in text:
                    if text.index(stop) > shown:
                        yield text[shown : text.index(stop)]
                    return
            safe = len(text.rstrip("\ufffd"))
            for stop in stops:
                safe = min(safe, len(text) - held_back(text, stop))
            if safe > shown:
                yield text[shown:safe]
                shown = safe
        text = self.tokenizer.decode(made).rstrip("\ufffd")
        if len(text) > shown:
            yield text[shown:]


BE = ("bos", "eos")


def held_back(text, stop):
    """How many characters at the end of a text could begin a stop word."""
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def read_fields(path):
    """Return a GGUF file's metadata; an exception says that it is none."""
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


class Entry:
    """What the server knows of a model: how to answer, its template and its parameters."""

    def __init__(self, model, digest=None, template="{{ .Prompt }}", parameters=None, system=""):
        self.model, self.template, self.system = model, template, system
        self.parameters, self.loaded = parameters or {}, False
        self.digest = digest or hashlib.sha256(repr(model).encode()).hexdigest()
        self.modified_at = now()

    def details(self):
        details = {"parent_model": "", "format": "gguf", "family": self.model.family}
        return details | {
            "families": [self.model.family],
            "parameter_size": f"{self.model.size / 4e6:.2f}M",
            "quantization_level": "F32",
        }

    def render(self, messages):
        """Fill the template once for each question, with the answer that followed it."""
        turns, text = [["", ""]], ""
        for message in messages:
            if message["role"] == "user":
                turns.append([message["content"], ""])
            elif message["role"] == "assistant":
                turns[-1][1] = message["content"]
        turns = [turn for turn in turns if turn != ["", ""]]
        template = self.template
        if ".Response" not in template:
            template += "{{ .Response }}"
        for number, (question, answer) in enumerate(turns):
            filled = template.replace("{{ .Prompt }}", question)
            if number == len(turns) - 1 and not answer:
                return text + filled.split("{{ .Response }}")[0]
            text += filled.replace("{{ .Response }}", answer) + "\n"
        return text


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime())


# SERVER
class StandIn(ThreadingHTTPServer):
    daemon_threads, request_queue_size, block_on_close = True, 256, False

    def __init__(self, models=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)  # never on another address
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.models = {full_name(name): Entry(model) for name, model in (models or {}).items()}
        self.library = {}  # what can be pulled
        self.fault, self.connections, self.requests, self.sent = None, 0, [], []
        self.blobs = tempfile.TemporaryDirectory(prefix="stand-in-")

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.blobs.cleanup()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # that is a client that went away
            super().handle_error(request, client_address)


def full_name(name):
    return name if ":" in name else f"{name}:latest"


class Refusal(Exception):
    """A status and an error, to be sent in the place of an answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def setup(self):
        super().setup()
        self.server.connections += 1

    def log_message(self, *_):
        pass

    # ANSWERS: whole, or line by line in chunks.
    def reply(self, content, status=200, kind="application/json; charset=utf-8"):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def chunk(self, data):
        self.server.sent.append(time.perf_counter())
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def stream(self, parts, kind="application/x-ndjson"):
        """Send parts as they come; an error before the first has a status, one later has not."""
        parts, first = iter(parts), None
        first = next(parts)
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        fault, count = self.server.fault, 0
        while first is not None:
            if fault in MID_STREAM and count == 3:
                return MID_STREAM[fault](self)
            self.chunk(first if isinstance(first, bytes) else json.dumps(first).encode() + b"\n")
            first, count = next(parts, None), count + 1
        self.chunk(b"")

    # ROUTES
    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_DELETE = do_GET

    def route(self):
        length, server = int(self.headers.get("Content-Length") or 0), self.server
        body = self.rfile.read(length)
        server.requests.append((self.command, self.path, body))
        if server.fault in WHOLE:
            return WHOLE[server.fault](self)
        try:
            if blob := BLOB.fullmatch(self.path):
                return self.blob(blob[1], body)
            if self.command in ("GET", "HEAD"):
                if self.path not in GET:
                    return self.reply("404 page not found", 404, "text/plain")
                content = GET[self.path](self)
                return self.reply(content, kind="text/plain" if self.path == "/" else JSON)
            if self.path not in POST:
                return self.reply("404 page not found", 404, "text/plain")
            if not body:
                raise Refusal(400, "missing request body")
            try:
                request = json.loads(body)
            except ValueError as error:
                raise Refusal(400, str(error)) from None
            return POST[self.path](self, request)
        except Refusal as refusal:
            status, message = refusal.args
            kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
            error = {"message": message, "type": kind, "param": None, "code": None}
            self.reply({"error": error if self.path.startswith("/v1/") else message}, status)

    def blob(self, digest, body):
        path = Path(self.server.blobs.name) / digest.replace(":", "-")
        if self.command == "HEAD":
            return self.reply("", 200 if path.exists() else 404)
        if f"sha256:{hashlib.sha256(body).hexdigest()}" != digest:
            raise Refusal(400, "digest mismatch")
        path.write_bytes(body)
        return self.reply("", 201)

    def find(self, request):
        entry = self.server.models.get(full_name(request.get("model") or ""))
        if entry is None:
            raise Refusal(404, f"model '{request.get('model', '')}' not found")
        return entry

    def listed(self, running):
        models = []
        for name, entry in self.server.models.items():
            model = {"name": name, "model": name, "size": entry.model.size, "digest": entry.digest}
            model["details"] = entry.details()
            if not running:
                models.append(model | {"modified_at": entry.modified_at})
            elif entry.loaded:
                size = {"size_vram": 0, "context_length": entry.model.context}
                models.append(model | {"expires_at": now()} | size)
        return {"models": models}

    def show(self, request):
        entry = self.find(request)
        lines = [
            f"{name} {json.dumps(value)}"
            for name, values in entry.parameters.items()
            for value in (values if isinstance(values, list) else [values])
        ]
        info = {"general.architecture": entry.model.family}
        shown = {"modelfile": "FROM model.gguf", "parameters": "\n".join(lines)}
        shown |= {"template": entry.template, "details": entry.details(), "model_info": info}
        self.reply(shown | {"capabilities": ["completion"], "modified_at": entry.modified_at})

    # TEXT: generate, chat and the OpenAI form of chat are one thing in three dresses.
    def prepare(self, request):
        """Return (entry, load nanoseconds), once the model is in memory."""
        entry, start = self.find(request), time.perf_counter_ns()
        if not entry.loaded:
            time.sleep(entry.model.load_seconds)
            getattr(entry.model, "load", lambda: None)()
            entry.loaded = True
        return entry, time.perf_counter_ns() - start

    def answer(self, request, entry, prompt, load, shape):
        """Yield the parts of an answer in a shape, the last one with the counters."""
        start, model, count = time.perf_counter_ns(), entry.model, 0
        options = entry.parameters | (request.get("options") or {})
        context = model.context = min(options.get("num_ctx", model.context), model.context)
        length, first = model.count(prompt), None
        if length >= context:
            if request.get("truncate") is False or request.get("shift") is False:
                raise Refusal(400, TOO_LONG)
            prompt = model.cut(prompt, context - max(context // 2, 1))  # half, as Ollama does
            length = model.count(prompt)
        common = {"model": request["model"], "created_at": now()}
        for piece in re.findall(r"\s*\S+", model.thinking):
            yield common | shape("", piece) | {"done": False}
        for piece in model.answer(prompt, options):
            first, count = first or time.perf_counter_ns(), count + 1
            yield common | shape(piece, "") | {"done": False}
        end = time.perf_counter_ns()
        reason = "length" if count == options.get("num_predict") else "stop"
        counters = {
            "total_duration": end - start + load,
            "load_duration": load,
            "prompt_eval_count": length,
            "prompt_eval_duration": (first or end) - start,
            "eval_count": count,
            "eval_duration": end - (first or end),
        }
        if self.server.fault == "no counters":  # all of them are omitempty
            counters = {}
        counters = {name: value for name, value in counters.items() if value}
        yield common | shape("", "") | {"done": True, "done_reason": reason} | counters

    def respond(self, request, parts, join):
        if request.get("stream", True):
            return self.stream(parts)
        parts = list(parts)
        return self.reply(join(parts))

    def only_load(self, request, entry, shape):
        unload = request.get("keep_alive") == 0
        entry.loaded = not unload
        common = {"model": request["model"], "created_at": now()}
        reason = {"done": True, "done_reason": "unload" if unload else "load"}
        self.reply(common | shape("", "") | reason)

    def generate(self, request):
        entry, load = self.prepare(request)

        def shape(piece, thought):
            return {"response": piece} | ({"thinking": thought} if thought else {})

        def join(parts):
            return parts[-1] | {"response": "".join(part["response"] for part in parts)}

        prompt = request.get("prompt", "")
        if not prompt:
            return self.only_load(request, entry, shape)
        if not request.get("raw"):
            prompt = entry.render([{"role": "user", "content": prompt}])
        return self.respond(request, self.answer(request, entry, prompt, load, shape), join)

    def chat(self, request):
        if not request.get("model"):
            raise Refusal(400, "model is required")
        entry, load = self.prepare(request)

        def shape(piece, thought):
            message = {"role": "assistant", "content": piece}
            return {"message": message | ({"thinking": thought} if thought else {})}

        def join(parts):
            text = "".join(part["message"]["content"] for part in parts)
            return parts[-1] | {"message": {"role": "assistant", "content": text}}

        messages = request.get("messages") or []
        if not messages:
            return self.only_load(request, entry, shape)
        prompt = entry.render(messages)
        return self.respond(request, self.answer(request, entry, prompt, load, shape), join)

    def openai(self, request):
        entry, load = self.prepare(request)
        names = {"max_tokens": "num_predict", "temperature": "temperature", "seed": "seed"}
        options = {ours: request[theirs] for theirs, ours in names.items() if theirs in request}
        prompt = entry.render(request["messages"])
        asked = {"model": request["model"], "options": options}
        parts = self.answer(asked, entry, prompt, load, lambda piece, _: {"text": piece})
        common = {"id": "chatcmpl-1", "created": int(time.time()), "model": request["model"]}
        common["system_fingerprint"] = "fp_ollama"
        if request.get("stream"):  # here False is the default

            def events():
                for part in parts:
                    delta = {"role": "assistant", "content": part["text"]}
                    choice = {"index": 0, "delta": delta, "finish_reason": part.get("done_reason")}
                    event = common | {"object": "chat.completion.chunk", "choices": [choice]}
                    yield f"data: {json.dumps(event)}\n\n".encode()
                yield b"data: [DONE]\n\n"

            return self.stream(events(), "text/event-stream")
        parts = list(parts)
        message = {"role": "assistant", "content": "".join(part["text"] for part in parts)}
        choice = {"index": 0, "message": message, "finish_reason": parts[-1]["done_reason"]}
        read, made = (parts[-1].get(f"{name}eval_count", 0) for name in ("prompt_", ""))
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        whole = {"object": "chat.completion", "choices": [choice], "usage": usage}
        return self.reply(common | whole)

    # MODELS: made from an uploaded file, pulled from a library, removed.
    def create(self, request):
        name, files = request.get("model") or "", request.get("files") or {}
        if not NAME.fullmatch(name):
            raise Refusal(400, "invalid model name")
        if not files:
            raise Refusal(400, "neither 'from' or 'files' was specified")
        blobs = []
        for file, digest in files.items():
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise Refusal(400, "file path must be relative")
            blob = Path(self.server.blobs.name) / digest.replace(":", "-")
            if not BLOB.fullmatch(f"/api/blobs/{digest}") or not blob.exists():
                raise Refusal(400, f"blob not found for {file}")
            blobs.append(blob)
        try:
            read_fields(blobs[0])
        except Exception:
            raise Refusal(400, "supplied file was not in GGUF format") from None

        def steps():
            yield {"status": "parsing GGUF"}
            more = {part: request[part] for part in ("template", "parameters") if part in request}
            entry = Entry(Gpt2(blobs[0]), digest.removeprefix("sha256:"), **more)
            self.server.models[full_name(name)] = entry
            yield {"status": f"using existing layer {digest}"}
            yield {"status": "writing manifest"}
            yield {"status": "success"}

        return self.progress(request, steps())

    def pull(self, request):
        name = full_name(request.get("model") or "")

        def steps():
            yield {"status": "pulling manifest"}  # first, so what fails later has status 200
            if name not in self.server.library:
                yield {"error": "pull model manifest: file does not exist"}
                return
            model = self.server.library[name]
            digest = Entry(model).digest
            for completed in (model.size // 2, model.size):
                part = {"digest": f"sha256:{digest}", "total": model.size, "completed": completed}
                yield {"status": f"pulling {digest[:12]}"} | part
            self.server.models[name] = Entry(model)
            for status in ("verifying sha256 digest", "writing manifest", "success"):
                yield {"status": status}

        return self.progress(request, steps())

    def progress(self, request, steps):
        if request.get("stream", True):
            return self.stream(steps)
        last = list(steps)[-1]
        return self.reply(last, 500 if "error" in last else 200)

    def delete(self, request):
        self.find(request)
        del self.server.models[full_name(request["model"])]
        self.reply("")

    # FAULTS
    def hang(self):
        self.server.released = getattr(self.server, "released", None) or threading.Event()
        self.server.released.wait(30)
        self.close_connection = True

    def break_off(self):
        self.close_connection = True  # without the last chunk, and in the middle of a line
        data = b'{"model":"tinyllama","created_at":"2026-01-01T00:00:00Z","respo'
        self.wfile.write(f"{len(data) + 40:x}\r\n".encode() + data)

    def end_early(self):
        self.chunk(b"")  # a stream that ends in order, but without "done": true

    def garble(self, data):
        self.chunk(data)
        self.chunk(b"")


JSON = "application/json; charset=utf-8"
GET = {
    "/": lambda handler: "Ollama is running",
    "/api/version": lambda handler: {"version": VERSION},
    "/api/tags": lambda handler: handler.listed(running=False),
    "/api/ps": lambda handler: handler.listed(running=True),
}
POST = {
    "/api/show": Handler.show,
    "/api/generate": Handler.generate,
    "/api/chat": Handler.chat,
    "/api/create": Handler.create,
    "/api/pull": Handler.pull,
    "/api/delete": Handler.delete,
    "/v1/chat/completions": Handler.openai,
}
WHOLE = {  # in the place of every answer
    "not Ollama": lambda handler: handler.reply("<h1>It works!</h1>", kind="text/html"),
    "another API": lambda handler: handler.reply({"name": "somebody else"}),
    "a list": lambda handler: handler.reply([1, 2, 3]),
    "redirect": lambda handler: handler.reply("", 302),
    "500": lambda handler: handler.reply({"error": "llama runner has terminated"}, 500),
    "503": lambda handler: handler.reply({"error": "server busy, please try again"}, 503),
    "502 page": lambda handler: handler.reply("<h1>Bad Gateway</h1>", 502, "text/html"),
    "400": lambda handler: handler.reply({"error": TOO_LONG}, 400),
    "hangs": Handler.hang,
    "hangs up": lambda handler: setattr(handler, "close_connection", True),
}
MID_STREAM = {  # after three parts of a stream
    "error line": lambda handler: handler.garble(b'{"error":"an error was encountered"}\n'),
    "cut off": Handler.break_off,
    "no end": Handler.end_early,
    "hangs midway": Handler.hang,
    "malformed": lambda handler: handler.garble(b'{"model": "tinyllama", "respon\n'),
    "not an object": lambda handler: handler.garble(b"[1, 2, 3]\n"),
    "not UTF-8": lambda handler: handler.garble(b'{"response": "\xff\xfe"}\n'),
    "wrong types": lambda handler: handler.garble(b'{"response": 7, "message": 7}\n'),
}


def import_early():
    """Import, while the first client gets ready, what its first request will need."""
    with IMPORTING:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def main():
    root = Path(__file__).resolve().parents[1]
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--port", type=int, default=0, help="0 means any that is free")
    cli.add_argument("--model", type=Path, default=root / "models" / "gpt2_mini")
    arguments = cli.parse_args()
    models = {}
    if (arguments.model / "config.json").exists():
        models["tinyllama"] = Gpt2(arguments.model)  # the name that the lessons ask for
    with StandIn(models, arguments.port) as server:
        print(server.url, flush=True)
        threading.Thread(target=import_early, daemon=True).start()
        threading.Event().wait()


if __name__ == "__main__":
    main()
