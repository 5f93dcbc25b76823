"""Your model in Ollama: merge your adapter, write one GGUF file, and let Ollama answer with it.

Run:    uv run src/llm/09_your_model_in_ollama.py
Needs:  models/gpt2_mini/, models/gpt2_lora/ (and a running Ollama, for the second half)
Makes:  models/ollama/my_gpt2.gguf, models/ollama/Modelfile
Expect: agreement >= 90 %

A GGUF file holds a whole model, without Python. If all in it is right, Ollama writes the very tokens
that PyTorch writes; with one matrix the wrong way round, nonsense. So both are asked, and compared.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import gguf
import requests
import torch

ROOT = Path(__file__).resolve().parents[2]
FILE, LENGTH, END, DONE = "my_gpt2.gguf", 40, "<|endoftext|>", {"status": "success"}
DIRECT = {"timeout": (5, 300), "allow_redirects": False, "proxies": {"http": "", "https": ""}}
QUESTION = "Question: {}\nAnswer:"  # the form that llm/07_finetune_lora.py has tuned for
TEMPLATE = QUESTION.format("{{ .Prompt }}") + "{{ .Response }}" + END  # for Ollama, in Go's terms
STOP = [END, "Question:"]  # where an answer ends
RULES = "".join(f'PARAMETER stop "{word}"\n' for word in STOP)
MODELFILE = f'FROM ./{FILE}\nTEMPLATE """{TEMPLATE}"""\n{RULES}'
CHAT = """{% for m in messages %}{{ 'Question: ' + m.content + '\\nAnswer:' if m.role == 'user'
else m.content + '<|endoftext|>' }}{% endfor %}"""  # for other programs, in Jinja's terms
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 48)  # blocks: as many as the largest has


# LOAD: an adapter and its base become one model, on the CPU in float32: it is the reference.
def load_model(folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter, base = folder / "adapter_config.json", str(folder.resolve())
    if adapter.exists():
        base = json.loads(adapter.read_text())["base_model_name_or_path"]
    base = base if base == "gpt2" else ROOT / base  # a name on the Hub, or a folder of this course
    if base != "gpt2" and not (base / "config.json").exists():
        raise FileNotFoundError(f"there is no model in {base}")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if model.config.model_type != "gpt2":
        raise ValueError("this lesson knows the tensors of GPT-2 only")
    if adapter.exists():
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return model.eval(), AutoTokenizer.from_pretrained(base)


@torch.inference_mode()
def ask_torch(model, tokenizer, question, length):
    ids = tokenizer(QUESTION.format(question), return_tensors="pt")
    end = model.config.eos_token_id
    made = model.generate(**ids, max_new_tokens=length, do_sample=False, pad_token_id=end)
    text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.split(STOP[1])[0].rstrip("\ufffd")  # not half a letter


# CONVERT: llama.cpp, Ollama's engine, has names of its own, and keeps matrices as nn.Linear does.
def write_gguf(path, model, tokenizer, quantize):
    F32, kind = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType[quantize.upper()]
    config, writer = model.config, gguf.GGUFWriter(path, "gpt2")
    ids = range(config.vocab_size)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(0 if kind == F32 else gguf.LlamaFileType.MOSTLY_Q8_0)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # how text is split before BPE; "default" does it otherwise
    writer.add_token_list(tokenizer.convert_ids_to_tokens(ids))
    writer.add_token_types([3 if i == config.eos_token_id else 1 for i in ids])  # 3: not a text
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    for name, tensor in model.state_dict().items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T.contiguous()  # a Conv1D, the other way round from nn.Linear
        dtype = kind if tensor.dim() == 2 and "wpe" not in name else F32
        name = NAMES.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# SAVE: as in basics/07_activations.py.
def save(write, path):
    """Let write(file) fill a new file, then rename it to path; exit with a sentence if that fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        sys.exit(
            f"Cannot write {path}: {error}. Make room or mend its permissions, then run again."
        )
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


# SERVE: through Ollama's API, as in llm/08_serve_ollama.py, which tells more faults apart.
def server_url(address):
    """Read an address as the ollama command reads OLLAMA_HOST: each part of it may be missing."""
    form = r"(?:(https?)://)?(\[[\da-fA-F:]+\]|[\w.-]*)(?::(\d{1,5}))?/?"
    if not (match := re.fullmatch(form, address.strip("\"' "))):
        sys.exit(f"{address!r} is no server's address; one looks like http://127.0.0.1:11434")
    port = match[3] or {"http": 80, "https": 443}.get(match[1], 11434)
    return f"{match[1] or 'http'}://{match[2] or '127.0.0.1'}:{port}"


