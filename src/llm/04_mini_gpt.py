"""MiniGPT: train a language model on six lines, and let it write its own.

Run:    uv run src/llm/04_mini_gpt.py
Needs:  nothing
Makes:  models/mini_gpt.pth, models/plots/04_mini_gpt.png
Expect: loss <= 0.25, parameters = 25,103, known_words = 100 %

A GPT does one thing: from the characters so far it guesses the next. To write, it guesses, appends
its guess, and guesses again. The causal mask keeps it honest: in training, nobody sees the answer.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw  # loads in a tenth of matplotlib's time
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
STEPS, BATCH_SIZE, LEARNING_RATE, CONTEXT, TEMPERATURE, SEED = 1000, 8, 1e-2, 16, 0.5, 42
TEXT = """the cat sat on the mat
the dog ran fast
the cat ran on the mat
the dog sat fast
the cat and dog sat on the mat
the dog and cat ran fast"""
CHARACTERS = sorted(set(TEXT))


# DATA: one number for each character, and every window of CONTEXT characters with the one after it.
def to_ids(text):
    """Return the ids [len(text)] of a text; exit with a sentence for characters that TEXT lacks."""
    if not text or set(text) - set(CHARACTERS):
        sys.exit(f"MiniGPT reads texts of the characters {''.join(CHARACTERS)!r}, not {text!r}")
    return torch.tensor([CHARACTERS.index(character) for character in text], device=DEVICE)


def to_text(ids):
    return "".join(CHARACTERS[number] for number in ids)


# MODEL: as in llm/02_attention.py and llm/03_transformer_block.py; below it, the two tables.
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


class MiniGPT(nn.Module):
    def __init__(self, vocab_size, embed_dim=32, ff_dim=128, num_blocks=2, max_seq_len=32):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.pos_embedding = nn.Embedding(max_seq_len, embed_dim)  # attention alone knows no order
        self.blocks = nn.ModuleList(
            TransformerBlock(embed_dim, ff_dim, causal=True) for _ in range(num_blocks)
        )
        self.head = nn.Linear(embed_dim, vocab_size)

    def forward(self, ids):  # [N, T]
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token_embedding(ids) + self.pos_embedding(positions)  # [N, T, embed_dim]
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # [N, T, vocab_size], logits for the next character


# TRAIN: every position of every window is a guess to learn from.
def language_loss(model, windows):  # [N, T + 1]
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train(model, windows, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        loss = language_loss(model, windows[torch.randint(len(windows), (BATCH_SIZE,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"Step {step:4d} | Loss: {loss.item():.4f}")


# GENERATE: a low temperature takes the safest guess, a high one almost any.
@torch.inference_mode()
def generate(model, prompt, length, temperature):
    """Return prompt and length more characters, sampled one after the other."""
    ids = to_ids(prompt)[None]  # [1, T]
    for _ in range(length):
        logits = model(ids[:, -CONTEXT:])[:, -1]  # [1, vocab_size]
        probabilities = F.softmax(logits / temperature, dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    return to_text(ids[0].tolist())


def share_of_known_words(text):
    words = text.split()[:-1]  # the last may be cut off
    return sum(word in TEXT.split() for word in words) / max(1, len(words))


# PICTURE: which characters the last block looks at while it reads a line; each row is one character.
def draw(model, line, cell=24):
    ids = to_ids(line)[None]
    x = model.token_embedding(ids) + model.pos_embedding.weight[: ids.shape[1]]
    weights = model.blocks[1].attention(model.blocks[0](x))[1][0]  # [T, T]
    picture = Image.new("L", (cell * (len(line) + 1),) * 2, "white")
    pen = ImageDraw.Draw(picture)
    for row, character in enumerate(line, start=1):
        pen.text((8, cell * row + 6), character, fill="black")
        pen.text((cell * row + 8, 6), character, fill="black")
        for column, weight in enumerate(weights[row - 1].tolist(), start=1):
            left, top = cell * column, cell * row
            pen.rectangle((left, top, left + cell, top + cell), fill=int(255 * (1 - weight)))
    return picture


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


def main(quick=False, prompt="the cat"):
    torch.manual_seed(SEED)
    to_ids(prompt)  # before the training, so that a prompt it cannot read costs no time
    windows = to_ids(TEXT).unfold(0, CONTEXT + 1, 1)  # [windows, CONTEXT + 1]
    model = MiniGPT(len(CHARACTERS)).to(DEVICE)
    print(f"{len(TEXT)} characters, {len(CHARACTERS)} different, {len(windows)} windows")
    train(model, windows, steps=100 if quick else STEPS)
    loss = language_loss(model, windows).item()
    for temperature in (TEMPERATURE, 1.0, 2.0):
        print(f"Temperature {temperature}:", repr(generate(model, prompt, 60, temperature)))
    known_words = share_of_known_words(generate(model, prompt, 60 if quick else 600, TEMPERATURE))
    models = ROOT / ("models/quick" if quick else "models")
    save(lambda file: torch.save(model.state_dict(), file), models / "mini_gpt.pth")
    picture = draw(model, generate(model, prompt, CONTEXT, 0.1)[:CONTEXT])
    save(lambda file: picture.save(file, "PNG"), models / "plots" / "04_mini_gpt.png")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Result: loss = {loss:.4f}, parameters = {size:,}, known_words = {known_words:.2%}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 100 steps, models/quick/")
    cli.add_argument("--prompt", default="the cat", help="what it is to continue")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
