"""The language models: what attention must be equal to, what it must not see, and what is refused."""

import json
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import load_lesson
from hypothesis import given
from hypothesis import strategies as st


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# EMBEDDINGS
def test_unknown_words_become_unk_and_known_ones_keep_their_place():
    lesson = load_lesson("llm/01_embeddings")
    index = {word: place for place, word in enumerate(lesson.VOCABULARY)}
    assert len(index) == 10, "every word has a name of its own, <pad> and <unk> too"
    assert lesson.look_up(["the", "cat", "sofa"], index).tolist() == [2, 3, 1]


def test_the_similarity_model_only_adds_a_score_for_each_word():
    model = load_lesson("llm/01_embeddings").SimilarityModel(10)
    first, second = torch.tensor([3, 5, 3, 5]), torch.tensor([4, 8, 8, 4])
    cat_dog, sat_ran, cat_ran, sat_dog = model(first, second)
    torch.testing.assert_close(cat_dog + sat_ran, cat_ran + sat_dog)
    assert count(model) == 49


def test_skip_gram_learns_who_stands_beside_whom(monkeypatch):
    lesson = load_lesson("llm/01_embeddings")
    monkeypatch.setattr(lesson, "BATCH_SIZE", 64)
    torch.manual_seed(0)
    # 1 and 2 always stand between 0 and 3, and 4 to 7 among themselves
    left = torch.tensor([[0, 1, 3], [0, 2, 3]])[torch.randint(2, (400,))].flatten()
    ids = torch.cat([left, torch.randint(4, 8, (1200,))]).to(lesson.DEVICE)
    vectors = F.normalize(lesson.train_neighbours(ids, 8, epochs=3).cpu(), dim=1)
    assert vectors[1] @ vectors[2] > 0.8 > vectors[1] @ vectors[5]


# ATTENTION
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 8), (2, 64, 32)])
def test_attention_equals_scaled_dot_product_attention(shape, causal):
    lesson = load_lesson("llm/02_attention")
    attention, x = lesson.SelfAttention(shape[-1], causal).double(), torch.randn(shape).double()
    output, weights = attention(x)
    queries, keys, values = attention.W_Q(x), attention.W_K(x), attention.W_V(x)
    expected = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(shape[:2]).double())
    if causal:
        assert weights.triu(diagonal=1).abs().max() == 0


def test_attention_has_the_right_gradients():
    attention = load_lesson("llm/02_attention").SelfAttention(4, causal=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x)[0], (x,))


def test_the_bytes_kept_are_counted():
    lesson = load_lesson("llm/02_attention")
    a, b = torch.randn(2, 100, 100, requires_grad=True)
    assert lesson.count_saved_bytes(lambda: a + b)[1] == 0
    x = torch.randn(100, 100, requires_grad=True)
    assert lesson.count_saved_bytes(lambda: x.exp())[1] == 40_000
    assert lesson.count_saved_bytes(lambda: x * x)[1] == 40_000, "the same tensor counts once"


# BLOCKS
def test_blocks_have_the_notes_sizes():
    lesson = load_lesson("llm/03_transformer_block")
    for depth, size in {1: 776, 2: 1552, 4: 3104, 8: 6208, 12: 9312}.items():
        assert sum(count(lesson.TransformerBlock(8, 32)) for _ in range(depth)) == size
    names = [name for name, _ in lesson.TransformerBlock(8, 32).named_parameters()]
    assert names[:4] == ["attention.W_Q.weight", "attention.W_K.weight", "attention.W_V.weight"] + [
        "ff.0.weight"
    ]


def test_our_gpt2_block_is_the_one_of_transformers():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    ours = load_lesson("llm/03_transformer_block").GPT2Block(32, heads=4).eval()
    theirs = GPT2Block(GPT2Config(n_embd=32, n_head=4, attn_implementation="eager")).eval()
    state = {  # their Conv1D keeps its matrices the other way round
        name: tensor.T if tensor.dim() == 2 else tensor
        for name, tensor in ours.state_dict().items()
    }
    theirs.load_state_dict(state, strict=False)
    x, future = torch.randn(2, 7, 32), torch.full((7, 7), float("-inf")).triu(diagonal=1)
    expected = theirs(x, attention_mask=future[None, None])
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_heads_cost_no_parameters(heads):
    assert count(load_lesson("llm/03_transformer_block").GPT2Block(64, heads)) == 49_984


