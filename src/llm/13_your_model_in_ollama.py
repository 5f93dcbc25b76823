"""Your model in Ollama: merge your adapter into SmolLM2 and talk to the model that you tuned.

Run:    uv run src/llm/13_your_model_in_ollama.py
Needs:  models/smollm2/, models/smollm2_lora/ (and a running Ollama, for the comparison)
Makes:  models/my_tutor/
Expect: equal >= 15

Merging adds the adapter's changes to the weights, so that two folders become one ordinary model.
Ollama imports the folder. An import can go wrong without an error message, and the answers still
look sensible. Only a comparison shows it: PyTorch and Ollama answer the same sixteen questions.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import requests
from tokenizers import Regex, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 60  # the most tokens in an answer
ROPE_THETA_ON_TOP = True  # False: as transformers writes it, where Ollama does not look
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""  # the chat format of SmolLM2, in the language of Ollama's templates
# Without these settings, Ollama draws each token at random and avoids tokens written before.
SETTINGS = {"temperature": 0, "repeat_penalty": 1, "stop": ["<|im_start|>", "<|im_end|>"]}
WORDS = (  # Qwen2's rule to split a text into words. Ollama knows this rule, not SmolLM2's own
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SESSION = requests.Session()
SESSION.trust_env = False  # no proxy between this machine and itself


# MERGE: the result is a folder that any program for language models can read.
def merge_adapter(base, adapter):
    """Return the base model with the adapter merged into it, and its tokenizer."""
    from peft import PeftConfig, PeftModel  # takes seconds to import
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if trained_on is None or ROOT / trained_on != base:
        raise ValueError(f"it was trained on {trained_on}, not on {base}")
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model, AutoTokenizer.from_pretrained(base)


def save_model(model, tokenizer, folder):
    """Write a folder of a temporary name, then rename it. A crash never leaves half a model."""
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    if ROPE_THETA_ON_TOP:  # transformers writes it inside rope_parameters, and Ollama takes 10,000
        model.config.rope_theta = model.config.rope_parameters["rope_theta"]
    with TemporaryDirectory(dir=folder.parent, suffix=".part") as part:
        whole = Path(part, folder.name)
        model.half().save_pretrained(whole)  # 16 bits for a weight, as Ollama stores them
        tokenizer.save_pretrained(whole)
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)
    print(f"Saved {folder.relative_to(ROOT).as_posix()}/")


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


# COMPARE: the most likely answer of each program to each question.
def choose_questions():
    """Return eight learned terms in words that were not learned, and eight others."""
    with (ROOT / "data/qa.jsonl").open(encoding="utf-8-sig") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    learned = [row["questions"][-1] for row in rows if row["split"] == "train"]
    unseen = [row["questions"][0] for row in rows if row["split"] == "test"]
    return {"Learned terms, in new words": learned[::5][:8], "Terms not taught": unseen[:8]}


def answers_agree(model, tokenizer, url, name, question):
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=LENGTH, do_sample=False)
    count = prompt["input_ids"].shape[1]  # input_ids: [1, count]
    ours = tokenizer.decode(written[0, count:], skip_special_tokens=True)

    request = {"model": name, "messages": chat, "stream": False, "options": {"num_predict": LENGTH}}
    answer = call_server("POST", f"{url}/api/chat", json=request)
    theirs = answer["message"]["content"]
    if not answer["done"]:  # the server ends an answer that repeats itself
        ours = ours[: len(theirs)]
    print(f"{question}\n  PyTorch: {ours!r}\n  Ollama:  {theirs!r}")
    return ours == theirs


def main(quick=False):
    warnings.simplefilter("ignore")  # peft uses names that transformers will change
    models = ROOT / ("models/quick" if quick else "models")
    folder = models / "my_tutor"
    try:
        chosen = choose_questions()
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"Cannot read data/qa.jsonl: {error!r}")
    try:
        model, tokenizer = merge_adapter(models / "smollm2", models / "smollm2_lora")
    except Exception as error:  # a missing or damaged folder, or an adapter of a different model
        command = "uv run src/llm/07_finetune_lora.py" + (" --quick" if quick else "")
        sys.exit(f"Cannot merge {models / 'smollm2_lora'}: {error}. Make it with: {command}")
    save_model(model, tokenizer, folder)
    model = type(model).from_pretrained(folder, dtype="float32")  # the rounded weights

    url = server_url(os.environ.get("OLLAMA_HOST", ""))
    version = call_server("GET", f"{url}/api/version")["version"]
    name = "my-tutor-quick" if quick else "my-tutor"
    create_model(url, name, folder.iterdir(), template=TEMPLATE, system=SYSTEM, parameters=SETTINGS)
    agree = []
    for title, questions in chosen.items():
        print(f"{title}, in Ollama {version} at {url}:")
        for question in questions:
            agree.append(answers_agree(model, tokenizer, url, name, question))
    words = "I do not understand dropout. Help me."
    request = {"model": name, "stream": False, "messages": [{"role": "user", "content": words}]}
    print(f'Talk to your model:\n  ollama run {name} "{words}"')
    print(f"  curl {url}/api/chat -d '{json.dumps(request)}'")
    print(f"Result: server = {version}, questions = {len(agree)}, equal = {sum(agree)}")


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
