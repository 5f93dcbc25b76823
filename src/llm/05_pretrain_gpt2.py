"""Pre-train GPT-2: its own architecture, from random numbers to Python that looks like Python.

Run:    uv run src/llm/05_pretrain_gpt2.py
Needs:  nothing
Makes:  models/gpt2_mini/
Expect: validation_loss <= 4.2, logit_difference <= 0.001

The toy before this one read six lines of text. This is the real thing, only smaller, with megabytes.
"""

import argparse
import contextlib
import math
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import nn
from torch.utils.benchmark import Timer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY = 128, 4, 4, 256, 2048
STEPS, WARM_UP, BATCH_SIZE, LEARNING_RATE, SEED = 800, 80, 8, 2e-3, 42
SOURCES, PARTS = Path(torch.__file__).parent, ("nn", "optim", "distributions", "utils")
END, PROMPT, CHECKPOINT = "<|endoftext|>", "def forward(self", "checkpoint.pth"


# DATA: PyTorch's own Python sources, which are on this disk; every twentieth file is kept back.
def read_corpus(corpus):
    """Return the texts to train on and those to validate on; of a single text, its last twentieth."""
    files = [file for part in PARTS for file in sorted((SOURCES / part).rglob("*.py"))]
    try:
        texts = [file.read_text(encoding="utf-8") for file in ([corpus] if corpus else files)]
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"Cannot read the corpus: {error}. Give a UTF-8 text: --corpus FILE")
    if corpus:
        return [texts[0][: -len(texts[0]) // 20]], [texts[0][-len(texts[0]) // 20 :]]
    return [text for number, text in enumerate(texts) if number % 20], texts[::20]


def train_tokenizer(texts, size):
    """Learn a byte-level BPE, as GPT-2's: it can write any text, since the 256 bytes are in it."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, size, special_tokens=[END], show_progress=False)
    return Tokenizer.from_str(tokenizer.to_str())


# FASTER: GPT-2's GELU, x * sigmoid(x * (a + b * x**2)), by hand: on a CPU torch's takes longer.
class FastGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        a = math.sqrt(8 / math.pi)
        logit = torch.addcmul(x.new_tensor(a), x, x, value=0.044715 * a).mul_(x)
        gate = torch.sigmoid(logit)
        slope = logit.sub_(x, alpha=2 / 3 * a)  # a third of x * (a + 3 * b * x**2)
        slope.addcmul_(gate, slope, value=-1)
        ctx.save_for_backward(torch.addcmul(gate, gate, slope, value=3, out=slope))
        return gate.mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * gradient


# MODEL: the block of llm/03_transformer_block.py in one piece; GPT-2's names for all weights.
class Block(nn.Module):
    """Map x [N, T, width] to [N, T, width], causally, with heads that each see width / heads numbers."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.attn, self.mlp = heads, nn.Module(), nn.Module()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn.c_attn = nn.Linear(width, 3 * width)  # queries, keys and values at once
        self.attn.c_proj = nn.Linear(width, width)
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        qkv = self.attn.c_attn(self.ln_1(x)).unflatten(-1, (3, self.heads, -1))
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, T, width / heads]
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.attn.c_proj(mixed.transpose(1, 2).flatten(2))
        hidden = self.mlp.c_fc(self.ln_2(x))
        hidden = FastGELU.apply(hidden) if x.is_cpu else F.gelu(hidden, approximate="tanh")
        return x + self.mlp.c_proj(hidden)


class GPT2(nn.Module):
    """Radford et al. 2019; the token table also serves as the last layer."""

    def __init__(self, vocabulary, context, width, layers, heads):
        super().__init__()
        self.plan = {"vocab_size": vocabulary, "n_positions": context, "n_embd": width}
        self.plan |= {"n_layer": layers, "n_head": heads}  # as a Hugging Face config names them
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # what 2 * layers projections give is added up
                nn.init.normal_(weight, std=0.02 / (2 * layers if "c_proj" in name else 1) ** 0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids):  # [N, T]
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]  # [N, T, width]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)  # [N, T, vocabulary], logits


def language_loss(model, windows):  # [N, T + 1]
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


# GENERATE: sample from the forty likeliest tokens; each step reads everything before it again.
@torch.inference_mode()
def generate(model, tokenizer, length, temperature=0.8, top_k=40):
    ids = torch.tensor([tokenizer.encode(PROMPT).ids], device=DEVICE)  # [1, T]
    for _ in range(length):
        logits, choices = model(ids[:, -CONTEXT:])[:, -1].topk(top_k)
        picked = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)
        ids = torch.cat([ids, choices.gather(1, picked)], dim=1)
    return repr(tokenizer.decode(ids[0].tolist()))


# TRAIN: AdamW, decay on matrices only, warm-up, cosine, clipped gradients, bf16 on a GPU; for a longer
# run model.compile() pays. The batch depends on the step alone, so that a run can be resumed.
def draw_batch(tokens, step):
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH_SIZE,), generator=generator)
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)].to(DEVICE)


