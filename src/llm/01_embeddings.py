"""Embeddings: turn words into vectors, and let real text decide which of them are alike.

Run:    uv run src/llm/01_embeddings.py
Needs:  nothing
Makes:  models/plots/01_embeddings.png
Expect: pairs_loss <= 0.01, related_cosine >= 0.35, random_cosine <= 0.15

A network computes with numbers, so every word gets a row of them. Rows begin as random noise. They
come to mean something when the network must predict which words stand next to each other.
"""

import argparse
import contextlib
import os
import re
import sys
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, BATCH_SIZE, WINDOW, WIDTH, LEARNING_RATE, SEED = 1, 4096, 2, 64, 1e-2, 42
VOCABULARY = ["<pad>", "<unk>", "the", "cat", "dog", "sat", "on", "mat", "ran", "fast"]
# Two words, and whether they are related: the six pairs of the notes.
PAIRS = [("cat", "dog", 1), ("cat", "mat", 0), ("dog", "fast", 0)]
PAIRS += [("sat", "ran", 1), ("the", "on", 1), ("cat", "ran", 0)]
UNSEEN = [("dog", "cat"), ("sat", "dog")]
ALIKE = (
    "list tuple, int float, true false, first second, rows columns, minimum maximum, weight bias"
)
ALIKE += ", mean variance, height width, input output, cpu cuda, encoder decoder"
RELATED = [pair.split() for pair in ALIKE.split(", ")]  # judged by us before any training


# LOOK UP: a word that is not in the vocabulary becomes <unk>; <pad> fills short sentences up.
def look_up(words, index):
    return torch.tensor([index.get(word, index["<unk>"]) for word in words], device=DEVICE)


# TOY: the notes' model, which judges two words at a time.
class SimilarityModel(nn.Module):
    def __init__(self, vocab_size, embed_dim=4):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.fc = nn.Linear(embed_dim * 2, 1)

    def forward(self, first, second):  # [N], [N]
        both = torch.cat([self.embedding(first), self.embedding(second)], dim=-1)  # [N, 8]
        return self.fc(both).squeeze(-1)  # [N], logits


def train_pairs(index):
    """Train on the six pairs; return the loss, and cat and dog's cosine before and after."""
    model = SimilarityModel(len(index)).to(DEVICE)
    first, second = (look_up([pair[side] for pair in PAIRS], index) for side in (0, 1))
    related = torch.tensor([float(pair[2]) for pair in PAIRS], device=DEVICE)
    before = cosine(model.embedding.weight, index, "cat", "dog")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    for _ in range(500):
        loss = F.binary_cross_entropy_with_logits(model(first, second), related)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for one, other in [pair[:2] for pair in PAIRS] + UNSEEN:
        probability = model(look_up([one], index), look_up([other], index)).sigmoid().item()
        seen = "  <- a pair that it never saw" if (one, other) in UNSEEN else ""
        print(f"  {one} + {other}: related with probability {probability:.4f}{seen}")
    return loss.item(), before, cosine(model.embedding.weight, index, "cat", "dog")


def cosine(vectors, index, one, other):
    return F.cosine_similarity(vectors[index[one]], vectors[index[other]], dim=0).item()


# TEXT: the reference of the Python language, and PyTorch's own documentation; both are installed.
def read_words():
    texts = list(topics.values())
    for pattern in ("*.py", "nn/**/*.py", "optim/*.py", "distributions/*.py"):
        for file in sorted(Path(torch.__file__).parent.glob(pattern)):
            texts += re.findall(r'"""(.*?)"""', file.read_text(encoding="utf-8"), re.DOTALL)
    return re.findall("[a-z]+", " ".join(texts).lower())


# NEIGHBOURS: predict every word within WINDOW places of a word, from that word's vector alone.
class SkipGram(nn.Module):
    """Mikolov et al. 2013, arXiv:1301.3781; the vocabulary is small, so softmax is affordable."""

    def __init__(self, vocab_size, width):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, words):  # [N]
        return self.head(self.embedding(words))  # [N, width] -> [N, vocab_size], logits


