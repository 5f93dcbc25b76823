"""Attention: let each word look at the other words and take what it needs from them.

Run:    uv run src/llm/02_attention.py
Needs:  nothing
Makes:  models/plots/llm-02_attention.png
Expect: weights_sum = 1.0000, future_weight = 0.0000

Each word has a query (what it looks for), a key (what it offers) and a value (what it passes on).
If a key fits a query, its value gets a large weight. The weighted sum of the values is the word's
new vector.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH = 8  # numbers per word
SEED = 42


# MODEL: queries, keys and values are three products of the same words.
def attend(q, k, v, causal=False):  # [N, T, d] each
    """softmax(Q K^T / sqrt(d)) V (Vaswani et al. 2017, arXiv:1706.03762): output and weights."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [N, T, T]
    if causal:  # hide the words that follow
        future = torch.ones_like(scores, dtype=torch.bool).triu(diagonal=1)
        scores = scores.masked_fill(future, float("-inf"))  # softmax turns -inf into 0
    weights = F.softmax(scores, dim=-1)  # each row sums to 1
    return weights @ v, weights  # [N, T, d], [N, T, T]


class SelfAttention(nn.Module):
    def __init__(self, embed_dim, causal=False):
        super().__init__()
        self.W_Q = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_K = nn.Linear(embed_dim, embed_dim, bias=False)
        self.W_V = nn.Linear(embed_dim, embed_dim, bias=False)
        self.causal = causal

    def forward(self, x):  # [N, T, embed_dim]
        return attend(self.W_Q(x), self.W_K(x), self.W_V(x), self.causal)


def show_weights(title, weights):
    print(title)
    for word, row in enumerate(weights[0].tolist()):
        print(f"  word{word} attends to:", " ".join(f"{weight:.2f}" for weight in row))


# COST: twice as many words have four times as many scores. PyTorch's scaled_dot_product_attention
# computes them in pieces (FlashAttention, arXiv:2205.14135), so it never has to keep all of them.
def show_costs():
    for words in [256, 512, 1024, 2048]:
        size = 4 * words**2 / 2**20
        print(f"{words:5} words have {words**2:9,} scores, which need {size:5.2f} MiB")


# PICTURE: the weights without and with the causal mask.
def draw(pictures):
    figure = Figure(figsize=(8, 4), layout="constrained")
    for axis, (title, weights) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        image = axis.imshow(weights[0].detach().cpu().numpy(), vmin=0, vmax=1, cmap="Blues")
        axis.set(title=title, xlabel="word that is looked at", ylabel="word that looks")
        axis.set(xticks=range(4), yticks=range(4))
    figure.colorbar(image, label="weight")
    return figure


def main(quick=False):
    torch.manual_seed(SEED)
    x = torch.randn(1, 4, WIDTH, device=DEVICE)  # [sentences, words, numbers per word]
    attention = SelfAttention(WIDTH).to(DEVICE)
    output, weights = attention(x)
    print("Input shape:  ", x.shape)
    print("Output shape: ", output.shape)
    print("Weights shape:", weights.shape)
    show_weights("Every word sees every word", weights)
    attention.causal = True
    _, masked = attention(x)
    show_weights("Causal: no word sees the words that follow", masked)
    show_costs()

    plots = ROOT / ("models/quick/plots" if quick else "models/plots")
    plots.mkdir(parents=True, exist_ok=True)
    pictures = {"every word": weights, "causal": masked}
    draw(pictures).savefig(plots / "llm-02_attention.png")
    future = masked[0].triu(diagonal=1).max()
    print(f"Result: weights_sum = {weights[0, 0].sum():.4f}, future_weight = {future:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
