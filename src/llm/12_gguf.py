"""GGUF: write the GPT-2 that you trained into one file, and let Ollama continue your text.

Run:    uv run src/llm/12_gguf.py
Needs:  models/gpt2_mini/ (and a running Ollama, for the comparison)
Makes:  models/ollama/my_gpt2.gguf, models/ollama/my_gpt2_q8_0.gguf, models/ollama/Modelfile
Expect: agreement >= 95%, q8_0_bytes <= 2,000,000

A GGUF file holds everything that llama.cpp, the engine in Ollama, needs to run a model: sizes,
tokenizer and weights. If one matrix is transposed, the model writes nonsense, and no error message
says so. Therefore PyTorch and Ollama continue the same texts, and the lesson compares their tokens.
"""

import argparse
import hashlib
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import requests

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["def forward(self", "class Linear(", "raise ValueError(", "if x is None", "import torch"]
LENGTH = 24  # the most tokens that follow a prompt. Ollama ends a text that repeats 30 tokens
SESSION = requests.Session()
SESSION.trust_env = False  # no proxy between this machine and itself


# WRITE: first a header of names and values, with the tokenizer, then the tensors.
def add_header(writer, config, tokenizer, form):
    # 7 is Q8_0, and 1 is F16. Not 0 for F32: Ollama's option -q would refuse the file.
    writer.add_file_type(7 if form == "Q8_0" else 1)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    types = [gguf.TokenType.NORMAL] * config.vocab_size
    for number, added in tokenizer.added_tokens_decoder.items():
        # CONTROL: a signal such as <|endoftext|>, never a part of the text
        types[number] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how a text is split into words before the merges
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_types(types)
    writer.add_add_bos_token(False)
    gguf.SpecialVocab(tokenizer.name_or_path, load_merges=True).add_to_gguf(writer)


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


def write_gguf(path, model, tokenizer, form):
    """Write a temporary file, then rename it. A crash never leaves half a model."""
    with TemporaryDirectory(dir=path.parent, suffix=".part") as folder:
        part = Path(folder, path.name)
        writer = gguf.GGUFWriter(part, "gpt2")
        add_header(writer, model.config, tokenizer, form)
        add_tensors(writer, model, form)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.replace(path)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


# SERVE: requests as in llm/08.
def server_url(address):
    """Read an address as the ollama command reads OLLAMA_HOST. Each part of it may be missing."""
    form = r"(?:(.*?)://)?(\[.*?\]|[^:/]*:[^:/]*:[^/]*|[^:/]*)(?::([^/]*))?/*(.*)"
    scheme, host, port, path = re.fullmatch(form, address.strip(" \"'")).groups("")
    if not port.isdecimal() or int(port) > 65535:
        port = {"http": 80, "https": 443}.get(scheme, 11434)
    if ":" in host:  # IPv6
        host = f"[{host.strip('[]')}]"
    return f"{scheme or 'http'}://{host or '127.0.0.1'}:{port}/{path}".rstrip("/")


def call_server(method, url, **content):
    """Return the server's answer to a request, or stop with its error message."""
    response = SESSION.request(method, url, timeout=(5, 300), **content)
    answer = response.json() if response.content else {}
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
        if not SESSION.head(blob, timeout=5).ok:
            call_server("POST", blob, data=data)
    request = {"model": name, "files": digests, "stream": False, **settings}
    call_server("POST", f"{url}/api/create", json=request)


# COMPARE: each program continues a text with the most likely tokens.
def ask_torch(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    count = ids["input_ids"].shape[1]  # input_ids: [1, count]
    limit = model.config.n_positions - LENGTH
    if not 0 < count <= limit:
        sys.exit(f"The text {prompt[:30]!r} has {count} tokens. It may have 1 to {limit}.")
    written = model.generate(**ids, max_new_tokens=LENGTH, do_sample=False)
    return tokenizer.decode(written[0, count:]).removesuffix(tokenizer.eos_token or "")


def measure_agreement(url, name, tokenizer, texts):
    """Let Ollama continue the texts. Return the share of tokens before the first difference."""
    greedy = {"temperature": 0, "repeat_penalty": 1, "num_predict": LENGTH}
    same = 0
    total = 0
    for prompt, ours in texts.items():
        request = {"model": name, "prompt": prompt, "raw": True, "stream": False, "options": greedy}
        theirs = call_server("POST", f"{url}/api/generate", json=request)["response"]
        print(f"{prompt!r}\n  PyTorch: {ours!r}\n  Ollama:  {theirs!r}")
        whole, incomplete, rest = ours.partition("\ufffd")
        if incomplete:  # a part of a letter, which Ollama leaves out
            print(f"  Not compared: {incomplete + rest!r}")
            theirs = theirs[: len(whole)]
        pair = [tokenizer.encode(whole), tokenizer.encode(theirs)]
        same += len(os.path.commonprefix(pair))  # equal tokens at the beginning
        total += len(max(pair, key=len))
    return f"{same / total:.2%}" if total >= 20 else "not measured"


def main(quick=False):
    from transformers import AutoTokenizer, GPT2LMHeadModel  # takes seconds to import

    models = ROOT / ("models/quick" if quick else "models")
    try:
        model = GPT2LMHeadModel.from_pretrained(models / "gpt2_mini", dtype="float32")
        tokenizer = AutoTokenizer.from_pretrained(models / "gpt2_mini")
    except Exception as error:  # no folder, or damaged files
        command = "uv run src/llm/05_pretrain_gpt2.py" + (" --quick" if quick else "")
        sys.exit(f"Cannot load {models / 'gpt2_mini'}: {error}. Make it with: {command}")
    files = {"F32": models / "ollama/my_gpt2.gguf", "Q8_0": models / "ollama/my_gpt2_q8_0.gguf"}
    (models / "ollama").mkdir(parents=True, exist_ok=True)
    for form, path in files.items():
        write_gguf(path, model, tokenizer, form)
    (models / "ollama/Modelfile").write_text("FROM ./my_gpt2.gguf\nTEMPLATE {{ .Prompt }}\n")

    url = server_url(os.environ.get("OLLAMA_HOST", ""))
    version = call_server("GET", f"{url}/api/version")["version"]
    texts = {prompt: ask_torch(model, tokenizer, prompt) for prompt in PROMPTS}
    result = f"Result: server = {version}"
    for form, path in files.items():
        print(f"{form}, in Ollama {version} at {url}:")
        name = path.stem.replace("_", "-") + ("-quick" if quick else "")
        create_model(url, name, [path], template="{{ .Prompt }}")
        share = measure_agreement(url, name, tokenizer, texts)
        prefix = "q8_0_" if form == "Q8_0" else ""
        result += f", {prefix}bytes = {path.stat().st_size:,}, {prefix}agreement = {share}"
    print(result)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, in models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (requests.RequestException, LookupError, TypeError) as error:
        sys.exit(f"No answer from Ollama. Start it with: scripts/ollama.sh start ({error!r})")
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
