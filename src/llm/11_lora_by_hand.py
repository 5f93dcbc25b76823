"""LoRA by hand: the twenty lines inside peft, and what a higher rank buys.

Run:    uv run src/llm/11_lora_by_hand.py
Needs:  models/gpt2_mini/
Makes:  nothing
Expect: peft_difference <= 0.001, merged_difference <= 0.001, gpt2_rank_64 = 2,359,296

A matrix of 128 x 384 has 49,152 numbers. Two thin ones of rank 8 have 4,096, and their product is as
large as the first. The rank says how much the change may hold, not how good it is.
"""

import argparse
import copy
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
RANKS, SCALE, EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = (1, 8, 64), 4, 40, 8, 2e-3, 42


# DATA: as in llm/07_finetune_lora.py.
def read_questions(path):
    """Return two lists of (question, answer), to learn and held out; exit at the first bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"Cannot read {path}: {error}")
    parts = {False: [], True: []}
    for number, line in enumerate(lines, start=1):
        try:
            item = json.loads(line)
            parts[item["held_out"]].append((item["question"] + "", item["answer"] + ""))
        except (ValueError, KeyError, TypeError):
            sys.exit(f"{path}, line {number}: it must be like the first line of data/qa.jsonl")
    if not all(parts.values()):
        sys.exit(f"{path} needs questions of both kinds: held_out false, and held_out true")
    return parts.values()


def encode(tokenizer, question, answer):
    """Return {"input_ids": [T], "labels": [T]}; the loss skips a label of -100."""
    prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
    reply = tokenizer(f" {answer}{tokenizer.eos_token}")["input_ids"]  # so that it learns to stop
    if len(prompt + reply) > tokenizer.model_max_length:
        sys.exit(f"Longer than the model's {tokenizer.model_max_length} tokens: {question}")
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


# LOAD: as in llm/07_finetune_lora.py.
def load_base(models):
    """Return (model, tokenizer, folder); exit with a sentence if there is no model to be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = models / ("gpt2" if (models / "gpt2/model.safetensors").exists() else "gpt2_mini")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        command = f"uv run src/llm/05_pretrain_gpt2.py{' --quick' * (models.name == 'quick')}"
        sys.exit(f"{folder} is missing or damaged ({type(error).__name__}). Type: {command}")
    tokenizer.pad_token = tokenizer.eos_token  # GPT-2 has no token for padding
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.to(DEVICE).eval(), tokenizer, folder


# MODEL: Hu et al. 2021, arXiv 2106.09685. The scale is what peft calls alpha / rank.
class LoRA(nn.Module):
    """Add a trainable detour of some rank to a frozen layer, [N, T, inputs] to [N, T, outputs]."""

    def __init__(self, layer, rank):
        super().__init__()
        inputs, outputs = layer.weight.shape  # as in GPT-2's Conv1D; nn.Linear turns it round
        self.layer = layer
        self.A = nn.Parameter(torch.randn(inputs, rank).to(layer.weight) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(rank, outputs).to(layer.weight))  # at first, no change

    def forward(self, x):
        return self.layer(x) + x @ self.A @ self.B * SCALE

    def merge(self):
        """Add the detour into the layer's own weight, and return the layer."""
        self.layer.weight.data += self.A @ self.B * SCALE
        return self.layer


def add_detours(base, rank):
    """Return a frozen copy of a GPT-2 in which every c_attn has a detour."""
    model = copy.deepcopy(base).requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = LoRA(block.attn.c_attn, rank)
    return model


@torch.no_grad()
def compare_with_peft(base, ids, rank=8):
    """Give peft and ourselves the same A and B; return (its difference, that of merging) in logits."""
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # from inside peft
    ours = add_detours(base, rank)
    plan = {"r": rank, "lora_alpha": SCALE * rank, "target_modules": ["c_attn"]}
    theirs = get_peft_model(copy.deepcopy(base), LoraConfig(**plan, fan_in_fan_out=True)).eval()
    for block, other in zip(ours.transformer.h, theirs.base_model.model.transformer.h, strict=True):
        detour = block.attn.c_attn
        detour.B.normal_(std=0.1)
        other.attn.c_attn.lora_A["default"].weight.copy_(detour.A.T)
        other.attn.c_attn.lora_B["default"].weight.copy_(detour.B.T)
    before, expected = ours(ids).logits, theirs(ids).logits
    for block in ours.transformer.h:
        block.attn.c_attn = block.attn.c_attn.merge()
    change = (before - base(ids).logits).abs().max().item()
    differences = [(before - other).abs().max().item() for other in (expected, ours(ids).logits)]
    print(f"A random detour of rank {rank} changes the logits by up to {change:.2f}")
    print(f"The same in peft differs by {differences[0]:.6f}, merged by {differences[1]:.6f}")
    return differences


def count_trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# TRAIN: as in llm/07_finetune_lora.py, only without dropout.
def train(model, items, collate, epochs):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    steps = epochs * -(-len(items) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(epochs), leave=False, disable=None):
        for order in torch.randperm(len(items)).split(BATCH_SIZE):
            batch = collate([items[number] for number in order]).to(DEVICE)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def evaluate(model, items, collate):
    return model(**collate(items).to(DEVICE)).loss.item()


def main(quick=False):
    from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel

    base, tokenizer, _ = load_base(ROOT / ("models/quick" if quick else "models"))
    collate = DataCollatorForSeq2Seq(tokenizer)
    torch.manual_seed(SEED)
    by_peft, by_merging = compare_with_peft(base, torch.arange(64, device=DEVICE)[None])
    learned, held_out = read_questions(ROOT / "data" / "qa.jsonl")
    items, kept = ([encode(tokenizer, *item) for item in part] for part in (learned, held_out))
    with torch.device("meta"):  # shapes without numbers
        gpt2 = GPT2LMHeadModel(GPT2Config())
    print("Rank | trained here |     kB | on GPT-2 small | loss where learned | on the rest")
    for rank in (0, *RANKS):
        model = add_detours(base, rank) if rank else base.requires_grad_(False)
        if rank:
            train(model, items, collate, epochs=1 if quick else EPOCHS)
        size, real = count_trainable(model), count_trainable(add_detours(gpt2, rank)) if rank else 0
        losses = f"{evaluate(model, items, collate):18.2f} | {evaluate(model, kept, collate):11.2f}"
        print(f"{rank:4d} | {size:12,} | {size * 4 / 1000:6.0f} | {real:14,} | {losses}")
    print(
        f"Result: peft_difference = {by_peft:.7f}, merged_difference = {by_merging:.7f}, "
        f"gpt2_rank_64 = {count_trainable(add_detours(gpt2, 64)):,}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 1 epoch, models/quick/")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing was written.")
