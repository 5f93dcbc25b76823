"""KV cache: write each token without computing the whole text again.

Run:    uv run src/llm/10_kv_cache.py
Needs:  models/gpt2_mini/, models/smollm2/
Makes:  nothing
Expect: same_text = yes

A causal model never looks at later tokens, so the keys and values of earlier tokens do not change
when a token is added. Keep them, and each step computes one token instead of the whole text.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
PROMPT = "def forward(self"
LENGTHS = [32, 64, 128, 256]  # tokens in all; 256 is the context of llm/05
ROUNDS = 5


def load_folder(folder, lesson):
    """Return model and tokenizer of a folder, or stop and name the lesson that makes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        sys.exit(f"Cannot load {folder} ({type(error).__name__}). Make it with: uv run {lesson}")


# MODEL: the layers of the trained GPT-2, with a forward pass that takes and returns caches.
def attend_with_cache(layer, x, cache):
    """Map x [N, T, width] and a cache of P tokens to [N, T, width] and a cache of P + T tokens."""
    parts = layer.c_attn(x).chunk(3, dim=2)
    q, k, v = (part.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for part in parts)
    if cache is not None:
        k = torch.cat([cache[0], k], dim=2)  # [N, heads, P + T, width / heads]
        v = torch.cat([cache[1], v], dim=2)
    new, total = q.shape[2], k.shape[2]  # each new token sees itself and all tokens before
    seen = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return layer.c_proj(x.transpose(1, 2).flatten(2)), (k, v)


def forward(model, ids, caches=None):  # [N, T], and one cache for each block
    """Return the logits [N, T, vocabulary] of a GPT2LMHeadModel, and the longer caches."""
    gpt2 = model.transformer
    caches = caches or [None] * len(gpt2.h)
    start = 0 if caches[0] is None else caches[0][0].shape[2]
    x = gpt2.wte(ids) + gpt2.wpe.weight[start : start + ids.shape[1]]  # [N, T, width]
    new_caches = []
    for block, cache in zip(gpt2.h, caches, strict=True):
        mixed, cache = attend_with_cache(block.attn, block.ln_1(x), cache)
        x = x + mixed
        x = x + block.mlp(block.ln_2(x))
        new_caches.append(cache)
    return model.lm_head(gpt2.ln_f(x)), new_caches


# GENERATE: always the likeliest token, so that both ways must write the same text.
@torch.inference_mode()
def generate(model, ids, total, use_cache):
    """Continue ids [1, T] to `total` tokens. Without a cache, each step computes all of them."""
    new = ids
    caches = None
    while ids.shape[1] < total:
        logits, caches = forward(model, new, caches if use_cache else None)
        token = logits[:, -1:].argmax(dim=-1)  # [1, 1]
        ids = torch.cat([ids, token], dim=1)
        new = token if use_cache else ids
    return ids


def time_both(write, rounds):
    """Return the median seconds without and with a cache, and whether both write the same."""
    seconds = {False: [], True: []}
    texts = {}
    for _ in range(rounds + 1):  # the first round is a warm-up
        for use_cache, times in seconds.items():
            start = time.perf_counter()
            texts[use_cache] = write(use_cache=use_cache).tolist()  # .tolist() waits for a GPU
            times.append(time.perf_counter() - start)
    return median(seconds[False][1:]), median(seconds[True][1:]), texts[False] == texts[True]


def main(quick=False):
    models = ROOT / ("models/quick" if quick else "models")
    flag = " --quick" if quick else ""
    model, tokenizer = load_folder(models / "gpt2_mini", "src/llm/05_pretrain_gpt2.py" + flag)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]], device=DEVICE)  # [1, T]
    print("Tokens | without a cache | with a cache | gain")
    for length in LENGTHS[:1] if quick else LENGTHS:
        write = partial(generate, model, ids, min(length, model.config.n_positions))
        without, with_cache, same = time_both(write, rounds=1 if quick else ROUNDS)
        print(f"{length:6} | {without:13.3f} s | {with_cache:10.3f} s | {without / with_cache:.1f}")
    _, caches = forward(model, ids)
    size = sum(keys.nbytes + values.nbytes for keys, values in caches)
    print(f"The cache holds {size / ids.shape[1]:,.0f} bytes for each token")

    model, tokenizer = load_folder(models / "smollm2", "src/llm/06_pretrained_llm.py" + flag)
    inputs = tokenizer("Machine learning is", return_tensors="pt").to(DEVICE)
    new = 8 if quick else 48
    options = {"min_new_tokens": new, "max_new_tokens": new, "do_sample": False}
    write = partial(model.generate, **inputs, **options)
    without, with_cache, also_same = time_both(write, rounds=1)
    print(f"SmolLM2, {new} tokens: {without:.2f} s without, {with_cache:.2f} s with a cache")
    same_text = "yes" if same and also_same else "no"  # the longest text begins with the others
    print(f"Result: same_text = {same_text}, smollm2_speedup = {without / with_cache:.1f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: 32 tokens")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
