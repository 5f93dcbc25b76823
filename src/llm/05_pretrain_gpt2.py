"""Pre-train GPT-2: train a small GPT-2 until it writes text that looks like Python.

Run:    uv run src/llm/05_pretrain_gpt2.py
Needs:  nothing
Makes:  models/gpt2_mini/, models/plots/llm-05_pretrain_gpt2.png
Expect: validation_loss <= 4.2

The model of llm/04 learned from six lines. This one has GPT-2's layers, only fewer and smaller. It
learns from several megabytes of PyTorch's own source code, which is already on your disk.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors import SafetensorError
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
VOCABULARY = 2048  # different tokens (GPT-2 small: 50,257)
CONTEXT = 256  # tokens that the model sees at once (1,024)
WIDTH = 128  # numbers per token (768)
LAYERS = 4  # blocks (12)
HEADS = 4  # attention heads per block (12); must divide WIDTH
STEPS = 800
BATCH_SIZE = 8
LEARNING_RATE = 2e-3
SEED = 42
END = "<|endoftext|>"


def read_texts(corpus):
    """Return the files of PyTorch's source code, or a corpus in twenty pieces."""
    if corpus is None:
        files = []
        for folder in ["nn", "optim", "distributions", "utils"]:
            files += sorted(Path(torch.__file__).parent.joinpath(folder).rglob("*.py"))
        return [file.read_text(encoding="utf-8") for file in files]
    try:
        text = corpus.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"Cannot read the corpus {corpus}: {error}. Give a text file in UTF-8.")
    size = len(text) // 20 + 1
    return [text[start : start + size] for start in range(0, len(text), size)]


def train_tokenizer(texts):
    tokenizer = ByteLevelBPETokenizer()  # starts from the 256 bytes, so it can write any text
    tokenizer.train_from_iterator(texts, VOCABULARY, special_tokens=[END], show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())


# MODEL: GPT-2 (Radford et al. 2019). Each head attends with its own part of the vectors.
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)  # queries, keys and values at once
        self.c_proj = nn.Linear(WIDTH, WIDTH)  # mixes the results of the heads

    def forward(self, x):  # [N, T, WIDTH]
        N, T, _ = x.shape
        parts = self.c_attn(x).split(WIDTH, dim=2)  # three tensors [N, T, WIDTH]
        q, k, v = (part.view(N, T, HEADS, -1).transpose(1, 2) for part in parts)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [N, HEADS, T, WIDTH / HEADS]
        return self.c_proj(x.transpose(1, 2).reshape(N, T, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()  # GPT-2's names for the layers: other programs can load them
        self.mlp.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp.gelu = nn.GELU(approximate="tanh")
        self.mlp.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):  # [N, T, WIDTH]
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, WIDTH)  # one vector for each token
        self.wpe = nn.Embedding(CONTEXT, WIDTH)  # one vector for each position
        self.h = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids):  # [N, T]
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # [N, T, WIDTH]
        return F.linear(self.ln_f(self.h(x)), self.wte.weight)  # wte computes the logits, too


def language_loss(model, windows):
    logits = model(windows[:, :-1])  # [N, T + 1] -> [N, T, vocabulary]
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model, tokens):
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT + 1).to(DEVICE)  # no overlap
    losses = [language_loss(model, batch) for batch in windows.split(BATCH_SIZE)]
    return torch.stack(losses).mean().item()


@torch.inference_mode()
def generate(model, tokenizer, prompt="def forward(self", length=20, temperature=0.8, top_k=40):
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=DEVICE)  # [1, T]
    for _ in range(length):
        logits, candidates = model(ids[:, -CONTEXT:])[:, -1].topk(top_k)  # [1, top_k]
        choice = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
        ids = torch.cat([ids, candidates.gather(1, choice)], dim=1)
    return tokenizer.decode(ids[0].tolist())