# MINI GPT
@pytest.fixture
def mini_gpt():
    torch.manual_seed(0)
    return load_lesson("llm/04_mini_gpt")


def test_mini_gpt_has_the_notes_size(mini_gpt):
    assert len(mini_gpt.CHARACTERS) == 15
    assert count(mini_gpt.MiniGPT(15)) == 25_103


@pytest.mark.parametrize("changed", range(16))
def test_a_change_in_the_future_never_changes_the_past(mini_gpt, changed):
    model = mini_gpt.MiniGPT(15)
    ids = torch.randint(15, (2, 16))
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % 15
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_encode_and_decode_are_inverse(mini_gpt):
    assert mini_gpt.to_text(mini_gpt.to_ids(mini_gpt.TEXT).tolist()) == mini_gpt.TEXT


@pytest.mark.parametrize("text", ["", "the zebra", "THE CAT", "the cat\u00e9"])
def test_a_text_that_it_cannot_read_is_refused_in_a_sentence(mini_gpt, text):
    with pytest.raises(SystemExit) as stop:
        mini_gpt.main(quick=True, prompt=text)
    assert repr(text) in stop.value.code


def test_generation_continues_the_prompt_and_temperature_decides(mini_gpt):
    model = mini_gpt.MiniGPT(15).to(mini_gpt.DEVICE)
    cold = {mini_gpt.generate(model, "the cat", 40, 1e-7) for _ in range(3)}
    hot = {mini_gpt.generate(model, "the cat", 40, 10.0) for _ in range(3)}
    assert len(cold) == 1
    assert len(hot) == 3
    assert all(text.startswith("the cat") and len(text) == 47 for text in cold | hot)


def test_a_word_that_is_not_in_the_text_is_counted(mini_gpt):
    assert mini_gpt.share_of_known_words("the cat sat cut-off") == 1
    assert mini_gpt.share_of_known_words("the cot sat ma") == pytest.approx(2 / 3)


# GPT-2
@pytest.fixture
def pretrain(tmp_path, monkeypatch):
    lesson = load_lesson("llm/05_pretrain_gpt2")
    lesson.ROOT = tmp_path
    sizes = {
        "WIDTH": 16,
        "LAYERS": 2,
        "HEADS": 2,
        "CONTEXT": 16,
        "VOCABULARY": 300,
        "BATCH_SIZE": 4,
    }
    for name, size in sizes.items():
        monkeypatch.setattr(lesson, name, size)
    torch.manual_seed(0)
    return lesson


def small_gpt2(lesson):
    return lesson.GPT2(300, 16, 16, 2, 2)


def test_gpt2_has_the_size_of_the_real_one():
    lesson = load_lesson("llm/05_pretrain_gpt2")
    with torch.device("meta"):
        assert count(lesson.GPT2(50257, 1024, 768, 12, 12)) == 124_439_808


def test_gpt2_does_not_see_the_future(pretrain):
    model, ids = small_gpt2(pretrain).eval(), torch.randint(300, (1, 16))
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 300
    torch.testing.assert_close(model(ids)[:, :9], model(other)[:, :9])
    assert not torch.allclose(model(ids)[:, 9:], model(other)[:, 9:])


def test_gpt2_logits_equal_those_of_transformers(pretrain):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    ours = small_gpt2(pretrain)  # takes over their weights, as it would the real GPT-2's
    theirs = GPT2LMHeadModel(GPT2Config(**ours.plan, bos_token_id=0, eos_token_id=0)).eval()
    ours.load_state_dict(pretrain.swap(theirs.transformer.state_dict()))
    ids = torch.randint(300, (2, 16))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-4)
    again = pretrain.swap(pretrain.swap(ours.state_dict()))
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_the_fast_gelu_is_gelu(pretrain):
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, 1e4, -1e4])])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = pretrain.FastGELU.apply(ours), F.gelu(theirs, approximate="tanh")
    weights = torch.randn_like(x)
    torch.autograd.backward(results, [weights, weights])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=5e-6, rtol=1e-5)
    precise = x[::50].double().requires_grad_()
    assert torch.autograd.gradcheck(pretrain.FastGELU.apply, precise)
    loss = pretrain.FastGELU.apply(precise).square().sum()
    (slope,) = torch.autograd.grad(loss, precise, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()  # there is no second derivative, rather than a wrong one


@given(st.binary(max_size=200), st.text(max_size=50))
def test_the_tokenizer_gives_any_text_back(data, text):
    text += data.decode("utf-8", errors="surrogateescape").encode("utf-8", "replace").decode()
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


TOKENIZER = load_lesson("llm/05_pretrain_gpt2").train_tokenizer(["def f(x):\n    pass\n"] * 3, 300)


def test_weight_decay_is_for_matrices_only(pretrain):
    groups = pretrain.make_optimizer(small_gpt2(pretrain)).param_groups
    assert {parameter.dim() for parameter in groups[0]["params"]} == {1}
    assert {parameter.dim() for parameter in groups[1]["params"]} == {2}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.0, 0.1)


