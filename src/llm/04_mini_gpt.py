"""MiniGPT: train a language model on six lines of text and let it write new ones.

Run:    uv run src/llm/04_mini_gpt.py
Needs:  nothing
Makes:  nothing
Expect: loss <= 0.25, parameters = 25,103, known_words >= 95%

A GPT does one thing: it predicts the next character from the characters so far. To write, it
predicts a character, appends it to the text, and predicts again.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
TEXT = """the cat sat on the mat
the dog ran fast
the cat ran on the mat
the dog sat fast
the cat and dog sat on the mat
the dog and cat ran fast"""
CHARACTERS = sorted(set(TEXT))  # the place of a character in this list is its number
CONTEXT = 16  # the model sees so many characters at once
STEPS = 1000
BATCH_SIZE = 8
LEARNING_RATE = 1e-2
TEMPERATURE = 0.5  # low: only likely characters; high: almost any
SEED = 42


def to_ids(text):
    return torch.tensor([CHARACTERS.index(character) for character in text], device=DEVICE)


# MODEL: blocks as in llm/03, between the embeddings and a last layer.
class MiniBlock(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.W_Q = nn.Linear(width, width, bias=False)
        self.W_K = nn.Linear(width, width, bias=False)
        self.W_V = nn.Linear(width, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x):  # [N, T, width]
        q, k, v = self.W_Q(x), self.W_K(x), self.W_V(x)
        x = self.norm1(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.norm2(x + self.ff(x))


class MiniGPT(nn.Module):
    def __init__(self, vocab_size, embed_dim=32, ff_dim=128, num_blocks=2, max_seq_len=32):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        self.pos_embedding = nn.Embedding(max_seq_len, embed_dim)  # attention ignores the order
        self.blocks = nn.Sequential(*(MiniBlock(embed_dim, ff_dim) for _ in range(num_blocks)))
        self.head = nn.Linear(embed_dim, vocab_size)

    def forward(self, ids):  # [N, T]
        x = self.token_embedding(ids) + self.pos_embedding.weight[: ids.shape[1]]
        return self.head(self.blocks(x))  # [N, T, vocab_size], logits for the next character


def language_loss(model, windows):
    """Return the mean loss of predicting the next character at every position."""
    logits = model(windows[:, :-1])  # [N, T + 1] -> [N, T, vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


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


@torch.inference_mode()
def generate(model, prompt, length, temperature):
    """Return the prompt and more characters, sampled one after the other."""
    ids = to_ids(prompt).unsqueeze(0)  # [1, T]
    for _ in range(length):
        logits = model(ids[:, -CONTEXT:])[:, -1]  # [1, vocab_size]
        probabilities = F.softmax(logits / temperature, dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    return "".join(CHARACTERS[number] for number in ids[0].tolist())


def main(quick=False):
    torch.manual_seed(SEED)
    if len(TEXT) < 2:
        sys.exit("TEXT is too short: MiniGPT needs at least two characters to learn from.")
    window = min(CONTEXT + 1, len(TEXT))  # the last character of a window is only predicted
    windows = to_ids(TEXT).unfold(0, window, 1)  # [windows, window]
    model = MiniGPT(len(CHARACTERS), max_seq_len=max(32, CONTEXT)).to(DEVICE)
    print(f"{len(TEXT)} characters, {len(CHARACTERS)} different, {len(windows)} windows")
    train(model, windows, steps=100 if quick else STEPS)

    loss = language_loss(model, windows).item()
    prompt = TEXT[:7]
    for temperature in [TEMPERATURE, 1.0, 2.0]:
        print(f"Temperature {temperature}: {generate(model, prompt, 60, temperature)!r}")
    text = generate(model, prompt, 60 if quick else 600, TEMPERATURE)
    words = text.split()[:-1]  # the last word can be cut off
    known = sum(word in TEXT.split() for word in words) / max(1, len(words))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"Result: loss = {loss:.4f}, parameters = {parameters:,}, known_words = {known:.2%}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: 100 steps")
    arguments = parser.parse_args()
    main(arguments.quick)