def learning_rate(step, steps):
    warm_up = min(WARM_UP, steps // 5 + 1)
    progress = max(0, step - warm_up) / (steps - warm_up)
    return LEARNING_RATE * min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * progress))


@torch.inference_mode()
def evaluate(model, tokens):
    return sum(language_loss(model, draw_batch(tokens, -n)).item() for n in range(1, 11)) / 10


def make_optimizer(model):
    groups = [{"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}]
    groups += [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def train(model, tokenizer, tokens, validation, steps, every, folder):
    """Train, and return the validation loss; an interrupted run goes on from its last checkpoint."""
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(tokens)} tokens to train on, {len(validation)} to validate, {size:,} parameters")
    optimizer, first, losses = make_optimizer(model), 0, []
    settings = [*model.plan.values(), BATCH_SIZE, LEARNING_RATE, SEED, steps, int(tokens.sum())]
    with contextlib.suppress(Exception):  # none, or not a whole one: begin at the beginning
        state = torch.load(folder / CHECKPOINT, map_location=DEVICE, weights_only=True)
        if state["settings"] == settings:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first, losses = state["step"], state["losses"]
            print(f"Resumed at step {first}")
    cuda, start = DEVICE.type == "cuda", time.perf_counter()
    for step in tqdm(range(first, steps), initial=first, total=steps, leave=False, disable=None):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=cuda):
            loss = language_loss(model, draw_batch(tokens, step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        if (step + 1) % every == 0:
            losses = [float(loss) for loss in losses]
            recent, now = sum(losses[-every:]) / every, evaluate(model, validation)
            report = f"Step {step + 1:5d} | train loss {recent:.4f} | validation loss {now:.4f}"
            tqdm.write(f"{report} | {generate(model, tokenizer, 20)}")
            state = {"settings": settings, "step": step + 1, "losses": losses}
            state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "checkpoint.part")
            (folder / "checkpoint.part").replace(folder / CHECKPOINT)
    speed = (steps - first) * BATCH_SIZE * CONTEXT / (time.perf_counter() - start)
    work = 6 * size + 12 * LAYERS * WIDTH * CONTEXT  # FLOP for each token: PaLM, arXiv 2204.02311
    n = 8192 if cuda else 1024
    matrix = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if cuda else torch.float32)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    share = speed * work / (2 * n**3 / timer.timeit(20).mean)
    print(f"{speed:,.0f} tokens/s, {share:.0%} of this device's speed in matrix products")
    return evaluate(model, validation)


# HAND ON: as a Hugging Face folder. Their Conv1D keeps its matrices the other way round from Linear.
def swap(state):
    """Transpose the matrices of the blocks, in our state_dict or in theirs; its own inverse."""
    return {name: t.T if t.dim() == 2 and name[0] == "h" else t for name, t in state.items()}


def hand_on(model, tokenizer, folder):
    """Write the folder, read it again, and return the largest difference between the logits."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer  # takes seconds

    theirs = GPT2LMHeadModel(GPT2Config(**model.plan, bos_token_id=0, eos_token_id=0))
    theirs.transformer.load_state_dict(swap(model.cpu().state_dict()))
    part = folder.with_suffix(".part")  # complete before it takes the place of the old one
    theirs.save_pretrained(part)
    GPT2Tokenizer(tokenizer_object=tokenizer, bos_token=END, eos_token=END).save_pretrained(part)
    shutil.rmtree(folder)
    part.rename(folder)
    print(f"Saved {folder.relative_to(ROOT).as_posix()}/")
    ids = torch.arange(CONTEXT)[None]
    with torch.inference_mode():
        theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
        return (model(ids) - theirs(ids).logits).abs().max().item()


def main(quick=False, corpus=None):
    steps, every = (20, 10) if quick else (STEPS, 100)
    folder = ROOT / ("models/quick" if quick else "models") / "gpt2_mini"
    texts = [part[: 40 if quick else None] for part in read_corpus(corpus)]
    tokenizer = train_tokenizer(texts[0], VOCABULARY)
    parts = map(tokenizer.encode_batch, texts)  # below, END, whose id is 0, after each text: [T]
    tokens, validation = (torch.tensor([i for t in part for i in [*t.ids, 0]]) for part in parts)
    if min(len(tokens), len(validation)) < CONTEXT + 2:
        sys.exit(f"The corpus is too short: each part needs {CONTEXT + 2} tokens")
    torch.manual_seed(SEED)
    model = GPT2(tokenizer.get_vocab_size(), CONTEXT, WIDTH, LAYERS, HEADS).to(DEVICE)
    folder.mkdir(parents=True, exist_ok=True)
    loss = train(model, tokenizer, tokens, validation, steps, every, folder)
    difference = hand_on(model, tokenizer, folder)
    print(f"Result: validation_loss = {loss:.4f}, logit_difference = {difference:.6f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 20 steps, models/quick/")
    cli.add_argument("--corpus", type=Path, help="a UTF-8 text in the place of PyTorch's sources")
    try:
        main(**vars(cli.parse_args()))
    except (KeyboardInterrupt, OSError, RuntimeError) as error:
        sys.exit(f"Stopped ({error!r}). Every 100 steps are kept; the same command goes on there.")
