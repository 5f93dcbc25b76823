"""GGUF: write the GPT-2 that you trained into one file, and let Ollama continue your text.

Run:    uv run src/llm/12_gguf.py
Needs:  models/gpt2_mini/ (and a running Ollama, for the comparison)
Makes:  models/ollama/my_gpt2.gguf, models/ollama/my_gpt2_q8_0.gguf, models/ollama/Modelfile
Expect: agreement >= 95%, q8_0_bytes <= 2,000,000

A GGUF file holds everything that a program needs to run a model: sizes, tokenizer and weights.
llama.cpp, the engine in Ollama, reads the file without Python. If one matrix is transposed or one
token has the wrong type, the model writes nonsense, and no error message says so. Therefore PyTorch
and Ollama continue the same texts, and the lesson compares their tokens.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import gguf
import requests

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "def forward(self",
    "class Linear(",
    "raise ValueError(",
    "if not isinstance(",
    "import torch",
]
LENGTH = 24  # the most tokens that follow a prompt
MODELFILE = "FROM ./my_gpt2.gguf\nTEMPLATE {{ .Prompt }}\n"  # for the command ollama create
SESSION = requests.Session()
SESSION.trust_env = False  # no proxy between this machine and itself


def load_model(folder, command):
    """Return the GPT-2 in a Hugging Face folder, on the CPU in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        if model.config.model_type != "gpt2":
            raise ValueError(f"it holds a model of the type {model.config.model_type}")
        return model, AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # no folder, damaged files, or a different kind of model
        reason = str(error).partition("\n")[0]
        sys.exit(f"Cannot read a GPT-2 from {folder}: {reason}. Make one with: {command}")


# WRITE: first a header of names and values, with the tokenizer, then the tensors.
def add_sizes(writer, config, form):
    # Ollama reads 0, the number of F32, as unknown. Its option -q then refuses the file.
    writer.add_file_type(7 if form == "Q8_0" else 1)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def add_tokenizer(writer, tokenizer, config):
    tokens = []
    types = []
    for number in range(config.vocab_size):
        added = tokenizer.added_tokens_decoder.get(number)
        kind = "NORMAL"
        if added:  # CONTROL: a signal such as <|endoftext|>, never a part of the text
            kind = "CONTROL" if added.special else "USER_DEFINED"
        elif number >= len(tokenizer):  # the model's vocabulary was rounded up
            kind = "UNUSED"
        types.append(gguf.TokenType[kind])
        tokens.append(tokenizer.convert_ids_to_tokens(number) or f"<unused {number}>")
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how a text is split into words before the merges
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_add_bos_token(False)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_id is not None:
        writer.add_eos_token_id(config.eos_token_id)


# README: start
def add_tensors(writer, model, form):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    for name, tensor in model.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T.contiguous()  # GPT-2 stores these the other way round
        kind = gguf.GGMLQuantizationType.F32
        if tensor.dim() == 2 and "wpe" not in name:  # not biases, norms and positions
            kind = gguf.GGMLQuantizationType[form]
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(names.get_name(name, [".weight", ".bias"]), data, raw_dtype=kind)
    # README: end


def write_gguf(path, model, tokenizer, form):
    """Write a temporary file, then rename it. A crash never leaves half a model."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        writer = gguf.GGUFWriter(part, "gpt2")
        add_sizes(writer, model.config, form)
        add_tokenizer(writer, tokenizer, model.config)
        add_tensors(writer, model, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


# SERVE: requests as in llm/08.
def server_url(address):
    """Read an address as the ollama command reads OLLAMA_HOST. Each part of it may be missing."""
    form = r"(?:(.*?)://)?(\[.*?\]|[^:/]*:[^:/]*:[^/]*|[^:/]*)(?::([^/]*))?/*(.*)"
    scheme, host, port, path = re.fullmatch(form, address.strip(" \"'")).groups("")
    if not port.isdecimal() or int(port) > 65535:
        port = {"http": 80, "https": 443}.get(scheme, 11434)
    host = host.strip("[]") or "127.0.0.1"
    if ":" in host:  # IPv6
        host = f"[{host}]"
    return f"{scheme or 'http'}://{host}:{port}/{path}".rstrip("/")


def call_server(url, **content):
    """Return the server's answer to a request, or stop with a sentence."""
    try:
        method = SESSION.post if content else SESSION.get
        response = method(url, timeout=(5, 300), **content)
        answer = response.json() if response.content else {}
    except requests.RequestException as error:
        start = "Is Ollama running? Start it with: scripts/ollama.sh start"
        sys.exit(f"No answer from {url} ({type(error).__name__}). {start}")
    if "error" in answer:
        sys.exit(f"The server answers: {answer['error']!r}")
    return answer