def train_neighbours(ids, vocab_size, epochs):
    model = SkipGram(vocab_size, WIDTH).to(DEVICE)
    nn.init.normal_(model.embedding.weight, std=0.1)
    pairs = torch.cat([torch.stack([ids[:-n], ids[n:]]) for n in range(1, WINDOW + 1)], dim=1)
    pairs = torch.cat([pairs, pairs.flip(0)], dim=1)  # [2, P]: each is the other's neighbour
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    for epoch in range(1, epochs + 1):
        total, batches = 0.0, torch.randperm(pairs.shape[1], device=DEVICE).split(BATCH_SIZE)
        for batch in tqdm(batches, f"Epoch {epoch}", leave=False, disable=None):
            words, neighbours = pairs[:, batch]
            loss = F.cross_entropy(model(words), neighbours)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        print(f"Epoch {epoch}/{epochs} | Loss: {total / len(batches):.4f}")
    return model.embedding.weight.detach()


# COMPARE: related pairs against pairs drawn at random, and the nearest neighbours of some words.
def compare_pairs(vectors, index):
    """Return the mean cosine of the RELATED pairs and of 2,000 random ones."""
    unit = F.normalize(vectors - vectors.mean(dim=0), dim=1)  # [V, WIDTH]
    for word in ("list", "float", "maximum", "weight", "first"):
        nearest = (unit @ unit[index[word]]).topk(6).indices[1:].tolist()
        print(f"  {word:8} is near {', '.join(list(index)[place] for place in nearest)}")
    first, second = torch.randint(len(index), (2, 2000), device=DEVICE)
    random_cosine = (unit[first] * unit[second]).sum(dim=1).mean().item()
    return sum(cosine(unit, index, *pair) for pair in RELATED) / len(RELATED), random_cosine


# PICTURE: the two directions in which the chosen words differ most.
def draw(vectors, index):
    words = [word for pair in RELATED for word in pair]
    chosen = vectors[look_up(words, index)].cpu()
    _, _, directions = torch.pca_lowrank(chosen, q=2)
    points = (chosen @ directions).numpy()
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for pair in range(len(RELATED)):
        axes.plot(*points[2 * pair : 2 * pair + 2].T, marker="o")
    for word, point in zip(words, points, strict=True):
        axes.annotate(word, point, fontsize=8, xytext=(4, 4), textcoords="offset points")
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
    index = {word: place for place, word in enumerate(VOCABULARY)}
    sentence = ["the", "cat", "sat", "on", "the", "sofa"]
    ids = look_up(sentence, index)
    print(f"{sentence} -> {ids.tolist()}")
    print("Vectors:", tuple(nn.Embedding(len(index), 4, device=DEVICE)(ids).shape))
    pairs_loss, before, after = train_pairs(index)
    print(f"Cosine of cat and dog: {before:.2f} before, {after:.2f} after")

    words = read_words()
    frequent = [word for word, count in Counter(words).most_common() if count >= 20]
    index = {word: place for place, word in enumerate(["<unk>", *frequent])}
    print(f"Real text: {len(words)} words, {len(frequent)} of them in the vocabulary")
    ids = look_up([word for word in words if word in index], index)
    vectors = train_neighbours(ids[: 20_000 if quick else None], len(index), EPOCHS)
    related_cosine, random_cosine = compare_pairs(vectors, index)
    models = ROOT / ("models/quick" if quick else "models")
    save(draw(vectors, index).savefig, models / "plots" / "01_embeddings.png")
    print(
        f"Result: pairs_loss = {pairs_loss:.4f}, related_cosine = {related_cosine:.2f}, "
        f"random_cosine = {random_cosine:.2f}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 20,000 words, one epoch")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
