"""Embeddings: turn words into vectors, and let real text decide which words are alike.

Run:    uv run src/llm/01_embeddings.py
Needs:  nothing
Makes:  models/plots/llm-01_embeddings.png
Expect: pairs_loss <= 0.01, related_cosine >= 0.35

A network computes with numbers, so each word gets a row of numbers: its embedding. The rows start
at random. They become meaningful when a network must predict which words stand near each other.
"""

import argparse
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
VOCABULARY = ["<pad>", "<unk>", "the", "cat", "dog", "sat", "on", "mat", "ran", "fast"]
RELATED = [("cat", "dog"), ("sat", "ran"), ("the", "on")]
UNRELATED = [("cat", "mat"), ("dog", "fast"), ("cat", "ran")]
ALIKE = """list tuple  int float  true false  first second  rows columns  minimum maximum
weight bias  mean variance  height width  input output  cpu cuda  encoder decoder"""
WIDTH = 64  # numbers per word
WINDOW = 2  # how many places away a neighbor can be
BATCH_SIZE = 4096
SEED = 42


def look_up(words, index):
    """Return the number of each word. A word that is not in the vocabulary becomes <unk>."""
    return torch.tensor([index.get(word, index["<unk>"]) for word in words], device=DEVICE)


def train(model, batches, loss_function):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for inputs, answers in tqdm(batches, leave=False, disable=None):  # a bar on a terminal
        loss = loss_function(model(inputs), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# A TOY: are two words related? We judged six pairs, and the model learns our answers.
def train_on_pairs():
    index = {word: number for number, word in enumerate(VOCABULARY)}
    sentence = ["the", "cat", "sat", "on", "the", "sofa"]
    print(f"{sentence} -> {look_up(sentence, index).tolist()}")
    words = [*RELATED, *UNRELATED, ("dog", "cat"), ("sat", "dog")]  # two pairs are not trained on
    pairs = torch.stack([look_up(pair, index) for pair in words])  # [8, 2]
    answers = torch.tensor([[1.0]] * len(RELATED) + [[0.0]] * len(UNRELATED), device=DEVICE)
    model = nn.Sequential(nn.Embedding(len(index), 4), nn.Flatten(), nn.Linear(8, 1)).to(DEVICE)
    batches = [(pairs[: len(answers)], answers)] * 500  # all six pairs, 500 times
    loss = train(model, batches, F.binary_cross_entropy_with_logits)
    for (first, second), logit in zip(words, model(pairs)[:, 0], strict=True):
        print(f"  {first} + {second}: related with probability {logit.sigmoid():.4f}")
    return loss


# REAL TEXT: Python's language reference and PyTorch's documentation, both already on your disk.
def read_words():
    texts = list(topics.values())
    for pattern in ["*.py", "nn/**/*.py", "optim/*.py", "distributions/*.py"]:
        for file in sorted(Path(torch.__file__).parent.glob(pattern)):
            texts += re.findall(r'"""(.*?)"""', file.read_text(encoding="utf-8"), re.DOTALL)
    return re.findall("[a-z]+", " ".join(texts).lower())


def train_on_text(ids, vocab_size):
    """Skip-gram (Mikolov et al. 2013, arXiv:1301.3781): return the vectors [vocab_size, WIDTH]."""
    pairs = [torch.stack([ids[:-n], ids[n:]], dim=1) for n in range(1, WINDOW + 1)]
    pairs = torch.cat([*pairs, *(pair.flip(1) for pair in pairs)])  # each is the other's neighbor
    pairs = pairs[torch.randperm(len(pairs), device=DEVICE)]
    embedding = nn.Embedding(vocab_size, WIDTH)  # one row of numbers for each word
    nn.init.normal_(embedding.weight, std=0.1)
    output_layer = nn.Linear(WIDTH, vocab_size)  # one logit for each word that could stand nearby
    model = nn.Sequential(embedding, output_layer).to(DEVICE)
    batches = [(batch[:, 0], batch[:, 1]) for batch in pairs.split(BATCH_SIZE)]
    train(model, batches, F.cross_entropy)  # predict the neighbor from the word
    vectors = embedding.weight.detach()
    return vectors - vectors.mean(dim=0)  # what all words share tells nothing about one


# PICTURE: the two directions in which the vectors differ most. A line joins each pair of ALIKE.
def draw(vectors):  # [24, WIDTH]
    _, _, directions = torch.pca_lowrank(vectors, q=2)
    points = (vectors @ directions).cpu().numpy()  # [24, 2]
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for pair in points.reshape(-1, 2, 2):
        axis.plot(pair[:, 0], pair[:, 1], marker="o")
    for word, point in zip(ALIKE.split(), points, strict=True):
        axis.annotate(word, point, fontsize=8, xytext=(4, 4), textcoords="offset points")
    return figure


def main(quick=False):
    torch.manual_seed(SEED)
    pairs_loss = train_on_pairs()
    words = read_words()
    vocabulary = ["<unk>"] + [word for word, n in Counter(words).most_common() if n >= 20]
    count = len(vocabulary) - 1
    print(f"Real text: {len(words):,} words. The {count:,} most frequent ones get a vector")
    index = {word: number for number, word in enumerate(vocabulary)}
    ids = look_up([word for word in words if word in index], index)
    vectors = train_on_text(ids[:20_000] if quick else ids, len(index))
    for word in ["list", "float", "maximum", "weight", "first"]:
        cosines = F.cosine_similarity(vectors, vectors[index[word]], dim=-1)  # [V]
        nearest = cosines.topk(6).indices[1:]  # the nearest is the word itself
        print(f"  {word:8} is near {', '.join(vocabulary[number] for number in nearest)}")
    alike = vectors[look_up(ALIKE.split(), index)]  # [24, WIDTH]
    related = F.cosine_similarity(alike[0::2], alike[1::2]).mean()  # 1: the same direction
    plots = ROOT / ("models/quick/plots" if quick else "models/plots")
    plots.mkdir(parents=True, exist_ok=True)
    draw(alike).savefig(plots / "llm-01_embeddings.png")
    print(f"Result: pairs_loss = {pairs_loss:.4f}, related_cosine = {related:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