def create_model(url, name, files, **settings):
    """Upload files under their SHA-256 digests, and let the server make a model of them."""
    digests = {}
    for path in files:
        data = path.read_bytes()  # once, because a second run may replace the file
        digests[path.name] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        blob = f"{url}/api/blobs/{digests[path.name]}"
        if SESSION.head(blob, timeout=5).status_code != 200:
            call_server(blob, data=data)
    call_server(
        f"{url}/api/create", json={"model": name, "files": digests, "stream": False, **settings}
    )


# COMPARE: each program continues a text with the most likely tokens.
def ask_torch(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    count = ids["input_ids"].shape[1]  # input_ids: [1, count]
    if not 0 < count <= model.config.n_positions - LENGTH:
        limit = f"{LENGTH} tokens follow, and the model reads {model.config.n_positions} in all."
        sys.exit(f"The text {prompt[:30]!r} has {count} tokens: {limit}")
    written = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False)
    return tokenizer.decode(written[0, count:]).removesuffix(tokenizer.eos_token or "")


def compare_texts(tokenizer, ours, answer):
    """Return how many tokens are equal, how many were compared, and the text that was not."""
    theirs = answer["response"]
    kept = ours.partition("\ufffd")[0]  # Ollama leaves out what is not a whole letter
    if not answer["done"]:  # the server ends an answer that repeats itself
        kept = kept[: len(theirs)]
    if kept != ours:
        theirs = theirs[: len(kept)]
    first = tokenizer.encode(kept)
    second = tokenizer.encode(theirs)
    same = len(os.path.commonprefix([first, second]))
    return same, max(len(first), len(second)), ours[len(kept) :]


def measure_agreement(url, name, path, tokenizer, texts):
    """Let Ollama continue the texts. Return the share of tokens that are PyTorch's."""
    create_model(url, name, [path], template="{{ .Prompt }}")
    request = {"model": name, "raw": True, "stream": False}
    request["options"] = {"temperature": 0, "repeat_penalty": 1, "num_predict": LENGTH}
    same = 0
    total = 0
    for prompt, ours in texts.items():
        answer = call_server(f"{url}/api/generate", json={**request, "prompt": prompt})
        equal, compared, rest = compare_texts(tokenizer, ours, answer)
        print(f"{prompt!r}\n  PyTorch: {ours!r}\n  Ollama:  {answer['response']!r}")
        if rest:
            print(f"  Not compared: {rest!r}")
        same += equal
        total += compared
    return f"{same / total:.2%}" if total >= 20 else "not measured"


def main(quick=False, folder=None):
    models = ROOT / ("models/quick" if quick else "models")
    command = "uv run src/llm/05_pretrain_gpt2.py" + (" --quick" if quick else "")
    model, tokenizer = load_model(folder or models / "gpt2_mini", command)
    print(f"{model.num_parameters():,} parameters")
    files = {"F32": models / "ollama/my_gpt2.gguf", "Q8_0": models / "ollama/my_gpt2_q8_0.gguf"}
    (models / "ollama").mkdir(parents=True, exist_ok=True)
    for form, path in files.items():
        write_gguf(path, model, tokenizer, form)
    (models / "ollama/Modelfile").write_text(MODELFILE)

    url = server_url(os.environ.get("OLLAMA_HOST", ""))
    version = call_server(f"{url}/api/version")["version"]
    texts = {prompt: ask_torch(model, tokenizer, prompt) for prompt in PROMPTS}
    shares = {}
    for form, path in files.items():
        print(f"{form}, in Ollama {version} at {url}:")
        name = path.stem.replace("_", "-") + ("-quick" if quick else "")
        shares[form] = measure_agreement(url, name, path, tokenizer, texts)
    large, small = (path.stat().st_size for path in files.values())
    print(
        f"Result: server = {version}, bytes = {large:,}, agreement = {shares['F32']}, "
        f"q8_0_bytes = {small:,}, q8_0_agreement = {shares['Q8_0']}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, in models/quick/")
    parser.add_argument("--model", type=Path, help="a folder with a different GPT-2")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.model)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
    except (LookupError, TypeError, ValueError) as error:
        sys.exit(f"This is not an answer of Ollama: {error!r}")