def test_the_learning_rate_climbs_and_falls_to_a_tenth(pretrain):
    rates = [pretrain.learning_rate(step, 800) for step in range(800)]
    assert max(rates) == pytest.approx(pretrain.LEARNING_RATE)
    assert rates[:80] == sorted(rates[:80])
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[-1] == pytest.approx(pretrain.LEARNING_RATE / 10, rel=0.01)


def test_an_interrupted_run_goes_on_with_the_identical_losses(pretrain, tmp_path, monkeypatch):
    tokens, validation = torch.randint(300, (2, 500))

    def run(folder):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = small_gpt2(pretrain).to(pretrain.DEVICE)
        tokenizer = pretrain.train_tokenizer(["def forward(self, x):\n    return x\n"] * 3, 300)
        pretrain.train(model, tokenizer, tokens, validation, 8, 2, folder)
        state = torch.load(folder / pretrain.CHECKPOINT, weights_only=True)
        return state["losses"], model.state_dict()

    whole, weights = run(tmp_path / "whole")
    steps = []

    def stop_at_step_five(step, steps_in_all):
        if steps[-1:] != [step]:  # asked once for each group of parameters
            steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return learning_rate(step, steps_in_all)

    learning_rate = pretrain.learning_rate
    monkeypatch.setattr(pretrain, "learning_rate", stop_at_step_five)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    resumed, resumed_weights = run(tmp_path / "broken")
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7], "it goes on from step 4, the last checkpoint"
    assert resumed == whole
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.mark.parametrize("content", [None, b"", b"short", b"\xff\xfe\x00binary"])
def test_a_bad_corpus_ends_with_a_sentence(pretrain, tmp_path, content):
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(quick=True, corpus=corpus)
    assert "corpus" in stop.value.code


