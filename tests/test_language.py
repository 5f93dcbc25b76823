"""The first language models: what they must equal, what they must not see, what is refused."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import copy_course, load_lesson, obey_permissions, run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from run_course import set_constant


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# EMBEDDINGS
def test_unknown_words_become_unk_and_known_ones_keep_their_place():
    lesson = load_lesson("llm/01_embeddings")
    index = {word: number for number, word in enumerate(lesson.VOCABULARY)}
    assert len(index) == 10, "every word has its own number, <pad> and <unk> too"
    assert lesson.look_up(["the", "cat", "sofa"], index).tolist() == [2, 3, 1]


def test_pairs_are_learned_and_say_nothing_about_other_pairs(capsys):
    lesson = load_lesson("llm/01_embeddings")
    torch.manual_seed(lesson.SEED)
    assert lesson.train_on_pairs() < 0.01
    printed = re.findall(r"(\w+) \+ (\w+): .* ([\d.]+)", capsys.readouterr().out)
    answers = {(first, second): float(probability) for first, second, probability in printed}
    assert all(answers[pair] > 0.9 for pair in lesson.RELATED)
    assert all(answers[pair] < 0.1 for pair in lesson.UNRELATED)
    assert answers["sat", "dog"] > 0.9, "nobody said that, and it is wrong"


def test_skip_gram_learns_which_words_are_neighbors(monkeypatch):
    lesson = load_lesson("llm/01_embeddings")
    monkeypatch.setattr(lesson, "BATCH_SIZE", 64)
    torch.manual_seed(0)
    # 1 and 2 always stand between 0 and 3, and 4 to 7 among themselves
    left = torch.tensor([[0, 1, 3], [0, 2, 3]])[torch.randint(2, (1200,))].flatten()
    ids = torch.cat([left, torch.randint(4, 8, (3600,))]).to(lesson.DEVICE)
    vectors = F.normalize(lesson.train_on_text(ids, 8).cpu(), dim=1)
    assert vectors[1] @ vectors[2] > 0.8 > vectors[1] @ vectors[5]


# ATTENTION
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 8), (2, 64, 32)])
def test_attention_equals_scaled_dot_product_attention(shape, causal):
    lesson = load_lesson("llm/02_attention")
    attention = lesson.SelfAttention(shape[-1], causal).double()
    x = torch.randn(shape).double()
    output, weights = attention(x)
    q, k, v = attention.W_Q(x), attention.W_K(x), attention.W_V(x)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(shape[:2]).double())
    if causal:
        assert weights.triu(diagonal=1).abs().max() == 0


def test_attention_has_the_right_gradients():
    attention = load_lesson("llm/02_attention").SelfAttention(4, causal=True).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x)[0], (x,))


def test_only_attention_by_hand_keeps_all_scores():
    """As llm/02 says of scaled_dot_product_attention: it never keeps T x T numbers."""
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    qkv = torch.randn(3, 1, 1, 512, 64, requires_grad=True)
    largest = {}
    for attention in (load_lesson("llm/02_attention").attend, F.scaled_dot_product_attention):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, keep):
            attention(*qkv)
        largest[attention.__name__] = max(sizes)
    assert largest == {"attend": 512 * 512, "scaled_dot_product_attention": 512 * 64}


# BLOCKS
def test_blocks_have_the_right_sizes():
    lesson = load_lesson("llm/03_transformer_block")
    for depth, size in {1: 776, 2: 1552, 4: 3104, 8: 6208, 12: 9312}.items():
        assert sum(count(lesson.TransformerBlock(8, 32)) for _ in range(depth)) == size
    names = [name for name, _ in lesson.TransformerBlock(8, 32).named_parameters()]
    assert names[:3] == ["attention.W_Q.weight", "attention.W_K.weight", "attention.W_V.weight"]


def test_the_two_orders_differ_in_nothing_but_the_order():
    lesson = load_lesson("llm/03_transformer_block")
    after = lesson.TransformerBlock(8, 32)
    before = lesson.PreNormBlock(8, 32)
    before.load_state_dict(after.state_dict())
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        assert not torch.allclose(after(x), before(x))
        for block in (after, before):  # parts that say nothing leave only the sums
            block.ff[2].weight.zero_()
            block.ff[2].bias.zero_()
            block.attention.W_V.weight.zero_()
        assert torch.equal(before(x), x), "x passes through untouched"
        assert not torch.allclose(after(x), x)


# MINI GPT
@pytest.fixture
def mini_gpt():
    torch.manual_seed(0)
    return load_lesson("llm/04_mini_gpt")


def test_mini_gpt_has_the_right_size(mini_gpt):
    assert len(set(mini_gpt.TEXT)) == 15
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


def test_ids_and_text_are_inverse(mini_gpt):
    model = mini_gpt.MiniGPT(15).to(mini_gpt.DEVICE)
    assert mini_gpt.generate(model, mini_gpt.TEXT, 0, 1.0) == mini_gpt.TEXT


def test_generation_continues_the_prompt_and_temperature_decides(mini_gpt):
    model = mini_gpt.MiniGPT(15).to(mini_gpt.DEVICE)
    cold = {mini_gpt.generate(model, "the cat", 40, 1e-7) for _ in range(3)}
    hot = {mini_gpt.generate(model, "the cat", 40, 10.0) for _ in range(3)}
    assert len(cold) == 1
    assert len(hot) == 3
    assert all(text.startswith("the cat") and len(text) == 47 for text in cold | hot)


CHANGES = [{"TEXT": "ab"}, {"TEXT": "Grüße, 你好!"}, {"CONTEXT": 64}, {"CONTEXT": 1}]
CHANGES += [{"STEPS": 1}, {"BATCH_SIZE": 1000}, {"TEXT": "word " * 40, "CONTEXT": 300}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_constants_are_there_to_be_changed(mini_gpt, monkeypatch, capsys, changes):
    monkeypatch.setattr(mini_gpt, "STEPS", 3)
    for name, value in changes.items():
        monkeypatch.setattr(mini_gpt, name, value)
    monkeypatch.setattr(mini_gpt, "CHARACTERS", sorted(set(mini_gpt.TEXT)))
    mini_gpt.main()
    assert "Result: loss = " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_without_a_next_character_is_refused(mini_gpt, monkeypatch, text):
    monkeypatch.setattr(mini_gpt, "TEXT", text)
    with pytest.raises(SystemExit, match="TEXT"):
        mini_gpt.main(quick=True)


# GPT-2
SIZES = {"WIDTH": 16, "LAYERS": 2, "HEADS": 2, "CONTEXT": 16, "VOCABULARY": 300, "BATCH_SIZE": 4}


@pytest.fixture
def pretrain(tmp_path, monkeypatch):
    lesson = load_lesson("llm/05_pretrain_gpt2")
    lesson.ROOT = tmp_path
    for name, size in SIZES.items():
        monkeypatch.setattr(lesson, name, size)
    torch.manual_seed(0)
    return lesson


@pytest.fixture
def small_course(tmp_path):
    """A copy of the course in which llm/05 is small."""
    course = copy_course(tmp_path / "course", with_data=False)
    path = course / "src" / "llm" / "05_pretrain_gpt2.py"
    text = path.read_text(encoding="utf-8")
    for name, size in SIZES.items():
        text = set_constant(text, f"{name}={size}")
    path.write_text(text, encoding="utf-8")
    return course


@pytest.mark.parametrize("heads", [1, 4, 12])
def test_gpt2_has_the_size_of_the_real_one_with_any_heads(monkeypatch, heads):
    lesson = load_lesson("llm/05_pretrain_gpt2")
    real = {"WIDTH": 768, "LAYERS": 12, "HEADS": heads, "CONTEXT": 1024}
    for name, size in real.items():
        monkeypatch.setattr(lesson, name, size)
    with torch.device("meta"):
        assert count(lesson.GPT2(50257)) == 124_439_808


def test_gpt2_does_not_see_the_future(pretrain):
    model, ids = pretrain.GPT2(300), torch.randint(300, (1, 16))
    other = ids.clone()
    other[:, 9] = (other[:, 9] + 1) % 300
    torch.testing.assert_close(model(ids)[:, :9], model(other)[:, :9])
    assert not torch.allclose(model(ids)[:, 9:], model(other)[:, 9:])


def test_gpt2_logits_equal_those_of_transformers(pretrain):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.2)
    theirs = GPT2LMHeadModel(config).eval()
    ours = pretrain.GPT2(300)  # reads their weights, as it would read the real GPT-2's
    weights = theirs.transformer.state_dict()
    ours.load_state_dict(
        {
            name: weight.T if weight.dim() == 2 and name.startswith("h.") else weight
            for name, weight in weights.items()
        }
    )
    ids = torch.randint(300, (2, 16))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


TOKENIZER = load_lesson("llm/05_pretrain_gpt2").train_tokenizer(["def f(x):\n    pass\n"] * 3)


@given(st.binary(max_size=200), st.text(max_size=50))
def test_the_tokenizer_gives_any_text_back(data, text):
    text += data.decode("utf-8", errors="surrogateescape").encode("utf-8", "replace").decode()
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize("content", [None, b"", b"short", b"\xff\xfe\x00binary", b"caf\xe9 " * 999])
def test_a_bad_corpus_ends_with_one_sentence_and_leaves_nothing(pretrain, tmp_path, content):
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        pretrain.main(quick=True, corpus=corpus)
    assert "corpus" in stop.value.code
    assert "\n" not in stop.value.code
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("heads", [3, 0, 32])
def test_heads_that_do_not_fit_are_told_before_anything_else(pretrain, monkeypatch, heads):
    monkeypatch.setattr(pretrain, "HEADS", heads)
    with pytest.raises(SystemExit, match=f"HEADS = {heads} does not divide WIDTH = 16"):
        pretrain.main(quick=True)


def write_corpus(folder):
    corpus = folder / "corpus.txt"
    text = "the quick brown fox jumps over the lazy dog\n" * 200  # no empty line in it
    corpus.write_text(text, encoding="utf-8-sig")
    return corpus


@pytest.mark.parametrize("changes", [{}, {"STEPS": 1}, {"STEPS": 10}, {"VOCABULARY": 50}], ids=str)
def test_your_own_corpus_becomes_a_hugging_face_folder(
    pretrain, tmp_path, capsys, monkeypatch, changes
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(pretrain, "STEPS", 8)
    for name, value in changes.items():
        monkeypatch.setattr(pretrain, name, value)
    corpus = write_corpus(tmp_path)
    pretrain.main(corpus=corpus)
    assert "Result: validation_loss = " in capsys.readouterr().out
    folder = tmp_path / "models" / "gpt2_mini"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a brown fox")["input_ids"]) == "a brown fox"
    assert tokenizer.eos_token == pretrain.END
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == count(pretrain.GPT2(len(tokenizer)))
    assert all(path.is_file() for path in folder.iterdir())


def test_the_saved_model_gives_the_same_logits(pretrain, tmp_path):
    from transformers import GPT2LMHeadModel

    (tmp_path / "part").mkdir()
    model = pretrain.GPT2(TOKENIZER.get_vocab_size())
    pretrain.export(model, TOKENIZER, tmp_path, tmp_path / "part")
    saved = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    ids = torch.arange(16).unsqueeze(0)
    torch.testing.assert_close(model(ids), saved(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("broken", ["weights", "tokenizer"])
def test_a_failed_save_keeps_the_old_model(pretrain, tmp_path, monkeypatch, broken):
    from transformers import GPT2LMHeadModel

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    folder = tmp_path / "models" / "quick" / "gpt2_mini"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"the old one")
    corpus = write_corpus(tmp_path)
    if broken == "weights":
        monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", fail)
    else:
        monkeypatch.setattr(pretrain.Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left on device"):
        pretrain.main(quick=True, corpus=corpus)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == b"the old one"


@pytest.mark.parametrize("locked", ["models", "models/gpt2_mini"])
def test_a_read_only_folder_is_told_before_the_training(small_course, tmp_path, locked):
    (small_course / locked).mkdir(parents=True)
    (small_course / locked).chmod(0o555)
    flags = ["--corpus", write_corpus(tmp_path)]
    failed = run(small_course, "llm/05_pretrain_gpt2", *flags, preexec_fn=obey_permissions)
    (small_course / locked).chmod(0o755)
    assert failed.returncode == 1
    sentence = r"Stopped: PermissionError\(13, .*\)\. Finished files are unchanged\.\n"
    assert re.fullmatch(sentence, failed.stderr)
    assert "Step" not in failed.stdout


def test_ctrl_c_saves_the_model_so_far_and_says_so(small_course, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = small_course / "src" / "llm" / "05_pretrain_gpt2.py"
    path.write_text(set_constant(path.read_text("utf-8"), "STEPS=4000"), encoding="utf-8")
    command = [sys.executable, "-u", path, "--corpus", write_corpus(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert any(line.startswith("Step 500") for line in process.stdout), "it trains"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Saving the model" in output
    assert re.fullmatch(r"Stopped after \d+ of 4000 steps\.", errors.strip().splitlines()[-1])
    assert "Traceback" not in errors
    folder = small_course / "models" / "gpt2_mini"
    assert all(file.is_file() for file in folder.iterdir()), "no folder .part is left"
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert (small_course / "models" / "plots" / "llm-05_pretrain_gpt2.png").stat().st_size > 0


def test_a_corpus_of_other_letters_is_fine_on_an_ascii_terminal(small_course, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("敏捷的棕色狐狸跳過了懶狗 🦊 Füchse\n" * 200, encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    flags = ["--quick", "--corpus", corpus]
    quick = run(small_course, "llm/05_pretrain_gpt2", *flags, env=environment)
    assert quick.returncode == 0, quick.stderr
    assert "\\u" in quick.stdout


# TOKENIZER
BY_HAND = load_lesson("llm/09_tokenizer")


def byte_characters():
    """GPT-2's table: the printable character that stands for each byte in its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


