"""Transformer block: the brick that every GPT is a stack of.

Run:    uv run src/llm/03_transformer_block.py
Needs:  nothing
Makes:  nothing
Expect: block = 776, twelve_blocks = 9,312, gpt2_small = 124,439,808, prenorm_loss <= 0.85

Attention mixes the words; a small network then thinks about each word by itself. Both add their
result to what was there, so nothing is lost on the way up through a hundred such blocks.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH, HIDDEN, DEPTH, LEARNING_RATE, SEED = 8, 32, 12, 3e-3, 42
L4_BYTES = 23_034 * 2**20  # what nvidia-smi reports for the reference machine's card


# MODEL: as in llm/02_attention.py, then the block around it.
class SelfAttention(nn.Module):
    """Map x [N, T, d] to (output [N, T, d], weights [N, T, T]); causal hides the words that follow."""

    def __init__(self, embed_dim, causal=False):
        super().__init__()
        self.W_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_V = nn.Linear(embed_dim, embed_dim, bias=False)
        self.scale, self.causal = embed_dim**-0.5, causal

    def forward(self, x):
        queries, keys, values = self.W_Q(x), self.W_K(x), self.W_V(x)
        scores = queries @ keys.transpose(-2, -1) * self.scale  # [N, T, T]
        if self.causal:
            future = torch.ones_like(scores[0], dtype=torch.bool).triu(diagonal=1)
            scores = scores.masked_fill(future, float("-inf"))  # after softmax: exactly 0
        weights = F.softmax(scores, dim=-1)  # each row sums to 1
        return weights @ values, weights


class TransformerBlock(nn.Module):
    """The notes' block, as in the first transformer: one head, and a norm after each sum."""

    def __init__(self, embed_dim, ff_dim, causal=False):
        super().__init__()
        self.attention = SelfAttention(embed_dim, causal)
        self.ff = nn.Sequential(
            nn.Linear(embed_dim, ff_dim), nn.ReLU(), nn.Linear(ff_dim, embed_dim)
        )
        self.norm1 = nn.LayerNorm(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)

    def forward(self, x):  # [N, T, embed_dim]
        x = self.norm1(x + self.attention(x)[0])
        return self.norm2(x + self.ff(x))


# GPT-2: several heads look for several things at once, and the norm stands before each part, so the
# sums run straight through from the first block to the last (Radford et al. 2019).
class MultiHeadAttention(nn.Module):
    """Map x [N, T, width] to [N, T, width], causally, with heads that each see width / heads numbers."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width)  # queries, keys and values at once
        self.c_proj = nn.Linear(width, width)

    def forward(self, x):
        parts = self.c_attn(x).chunk(3, dim=-1)  # each [N, T, width]; below, [N, heads, T, ...]
        queries, keys, values = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class GPT2Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiHeadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.act = nn.GELU(approximate="tanh")
        self.mlp.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):  # [N, T, width]
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


# COUNT: parameters of one block, of a stack, and of models whose plans are published.
def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


def show_published():
    """Build the published plans on the meta device, which has shapes but no memory."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    plans = {  # width, layers, heads, context; GPT-3: Brown et al. 2020, table 2.1
        "GPT-2 small": (768, 12, 12, 1024),
        "GPT-2 medium": (1024, 24, 16, 1024),
        "GPT-2 large": (1280, 36, 20, 1024),
        "GPT-2 XL": (1600, 48, 25, 1024),
        "GPT-3": (12288, 96, 96, 2048),
    }
    counts = {}
    print("Model        |      parameters |   fp32 |   bf16 |   int4 | fits an L4 with 23 GB in")
    with torch.device("meta"):
        for name, (width, layers, heads, context) in plans.items():
            config = GPT2Config(n_embd=width, n_layer=layers, n_head=heads, n_positions=context)
            counts[name] = size_of(GPT2LMHeadModel(config))
        counts["LLaMA 7B"] = size_of(LlamaForCausalLM(LlamaConfig()))
    for name, count in counts.items():
        sizes = {"fp32": 4 * count, "bf16": 2 * count, "int4": count // 2}
        fits = [form for form, size in sizes.items() if size < L4_BYTES] or ["none"]
        columns = " | ".join(f"{size / 1e9:6.1f}" for size in sizes.values())
        print(f"{name:12} | {count:15,} | {columns} | {', '.join(fits)}")
    return counts["GPT-2 small"]


# COMPARE: can a deep stack learn without a warm-up? The task is a running sum over the words.
def train_stack(make_block, steps, width=32, words=16):
    """Return the loss of a stack of DEPTH blocks after its steps; 1.0 is no better than guessing 0."""
    torch.manual_seed(SEED)
    stack = nn.Sequential(*(make_block(width) for _ in range(DEPTH)), nn.Linear(width, width))
    stack = stack.to(DEVICE)
    optimizer = torch.optim.Adam(stack.parameters(), lr=LEARNING_RATE, fused=True)
    counts = torch.arange(1, words + 1, device=DEVICE)[:, None]
    losses = []
    for _ in range(steps):
        x = torch.randn(8, words, width, device=DEVICE)
        loss = F.mse_loss(stack(x), x.cumsum(dim=1) / counts**0.5)  # the target has variance 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def main(quick=False):
    steps = 20 if quick else 100
    torch.manual_seed(SEED)
    block = TransformerBlock(WIDTH, HIDDEN).to(DEVICE)
    x = torch.randn(1, 4, WIDTH, device=DEVICE)
    print("Input shape: ", x.shape)
    print("Output shape:", block(x).shape)
    for name, parameter in block.named_parameters():
        print(f"  {name:24} {tuple(parameter.shape)}")
    counts = {}
    for depth in (1, 2, 4, 8, 12):
        stack = nn.Sequential(*(TransformerBlock(WIDTH, HIDDEN) for _ in range(depth)))
        counts[depth] = size_of(stack)
        print(f"  {depth:2} blocks: {counts[depth]:6,} parameters")
    gpt2_small = show_published()
    print(f"A stack of {DEPTH} blocks, {steps} steps, no warm-up: loss (guessing: 1.00)")
    losses = {
        "norm after, 1 head, as in the notes": lambda width: TransformerBlock(
            width, 4 * width, True
        ),
        "norm before, 1 head": lambda width: GPT2Block(width, heads=1),
        "norm before, 4 heads, as in GPT-2": lambda width: GPT2Block(width, heads=4),
    }
    for name, make_block in losses.items():
        losses[name] = train_stack(make_block, steps)
        print(f"  {name:35} {losses[name]:.2f}, {size_of(make_block(32)):,} parameters each")
    postnorm_loss, _, prenorm_loss = losses.values()
    print(
        f"Result: block = {counts[1]:,}, twelve_blocks = {counts[12]:,}, gpt2_small = {gpt2_small:,}, "
        f"postnorm_loss = {postnorm_loss:.2f}, prenorm_loss = {prenorm_loss:.2f}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 20 steps")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
