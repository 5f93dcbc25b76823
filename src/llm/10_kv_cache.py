"""KV cache: write each token without reading the whole text again.

Run:    uv run src/llm/10_kv_cache.py
Needs:  models/gpt2_mini/
Makes:  nothing
Expect: same_text = yes, logit_difference <= 0.001

The keys and values of the tokens so far do not change when one more arrives: causality sees to that.
Keep them, and a step costs one token's work instead of the whole text's. Every served model does this.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
PROMPT, LENGTHS, ROUNDS = "def forward(self", (32, 64, 128, 256), 7


# LOAD: as in llm/07_finetune_lora.py.
def load_base(models):
    """Return (model, tokenizer, folder); exit with a sentence if there is no model to be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = models / ("gpt2" if (models / "gpt2/model.safetensors").exists() else "gpt2_mini")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        command = f"uv run src/llm/05_pretrain_gpt2.py{' --quick' * (models.name == 'quick')}"
        sys.exit(f"{folder} is missing or damaged ({type(error).__name__}). Type: {command}")
    tokenizer.pad_token = tokenizer.eos_token  # GPT-2 has no token for padding
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(DEVICE).eval(), tokenizer, folder


# MODEL: GPT-2 as in llm/05_pretrain_gpt2.py, but each attention takes and returns what it has kept.
class CachedAttention(nn.Module):
    """Map x [N, T, width] and a cache of P tokens to ([N, T, width], a cache of P + T tokens)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x, cache=None):
        qkv = self.c_attn(x).unflatten(-1, (3, self.heads, -1))  # [N, T, 3, heads, width / heads]
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, T, width / heads]
        if cache is not None:
            keys = torch.cat([cache[0], keys], dim=2)  # [N, heads, P + T, width / heads]
            values = torch.cat([cache[1], values], dim=2)
        new, total = queries.shape[2], keys.shape[2]
        seen = torch.ones(new, total, dtype=torch.bool, device=x.device).tril(total - new)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.c_proj(mixed.transpose(1, 2).flatten(2)), (keys, values)


class CachedBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CachedAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.act = nn.GELU(approximate="tanh")
        self.mlp.c_proj = nn.Linear(4 * width, width)

    def forward(self, x, cache=None):
        mixed, cache = self.attn(self.ln_1(x), cache)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), cache


class CachedGPT2(nn.Module):
    def __init__(self, vocabulary, context, width, layers, heads):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(CachedBlock(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, ids, caches=None):  # [N, T], and for each block what it has kept of P tokens
        start = caches[0][0].shape[2] if caches else 0
        x = self.wte(ids) + self.wpe.weight[start : start + ids.shape[1]]  # [N, T, width]
        kept = []
        for block, cache in zip(self.h, caches or [None] * len(self.h), strict=True):
            x, cache = block(x, cache)
            kept.append(cache)
        return F.linear(self.ln_f(x), self.wte.weight), kept  # logits [N, T, vocabulary]


def swap(state):
    """Transpose the matrices of the blocks, in our state_dict or in theirs; its own inverse."""
    return {name: t.T if t.dim() == 2 and name[0] == "h" else t for name, t in state.items()}


def take_over(theirs):
    """Return our GPT-2 with the weights of a GPT2LMHeadModel, of OpenAI's GPT-2 as well."""
    plan = theirs.config
    sizes = (plan.vocab_size, plan.n_positions, plan.n_embd, plan.n_layer, plan.n_head)
    ours = CachedGPT2(*sizes).to(DEVICE)
    ours.load_state_dict(swap(theirs.transformer.state_dict()))
    return ours.eval()


# GENERATE: greedily, so that both ways must write the same.
@torch.inference_mode()
def generate(model, ids, total, cached):
    """Return ids [1, T], continued to total tokens; without the cache, every step reads them all."""
    new, caches = ids, None
    while ids.shape[1] < total:
        logits, kept = model(new if cached else ids, caches)
        new, caches = logits[:, -1:].argmax(dim=-1), kept if cached else None
        ids = torch.cat([ids, new], dim=1)
    return ids


# MEASURE: the two ways in turn, since a machine is not equally fast all the time.
def measure(model, ids, total, rounds):
    """Return (seconds without the cache, seconds with it), medians of some rounds."""
    seconds = {False: [], True: []}
    for _ in range(rounds + 1):
        for cached, list_of in seconds.items():
            start = time.perf_counter()
            generate(model, ids, total, cached)[0, -1].item()  # .item() waits for a GPU
            list_of.append(time.perf_counter() - start)
    return [statistics.median(list_of[1:]) for list_of in seconds.values()]  # [0] is the warm-up


def main(quick=False, prompt=PROMPT):
    models = ROOT / ("models/quick" if quick else "models")
    theirs, tokenizer, folder = load_base(models)
    model = take_over(theirs)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long().to(DEVICE)  # [1, T]
    limit = min(LENGTHS[0] if quick else LENGTHS[-1], model.wpe.num_embeddings)
    if not 1 <= ids.shape[1] < LENGTHS[0]:
        sys.exit(f"A prompt needs 1 to {LENGTHS[0] - 1} tokens; this one has {ids.shape[1]}")
    whole = generate(model, ids, limit, cached=False)
    same = torch.equal(whole, generate(model, ids, limit, cached=True))
    with torch.inference_mode():
        logits, caches = model(whole)
        difference = (logits - theirs(whole).logits).abs().max().item()
    print(f"{folder.relative_to(ROOT).as_posix()} in our own class, {len(whole[0])} tokens")
    print("Sample:", repr(tokenizer.decode(whole[0, :40])))
    size = sum(tensor.nbytes for cache in caches for tensor in cache)
    print(f"The cache: {size / len(whole[0]):,.0f} bytes for each token, {size / 1e6:.2f} MB here")
    print("Tokens | again s | cached s | speed-up")
    for total in LENGTHS[:1] if quick else LENGTHS:
        again, cached = measure(model, ids, total, rounds=1 if quick else ROUNDS)
        print(f"{total:6d} | {again:7.3f} | {cached:8.3f} | {again / cached:.1f}x")
    print(f"Result: same_text = {'yes' if same else 'no'}, logit_difference = {difference:.6f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 32 tokens, models/quick/")
    cli.add_argument("--prompt", default=PROMPT, help="what it is to continue")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing was written.")
