"""A stand-in for Ollama, for machines that have none: its API, a real small model, and every fault.

    uv run tests/ollama_stand_in.py --model models/smollm2    # served under the name smollm2

It listens on 127.0.0.1 only, and its version says what it is. Its answers and refusals follow a
real Ollama of May 2026; tests/test_serving.py holds both to the same shapes. What it cannot do, it
refuses. `fault` makes it misbehave.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "0.0.0-stand-in"
JSON = "application/json; charset=utf-8"
BLOB = re.compile(r"/api/blobs/(sha256:[0-9a-f]{64})")
NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)*(:[\w.-]+)?")
TOO_LONG = "the input length exceeds the context length"
CONTEXT = 4096  # Ollama's num_ctx on a machine without a GPU, unless the model has less
REPEATS = 30  # an answer that repeats a piece more often ends at once, without a last part
CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
PROMPT = "{{ .Prompt }}"  # Ollama's template for a model that brings none
FOLDERS = ["Llama", "Mixtral", "Gemma", "Gemma2", "Gemma3", "Phi3", "Qwen2", "Cohere", "GptOss"]
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
KNOWN = {  # the rules that Ollama knows when it imports a folder, by their SHA-256: Llama 3, Qwen2
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",
}
SPLITS = {  # how llama.cpp splits a text into words; for other kinds it is as in the tokenizer
    "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"],
    "smollm": [r"\p{N}", WORDS],
}


class Refusal(Exception):
    """A status and an error, to be sent in the place of an answer."""


# MODELS: one that repeats words, for tests of the client, and a real one, for tests of the answers.
class Echo:
    """Answers with what it was asked; its tokens are words."""

    family, size, context, load_seconds = "echo", 1_000_000, CONTEXT, 0
    chat = ""

    def load(self):
        time.sleep(self.load_seconds)

    def encode(self, text):
        return text.split()

    def answer(self, ids, options):
        length = options.get("num_predict", -1)
        text = f"You said: {' '.join(ids)}"
        yield from re.findall(r"\s*\S+", text)[: length if length > 0 else None]


IMPORTING = threading.Lock()  # two threads that import transformers at once get in each other's way


class CausalModel:
    """A language model in a Hugging Face folder or a GGUF file, as transformers reads it."""

    def __init__(self, path, imported=False):
        """imported: as Ollama converts a folder, which is not in all as transformers reads it."""
        self.path, self.imported, self.model = Path(path), imported, None
        self.lock = threading.Lock()
        if self.path.is_file():
            self.fields = read_fields(self.path)
            self.family = self.fields["general.architecture"]
            self.chat = self.fields.get("tokenizer.chat_template", "")
            length = self.fields.get(f"{self.family}.context_length", CONTEXT)
            self.size = self.path.stat().st_size
        else:
            self.config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
            self.family = self.config["model_type"]
            template = self.path / "chat_template.jinja"  # Ollama does not read this file
            read = template.exists() and not imported
            self.chat = template.read_text(encoding="utf-8") if read else ""
            length = self.config.get("max_position_embeddings") or self.config["n_positions"]
            self.size = sum(file.stat().st_size for file in self.path.iterdir())
        self.context = min(length, CONTEXT)

    def load(self):
        with IMPORTING:
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

        with self.lock:
            if self.model is not None:
                return
            folder, options, split = self.path, {}, ""
            if self.path.is_file():
                folder, options = self.path.parent, {"gguf_file": self.path.name}
                split = self.fields.get("tokenizer.ggml.pre", "default")
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            if self.imported and not self.knows_words():
                split = "default"
            if split in SPLITS:
                self.split_words(SPLITS[split])
            if self.family == "gpt2" and self.path.is_file():
                options["config"] = gpt2_config(self.fields)  # not GPT-2 small's, as transformers
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
            if self.imported:
                self.convert(model)
            self.model = model.eval()

    def knows_words(self):
        """True if Ollama knows by which rule the tokenizer of a folder splits a text into words."""
        own = json.loads(self.tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
        parts = own.get("pretokenizers", [])
        patterns = [part["pattern"]["Regex"] for part in parts if part["type"] == "Split"]
        return hashlib.sha256("".join(patterns).encode()).hexdigest() in KNOWN

    def split_words(self, patterns):
        from tokenizers import Regex, pre_tokenizers

        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        split = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self.tokenizer.backend_tokenizer.pre_tokenizer = split

    def convert(self, model):
        """Round matrices to 16 bits; take rope_theta from the top of config.json, or 10,000."""
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half().float()
        if getattr(model.config, "rope_parameters", None):
            model.config.rope_parameters["rope_theta"] = self.config.get("rope_theta", 10_000.0)
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, ids, options):
        """Yield (text, tokens so far) as text becomes certain: no half a letter or stop word.

        Return why the answer ended: "stop" or "length".
        """
        import torch

        room = self.context - len(ids)
        limit = options.get("num_predict", -1)
        limit = room if limit < 0 else min(limit, room)
        temperature, stops = options.get("temperature", 0.8), options.get("stop") or []
        dice = torch.Generator().manual_seed(max(0, options.get("seed", 0)))
        inputs, made, shown, past, text = list(ids), [], 0, None, ""
        while len(made) < limit:
            with self.lock, torch.inference_mode():
                output = self.model(torch.tensor([inputs]), past_key_values=past, use_cache=True)
            logits, past = output.logits[0, -1], output.past_key_values
            if temperature > 0:
                chances, choices = (logits / temperature).softmax(-1).topk(40)
                token = int(choices[torch.multinomial(chances, 1, generator=dice)])
            else:
                token = int(logits.argmax())
            if token == self.model.config.eos_token_id:
                yield text[shown:], len(made) + 1
                return "stop"
            made, inputs = [*made, token], [token]
            text = self.tokenizer.decode(made).replace("\ufffd", "")  # Ollama leaves these out
            for stop in stops:
                if stop in text:
                    yield text[shown : max(shown, text.index(stop))], len(made)
                    return "stop"
            safe = len(text) - max((held_back(text, stop) for stop in stops), default=0)
            if safe > shown:
                yield text[shown:safe], len(made)
                shown = safe
        yield text[shown:], len(made)
        return "length"


def held_back(text, stop):
    """How many characters at the end of a text could begin a stop word."""
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def read_fields(path):
    """Return a GGUF file's metadata, of a long list its length; an exception says it is none."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    sizes = {name: len(field.data) for name, field in fields.items()}
    return {name: fields[name].contents() if size < 100 else size for name, size in sizes.items()}