def train(model, tokenizer, tokens, validation, steps):
    """Return the losses on training batches, and {step: validation loss}."""
    windows = tokens.unfold(0, CONTEXT + 1, 1)  # one per start; copies nothing
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.12, cycle_momentum=False)
    every = max(1, steps // 8)
    losses = []
    checks = {}
    try:
        for step in tqdm(range(1, steps + 1), leave=False, disable=None):  # a bar on a terminal
            batch = windows[torch.randint(len(windows), (BATCH_SIZE,))].to(DEVICE)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
                loss = language_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # limits the step of an odd batch
            optimizer.step()
            schedule.step()
            losses.append(loss.item())  # a number: kept tensors would fragment the memory
            if step % every == 0:
                checks[step] = evaluate(model, validation)
                recent = sum(losses[-every:]) / every
                report = f"train loss {recent:.4f} | validation loss {checks[step]:.4f}"
                tqdm.write(f"Step {step} | {report} | {generate(model, tokenizer)!r}")
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C. Saving the model that you have so far.")
    return losses, checks


def draw(losses, checks):
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots(subplot_kw={"xlabel": "step", "ylabel": "loss"})
    axis.plot(losses, alpha=0.5, label="training batch")
    axis.plot(checks.keys(), checks.values(), marker="o", label="validation")
    axis.legend()
    return figure


# EXPORT: a Hugging Face folder. Its files replace the old ones when all of them are complete.
def export(model, tokenizer, folder, part):
    from transformers import GPT2Config, GPT2LMHeadModel  # takes seconds

    config = GPT2Config(n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    config.vocab_size = tokenizer.get_vocab_size()
    config.bos_token_id = config.eos_token_id = tokenizer.token_to_id(END)
    theirs = GPT2LMHeadModel(config)
    weights = theirs.transformer.state_dict()
    for name, weight in model.state_dict().items():
        transpose = name.startswith("h.") and weight.dim() == 2  # Conv1D is a transposed Linear
        weights[name].copy_(weight.T if transpose else weight)
    theirs.save_pretrained(part)
    Path(part, "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for file in Path(part).iterdir():
        file.replace(folder / file.name)
    print(f"Saved {folder.relative_to(ROOT).as_posix()}/")


def main(quick=False, corpus=None):
    if HEADS < 1 or WIDTH % HEADS != 0:
        sys.exit(f"HEADS = {HEADS} does not divide WIDTH = {WIDTH} into equal parts.")
    torch.manual_seed(SEED)
    texts = read_texts(corpus)[: 45 if quick else None]
    held_out = texts[::20]
    del texts[::20]
    tokenizer = train_tokenizer(texts)
    tokens = torch.tensor(tokenizer.encode(END.join(texts) + END).ids)  # END follows each text
    validation = torch.tensor(tokenizer.encode(END.join(held_out) + END).ids)
    print(f"{len(tokens):,} tokens to train on, {len(validation):,} to validate on")
    if min(len(tokens), len(validation)) <= CONTEXT:
        sys.exit(f"The corpus is too short: each part needs more than CONTEXT = {CONTEXT} tokens.")
    model = GPT2(tokenizer.get_vocab_size()).to(DEVICE)
    models = ROOT / ("models/quick" if quick else "models")
    folder = models / "gpt2_mini"
    folder.mkdir(parents=True, exist_ok=True)
    steps = 16 if quick else STEPS
    with TemporaryDirectory(dir=folder, suffix=".part") as part:  # fails now if it cannot write
        losses, checks = train(model, tokenizer, tokens, validation, steps)
        export(model, tokenizer, folder, part)
    (models / "plots").mkdir(exist_ok=True)
    draw(losses, checks).savefig(models / "plots/llm-05_pretrain_gpt2.png")
    print(f"Result: validation_loss = {evaluate(model, validation):.4f}")
    if len(losses) < steps:
        sys.exit(f"Stopped after {len(losses)} of {steps} steps.")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    parser.add_argument("--corpus", type=Path, help="a UTF-8 text file to train on")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.corpus)
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
