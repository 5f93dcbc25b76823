"""Fine-tune with LoRA: teach a language model the glossary of this course, and see what it learns.

Run:    uv run src/llm/07_finetune_lora.py
Needs:  models/smollm2/
Makes:  models/smollm2_lora/, models/plots/llm-07_finetune_lora.png
Expect: word_for_word >= 85%, gpt2_trainable = 294,912

LoRA freezes every large matrix W and trains two small ones beside it: W x becomes W x + B A x. Two
tests follow: learned terms, asked for in new words, and terms that are not trained.
"""

import argparse
import json
import shutil
import sys
import time
import warnings
from difflib import SequenceMatcher
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
RANK = 8  # rows of A and columns of B
ALPHA = 32  # B A x is multiplied by ALPHA / RANK
EPOCHS = 3
BATCH_SIZE = 4
LEARNING_RATE = 1e-3
LENGTH = 40  # the most tokens in an answer
LONGEST = 256  # the most tokens in a question and its answer
SEED = 42


# DATA: each line is a JSON object: a term, its sentence, and several questions about it.
def read_questions(path):
    """Return (question, answer) pairs. The last question about a learned term is for the test."""
    pairs = {"train": [], "unseen phrasings": [], "unseen terms": []}
    number = 1
    try:
        for number, line in enumerate(path.open(encoding="utf-8-sig"), start=1):  # noqa: B007
            if not line.strip():
                continue
            term = json.loads(line)
            "".join([term["answer"]] + term["questions"]).encode()  # refuses half an emoji
            of_term = [(question, term["answer"]) for question in term["questions"]]
            if term["split"] == "train":
                pairs["train"] += of_term[:-1]
                pairs["unseen phrasings"] += of_term[-1:]
            else:
                pairs["unseen terms"] += of_term
        if not all(pairs.values()):
            raise ValueError("terms of the split train and of the split test are needed")
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"Cannot read {path}, line {number}: {error!r}. See data/qa.jsonl")
    return pairs


def encode(tokenizer, question, answer):
    """Return the token ids of a conversation. The loss does not count labels of -100."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    reply = tokenizer(answer + tokenizer.eos_token)["input_ids"]  # it also learns to stop
    if len(prompt + reply) > LONGEST:
        sys.exit(f"A question and its answer have more than {LONGEST} tokens: {question[:60]!r}")
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


def load_folder(folder, lesson):
    """Return model and tokenizer of a folder, or stop and name the lesson that makes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds to import

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return model.to(DEVICE).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        sys.exit(f"Cannot load {folder} ({type(error).__name__}). Make it with: uv run {lesson}")


# LORA: peft puts small matrices beside the large ones of these layers, and freezes the large ones.
def add_lora(model, layers):
    from peft import LoraConfig, get_peft_model

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # from inside peft
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=layers, task_type="CAUSAL_LM")
    config.fan_in_fan_out = model.config.model_type == "gpt2"  # it stores matrices transposed
    tuned = get_peft_model(model, config)
    print(f"LoRA on {layers} of {model.config.model_type}", end=": ")
    tuned.print_trainable_parameters()
    return tuned


# TRAIN: after each epoch, measure the loss on both tests.
@torch.inference_mode()
def evaluate(model, batches):
    model.eval()
    return sum(model(**batch.to(DEVICE)).loss.item() for batch in batches) / len(batches)


