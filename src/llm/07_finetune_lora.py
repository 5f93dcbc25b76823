"""Fine-tune with LoRA: teach a language model to answer, by training about one per cent of it.

Run:    uv run src/llm/07_finetune_lora.py
Needs:  models/gpt2_mini/
Makes:  models/gpt2_lora/
Expect: gpt2_trainable = 294,912, held_out_gain >= 0.4, merged_difference <= 0.001

The big matrices stay as they are. Beside each stands a detour through a narrow gate, two thin matrices
B and A, and only these learn: W x + B A x. Afterwards, the detour can be added into W.
"""

import argparse
import json
import shutil
import sys
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
RANK, ALPHA, DROPOUT, EPOCHS, BATCH_SIZE, LEARNING_RATE, SEED = 8, 32, 0.1, 40, 8, 2e-3, 42


# DATA: the loss counts the answer and the token that ends it; neither the question nor the padding.
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


# LOAD: GPT-2 if lesson 06 has brought it, else our own; a fresh copy each time.
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


# LORA: peft finds the layers; of GPT-2 it takes c_attn, as the notes do.
def add_lora(model, name):
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # from inside peft
    plan = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": DROPOUT, "task_type": "CAUSAL_LM"}
    conv1d = model.config.model_type == "gpt2"  # keeps its weights as [inputs, outputs]
    tuned = get_peft_model(model, LoraConfig(**plan, fan_in_fan_out=conv1d))
    tuned.peft_config["default"].base_model_name_or_path = name
    return tuned


# TRAIN: all questions in a new order in each epoch, in batches that are padded no more than needed.
def train(model, items, collate, epochs):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    steps = epochs * -(-len(items) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    model.train()
    for _ in tqdm(range(epochs), leave=False, disable=None):
        for order in torch.randperm(len(items)).split(BATCH_SIZE):
            batch = collate([items[number] for number in order]).to(DEVICE)
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


# EVALUATE: the loss on questions, and the answers themselves.
@torch.inference_mode()
def evaluate(model, items, collate):
    return model(**collate(items).to(DEVICE)).loss.item()


@torch.inference_mode()
def ask(model, tokenizer, question):
    batch = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt").to(DEVICE)
    how = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    ids = model.generate(**batch, **how)[0, batch["input_ids"].shape[1] :]
    return repr(tokenizer.decode(ids))


@torch.inference_mode()
def show_the_notes_loss(model, tokenizer, questions):
    """Print the loss as the notes count it, each text padded to 128, and what most of it measures."""
    texts = [f"Question: {question} Answer: {answer}" for question, answer in questions[:5]]
    batch = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=128)
    ids, real = batch["input_ids"].to(DEVICE), batch["attention_mask"].to(DEVICE)
    everything = model(input_ids=ids, labels=ids).loss
    words = model(input_ids=ids, labels=ids.masked_fill(real == 0, -100)).loss
    share = 1 - real.float().mean()
    print(
        f"Loss as in the notes: {everything:.2f}, {share:.0%} of it padding; without: {words:.2f}"
    )


# SAVE: only the adapter, and the name of its base; then read it again and melt it into the base.
def save_adapter(model, folder):
    part = folder.with_suffix(".part")  # complete before it takes the place of the old one
    try:
        model.save_pretrained(part)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except Exception as error:
        sys.exit(f"Cannot write {folder}: {error}. Make room, then run again.")
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"Saved {folder.relative_to(ROOT).as_posix()}/, {size / 1000:,.0f} kB")


def compare_logits(models, tuned, batch):
    """Return the largest differences of the logits: base and tuned, tuned and read again, merged."""
    from peft import PeftModel

    base = load_base(models)[0]
    reloaded = PeftModel.from_pretrained(load_base(models)[0], models / "gpt2_lora").eval()
    with torch.inference_mode():
        ours, others = tuned(**batch).logits, [base(**batch).logits, reloaded(**batch).logits]
        others.append(reloaded.merge_and_unload()(**batch).logits)
    return [(ours - other).abs().max().item() for other in others]


def main(quick=False, questions=ROOT / "data" / "qa.jsonl"):
    from transformers import DataCollatorForSeq2Seq, GPT2Config, GPT2LMHeadModel

    learned, held_out = read_questions(questions)
    models = ROOT / ("models/quick" if quick else "models")
    base, tokenizer, folder = load_base(models)
    name, collate = folder.relative_to(ROOT).as_posix(), DataCollatorForSeq2Seq(tokenizer)
    print(f"{len(learned)} questions to learn and {len(held_out)} held out")
    show_the_notes_loss(base, tokenizer, learned)
    shown = [question for question, _ in learned[:2] + held_out[:1]]
    for question in shown:
        print(f"Before: {question} {ask(base, tokenizer, question)}")
    items, kept = ([encode(tokenizer, *item) for item in part] for part in (learned, held_out))
    before = evaluate(base, kept, collate)
    torch.manual_seed(SEED)
    model = add_lora(base, name)
    trainable, everything = model.get_nb_trainable_parameters()
    print(f"{name} with LoRA: {trainable:,} of {everything:,} parameters are trained")
    model = train(model, items, collate, epochs=2 if quick else EPOCHS)
    for question in shown:
        print(f"After: {question} {ask(model, tokenizer, question)}")
    now, after = evaluate(model, items, collate), evaluate(model, kept, collate)
    print(f"Loss: {now:.2f} on what it learned, {after:.2f} on the rest, where it was {before:.2f}")
    save_adapter(model, models / "gpt2_lora")
    tuning, reading, merging = compare_logits(models, model, collate(kept).to(DEVICE))
    print(f"Largest change of a logit: {tuning:.2f} by tuning, {reading:.6f} by reading it again")
    with torch.device("meta"):  # shapes without numbers: GPT-2 itself need not be here
        gpt2 = add_lora(GPT2LMHeadModel(GPT2Config()), "gpt2")
    trainable, everything = gpt2.get_nb_trainable_parameters()
    print(f"GPT-2 small: {trainable:,} of {everything:,} parameters, {trainable / everything:.2%}")
    print(
        f"Result: gpt2_trainable = {trainable:,}, held_out_gain = {before - after:.2f}, "
        f"merged_difference = {merging:.6f}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 2 epochs, models/quick/")
    cli.add_argument("--questions", type=Path, default=ROOT / "data" / "qa.jsonl", help="JSONL")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; no file is left half-written.")
