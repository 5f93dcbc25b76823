"""Attention: let every word look at the others, and take from each what it needs.

Run:    uv run src/llm/02_attention.py
Needs:  nothing
Makes:  models/plots/02_attention.png
Expect: sdpa_difference <= 0.00001, weights_sum = 1.0000, future_weight = 0.0000

Each word asks a question (query), shows a label (key) and holds a message (value). Where a question
fits a label, the message gets a large weight; the weighted messages are the word's new vector.
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH, LENGTHS, REPEATS, SEED = 8, [256, 512, 1024, 2048], 7, 42


# MODEL: softmax(Q K^T / sqrt(d)) V, from Vaswani et al. 2017, arXiv:1706.03762, with a single head.
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


# LOOK: who attends to whom; untrained, the weights are an accident of the first random numbers.
def show_weights(title, weights):
    print(title)
    for word, row in enumerate(weights[0].tolist()):
        print(f"  word{word} attends to:", " ".join(f"{weight:.2f}" for weight in row))


# CHECK: PyTorch's fused version computes the same.
def difference_from_sdpa(attention, x):
    queries, keys, values = attention.W_Q(x), attention.W_K(x), attention.W_V(x)
    fused = F.scaled_dot_product_attention(queries, keys, values, is_causal=attention.causal)
    return (fused - attention(x)[0]).abs().max().item()


# MEASURE: T words make T x T scores, so twice the words cost four times as much. SDPA computes the
# scores piece by piece (FlashAttention, arXiv:2205.14135) and never keeps them all.
def count_saved_bytes(work):
    """Return work's output and the bytes that it keeps for the backward pass."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = work()
    return output, sum(kept.values())


def by_hand(queries, keys, values):
    return F.softmax(queries @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5, dim=-1) @ values


def measure(attend, length, repeats):
    """Return the median milliseconds of forward and backward, and the MiB kept between the two."""
    qkv = torch.randn(3, 1, 1, length, 64, device=DEVICE, requires_grad=True)
    times = []
    for _ in range(repeats + 2):  # the first two warm up
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()
        start = time.perf_counter()
        output, saved = count_saved_bytes(lambda: attend(*qkv))
        output.sum().backward()
        if DEVICE.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:]) * 1e3, saved / 2**20


def compare_costs(lengths, repeats):
    print("Words | by hand: ms, MiB kept | SDPA: ms, MiB kept")
    for length in lengths:
        hand = measure(by_hand, length, repeats)
        fused = measure(F.scaled_dot_product_attention, length, repeats)
        print(f" {length:4} | {hand[0]:8.2f}, {hand[1]:8.2f}  | {fused[0]:8.2f}, {fused[1]:.2f}")


# PICTURE: the weights without and with the causal mask.
def draw(pictures):
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, (title, weights) in zip(figure.subplots(1, 2), pictures.items(), strict=True):
        image = axes.imshow(weights[0].detach().cpu().numpy(), vmin=0, vmax=1, cmap="viridis")
        axes.set(title=title, xlabel="is looked at", ylabel="looks")
    figure.colorbar(image)
    return figure


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


def main(quick=False):
    torch.manual_seed(SEED)
    x = torch.randn(1, 4, WIDTH, device=DEVICE)  # [sentences, words, numbers for each word]
    attention = SelfAttention(WIDTH).to(DEVICE)
    output, weights = attention(x)
    print("Input shape:  ", x.shape)
    print("Output shape: ", output.shape)
    print("Weights shape:", weights.shape)
    show_weights("Every word sees every word", weights)
    causal = SelfAttention(WIDTH, causal=True).to(DEVICE)
    causal.load_state_dict(attention.state_dict())
    masked = causal(x)[1]
    show_weights("Causal: no word sees the ones that follow", masked)
    difference = max(difference_from_sdpa(attention, x), difference_from_sdpa(causal, x))
    compare_costs([64, 128] if quick else LENGTHS, 2 if quick else REPEATS)
    models = ROOT / ("models/quick" if quick else "models")
    save(draw({"all": weights, "causal": masked}).savefig, models / "plots" / "02_attention.png")
    print(
        f"Result: sdpa_difference = {difference:.7f}, weights_sum = {weights[0, 0].sum():.4f}, "
        f"future_weight = {masked[0].triu(diagonal=1).max():.4f}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: short sequences")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