def train(model, batches, tests, epochs):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = OneCycleLR(optimizer, LEARNING_RATE, epochs * len(batches), cycle_momentum=False)
    curves = {name: [evaluate(model, test)] for name, test in tests.items()}  # before training
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        start = time.perf_counter()
        for batch in tqdm(batches, leave=False, disable=None):
            loss = model(**batch.to(DEVICE)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        report = f"{time.perf_counter() - start:.1f} s | train loss {total / len(batches):.2f}"
        for name, test in tests.items():
            curves[name].append(evaluate(model, test))
            report += f" | {name} {curves[name][-1]:.2f}"
        print(f"Epoch {epoch} | {report}")
    return curves


def draw(curves):
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots(subplot_kw={"xlabel": "epoch", "ylabel": "loss"})
    for name, losses in curves.items():
        axis.plot(losses, marker="o", label=name)
    axis.legend()
    return figure


# ASK: the answer always takes the likeliest token. All questions are one batch.
@torch.inference_mode()
def ask_model(model, tokenizer, questions):
    chats = [[{"role": "user", "content": question}] for question in questions]
    options = {"padding": True, "return_tensors": "pt"}
    batch = tokenizer.apply_chat_template(chats, add_generation_prompt=True, **options).to(DEVICE)
    ids = model.generate(**batch, max_new_tokens=LENGTH, do_sample=False)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def show_best_and_worst(model, tokenizer, name, pairs):
    """Print the best and the worst answer; return the share that is right, word for word."""
    questions, sentences = zip(*pairs, strict=True)
    answers = ask_model(model, tokenizer, questions)
    scores = [SequenceMatcher(None, *both).ratio() for both in zip(answers, sentences, strict=True)]
    for place, index in [("best", scores.index(max(scores))), ("worst", scores.index(min(scores)))]:
        with model.disable_adapter():
            before = ask_model(model, tokenizer, [questions[index]])[0]
        print(f"{name}, {place} answer:\nQuestion: {questions[index]}")
        print(f"Glossary: {sentences[index]}\nBefore: {before!r}\nAfter: {answers[index]!r}")
    return scores.count(1.0) / len(scores)


def main(quick=False, questions=ROOT / "data/qa.jsonl"):
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, GPT2Config

    models = "models/quick" if quick else "models"
    pairs = {name: part[: 4 if quick else None] for name, part in read_questions(questions).items()}
    lesson = "src/llm/06_pretrained_llm.py" + (" --quick" if quick else "")
    base, tokenizer = load_folder(ROOT / models / "smollm2", lesson)
    tokenizer.padding_side = "left"  # each question then ends where its answer begins
    collate = DataCollatorForSeq2Seq(tokenizer)  # pads to the longest, labels with -100
    loaders = {}
    for name, part in pairs.items():
        rows = [encode(tokenizer, *pair) for pair in part]
        loaders[name] = DataLoader(rows, BATCH_SIZE, shuffle=name == "train", collate_fn=collate)
    torch.manual_seed(SEED)
    with torch.device("meta"):  # shapes without numbers: nothing is downloaded
        gpt2 = add_lora(AutoModelForCausalLM.from_config(GPT2Config()), ["c_attn"])
    model = add_lora(base, "all-linear")
    model.peft_config["default"].base_model_name_or_path = f"{models}/smollm2"
    curves = train(model, loaders.pop("train"), loaders, epochs=1 if quick else EPOCHS)
    with TemporaryDirectory(dir=ROOT / models, suffix=".part") as part:  # renamed when complete
        model.save_pretrained(Path(part, "smollm2_lora"))
        shutil.rmtree(ROOT / models / "smollm2_lora", ignore_errors=True)
        Path(part, "smollm2_lora").rename(ROOT / models / "smollm2_lora")
    print(f"Saved {models}/smollm2_lora/")
    (ROOT / models / "plots").mkdir(exist_ok=True)
    draw(curves).savefig(ROOT / models / "plots/llm-07_finetune_lora.png")
    shares = [show_best_and_worst(model, tokenizer, name, pairs[name]) for name in curves]
    result = f"word_for_word = {shares[0]:.1%}, unseen_terms = {shares[1]:.1%}"
    print(f"Result: {result}, gpt2_trainable = {gpt2.get_nb_trainable_parameters()[0]:,}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack some letters
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    parser.add_argument("--questions", type=Path, default=ROOT / "data/qa.jsonl", help="JSON Lines")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.questions)
    except (KeyboardInterrupt, OSError, SafetensorError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
