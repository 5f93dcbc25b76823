"""Tokenizer: write byte-pair encoding by hand, and see what a language model reads.

Run:    uv run src/llm/09_tokenizer.py
Needs:  nothing
Makes:  nothing
Expect: lowest = 2, emoji = 4, bytes_per_token >= 2.2

A language model reads numbers, not letters. A tokenizer starts from single bytes. Again and again,
it joins the pair of neighbors that is most frequent into a new token. A frequent word becomes one
token, a rare word becomes several, and every text can be written.
"""

import argparse
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import regex  # like re, but it knows the letters and digits of all languages
import torch

TOY = "low low low low low lower lower" + " newest" * 6 + " widest" * 3  # Sennrich et al. 2016
TOY_MERGES = 10
MERGES = 500  # GPT-2: 50,000
SAMPLES = {
    "Python": "for batch in batches:\n    loss = model(batch).mean()\n",
    "English": "The fewer tokens a text has, the faster a model reads it.",
    "Chinese": "語言模型讀的是數字,不是文字。",
    "emoji": "🙂🚀",
}
# GPT-2's words: letters, digits or signs, with the space before them. No token crosses a word.
WORD = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def split_into_bytes(word):
    return [bytes([byte]) for byte in word.encode("utf-8")]  # "é" has two bytes, an emoji four


def merge(tokens, pair):
    """Join the two tokens of the pair wherever they are neighbors."""
    merged = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


# TRAIN: each different word is kept once, with the number of times that it occurs.
def train(text, count):
    """Return the most frequent pairs, in the order in which they are merged."""
    occurrences = Counter(WORD.findall(text))
    words = {word: split_into_bytes(word) for word in occurrences}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, tokens in words.items():
            for pair in pairwise(tokens):
                pairs[pair] += occurrences[word]
        if not pairs:  # every word is a single token
            break
        merges.append(max(pairs, key=pairs.get))
        words = {word: merge(tokens, merges[-1]) for word, tokens in words.items()}
    return merges


def list_vocabulary(merges):
    """Return all tokens in the order of their ids: the 256 bytes, then one for each merge."""
    return [bytes([byte]) for byte in range(256)] + [first + second for first, second in merges]


# ENCODE: repeat the merges, the earliest first. DECODE: put the bytes together again.
def encode_text(text, merges):
    ids = {token: number for number, token in enumerate(list_vocabulary(merges))}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    encoded = []
    for word in WORD.findall(text):
        tokens = split_into_bytes(word)
        while known := [pair for pair in pairwise(tokens) if pair in ranks]:
            tokens = merge(tokens, min(known, key=ranks.get))
        encoded += [ids[token] for token in tokens]
    return encoded


def decode_ids(ids, merges):
    vocabulary = list_vocabulary(merges)
    return b"".join(vocabulary[number] for number in ids).decode("utf-8", errors="replace")


def main(quick=False):
    toy = train(TOY, TOY_MERGES)
    print("A small text:", TOY)
    for first, second in toy:
        print(f"  {first} + {second} -> {first + second}")
    for text in [" newest", "lowest", "🙂"]:
        ids = encode_text(text, toy)
        tokens = [list_vocabulary(toy)[number] for number in ids]
        print(f"{text!r}: {tokens} -> {ids} -> {decode_ids(ids, toy)!r}")

    source = Path(torch.__file__).parent
    text = "".join(file.read_text(encoding="utf-8") for file in sorted(source.glob("nn/*.py")))
    merges = train(text, 50 if quick else MERGES)
    print(f"PyTorch's source code: {len(text):,} characters, {len(merges)} merges")
    samples = SAMPLES | {"a new file": (source / "optim/adam.py").read_text(encoding="utf-8")}
    for name, sample in samples.items():
        length = len(encode_text(sample, merges))
        ratio = len(sample.encode("utf-8")) / length
        print(f"  {name:10} {length:6,} tokens, {ratio:.2f} bytes per token")
    counts = f"lowest = {len(encode_text('lowest', toy))}, emoji = {len(encode_text('🙂', toy))}"
    print(f"Result: {counts}, bytes_per_token = {ratio:.2f}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: fewer merges")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