def test_a_corpus_of_ones_own_becomes_a_hugging_face_folder(pretrain, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the quick brown fox jumps over the lazy dog\n" * 200, encoding="utf-8")
    pretrain.main(quick=True, corpus=corpus)
    assert "logit_difference = 0.0000" in capsys.readouterr().out
    folder = tmp_path / "models" / "quick" / "gpt2_mini"
    assert not (folder / pretrain.CHECKPOINT).exists()
    expected = pretrain.GPT2(len(AutoTokenizer.from_pretrained(folder)), 16, 16, 2, 2)
    assert AutoModelForCausalLM.from_pretrained(folder).num_parameters() == count(expected)


# PRETRAINED
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small GPT-2 with random weights, in a Hugging Face folder as lesson 05 leaves one."""
    lesson = load_lesson("llm/05_pretrain_gpt2")
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("a model") / "gpt2_mini"
    sizes = {"vocab_size": 300, "n_positions": 160, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    GPT2Tokenizer(
        tokenizer_object=TOKENIZER, bos_token=lesson.END, eos_token=lesson.END
    ).save_pretrained(folder)
    return folder


def test_left_padding_changes_nothing(folder):
    lesson = load_lesson("llm/06_pretrained_llm")
    model, tokenizer, _ = lesson.load_pretrained(str(folder), folder)
    prompts = ["a", "def f(x): pass", "one two three four"]
    single = [lesson.generate(model, tokenizer, [text], 8, do_sample=False)[0] for text in prompts]
    assert lesson.generate(model, tokenizer, prompts, 8, do_sample=False) == single
    right = lesson.generate(model, tokenizer, prompts, 8, side="right", do_sample=False)
    assert right != single, "on the right it must show the difference"


def test_without_the_hub_it_goes_on_within_seconds(folder, monkeypatch, capsys):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    lesson, start = load_lesson("llm/06_pretrained_llm"), time.monotonic()
    assert lesson.load_pretrained("gpt2", folder)[2] == folder
    assert "Hub cannot be reached" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        lesson.load_pretrained("gpt2", folder / "missing")
    assert "05_pretrain_gpt2.py" in stop.value.code
    with pytest.raises(SystemExit) as stop:
        lesson.load_pretrained("somebody/some-model", folder)
    assert "somebody/some-model" in stop.value.code, "a model that one asked for is not replaced"
    assert time.monotonic() - start < 10


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    lesson = load_lesson("llm/06_pretrained_llm")
    monkeypatch.setattr(lesson.requests, "head", lambda *_, **__: time.sleep(60))
    start = time.monotonic()
    assert not lesson.hub_answers(seconds=0.2)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", ["06_pretrained_llm", "07_finetune_lora"])
@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", b"{"), ("tokenizer.json", b""), ("model.safetensors", b"no weights")],
)
def test_a_damaged_folder_ends_with_a_sentence(folder, tmp_path, name, file, content):
    models = tmp_path / "models"
    shutil.copytree(folder, models / "gpt2_mini")
    (models / "gpt2_mini" / file).write_bytes(content)
    lesson = load_lesson(f"llm/{name}")
    with pytest.raises(SystemExit) as stop:
        if name.startswith("06"):
            lesson.load_pretrained(str(models / "gpt2_mini"), models / "gpt2_mini")
        else:
            lesson.load_base(models)
    assert "gpt2_mini" in stop.value.code
    assert "05_pretrain_gpt2.py" in stop.value.code


@pytest.mark.parametrize("prompt", ["", "word " * 160])
def test_a_prompt_that_does_not_fit_is_refused(folder, tmp_path, prompt):
    lesson = load_lesson("llm/06_pretrained_llm")
    with pytest.raises(SystemExit) as stop:
        lesson.main(quick=True, model=str(folder), prompt=prompt)
    assert "--prompt" in stop.value.code


# LORA
@pytest.fixture
def lora(folder, tmp_path):
    lesson = load_lesson("llm/07_finetune_lora")
    lesson.ROOT = tmp_path
    shutil.copytree(folder, tmp_path / "models" / "gpt2_mini")
    return lesson


def test_the_loss_counts_the_answer_and_its_end_alone(lora, tmp_path):
    from transformers import DataCollatorForSeq2Seq

    model, tokenizer, _ = lora.load_base(tmp_path / "models")
    items = [lora.encode(tokenizer, "Why?", "So."), lora.encode(tokenizer, "What?", "f(x) = x")]
    for item, reply in zip(items, (" So.", " f(x) = x"), strict=True):
        asked = [i for i, label in zip(*item.values(), strict=True) if label == -100]
        answered = [label for label in item["labels"] if label != -100]
        assert tokenizer.decode(asked).endswith("Answer:")
        assert tokenizer.decode(answered) == f"{reply}<|endoftext|>"
    batch = DataCollatorForSeq2Seq(tokenizer)(items)
    lengths = [len(item["labels"]) for item in items]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert (batch["labels"][0, lengths[0] :] == -100).all()
    counts = torch.tensor([sum(label != -100 for label in item["labels"]) for item in items])
    alone = [lora.evaluate(model, [item], DataCollatorForSeq2Seq(tokenizer)) for item in items]
    together = lora.evaluate(model, items, DataCollatorForSeq2Seq(tokenizer))
    expected = (torch.tensor(alone) * counts).sum() / counts.sum()
    assert together == pytest.approx(expected.item(), rel=1e-4), "padding must change nothing"


def test_an_untrained_adapter_changes_nothing_and_only_it_is_trained(lora, tmp_path):
    base, _, _ = lora.load_base(tmp_path / "models")
    ids = torch.arange(20, device=lora.DEVICE)[None]
    before = base(ids).logits
    tuned = lora.add_lora(base, "models/gpt2_mini").eval()
    assert torch.equal(tuned(ids).logits, before)
    trained = [name for name, parameter in tuned.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name and "c_attn" in name for name in trained)
    assert len(trained) == 4
    assert tuned.peft_config["default"].base_model_name_or_path == "models/gpt2_mini"


def test_tuning_leaves_an_adapter_that_can_be_read_and_merged(lora, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lora, "EPOCHS", 3)
    questions = tmp_path / "own.jsonl"
    rows = [{"question": f"{n}?", "answer": f"{n}!", "held_out": n > 6} for n in range(9)]
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    lora.main(questions=questions)
    output = capsys.readouterr().out
    assert "gpt2_trainable = 294,912" in output
    assert float(output.rsplit("merged_difference = ")[1]) < 1e-3
    folder = tmp_path / "models" / "gpt2_lora"
    plan = json.loads((folder / "adapter_config.json").read_text())
    assert (plan["r"], plan["lora_alpha"]) == (8, 32)
    assert plan["base_model_name_or_path"] == "models/gpt2_mini"
    assert not folder.with_suffix(".part").exists()


GOOD = '{"question": "a", "answer": "b", "held_out": %s}\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "Cannot read"),
        (b"", "both kinds"),
        (b"\xff\xfe", "Cannot read"),
        ((GOOD % "true").encode(), "both kinds"),
        ((GOOD % "true" + GOOD % "false" + "{oops\n").encode(), "line 3"),
        ((GOOD % "true" + '{"question": "a"}\n').encode(), "line 2"),
        ((GOOD % "true" + '["a", "b"]\n').encode(), "line 2"),
        ((GOOD % '"yes"').encode(), "line 1"),
        (b'{"question": 1, "answer": "b", "held_out": true}', "line 1"),
    ],
)
def test_bad_questions_end_with_a_sentence_and_their_line(lora, tmp_path, content, complaint):
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        lora.main(quick=True, questions=path)
    assert complaint in stop.value.code
    assert path.name in stop.value.code


def test_a_question_longer_than_the_context_is_named(lora, tmp_path):
    tokenizer = lora.load_base(tmp_path / "models")[1]
    with pytest.raises(SystemExit, match="160 tokens: why why"):
        lora.encode(tokenizer, "why " * 160, "so")


def test_our_questions_are_many_and_none_is_held_out_and_learned():
    lesson = load_lesson("llm/07_finetune_lora")
    learned, held_out = lesson.read_questions(lesson.ROOT / "data" / "qa.jsonl")
    assert len(learned) >= 35
    assert len(held_out) >= 5
    assert not {question for question, _ in learned} & {question for question, _ in held_out}


def test_lora_by_hand_equals_peft_and_merges(folder, capsys):
    lesson = load_lesson("llm/11_lora_by_hand")
    base = lesson.load_base(folder.parent)[0]
    ids = torch.arange(30, device=lesson.DEVICE)[None]
    assert max(lesson.compare_with_peft(base, ids)) < 1e-3
    assert float(capsys.readouterr().out.split("up to ")[1].split()[0]) > 0.1
    fresh = lesson.add_detours(base, 4)
    assert torch.equal(fresh(ids).logits, base(ids).logits)
    assert lesson.count_trainable(fresh) == 2 * 4 * (32 + 96)
    with torch.device("meta"):
        from transformers import GPT2Config, GPT2LMHeadModel

        gpt2 = GPT2LMHeadModel(GPT2Config())
    sizes = {1: 36_864, 8: 294_912, 64: 2_359_296}
    assert {rank: lesson.count_trainable(lesson.add_detours(gpt2, rank)) for rank in sizes} == sizes


# KV CACHE
def test_cached_generation_equals_plain(folder):
    lesson = load_lesson("llm/10_kv_cache")
    theirs = lesson.load_base(folder.parent)[0]
    model, ids = lesson.take_over(theirs), torch.tensor([[5, 6, 7]], device=lesson.DEVICE)
    plain = lesson.generate(model, ids, 96, cached=False)
    assert torch.equal(plain, lesson.generate(model, ids, 96, cached=True))
    assert len(set(plain[0].tolist())) > 3, "a text of one token proves nothing"
    expected = theirs.generate(ids, max_new_tokens=93, do_sample=False, eos_token_id=None)
    assert torch.equal(plain, expected)


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_text_in_two_parts_gives_the_same_logits(folder, cut):
    lesson = load_lesson("llm/10_kv_cache")
    theirs = lesson.load_base(folder.parent)[0]
    model, ids = lesson.take_over(theirs), torch.randint(300, (2, 20), device=lesson.DEVICE)
    whole, _ = model(ids)
    first, caches = model(ids[:, :cut])
    second, caches = model(ids[:, cut:], caches)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole, theirs(ids).logits, atol=1e-4, rtol=1e-4)
    assert caches[0][0].shape == (2, 2, 20, 16)


def test_the_cached_model_has_the_size_of_gpt2():
    with torch.device("meta"):
        assert (
            count(load_lesson("llm/10_kv_cache").CachedGPT2(50257, 1024, 768, 12, 12))
            == 124_439_808
        )
