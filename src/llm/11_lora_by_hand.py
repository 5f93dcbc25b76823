"""LoRA by hand: write the layer that peft adds, and see what a higher rank is good for.

Run:    uv run src/llm/11_lora_by_hand.py
Needs:  models/smollm2/
Makes:  nothing
Expect: merged_difference <= 0.001, gpt2_rank_64 = 2,359,296

A matrix of 576 x 576 has 331,776 numbers. Two matrices of rank 8 have 9,216, and their product is
as large as the first matrix. The rank limits what such a product can express.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
SCALE = 4  # peft's alpha / rank
TERMS = 16  # of the glossary are learned
EPOCHS = 6


class LoRA(nn.Module):
    """Add a trainable product of two small matrices to a frozen layer (Hu et al. 2021)."""

    def __init__(self, layer, rank):
        super().__init__()
        outputs, inputs = layer.weight.shape
        self.layer = layer
        self.A = nn.Parameter(torch.randn(rank, inputs).to(layer.weight) / inputs**0.5)
        self.B = nn.Parameter(torch.zeros(outputs, rank).to(layer.weight))  # no change at first

    def forward(self, x):  # [N, T, inputs] -> [N, T, outputs]
        return self.layer(x) + SCALE * (x @ self.A.T @ self.B.T)


def insert_lora(model, rank, names):
    """Return a frozen copy in which every layer of these names has a LoRA."""
    model = copy.deepcopy(model).requires_grad_(False)
    for path, layer in list(model.named_modules()):
        if path.split(".")[-1] in names:
            model.set_submodule(path, LoRA(layer, rank))
    return model


def count_trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def merge_lora(model):
    """Add every product to its layer's weights. The model is then as fast as before."""
    for path, lora in list(model.named_modules()):
        if isinstance(lora, LoRA):
            lora.layer.weight += SCALE * (lora.B @ lora.A)
            model.set_submodule(path, lora.layer)


def load_folder(folder, lesson):
    """Return model and tokenizer of a folder, or stop and name the lesson that makes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        sys.exit(f"Cannot load {folder} ({type(error).__name__}). Make it with: uv run {lesson}")


# TRAIN: one question at a time, without padding. The loss does not count labels of -100.
def encode_term(tokenizer, term):
    chat = [{"role": "user", "content": term["questions"][0]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    reply = tokenizer(term["answer"] + tokenizer.eos_token)["input_ids"]
    ids = torch.tensor([prompt + reply], device=DEVICE)  # [1, T]
    labels = torch.tensor([[-100] * len(prompt) + reply], device=DEVICE)
    return {"input_ids": ids, "labels": labels}


def train(model, examples, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    for _ in tqdm(range(epochs), leave=False, disable=None):
        for number in torch.randperm(len(examples)):
            loss = model(**examples[number]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def evaluate(model, examples):
    return sum(model(**example).loss.item() for example in examples) / len(examples)


def main(quick=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    lesson = "src/llm/06_pretrained_llm.py" + (" --quick" if quick else "")
    models = ROOT / ("models/quick" if quick else "models")
    base, tokenizer = load_folder(models / "smollm2", lesson)
    lines = (ROOT / "data/qa.jsonl").open(encoding="utf-8-sig")
    terms = [json.loads(line) for line in lines if line.strip()]
    learned = [encode_term(tokenizer, term) for term in terms if term["split"] == "train"][:TERMS]
    unseen = [encode_term(tokenizer, term) for term in terms if term["split"] == "test"]
    print("Rank | trained | loss: learned | unseen terms")
    for rank in [0, 1, 8, 64]:
        torch.manual_seed(42)
        model = insert_lora(base, rank, ["q_proj", "v_proj"])  # the layers of the paper
        if rank > 0:  # without a LoRA, there is nothing to train
            train(model, learned, epochs=1 if quick else EPOCHS)
        losses = f"{evaluate(model, learned):.2f} | {evaluate(model, unseen):.2f}"
        print(f"{rank:4} | {count_trainable(model):9,} | {losses}")
    before = model(**unseen[0]).logits[:, -1]  # of the next token
    merge_lora(model)
    difference = (model(**unseen[0]).logits[:, -1] - before).abs().max()
    with torch.device("meta"):  # shapes without numbers: nothing is downloaded
        gpt2 = insert_lora(GPT2LMHeadModel(GPT2Config()), 64, ["c_attn"])
    print(f"Result: merged_difference = {difference:.7f}, gpt2_rank_64 = {count_trainable(gpt2):,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, on models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