def gpt2_config(fields):
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=fields["tokenizer.ggml.tokens"],
        n_positions=fields["gpt2.context_length"],
        n_embd=fields["gpt2.embedding_length"],
        n_layer=fields["gpt2.block_count"],
        n_head=fields["gpt2.attention.head_count"],
        layer_norm_epsilon=fields["gpt2.attention.layer_norm_epsilon"],
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
    )


# TEMPLATES: only the two that the lessons use.
def fill(template, messages):
    """Return the prompt that a template makes of messages, as Ollama's template.Execute does."""
    if template == PROMPT:
        return "".join(message["content"] for message in messages if message["role"] != "system")
    turns = [f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


class Entry:
    """What the server knows of a model: how to answer, its template and its parameters."""

    def __init__(self, model, digest=None, template=None, parameters=None, system=""):
        chatml = "<|im_start|>" in getattr(model, "chat", "")  # Ollama knows some by their looks
        default = CHATML if chatml else PROMPT
        stops = {"stop": ["<|im_start|>", "<|im_end|>"]} if chatml else {}
        self.model, self.system, self.loaded = model, system, False
        self.template, self.parameters = template or default, stops | (parameters or {})
        self.digest = digest or hashlib.sha256(repr(model).encode()).hexdigest()
        self.modified_at = now()
        if self.template not in (PROMPT, CHATML):
            raise Refusal(400, "template error: the stand-in does not know this template")

    def details(self):
        details = {"parent_model": "", "format": "gguf", "family": self.model.family}
        return details | {
            "families": [self.model.family],
            "parameter_size": f"{self.model.size / 4e6:.2f}M",
            "quantization_level": "F32",
        }

    def render(self, messages):
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        return fill(self.template, messages)


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime())


# SERVER
class StandIn(ThreadingHTTPServer):
    daemon_threads, request_queue_size, block_on_close = True, 256, False

    def __init__(self, models=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)  # never on another address
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.models = {full_name(name): Entry(model) for name, model in (models or {}).items()}
        self.fault, self.connections, self.requests = None, 0, []
        self.folder = tempfile.TemporaryDirectory(prefix="stand-in-")
        self.released = threading.Event()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.server_close()
        self.folder.cleanup()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # that is a client that went away
            super().handle_error(request, client_address)


