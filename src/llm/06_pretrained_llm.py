"""Pretrained LLM: load a model that others have trained, and choose how it picks its next word.

Run:    uv run src/llm/06_pretrained_llm.py
Needs:  models/gpt2_mini/
Makes:  nothing
Expect: left_padded = 3 of 3, gpt2_parameters = 124,439,808

Every causal language model answers one question: how likely is each token to come next? Greedy
decoding takes the likeliest, sampling throws dice, temperature and top-p decide how loaded they are.
"""

import argparse
import contextlib
import sys
import threading
from pathlib import Path

import requests
import torch

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
MODEL, LENGTH, TEMPERATURES, TOP_P = "gpt2", 50, (0.1, 0.8, 1.5), 0.9
PROMPTS = [
    "The cat sat on the mat and",
    "Once upon a time in a land far away",
    "The best way to learn machine learning is",
]


# LOAD: a folder, or a name on the Hugging Face Hub. Their own search for a Hub that cannot be reached
# takes three quarters of a minute, so we ask first; in a thread, since even finding its address can hang.
def hub_answers(seconds=5):
    from huggingface_hub import constants

    answers = []

    def ask():
        with contextlib.suppress(Exception):
            answers.append(requests.head(constants.ENDPOINT, timeout=seconds))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers) and not constants.HF_HUB_OFFLINE


def load_pretrained(name, fallback):
    """Return (model, tokenizer, folder) of a folder, or of a name on the Hub, kept in models/.

    Where the Hub is out of reach, fallback takes the place of MODEL; exits with a sentence otherwise.
    """
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    make = "uv run src/llm/05_pretrain_gpt2.py" + (" --quick" if "quick" in fallback.parts else "")
    folder = next((path for path in (Path(name), ROOT / name) if path.is_dir()), None)
    if folder is None:
        folder, online = ROOT / "models" / Path(name).name, hub_answers()
        files = {"allow_patterns": ["*.json", "*.txt", "*.model", "*.safetensors"]}
        try:
            if online:
                snapshot_download(name, local_dir=folder, **files)
            elif not (folder / "config.json").exists():
                folder = snapshot_download(name, local_files_only=True, **files)
        except Exception as error:
            reason = [*str(error).splitlines(), ""][0] if online else "the Hub cannot be reached"
            if online or name != MODEL or not (fallback / "config.json").exists():
                sys.exit(f"Cannot load {name}: {reason}. Make a model of your own: {make}")
            print(f"Cannot load {name}: {reason}. Going on with a model of our own.")
            folder = fallback
    safe = {"trust_remote_code": False}  # run no code that comes with a model
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe)
    except Exception as error:
        reason = f"it is incomplete or damaged ({type(error).__name__})"
        sys.exit(f"Cannot read the model in {folder}: {reason}. Make one of your own: {make}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none of its own
    return model.to(DEVICE).eval(), tokenizer, Path(folder)


def check(prompt, length, model, tokenizer):
    """Exit with a sentence if there is no prompt, or if it and its continuation do not fit."""
    tokens, limit = len(tokenizer(prompt)["input_ids"]), model.config.max_position_embeddings
    if not tokens or tokens + length > limit:
        sys.exit(
            f"A prompt needs 1 to {limit - length} tokens, since the model reads {limit} at most "
            f"and is to write {length}. This one has {tokens}: give another --prompt TEXT"
        )


# PROBABILITIES: the temperature divides the logits before the softmax; the order stays the same.
@torch.inference_mode()
def show_likeliest(model, tokenizer, prompt):
    ids = tokenizer(prompt, return_tensors="pt").to(DEVICE)["input_ids"]
    logits = model(ids).logits[0, -1].float()  # [vocabulary]
    likeliest = logits.topk(5).indices
    print("Next:", ", ".join(repr(tokenizer.decode(token)) for token in likeliest))
    for temperature in TEMPERATURES:
        probabilities = torch.softmax(logits / temperature, dim=0)
        nucleus = (probabilities.sort(descending=True).values.cumsum(0) < TOP_P).sum() + 1
        shown = " ".join(f"{probability:6.1%}" for probability in probabilities[likeliest])
        print(f"  at temperature {temperature}: {shown}; tokens kept by top-p {TOP_P}: {nucleus}")


# GENERATE: left padding, so that every prompt ends where its continuation begins.
@torch.inference_mode()
def generate(model, tokenizer, prompts, length, side="left", **how):
    """Return the continuations of several prompts, computed as one batch."""
    tokenizer.padding_side = side
    batch = tokenizer(prompts, return_tensors="pt", padding=True).to(DEVICE)
    how = {"max_new_tokens": length, "pad_token_id": tokenizer.pad_token_id, **how}
    ids = model.generate(**batch, **how)[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def share_of_repeats(text):
    """Return how many of the runs of three words in a text have stood there before."""
    words = text.split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(runs)) / max(1, len(runs))


def count_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):  # shapes without numbers, so nothing is downloaded
        return GPT2LMHeadModel(GPT2Config()).num_parameters()


def main(quick=False, model=None, prompt=PROMPTS[0]):
    folder = ROOT / ("models/quick" if quick else "models") / "gpt2_mini"
    name, length = model or (str(folder) if quick else MODEL), 20 if quick else LENGTH
    model, tokenizer, folder = load_pretrained(name, folder)
    for text in (prompt, *PROMPTS):
        check(text, length, model, tokenizer)
    print(f"Model: {folder.name}, {model.num_parameters():,} parameters on {DEVICE}")
    show_likeliest(model, tokenizer, prompt)
    torch.manual_seed(42)
    for temperature in TEMPERATURES:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0}
        text = generate(model, tokenizer, [prompt], length, **how)[0]
        print(f"Temperature {temperature}: {text!r}")
    how = {"do_sample": True, "top_p": TOP_P, "top_k": 0}
    sampled = generate(model, tokenizer, PROMPTS, length, **how)
    print(f"Top-p {TOP_P}: {sampled[0]!r}")
    single = [generate(model, tokenizer, [text], length, do_sample=False)[0] for text in PROMPTS]
    print(f"Greedy: {single[0]!r}")
    equal = {}
    for side in ("left", "right"):
        batch = generate(model, tokenizer, PROMPTS, length, side, do_sample=False)
        equal[side] = sum(one == other for one, other in zip(single, batch, strict=True))
        print(f"Padded on the {side}, {equal[side]} of 3 greedy texts are the same as one by one")
    repeats = [sum(map(share_of_repeats, texts)) / len(texts) for texts in (single, sampled)]
    print(f"Repeated runs of three words: greedy {repeats[0]:.0%}, top-p {repeats[1]:.0%}")
    print(
        f"Result: left_padded = {equal['left']} of 3, greedy_repeats = {repeats[0]:.1%}, "
        f"gpt2_parameters = {count_gpt2():,}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: the model of 05's smoke run")
    cli.add_argument("--model", help=f"a folder, or a name on the Hub (default: {MODEL})")
    cli.add_argument("--prompt", default=PROMPTS[0], help="what it is to continue")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing was written.")