def post(url, **content):
    """Return the JSON objects of an answer; an error may come after a good beginning."""
    answer = requests.post(url, **DIRECT, **content)
    parts = [json.loads(line) for line in answer.content.splitlines()]
    if errors := [part["error"] for part in parts if "error" in part]:
        raise ValueError(errors[0])
    return parts


def ask_ollama(url, name, path, questions, length):
    """Make a model of a file, uploaded under its sha256 if it is new; return (version, answers)."""
    try:
        version = requests.get(f"{url}/api/version", **DIRECT).json()["version"] + ""
    except requests.ConnectionError:
        print(f"No server answers at {url}. Start one (scripts/ollama.sh start), then type:")
        print(" ", shlex.join(["ollama", "create", name, "-f", str(path.with_name("Modelfile"))]))
        print(" ", shlex.join(["ollama", "run", name, questions[0]]))
        return "none", []
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    if requests.head(f"{url}/api/blobs/{digest}", **DIRECT).status_code != 200:
        post(f"{url}/api/blobs/{digest}", data=path.read_bytes())
    request = {"model": name, "files": {path.name: digest}, "template": TEMPLATE}
    if post(f"{url}/api/create", json=request | {"parameters": {"stop": STOP}})[-1] != DONE:
        raise ValueError("the creation did not come to its end")
    request = {"model": name, "raw": True, "stream": False}  # raw: no template around the prompt
    request["options"] = {"temperature": 0, "repeat_penalty": 1, "num_predict": length}
    prompts = [request | {"prompt": QUESTION.format(question)} for question in questions]
    parts = [post(f"{url}/api/generate", json=prompt)[-1] for prompt in prompts]
    return re.sub(r"[^\w.+-]", "?", version), [part["response"] + "" for part in parts]


def main(quick=False, model=None, quantize="f32", url=""):
    folder, length = ROOT / ("models/quick" if quick else "models"), 8 if quick else LENGTH
    source, name = model or folder / "gpt2_lora", f"my-gpt2{'-quick' * quick}"
    url, path = server_url(url or os.environ.get("OLLAMA_HOST", "")), folder / "ollama" / FILE
    warnings.simplefilter("ignore")  # peft imports what torchao is about to rename
    try:
        rows = map(json.loads, (ROOT / "data" / "qa.jsonl").read_text("utf-8").splitlines())
        questions = [row["question"] for row in rows if row["held_out"]]
        model, tokenizer = load_model(source)
    except Exception as error:
        reason, flag = str(error).partition("\n")[0], " --quick" * quick
        sys.exit(f"{source} fails: {reason}. Make it: uv run src/llm/07_finetune_lora.py{flag}")
    print(f"{model.num_parameters():,} parameters, merged in float32, to be saved as {quantize}")
    save(lambda file: write_gguf(file.name, model, tokenizer, quantize), path)
    save(lambda file: file.write(MODELFILE.encode()), path.with_name("Modelfile"))
    try:
        version, answers = ask_ollama(url, name, path, questions, length)
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        sys.exit(f"{url} does not do as Ollama does: {str(error)!r}. The files are written.")
    same = total = 0
    for question, theirs in zip(questions, answers, strict=False):
        ours = ask_torch(model, tokenizer, question, length)
        print(f"{question}\n  PyTorch: {ours!r}\n  Ollama:  {theirs!r}")
        ids = [tokenizer.encode(text + END) for text in (ours, theirs)]
        same, total = same + len(os.path.commonprefix(ids)), total + max(map(len, ids))
    share = f"{same / total:.2%}" if total else "not measured"
    print(f"Result: server = {version}, bytes = {path.stat().st_size:,}, agreement = {share}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 8 tokens, models/quick/")
    cli.add_argument("--model", type=Path, help="another folder: an adapter's, or models/gpt2_mini")
    cli.add_argument("--quantize", choices=["f32", "q8_0"], default="f32")
    cli.add_argument("--url", default="", help="the server; else OLLAMA_HOST; else this machine's")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