def full_name(name):
    return name if ":" in name else f"{name}:latest"


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def setup(self):
        super().setup()
        self.server.connections += 1

    def log_message(self, *_):
        pass

    # ANSWERS: whole, or line by line in chunks.
    def reply(self, content, status=200, kind=JSON):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def chunk(self, data):
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def stream(self, parts, kind="application/x-ndjson"):
        """Send parts as they come; an error before the first has a status, one later has not."""
        parts = iter(parts)
        part, fault, count = next(parts), self.server.fault, 0
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while part is not None:
            if fault in MID_STREAM and count == 3:
                return MID_STREAM[fault](self)
            self.chunk(part if isinstance(part, bytes) else json.dumps(part).encode() + b"\n")
            try:
                part, count = next(parts, None), count + 1
            except Refusal as refusal:
                part = {"error": refusal.args[1]}
                parts = iter(())
        self.chunk(b"")

    # ROUTES
    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def route(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, body))
        if self.server.fault in WHOLE:
            return WHOLE[self.server.fault](self)
        try:
            if self.path.startswith("/api/blobs/") and self.command in ("HEAD", "POST"):
                return self.blob(body)
            methods = [method for method, path in ROUTES if path == self.path]
            if not methods:
                return self.reply("404 page not found", 404, "text/plain")
            if self.command not in methods:
                return self.reply("405 method not allowed", 405, "text/plain")
            if self.command == "GET":
                return ROUTES[self.command, self.path](self)
            if not body:
                raise Refusal(400, "missing request body")
            try:
                request = json.loads(body)
            except ValueError as error:
                raise Refusal(400, str(error)) from None
            if not isinstance(request, dict):
                raise Refusal(400, "json: cannot unmarshal this into a Go value of a request")
            return ROUTES[self.command, self.path](self, request)
        except Refusal as refusal:
            status, message = refusal.args
            self.reply({"error": message}, status)

    def blob(self, body):
        if not (match := BLOB.fullmatch(self.path)):
            raise Refusal(400, "invalid digest format")
        path = self.blob_path(match[1])
        if self.command == "HEAD":
            return self.reply("", 200 if path.exists() else 404)
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        if digest != match[1]:
            raise Refusal(400, f'digest mismatch, expected "{match[1]}", got "{digest}"')
        if path.exists():
            return self.reply("", 200)
        part = path.with_name(f"{path.name}.{threading.get_ident()}")
        part.write_bytes(body)
        part.replace(path)
        return self.reply("", 201)

    def blob_path(self, digest):
        return Path(self.server.folder.name) / digest.replace(":", "-")

    def find(self, request, nameless=(404, "model '' not found")):
        name = request.get("model") or ""
        if not name:
            raise Refusal(*nameless)
        if not NAME.fullmatch(name):
            raise Refusal(400, "invalid model name")
        if full_name(name) not in self.server.models:
            raise Refusal(404, f"model '{name}' not found")
        return self.server.models[full_name(name)]

    def version(self):
        self.reply({"version": VERSION})

    def list_all(self):
        models = [self.listed(name) for name in self.server.models]
        for model in models:
            model["modified_at"] = self.server.models[model["name"]].modified_at
        self.reply({"models": models})

    def listed(self, name):
        entry = self.server.models[name]
        listed = {"name": name, "model": name, "size": entry.model.size, "digest": entry.digest}
        return listed | {"details": entry.details()}

    def show(self, request):
        entry = self.find(request, (400, "model is required"))
        lines = [
            f"{name:30} {json.dumps(value)}"
            for name, values in sorted(entry.parameters.items())
            for value in (values if isinstance(values, list) else [values])
        ]
        info = {"general.architecture": entry.model.family}
        shown = {"modelfile": "FROM model.gguf", "parameters": "\n".join(lines)}
        shown |= {"template": entry.template, "details": entry.details(), "model_info": info}
        if entry.system:
            shown["system"] = entry.system
        self.reply(shown | {"capabilities": ["completion"], "modified_at": entry.modified_at})

    # TEXT: generate and chat are one thing in two dresses.
    def prepare(self, request, nameless):
        """Return (entry, options, load nanoseconds), once the model is in memory."""
        entry, start = self.find(request, nameless), time.perf_counter_ns()
        if request.get("think"):
            raise Refusal(400, f'"{request["model"]}" does not support thinking')
        options = entry.parameters | (request.get("options") or {})
        if not entry.loaded:
            entry.model.load()
            entry.loaded = True
        return entry, options, time.perf_counter_ns() - start

    def answer(self, request, entry, options, prompt, load, shape):
        """Yield the parts of an answer in a shape, the last one with the counters."""
        start, model, first, count = time.perf_counter_ns(), entry.model, None, 0
        ids = model.encode(prompt)
        if len(ids) > model.context:  # without "truncate": false, Ollama would cut it
            raise Refusal(400, TOO_LONG)
        common = {"model": request["model"], "created_at": now()}
        reason, last, repeats = None, "", 0

        def pieces():
            nonlocal reason
            reason = yield from model.answer(ids, options)

        for piece in pieces():
            piece, count = piece if isinstance(piece, tuple) else (piece, count + 1)
            first = first or time.perf_counter_ns()
            repeats = repeats + 1 if piece.strip() == last else 0
            last = piece.strip()
            if repeats > REPEATS:
                return
            if piece:
                yield common | shape(piece) | {"done": False}
        end = time.perf_counter_ns()
        if reason is None:
            reason = "length" if count == options.get("num_predict") else "stop"
        counters = {
            "total_duration": end - start + load,
            "load_duration": load,
            "prompt_eval_count": len(ids),
            "prompt_eval_duration": (first or end) - start,
            "eval_count": count,
            "eval_duration": end - first if count > 1 else 0,
        }
        counters = {name: value for name, value in counters.items() if value}
        yield common | shape("") | {"done": True, "done_reason": reason} | counters

    def respond(self, request, entry, options, prompt, load, shape, join):
        if request.get("_debug_render_only"):
            common = {"model": request["model"], "created_at": now(), "done": False}
            info = {"_debug_info": {"rendered_template": prompt}}
            return self.reply(common | shape("") | info)
        parts = self.answer(request, entry, options, prompt, load, shape)
        return self.stream(parts) if request.get("stream", True) else self.reply(join([*parts]))

    def only_load(self, request, shape):
        common = {"model": request["model"], "created_at": now()}
        reason = {"done": True, "done_reason": "load"}
        self.reply(common | shape("") | reason)

    def generate(self, request):
        entry, options, load = self.prepare(request, (404, "model '' not found"))

        def shape(piece):
            return {"response": piece}

        def join(parts):
            return parts[-1] | {"response": "".join(part["response"] for part in parts)}

        prompt = request.get("prompt", "")
        if not prompt:
            return self.only_load(request, shape)
        if not request.get("raw"):
            prompt = entry.render([{"role": "user", "content": prompt}])
        return self.respond(request, entry, options, prompt, load, shape, join)

    def chat(self, request):
        entry, options, load = self.prepare(request, (400, "model is required"))

        def shape(piece):
            return {"message": {"role": "assistant", "content": piece}}

        def join(parts):
            text = "".join(part["message"]["content"] for part in parts)
            return parts[-1] | shape(text)

        messages = request.get("messages") or []
        if not messages:
            return self.only_load(request, shape)
        prompt = entry.render(messages)
        return self.respond(request, entry, options, prompt, load, shape, join)

    # MODELS: made from uploaded files, removed.
    def create(self, request):
        name, files = request.get("model") or "", request.get("files")
        if any(Path(file).is_absolute() or ".." in Path(file).parts for file in files or {}):
            raise Refusal(400, "file path must be relative")
        if not NAME.fullmatch(name):
            raise Refusal(400, "invalid model name")
        settings = {
            key: request[key] for key in ("template", "system", "parameters") if key in request
        }

        def steps():
            if files is None:
                raise Refusal(400, "neither 'from' or 'files' was specified")
            if request.get("from") or request.get("adapters") or request.get("quantize"):
                raise Refusal(500, "the stand-in makes models of files only")
            model, digest = yield from self.convert(files)
            entry = Entry(model, digest, **settings)
            yield {"status": f"using existing layer sha256:{entry.digest}"}
            yield {"status": "writing manifest"}
            self.server.models[full_name(name)] = entry
            yield {"status": "success"}

        return self.progress(request, steps())

    def convert(self, files):
        """Yield the steps that make a model of uploaded files; return the model and its digest."""
        kinds = {Path(file).suffix for file in files}
        blobs = {file: self.blob_path(digest) for file, digest in files.items()}
        if ".safetensors" in kinds:
            yield {"status": "converting model"}
            digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            folder = Path(self.server.folder.name) / digest
            shutil.rmtree(folder, ignore_errors=True)
            for file, blob in blobs.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).symlink_to(blob)
            check_folder(folder)
            return CausalModel(folder, imported=True), digest
        heads = [blob.open("rb").read(4) for blob in blobs.values() if blob.exists()]
        if ".gguf" not in kinds and b"GGUF" not in heads:
            raise Refusal(400, "unknown type")
        yield {"status": "parsing GGUF"}
        digest, blob = next(iter(files.values())), next(iter(blobs.values()))
        if not BLOB.fullmatch(f"/api/blobs/{digest}"):
            raise Refusal(500, "invalid digest format")
        if not blob.exists():
            raise Refusal(500, f"open {blob.name}: no such file or directory")
        if heads[0] != b"GGUF":
            raise Refusal(400, "supplied file was not in GGUF format")
        try:
            return CausalModel(blob), digest.removeprefix("sha256:")
        except Exception:
            raise Refusal(500, "unexpected EOF") from None

    def progress(self, request, steps):
        if request.get("stream", True):
            return self.stream(steps)
        return self.reply(list(steps)[-1])

    def delete(self, request):
        self.find(request)
        del self.server.models[full_name(request["model"])]
        self.reply("")

    # FAULTS
    def hang(self):
        self.server.released.wait(30)
        self.close_connection = True

    def break_off(self):
        self.close_connection = True  # without the last chunk, and in the middle of a line
        data = b'{"model":"smollm2","created_at":"2026-01-01T00:00:00Z","respo'
        self.wfile.write(f"{len(data) + 40:x}\r\n".encode() + data)

    def garble(self, data):
        self.chunk(data)
        self.chunk(b"")


