"""Transformer block: build the part that every GPT repeats, and stack it twelve times.

Run:    uv run src/llm/03_transformer_block.py
Needs:  nothing
Makes:  nothing
Expect: block = 776, twelve_blocks = 9,312, gpt2_small = 124,439,808, prenorm_loss <= 0.85

Attention moves information between words. Then a small network works on each word by itself. Both
add their result to their input, so that a stack of many blocks still knows what came in.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH = 8  # numbers per word
HIDDEN = 32  # numbers per word inside the small network
DEPTH = 12  # blocks in the stack that is trained
STEPS = 100
LEARNING_RATE = 3e-3
SEED = 42


# MODEL: the attention of llm/02 by PyTorch's own function, then the block around it.
class OneHead(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W_Q = nn.Linear(width, width, bias=False)
        self.W_K = nn.Linear(width, width, bias=False)
        self.W_V = nn.Linear(width, width, bias=False)

    def forward(self, x):  # [N, T, width]
        q, k, v = self.W_Q(x), self.W_K(x), self.W_V(x)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


# The block of the first transformer has a norm after each sum.
class TransformerBlock(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.attention = OneHead(width)
        self.ff = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x):  # [N, T, width]
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.ff(x))


class PreNormBlock(TransformerBlock):
    """The same parts in GPT-2's order: x itself passes through the sums without a norm."""

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.ff(self.norm2(x))


# COUNT: the parameters of blocks and of published models.
def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def show_published():
    """Build published models on the meta device, where a tensor has a shape but no memory."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt3 = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)
    with torch.device("meta"):
        models = {
            "GPT-2 small": GPT2LMHeadModel(GPT2Config()),
            "GPT-3": GPT2LMHeadModel(gpt3),
            "LLaMA 7B": LlamaForCausalLM(LlamaConfig()),
        }
    print("Model       |      parameters | GB in fp32 | in bf16")
    for name, model in models.items():
        count = parameter_count(model)
        print(f"{name:11} | {count:15,} | {count * 4 / 1e9:10.1f} | {count * 2 / 1e9:7.1f}")
    return parameter_count(models["GPT-2 small"])


# COMPARE: which order lets a deep stack learn? The task is to add up the vectors so far.
def train_stack(block_class, steps):
    """Return the mean loss of the last ten steps. A stack that always answers 0 has loss 1."""
    torch.manual_seed(SEED)
    blocks = [block_class(32, 128) for _ in range(DEPTH)]
    stack = nn.Sequential(*blocks, nn.Linear(32, 32)).to(DEVICE)
    optimizer = torch.optim.Adam(stack.parameters(), lr=LEARNING_RATE, fused=True)
    counts = torch.arange(1, 17, device=DEVICE).unsqueeze(1)  # [16, 1]
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 16, 32, device=DEVICE)  # 8 texts of 16 words
        loss = F.mse_loss(stack(x), x.cumsum(dim=1) / counts.sqrt())  # targets of variance 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def main(quick=False):
    torch.manual_seed(SEED)
    block = TransformerBlock(WIDTH, HIDDEN).to(DEVICE)
    x = torch.randn(1, 4, WIDTH, device=DEVICE)
    print("Input shape: ", x.shape)
    print("Output shape:", block(x).shape)
    for name, parameter in block.named_parameters():
        print(f"  {name:24} {tuple(parameter.shape)}")
    gpt2_small = show_published()
    steps = 20 if quick else STEPS
    print(f"A stack of {DEPTH} blocks after {steps} steps without a warm-up")
    after = train_stack(TransformerBlock, steps)
    print(f"  norm after the sum:   loss {after:.2f}")
    before = train_stack(PreNormBlock, steps)
    print(f"  norm before the part: loss {before:.2f}")
    size = parameter_count(block)
    counts = f"block = {size}, twelve_blocks = {12 * size:,}"
    losses = f"postnorm_loss = {after:.2f}, prenorm_loss = {before:.2f}"
    print(f"Result: {counts}, gpt2_small = {gpt2_small:,}, {losses}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: 20 steps")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
