"""LoRA by hand: write the layer that peft adds, and see what a higher rank is good for.

Run:    uv run src/llm/11_lora_by_hand.py
Needs:  models/smollm2/
Makes:  nothing
Expect: peft_difference <= 0.001, merged_difference <= 0.001, gpt2_rank_64 = 2,359,296

A matrix of 576 x 576 has 331,776 numbers. Two matrices of rank 8 have 9,216, and their product is
as large as the first matrix. The rank limits what such a product can express.
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
RANKS = [1, 8, 64]
SCALE = 4  # peft's alpha / rank
LAYERS = ["q_proj", "v_proj"]  # queries and values, as in the paper
TERMS = 16  # of the glossary; of each, one question is learned
EPOCHS = 6
LEARNING_RATE = 5e-4


# README: start
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
        # README: end


def insert_lora(model, rank, names):
    """Return a frozen copy in which every layer of these names has a LoRA, and these LoRAs."""
    model = copy.deepcopy(model).requires_grad_(False)
    added = []
    for parent in list(model.modules()):
        for name in names:
            if hasattr(parent, name):
                added.append(LoRA(getattr(parent, name), rank))
                setattr(parent, name, added[-1])
    return model, added


def count_trainable(model):
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@torch.no_grad()
def compare_with_peft(base, ids, rank=8):
    """Return how far peft's logits with the same A and B, and merged ones, are from ours."""
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # from inside peft
    config = LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=LAYERS)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    others = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    ours, added = insert_lora(base, rank, LAYERS)
    for lora, other in zip(added, others, strict=True):
        lora.B.normal_(std=0.02)
        other.lora_A["default"].weight.copy_(lora.A)
        other.lora_B["default"].weight.copy_(lora.B)
    logits = ours(ids).logits
    print(f"Random LoRAs change the logits by up to {(logits - base(ids).logits).abs().max():.2f}")
    by_peft = (logits - theirs(ids).logits).abs().max().item()
    for lora in added:  # merge: the sum goes into the weights, and the detour is empty
        lora.layer.weight += SCALE * (lora.B @ lora.A)
        lora.B.zero_()
    return by_peft, (logits - ours(ids).logits).abs().max().item()


def load_folder(folder, lesson):
    """Return model and tokenizer of a folder, or stop and name the lesson that makes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        sys.exit(f"Cannot load {folder} ({type(error).__name__}). Make it with: uv run {lesson}")


# DATA: some questions of llm/07, one at a time, so that none needs padding.
def read_examples(tokenizer):
    """Return {part: [token ids and labels]}, to learn and for the two tests of llm/07."""
    lines = (ROOT / "data/qa.jsonl").read_text(encoding="utf-8").strip().split("\n")
    terms = [json.loads(line) for line in lines]
    examples = {"learned": [], "unseen phrasings": [], "unseen terms": []}
    for term in terms[:TERMS] + [term for term in terms if term["split"] == "test"]:
        asked = {"learned": term["questions"][0], "unseen phrasings": term["questions"][-1]}
        if term["split"] == "test":
            asked = {"unseen terms": term["questions"][0]}
        for part, question in asked.items():
            chat = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
            reply = tokenizer(term["answer"] + tokenizer.eos_token)["input_ids"]
            labels = [-100] * len(prompt) + reply  # the loss counts the answer alone
            examples[part].append(torch.tensor([prompt + reply, labels], device=DEVICE))
    return examples


def train(model, examples, epochs):
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, LEARNING_RATE, weight_decay=0.0)
    for _ in tqdm(range(epochs), leave=False, disable=None):
        for number in torch.randperm(len(examples)):
            ids, labels = examples[number].split(1)  # [1, T] and [1, T]
            loss = model(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@torch.inference_mode()
def evaluate(model, examples):
    losses = []
    for example in examples:
        ids, labels = example.split(1)
        losses.append(model(ids, labels=labels).loss)
    return torch.stack(losses).mean().item()


def main(quick=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    lesson = "src/llm/06_pretrained_llm.py" + (" --quick" if quick else "")
    folder = ROOT / ("models/quick/smollm2" if quick else "models/smollm2")
    base, tokenizer = load_folder(folder, lesson)
    torch.manual_seed(42)
    ids = torch.arange(100, 164, device=DEVICE).unsqueeze(0)  # [1, 64], any tokens
    by_peft, by_merging = compare_with_peft(base, ids)
    print(f"peft's logits differ by {by_peft:.6f}, those of merged weights by {by_merging:.6f}")

    examples = read_examples(tokenizer)
    print(f"Rank | trained | loss: {' | '.join(examples)}")
    for rank in [0, *RANKS]:
        torch.manual_seed(42)
        model, _ = insert_lora(base, rank, LAYERS)
        if rank:  # without a LoRA, there is nothing to train
            train(model, examples["learned"], epochs=1 if quick else EPOCHS)
        losses = " | ".join(f"{evaluate(model, part):.2f}" for part in examples.values())
        print(f"{rank:4} | {count_trainable(model):9,} | {losses}")
    with torch.device("meta"):  # shapes without numbers: nothing is downloaded
        gpt2, _ = insert_lora(GPT2LMHeadModel(GPT2Config()), 64, ["c_attn"])
    differences = f"peft_difference = {by_peft:.7f}, merged_difference = {by_merging:.7f}"
    print(f"Result: {differences}, gpt2_rank_64 = {count_trainable(gpt2):,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, on models/quick/")
    arguments = parser.parse_args()
    try:
        main(arguments.quick)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