def check_folder(folder):
    """Refuse what Ollama's converter refuses of a Hugging Face folder."""
    if not (folder / "config.json").exists():
        raise Refusal(500, "open config.json: no such file or directory")
    try:
        kinds = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except ValueError as error:
        raise Refusal(500, f"parse config.json: {error}") from None
    except LookupError:
        raise Refusal(500, "unknown architecture") from None
    if kinds[0] not in [f"{name}ForCausalLM" for name in FOLDERS]:
        raise Refusal(500, f'unsupported architecture "{kinds[0]}"')
    if not (folder / "tokenizer.json").exists():
        raise Refusal(500, "unknown tokenizer format")


ROUTES = {
    ("GET", "/api/version"): Handler.version,
    ("GET", "/api/tags"): Handler.list_all,
    ("POST", "/api/show"): Handler.show,
    ("POST", "/api/generate"): Handler.generate,
    ("POST", "/api/chat"): Handler.chat,
    ("POST", "/api/create"): Handler.create,
    ("DELETE", "/api/delete"): Handler.delete,
}
WHOLE = {  # in the place of every answer
    "not Ollama": lambda handler: handler.reply("<h1>It works!</h1>", kind="text/html"),
    "another API": lambda handler: handler.reply({"name": "somebody else"}),
    "a list": lambda handler: handler.reply([1, 2, 3]),
    "redirect": lambda handler: handler.reply("", 302),
    "403": lambda handler: handler.reply({"error": "remote inference is disabled"}, 403),
    "500": lambda handler: handler.reply({"error": "llama runner has terminated"}, 500),
    "503": lambda handler: handler.reply({"error": "server busy, please try again"}, 503),
    "502 page": lambda handler: handler.reply("<h1>Bad Gateway</h1>", 502, "text/html"),
    "hangs": Handler.hang,
    "hangs up": lambda handler: setattr(handler, "close_connection", True),
}
MID_STREAM = {  # after three parts of a stream
    "error line": lambda handler: handler.garble(b'{"error":"an error was encountered"}\n'),
    "cut off": Handler.break_off,
    "hangs midway": Handler.hang,
    "malformed": lambda handler: handler.garble(b'{"model": "smollm2", "respon\n'),
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0 means any that is free")
    parser.add_argument("--model", type=Path, default=root / "models" / "smollm2")
    arguments = parser.parse_args()
    models = {}
    if (arguments.model / "config.json").exists():
        models["smollm2"] = CausalModel(arguments.model)  # the name that the lessons ask for
    with StandIn(models, arguments.port) as server:
        print(server.url, flush=True)
        threading.Thread(target=import_early, daemon=True).start()
        threading.Event().wait()


if __name__ == "__main__":
    main()
