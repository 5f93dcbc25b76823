"""KV cache: write each token without computing the whole text again.

Run:    uv run src/llm/10_kv_cache.py
Needs:  models/gpt2_mini/, models/smollm2/
Makes:  nothing
Expect: same_text = yes, logit_difference <= 0.001, smollm2_same_text = yes

A causal model never looks at later tokens, so the keys and values of earlier tokens do not change
when a token is added. Keep them, and each step computes one token instead of the whole text.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
PROMPT = "def forward(self"
QUESTION = "What is the capital of France?"
LENGTHS = [32, 64, 128, 256]  # tokens in all; 256 is the context of llm/05
ROUNDS = 5


# MODEL: the GPT-2 of llm/05, but each attention also takes and returns a cache.
class CachedAttention(nn.Module):
    """Map x [N, T, width] and a cache of P tokens to [N, T, width] and a cache of P + T tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x, cache):
        N, T, width = x.shape
        parts = self.c_attn(x).split(width, dim=2)  # three tensors [N, T, width]
        q, k, v = (part.view(N, T, self.heads, -1).transpose(1, 2) for part in parts)
        # README: start
        if cache is not None:
            k = torch.cat([cache[0], k], dim=2)  # [N, heads, P + T, width / heads]
            v = torch.cat([cache[1], v], dim=2)
        total = k.shape[2]  # the mask lets token i see the P tokens before, and 0 to i
        seen = torch.ones(T, total, dtype=torch.bool, device=x.device).tril(total - T)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        # README: end
        return self.c_proj(x.transpose(1, 2).reshape(N, T, width)), (k, v)


class CachedBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CachedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x, cache):
        mixed, cache = self.attn(self.ln_1(x), cache)
        x = x + mixed
        hidden = F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh")
        return x + self.mlp["c_proj"](hidden), cache


class CachedGPT2(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        blocks = [CachedBlock(config.n_embd, config.n_head) for _ in range(config.n_layer)]
        self.h = nn.ModuleList(blocks)
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, ids, caches=None):  # [N, T], and one cache for each block
        caches = caches or [None] * len(self.h)
        start = 0 if caches[0] is None else caches[0][0].shape[2]
        x = self.wte(ids) + self.wpe.weight[start : start + ids.shape[1]]  # [N, T, width]
        new_caches = []
        for block, cache in zip(self.h, caches, strict=True):
            x, cache = block(x, cache)
            new_caches.append(cache)
        return F.linear(self.ln_f(x), self.wte.weight), new_caches  # logits [N, T, vocabulary]


# LOAD: Hugging Face folders; GPT-2's weights then go into our own class.
def load_folder(folder, lesson):
    """Return model and tokenizer of a folder, or stop and name the lesson that makes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = f"is missing or is no language model ({type(error).__name__})"
        sys.exit(f"{folder} {reason}. Make it with: uv run {lesson}")
    return model.to(DEVICE).eval(), tokenizer


def copy_weights(theirs):
    """Return our GPT-2 with the weights of a GPT2LMHeadModel."""
    weights = theirs.transformer.state_dict()
    for name, weight in weights.items():
        if name.startswith("h.") and weight.dim() == 2:  # their Conv1D is a transposed Linear
            weights[name] = weight.T
    ours = CachedGPT2(theirs.config).to(DEVICE)
    ours.load_state_dict(weights)
    return ours.eval()


# GENERATE: always the likeliest token, so that both ways must write the same text.
@torch.inference_mode()
def generate(model, ids, total, cached):
    """Continue ids [1, T] to `total` tokens. Without a cache, each step computes all of them."""
    caches = None
    new = ids
    while ids.shape[1] < total:
        logits, new_caches = model(new if cached else ids, caches)
        if cached:
            caches = new_caches
        new = logits[:, -1:].argmax(dim=-1)  # [1, 1]
        ids = torch.cat([ids, new], dim=1)
    return ids


def time_both(write, rounds):
    """Return seconds without and with a cache: medians of rounds in turn, after a warm-up."""
    seconds = {False: [], True: []}
    for _ in range(rounds + 1):
        for cached, times in seconds.items():
            start = time.perf_counter()
            write(cached)[0, -1].item()  # .item() waits for a GPU
            times.append(time.perf_counter() - start)
    return [np.median(times[1:]) for times in seconds.values()]


def show_smollm2(folder, lesson, length, rounds):
    """Time SmolLM2's own generate() with and without its cache; return "yes" if the texts agree."""
    model, tokenizer = load_folder(folder, lesson)
    chat = [{"role": "user", "content": QUESTION}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(DEVICE)

    def write(cached):
        options = {"min_new_tokens": length, "max_new_tokens": length, "do_sample": False}
        return model.generate(**inputs, **options, use_cache=cached)

    without, with_cache = time_both(write, rounds)
    print(f"SmolLM2, {length} new tokens: use_cache=False {without:.2f} s, True {with_cache:.2f} s")
    return "yes" if torch.equal(write(False), write(True)) else "no"


def main(quick=False, prompt=PROMPT):
    models = ROOT / ("models/quick" if quick else "models")
    flag = " --quick" if quick else ""
    theirs, tokenizer = load_folder(models / "gpt2_mini", "src/llm/05_pretrain_gpt2.py" + flag)
    model = copy_weights(theirs)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(DEVICE)  # [1, T]
    if not 1 <= ids.shape[1] < LENGTHS[0]:
        sys.exit(f"A prompt needs 1 to {LENGTHS[0] - 1} tokens. This one has {ids.shape[1]}.")
    lengths = [length for length in LENGTHS if length <= theirs.config.n_positions]
    lengths = lengths[:1] if quick else lengths
    text = generate(model, ids, lengths[-1], cached=False)
    same = torch.equal(text, generate(model, ids, lengths[-1], cached=True))
    with torch.inference_mode():
        logits, caches = model(text)
        difference = (logits - theirs(text).logits).abs().max().item()
    print("Sample:", repr(tokenizer.decode(text[0, :40])))
    size = sum(tensor.nbytes for cache in caches for tensor in cache)
    print(f"The cache holds {size / text.shape[1]:,.0f} bytes for each token")
    print("Tokens | without s | with s | speed-up")
    rounds = 1 if quick else ROUNDS
    for length in lengths:
        without, with_cache = time_both(partial(generate, model, ids, length), rounds)
        print(f"{length:6} | {without:9.3f} | {with_cache:6.3f} | {without / with_cache:.1f}x")

    lesson = "src/llm/06_pretrained_llm.py" + flag
    smollm2_same = show_smollm2(models / "smollm2", lesson, 8 if quick else 64, rounds=1)
    same = "yes" if same else "no"
    numbers = f"same_text = {same}, logit_difference = {difference:.6f}"
    print(f"Result: {numbers}, smollm2_same_text = {smollm2_same}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: 32 tokens")
    parser.add_argument("--prompt", default=PROMPT, help="the text to continue")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.prompt)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