CHARACTERS = byte_characters()


def library(merges):
    """The same merges in the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    def spell(token):
        return "".join(CHARACTERS[byte] for byte in token)

    ids = {spell(token): i for i, token in enumerate(BY_HAND.list_vocabulary(merges))}
    pairs = [(spell(first), spell(second)) for first, second in merges]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


SOURCE = "".join(
    path.read_text("utf-8") for path in sorted(BY_HAND.Path(__file__).parent.glob("test_[a-d]*.py"))
)
OWN_MERGES = BY_HAND.train(SOURCE[:30_000] + " Straße naïve 你好你好 🙂🙂🙂" * 50, 300)
OWN_LIBRARY = library(OWN_MERGES)
TEXTS = [
    "",
    "lowest",
    "I'm sure they'll've   gone\n\n\tdef f(x):\r\n    return x**2  ",
    "🙂🚀👩‍👩‍👧",
]
TEXTS += [
    "語言模型讀的是數字",
    "नमस्ते दुनिया",
    "مرحبا",
    "½²Ⅷ٣",
    "\x00\x1c\x85\u00a0\u3000\u200d",
    "a" * 99,
]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_known_texts_get_the_ids_of_the_library(text):
    ids = BY_HAND.encode_text(text, OWN_MERGES)
    assert ids == OWN_LIBRARY.encode(text).ids
    assert BY_HAND.decode_ids(ids, OWN_MERGES) == text


@settings(deadline=None)
@given(st.text(max_size=80) | st.lists(st.sampled_from(SOURCE.split(" "))).map(" ".join))
@example("é e\u0301 ﷺ")
def test_any_text_gets_the_ids_of_the_library(text):
    ids = BY_HAND.encode_text(text, OWN_MERGES)
    assert ids == OWN_LIBRARY.encode(text).ids
    assert BY_HAND.decode_ids(ids, OWN_MERGES) == text


@settings(deadline=None, max_examples=30)
@given(st.text(alphabet="ab \né🙂", min_size=1, max_size=60), st.integers(0, 20))
def test_any_training_text_gives_a_tokenizer_that_the_library_understands(text, merges):
    merges = BY_HAND.train(text, merges)
    assert BY_HAND.encode_text(text, merges) == library(merges).encode(text).ids


def test_the_tokenizer_of_gpt2_mini_is_the_one_by_hand(pretrain, monkeypatch):
    import json

    monkeypatch.setattr(pretrain, "VOCABULARY", 600)
    theirs = pretrain.train_tokenizer([SOURCE])
    bytes_of = {character: byte for byte, character in enumerate(CHARACTERS)}

    def spell(token):
        return bytes(bytes_of[character] for character in token)

    merges = [
        (spell(first), spell(second))
        for first, second in json.loads(theirs.to_str())["model"]["merges"]
    ]
    vocabulary = BY_HAND.list_vocabulary(merges)
    for text in [*TEXTS, SOURCE[:5000]]:
        ours = [vocabulary[number] for number in BY_HAND.encode_text(text, merges)]
        assert ours == [spell(token) for token in theirs.encode(text).tokens]


def test_merging_goes_from_left_to_right():
    a = b"a"
    assert BY_HAND.merge([a, a, a, a, a], (a, a)) == [b"aa", b"aa", a]
    assert BY_HAND.merge([a, b"b", a, b"b"], (a, b"b")) == [b"ab", b"ab"]
    assert BY_HAND.merge([], (a, a)) == []


def test_half_an_emoji_decodes_without_an_error():
    emoji = BY_HAND.encode_text("🙂", [])
    assert BY_HAND.decode_ids(emoji, []) == "🙂"
    assert BY_HAND.decode_ids(emoji[:2], []) == "\N{REPLACEMENT CHARACTER}"


def test_training_ends_when_every_word_is_one_token():
    assert BY_HAND.train("aa aa", 100) == [(b"a", b"a"), (b" ", b"aa")]
    assert BY_HAND.train("", 5) == []
