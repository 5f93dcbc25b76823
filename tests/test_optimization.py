"""The benchmark method on simulated clocks, and the lessons that optimise, compare and time networks."""

import argparse
import io
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_lesson
from torch import nn


@pytest.fixture(scope="module")
def timing():
    return load_lesson("advanced/10_wrong_timings")


@pytest.fixture
def forms():
    return load_lesson("advanced/02_model_optimization")


@pytest.fixture
def exports():
    return load_lesson("advanced/18_export")


@pytest.fixture
def faster():
    return load_lesson("advanced/16_faster_or_not")


@pytest.fixture
def products():
    return load_lesson("advanced/04_gpu_vs_cpu_benchmark")


@pytest.fixture
def sides():
    return load_lesson("advanced/17_where_a_gpu_pays")


@pytest.fixture
def ways():
    return load_lesson("advanced/06_inference_comparison")


@pytest.fixture
def engines():
    return load_lesson("advanced/11_inference_engines")


@pytest.fixture
def latency():
    return load_lesson("advanced/19_latency_and_memory")


# METHOD: a machine whose clock we set. Its noise has a heavy tail: one block in ten is disturbed.
def noisy(random, seconds, rounds=21):
    times = seconds * np.exp(random.normal(0, 0.05, rounds))
    disturbed = random.random(rounds) < 0.1
    times[disturbed] *= 1 + random.pareto(1.5, disturbed.sum())
    return times


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, "no difference"), (1.1, "slower"), (1 / 1.1, "faster")]
)
def test_the_verdict_is_right_in_95_of_100_trials(timing, factor, expected):
    random, trials = np.random.default_rng(1), 400
    verdicts = [timing.compare(noisy(random, 1.0), noisy(random, factor))[3] for _ in range(trials)]
    assert verdicts.count(expected) >= 0.95 * trials


class Machine:
    """A clock that only work moves on; speed(now) says how slow the machine is at that time."""

    def __init__(self, speed=lambda now: 1.0):
        self.now, self.speed, self.pending, self.random = 0.0, speed, 0.0, np.random.default_rng(2)

    def perf_counter(self):
        return self.now

    def work(self, seconds):
        return lambda: self.advance(noisy(self.random, seconds, 1)[0])

    def advance(self, seconds):
        self.now += seconds * self.speed(self.now)

    def enqueue(self, seconds):
        self.pending += seconds

    def synchronize(self):
        self.now, self.pending = self.now + self.pending, 0.0


def test_the_whole_method_is_right_in_95_of_100_trials(timing, monkeypatch):
    found = []
    for _ in range(100):
        machine = Machine()
        monkeypatch.setattr(timing, "time", machine)
        calls = {"base": machine.work(1.0), "same": machine.work(1.0), "slow": machine.work(1.1)}
        times = timing.time_in_turn(calls)
        verdicts = [timing.compare(times["base"], times[name])[3] for name in ("same", "slow")]
        found.append(verdicts == ["no difference", "slower"])
    assert np.mean(found) >= 0.9  # both of them at once: 0.95 x 0.95


def test_a_machine_that_slows_down_fools_only_those_who_time_one_after_the_other(
    timing, monkeypatch
):
    machine = Machine(speed=lambda now: 1.0 if now < 30 else 1.5)
    monkeypatch.setattr(timing, "time", machine)
    first, second = machine.work(1.0), machine.work(1.0)
    one_after_the_other = [
        [timing.time_block(call, 1) for _ in range(30)] for call in (first, second)
    ]
    assert timing.compare(*one_after_the_other)[3] == "slower"
    machine.now = 0.0
    times = timing.time_in_turn({"first": first, "second": second})
    assert timing.compare(times["first"], times["second"])[3] == "no difference"


def test_each_candidate_warms_up_and_runs_often_and_long_enough(timing, monkeypatch):
    machine, calls = Machine(), []
    monkeypatch.setattr(timing, "time", machine)

    def compiles_first():
        calls.append(machine.now)
        machine.advance(max(0.01, 20.0 / 2 ** len(calls)))

    times = timing.time_in_turn({"": compiles_first})[""]
    assert len(times) >= 5
    assert max(times) == pytest.approx(0.01), "neither the compiler nor the cold start counts"
    counted = [start for start in calls if start >= calls[-1] - 2.0]
    assert len(counted) * 0.01 >= 2.0 - 0.02


def test_the_clock_is_read_when_the_device_is_idle(timing, monkeypatch):
    machine = Machine()
    monkeypatch.setattr(timing, "time", machine)
    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    machine.enqueue(5.0)  # somebody else's work, which must not count
    call = lambda: machine.enqueue(0.1)
    assert timing.time_block(call, 10) == pytest.approx(0.1)
    assert timing.time_hastily(call, 10) == 0.0


# FORMS: each is within its tolerance, and a broken one is found out.
@pytest.fixture
def network(forms):
    torch.manual_seed(0)
    model, images = forms.CNN().eval(), torch.rand(700, 1, 28, 28)  # 512 and an odd rest
    return model, images, torch.zeros(700, dtype=torch.long), forms.answer(model, images)


CHANGED = ["eager", "channels_last", "bf16 autocast", "torch.compile"]
CHANGED += ["int8 torch.ao", "int8 torchao"]
EXPORTED = ["eager", "TorchScript", "AOTInductor", "ONNX Runtime"]


def test_every_form_is_tested(forms, exports, faster):
    assert list(forms.FORMS) == CHANGED
    assert list(exports.FORMS) == EXPORTED
    assert set(faster.FORMS) == {*CHANGED, *EXPORTED}
    assert {*forms.NOT_QUICK, *exports.NOT_QUICK} < set(faster.NOT_QUICK) < set(faster.FORMS)


def check_changed(forms, name, network):
    allowed = forms.ALLOWED.get(name, 1e-3)
    return forms.check_form(forms.packed(forms.FORMS[name]), allowed, *network), allowed


@pytest.mark.parametrize("name", CHANGED + EXPORTED[1:])
def test_every_form_is_within_its_tolerance(forms, exports, network, name):
    if name in [*forms.NOT_QUICK, *exports.NOT_QUICK] and not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    exports.CNN.__module__ = forms.CNN.__module__ = "__main__"  # TorchScript knows no name like 02_
    if name in forms.FORMS:
        (call, content, accuracy, row), allowed = check_changed(forms, name, network)
    else:
        allowed = exports.TOLERANCE
        call, content, accuracy, row = exports.check_form(exports.FORMS[name][0], allowed, *network)
    assert row.endswith("kept"), row
    assert content
    assert 0 <= accuracy <= 1
    with torch.inference_mode():
        for batch in (1, 3):  # sizes that it has not been made with
            answered = call(network[1][:batch]).float()
            assert (answered - network[3][:batch]).abs().max() <= allowed


def spoil(forms, network, make, layers=()):
    """Return the table's row for a form that make has spoilt."""
    model, images, labels, _ = network
    model = nn.Sequential(model, *layers).eval()
    return forms.check_form(make, 1e-3, model, images, labels, forms.answer(model, images))


def exported_in_training(exports):
    export = lambda model, images: torch.export.export(
        model.train(), (images[:2],), dynamic_shapes=exports.ANY_BATCH
    )
    return lambda model, images: (export(model, images).module(), b"")


def exported_for_two(model, images):
    return torch.export.export(model, (images[:2],)).module(), b""


def test_a_broken_export_is_found_in_the_table(exports, network):
    dropout, norm = [nn.Dropout(0.5)], [nn.BatchNorm1d(10)]
    sound = spoil(exports, network, lambda model, images: (model, b""), dropout + norm)
    assert sound[3].endswith("kept")
    for layers in (dropout, norm):
        call, _, _, row = spoil(exports, network, exported_in_training(exports), layers)
        assert row.endswith("BROKEN") or call is None, row  # a batch of 1 has no norm to train with
        assert "kept" not in row
    for make in (exported_for_two, lambda model, _: (lambda x: model(x[:1]).repeat(2, 1), b"")):
        call, _, _, row = spoil(exports, network, make)
        assert call is None
        assert row.startswith("not run: ")


@pytest.mark.parametrize(
    "damage",
    {
        "nan": lambda x, logits: logits * math.nan,
        "one image": lambda x, logits: logits + (len(x) == 1),
        "the last image": lambda x, logits: (
            logits + (len(x) == 188) * torch.eye(len(x), 10).flip(0)
        ),
    }.values(),
)
def test_damage_to_a_single_batch_is_found(forms, network, damage):
    row = spoil(forms, network, lambda model, _: (lambda x: damage(x, model(x)), b""))[3]
    assert row.endswith("BROKEN")


def test_a_missing_package_is_a_reason_in_the_table(exports, network, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    call, _, _, row = exports.check_form(exports.onnx_runtime, 1e-3, *network)
    assert call is None
    assert "onnxruntime" in row


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_what_is_shipped_gives_the_same_answers(forms, exports, network, tmp_path):
    import onnxruntime
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model, images, _, _ = network
    forms.CNN.__module__ = "__main__"  # TorchScript cannot read back a name like 02_...
    call, content, _, _ = exports.check_form(exports.torchscript, 1e-3, *network)
    assert torch.equal(torch.jit.load(io.BytesIO(content))(images), call(images))
    call, content, _, _ = exports.check_form(exports.onnx_runtime, 1e-3, *network)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (answered,) = session.run(None, {"x": images.numpy()})
    assert np.array_equal(answered, call(images).numpy())
    (call, content, _, _), _ = check_changed(forms, "int8 torchao", network)
    state = torch.load(io.BytesIO(content), weights_only=True)
    other = forms.CNN().eval()
    quantize_(other, Int8DynamicActivationInt8WeightConfig(version=2))
    other.load_state_dict(state)
    assert torch.equal(other(images), call(images))
    assert len(content) < 0.35 * len(forms.pack(model))


def quick_folder(lesson, network, tmp_path):
    lesson.ROOT, folder = tmp_path, tmp_path / "models" / "quick"
    folder.mkdir(parents=True)
    torch.save(network[0].state_dict(), folder / "mnist_cnn.pth")
    return folder


def test_a_broken_form_is_not_shipped(forms, network, tmp_path, capsys):
    folder = quick_folder(forms, network, tmp_path)
    (folder / "mnist_cnn_int8.pth").write_bytes(b"the good one")
    spoilt = lambda model, images: lambda x: model(x) + 9
    forms.FORMS = {"eager": forms.FORMS["eager"], "int8 torchao": spoilt}
    forms.main(quick=True)
    assert "forms = 2, outside_tolerance = 1" in capsys.readouterr().out
    assert (folder / "mnist_cnn_int8.pth").read_bytes() == b"the good one"


def test_a_broken_export_is_not_shipped(exports, network, tmp_path, capsys):
    folder = quick_folder(exports, network, tmp_path)
    (folder / "mnist_cnn.onnx").write_bytes(b"the good one")
    spoilt = lambda model, images: (lambda x: model(x) + 9, b"bad")
    exports.FORMS = {"eager": (exports.eager, None), "ONNX Runtime": (spoilt, "mnist_cnn.onnx")}
    exports.main(quick=True)
    assert "forms = 2, outside_tolerance = 1" in capsys.readouterr().out
    assert (folder / "mnist_cnn.onnx").read_bytes() == b"the good one"


@pytest.mark.parametrize("file", ["t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte", None])
def test_stand_in_digits_that_the_network_has_learned_do_not_test_it(forms, tmp_path, file):
    forms.ROOT, folder = tmp_path, tmp_path / "data" / "MNIST" / "raw"
    if file:  # the other file holds three images, this one is torn
        folder.mkdir(parents=True)
        (folder / "t10k-labels-idx1-ubyte").write_bytes(bytes(8 + 3))
        (folder / "t10k-images-idx3-ubyte").write_bytes(bytes(16 + 3 * 784))
        assert forms.load_test_images()[2] == "MNIST"
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:-1])
    images, labels, source = forms.load_test_images()
    assert (len(images), len(labels), source) == (360, 360, "scikit-learn digits")


@pytest.mark.parametrize("lesson", ["forms", "exports"])
def test_without_a_trained_network_the_lesson_names_the_command(request, lesson, tmp_path):
    lesson = request.getfixturevalue(lesson)
    lesson.ROOT = tmp_path
    with pytest.raises(
        SystemExit, match=r"Make it with: uv run src/intermediate/02_cnn.py --quick"
    ):
        lesson.main(quick=True)


# FASTER: every form is made, timed, and found out when it answers otherwise.
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_only_what_answers_alike_is_called_kept(faster, network, capsys):
    model, images, _, _ = network
    faster.CNN.__module__ = "__main__"  # TorchScript cannot read back a name like 16_...
    calls, broken = faster.make_forms(model, images, quick=True)
    assert list(calls) == [name for name in faster.FORMS if name not in faster.NOT_QUICK]
    assert broken == 0
    faster.FORMS = {
        "nan": lambda model, images: lambda x: model(x) * math.nan,
        "other": lambda model, images: lambda x: model(x).roll(1, dims=1),
        "no package": lambda model, images: model.no_such_attribute,
    }
    calls, broken = faster.make_forms(model, images, quick=True)
    assert (list(calls), broken) == (["nan", "other"], 2)
    assert re.search(r"no package +\| not run: ", capsys.readouterr().out)


def test_a_form_that_fails_for_one_image_is_found(faster, network):
    spoilt = lambda model, images: lambda x: model(x) + (len(x) == 1)
    faster.FORMS = {"one image": spoilt}
    assert faster.make_forms(*network[:2], quick=True)[1] == 1


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_forms_answer_alike(faster, network):
    model, images, _, _ = network
    faster.FORMS = {name: faster.FORMS[name] for name in faster.NOT_QUICK}
    calls, broken = faster.make_forms(model, images, quick=False)
    assert (list(calls), broken) == (list(faster.NOT_QUICK), 0)


def test_each_form_is_compared_with_the_plain_one(faster, capsys, monkeypatch):
    took = {"eager": [2e-3] * 5, "other": [1e-3] * 5}
    monkeypatch.setattr(faster, "time_in_turn", lambda runs, **_: took)
    words = faster.measure(dict.fromkeys(took), torch.zeros(8))
    assert words["other"] == "2.00 (2.00 to 2.00): faster"
    assert re.search(r"other +\| 1\.000 \(1\.000 to 1\.000\)", capsys.readouterr().out)


# GPU AGAINST CPU: what is counted, and where the crossing lies.
@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        (["slower", "no difference", "faster", "faster"], "faster from batch 32 on"),
        (["faster", "faster", "faster", "faster"], "faster from batch 1 on"),
        (["slower", "faster", "slower", "faster"], "faster from batch 128 on"),
        (["slower", "faster", "faster", "no difference"], "not faster to the end"),
    ],
)
def test_the_crossing_is_where_nothing_slower_follows(sides, capsys, monkeypatch, verdicts, words):
    told, took = iter(verdicts), {"1 thread": [0.5] * 5, "all threads": [0.25] * 5}
    monkeypatch.setattr(sides, "time_in_turn", lambda works, **_: took)
    monkeypatch.setattr(sides, "compare", lambda *_: (1.0, 1.0, 1.0, next(told)))
    both = sides.pick_sides()
    rows, difference = sides.compare_batches("Inference", both, [1, 8, 32, 128], {})
    assert f": {words}\n" in capsys.readouterr().out
    assert difference <= 1e-5
    assert rows[32][0]["1 thread"].tolist() == [64.0] * 5, "images are counted"
    assert rows[32][0]["all threads"].tolist() == [128.0] * 5


def test_other_batches_may_be_measured(sides, capsys, monkeypatch):
    rows = {n: ({"CPU": np.ones(5)}, f"1.50 (1.40 to 1.60): faster at {n}") for n in (8, 64)}
    monkeypatch.setattr(sides, "BATCHES", list(rows))
    monkeypatch.setattr(sides, "compare_batches", lambda *_: (rows, 0.0))
    monkeypatch.setattr(sides, "save", lambda write, path: write(io.BytesIO()))
    sides.main()
    shown = capsys.readouterr().out
    assert "Batch of 64, inference: " in shown
    assert "faster at 64\n" in shown
    assert "gpu_at_64 = none" in shown


def test_operations_are_counted(products, capsys, monkeypatch):
    took = {"1 thread": [0.5] * 5, "all threads": [0.25] * 5}
    monkeypatch.setattr(products, "time_in_turn", lambda works, **_: took)
    rows, difference = products.compare_products(products.pick_sides(), [500, 1000])
    assert rows[500]["1 thread"].tolist() == [0.5] * 5  # 2 x 500^3 operations in half a second
    assert rows[1000]["all threads"].tolist() == [8.0] * 5
    assert difference <= 1e-5
    shown = capsys.readouterr().out
    assert "1000 x  1000 | 1 thread 4 (4 to 4)" in shown
    assert "2.00 (2.00 to 2.00): faster" in shown


def test_a_cpu_is_not_asked_for_what_takes_it_minutes(products, capsys, monkeypatch):
    gpu, asked = torch.device("meta"), []
    monkeypatch.setattr(products, "DEVICE", gpu)
    monkeypatch.setattr(
        products, "matmul", lambda device, size: asked.append((device.type, size)) or torch.ones
    )
    monkeypatch.setattr(products, "with_threads", lambda threads, work: lambda: torch.ones(1))
    monkeypatch.setattr(
        products, "time_in_turn", lambda works, **_: {side: [1.0] for side in works}
    )
    both = {"CPU": (torch.device("cpu"), 1), "GPU": (gpu, 1)}
    rows, _ = products.compare_products(both, [1024, 8192])
    assert asked == [("cpu", 1024), ("meta", 1024), ("meta", 8192)]
    assert list(rows[8192]) == ["GPU"]
    assert "the CPU is not asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("peak", "words"), [(8.0, "25% of its peak"), (math.nan, "its peak is not known")]
)
def test_a_share_of_the_peak_is_shown_where_the_peak_is_known(
    products, capsys, monkeypatch, peak, words
):
    monkeypatch.setattr(products, "find_peak", lambda: peak)
    monkeypatch.setattr(products, "save", lambda *_: None)
    rows = {128: {"1 thread": np.full(5, 1.0), "all threads": np.full(5, 2.0)}}
    monkeypatch.setattr(products, "compare_products", lambda *_, **__: (rows, 0.0))
    products.main(quick=True)
    assert f"by all threads: 2 GFLOP/s, {words}\n" in capsys.readouterr().out


def test_the_flags_of_the_notes_choose_the_largest_matrix_and_the_repeats(products, monkeypatch):
    asked = {}
    rows = {300: {"1 thread": np.ones(7), "all threads": np.ones(7)}}
    monkeypatch.setattr(
        products,
        "compare_products",
        lambda sides, sizes, **options: asked.update(sizes=sizes, **options) or (rows, 0.0),
    )
    monkeypatch.setattr(products, "save", lambda *_: None)
    products.main(matrix_size=300, iterations=7)
    assert asked == {"sizes": [64, 256, 300], "seconds": 2.0, "rounds": 7}


@pytest.mark.parametrize("text", ["", "4", "-8", "8.5", "many"])
def test_a_bad_size_is_refused_with_what_is_wanted(products, text):
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number of 5 or more"):
        products.count(text)
    assert products.count("5") == 5


def test_both_sides_do_the_same_work(sides):
    where = torch.device("cpu"), torch.get_num_threads()
    for kind in ("Inference", "Training"):
        assert torch.equal(*(sides.make_work(kind, 4, *where)() for _ in range(2)))
    answer, step = (sides.make_work(kind, 4, *where) for kind in ("Inference", "Training"))
    assert torch.equal(answer(), answer())
    assert step() != step(), "a training step trains"


def test_matrices_that_do_not_fit_end_in_a_sentence(products):
    with pytest.raises(SystemExit, match="smaller --matrix-size"):
        products.matmul(torch.device("cpu"), 10**7)


# WAYS: a small classifier through all of them.
@pytest.fixture
def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]
    return nn.Sequential(*layers).eval(), torch.rand(4, 3, 8, 8)


def rows_of(shown):
    return dict(re.findall(r"^(\w[\w. ]*\w) +\| (.+)$", shown, re.MULTILINE))


@pytest.mark.parametrize(
    ("lesson", "expected", "only_cuda"),
    [
        ("ways", {"eager fp32", "fp16 autocast", "bf16 autocast", "channels_last"}, ["TF32"]),
        ("engines", {"eager fp32", "TorchScript", "ONNX Runtime"}, ["CUDA graphs", "TensorRT"]),
    ],
)
def test_every_way_is_within_its_tolerance(request, small, capsys, lesson, expected, only_cuda):
    lesson = request.getfixturevalue(lesson)
    calls, ran, broken = lesson.check_ways(lesson.WAYS, *small, [1, 4])
    rows = rows_of(capsys.readouterr().out)
    assert broken == 0
    for way in lesson.WAYS:
        assert "kept" in rows[way] or "not run" in rows[way], rows[way]
        assert "kept" in rows[way] or way not in calls
    assert ran == sum("kept" in row for row in rows.values())
    assert expected <= {way for way in rows if "kept" in rows[way]}
    if lesson.DEVICE.type != "cuda":
        for way in only_cuda:
            assert "needs a CUDA device" in rows[way]


def test_a_broken_way_is_found(ways, small, capsys):
    model, images = small
    buffer = torch.zeros(4, 10)

    def keeps_one_buffer(
        x,
    ):  # as a CUDA graph does: right, although the answers overwrite each other
        buffer[: len(x)] = model(x)
        return buffer[: len(x)]

    spoilt = {
        "in training": (lambda model, _: model.train(), 1e-3),
        "one image": (lambda model, _: lambda x: model(x) + (len(x) == 1), 1e-3),
        "nan": (lambda model, _: lambda x: model(x) * math.nan, 1e-3),
        "another batch": (lambda model, _: torch.export.export(model, (images,)).module(), 1e-3),
        "one buffer": (lambda model, _: keeps_one_buffer, 1e-3),
    }
    _, ran, broken = ways.check_ways(spoilt, model, images, [1, 4])
    assert (ran, broken) == (4, 3)
    shown = capsys.readouterr().out
    assert {row.split(" |")[0].strip() for row in shown.splitlines() if " s | " in row} == {
        "in training",
        "one image",
        "nan",
        "one buffer",
    }
    assert "another batch | not run" in shown


def test_a_way_that_takes_too_long_is_not_waited_for(ways, small, monkeypatch):
    model, images = small
    seconds = {id(images): 1.0}
    monkeypatch.setattr(ways, "time_block", lambda call, count: (call(), seconds["now"])[1])
    seconds["now"] = 1.0
    eager = {"eager fp32": (lambda model, _: model, 1e-3)}
    assert list(ways.check_ways(eager, model, images, [4])[0]) == ["eager fp32"]
    ways.PATIENCE = 0.5
    assert ways.check_ways(eager, model, images, [4])[0] == {}


def test_a_slow_way_says_how_slow_it_is(ways, small, monkeypatch, capsys):
    model, images = small
    took = iter([2.0, 2.0, 2.0, 90.0, 60.0])  # eager, then two calls of each way
    monkeypatch.setattr(ways, "time_block", lambda call, count: next(took))
    both = {"eager fp32": (lambda model, _: model, 1e-3), "slow": (lambda model, _: model, 1e-3)}
    calls, ran, broken = ways.check_ways(both, model, images, [1, 4])
    assert (list(calls), ran, broken) == (["eager fp32"], 2, 0)
    assert "kept; 30 times as slow as eager, not timed\n" in capsys.readouterr().out


def test_tf32_lasts_as_long_as_a_call(ways, monkeypatch):
    monkeypatch.setattr(ways, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    call = ways.run_tf32(lambda x: torch.backends.cudnn.allow_tf32, None)
    assert [call(1), call(1), torch.backends.cudnn.allow_tf32] == [True, True, False]


def test_images_that_do_not_fit_end_in_a_sentence(ways, small, monkeypatch):
    monkeypatch.setattr(ways, "make_classifier", lambda name: small[0])
    with pytest.raises(SystemExit, match="cannot read 1000000000000 images"):
        ways.main(quick=True, batch_sizes=[10**12])


def test_logits_that_are_all_zero_are_no_difference(ways, small):
    model, images = small
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    _, ran, broken = ways.check_ways({"eager fp32": ways.WAYS["eager fp32"]}, model, images, [4])
    assert (ran, broken) == (1, 0)
    other = {"other": (lambda model, _: lambda x: model(x) + 1e-3, 1e-3)}
    assert ways.check_ways(other, model, images, [4])[1:] == (1, 1)


def test_an_unknown_network_is_refused_with_a_suggestion(ways):
    with pytest.raises(SystemExit, match=r"no classifier named resnet_50\. Try: .*resnet50"):
        ways.main(model_name="resnet_50")


def test_images_of_a_wrong_size_end_in_a_sentence(ways, small, monkeypatch):
    monkeypatch.setattr(ways, "make_classifier", lambda name: small[0])
    with pytest.raises(SystemExit, match="cannot read 8 images of SIZE = 32"):
        ways.main(quick=True)


@pytest.mark.parametrize("text", ["", "0", "-8", "1,a", "1;8"])
def test_bad_batch_sizes_are_refused(ways, text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole numbers, such as"):
        ways.positive_numbers(text)
    assert ways.positive_numbers("8,1,8") == [1, 8]


# LATENCY: each way gets its calls in turn, once it is warm.
def test_the_ways_take_turns_once_they_are_warm(latency, monkeypatch):
    machine, order = Machine(), []
    monkeypatch.setattr(latency, "time", machine)

    def work(name, seconds):
        cold = iter([9.0, 9.0, 9.0])
        return lambda: (order.append(name), machine.advance(next(cold, seconds)))

    times = latency.time_calls({"fast": work("fast", 0.01), "slow": work("slow", 0.5)}, 20)
    assert order[6:] == ["fast", "slow"] * 20
    assert [*times["fast"], *times["slow"]] == pytest.approx([0.01] * 20 + [0.5] * 20)


def test_the_percentiles_are_those_of_single_calls(latency, monkeypatch, capsys):
    seconds = [n / 1e3 for n in range(1, 102)]
    monkeypatch.setattr(latency, "time_calls", lambda *_: {"way": seconds})
    monkeypatch.setattr(latency, "peak_memory", lambda call: 7.0)
    latency.measure({"way": torch.neg}, torch.ones(8), 1.0)
    assert re.search(
        r"^way +\|    51\.00 \|    96\.00 \| +1\.88 \| +7\.0$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_that_a_call_gives_back_is_counted_once(latency):
    call = lambda: torch.ones(32, 2**18)  # 32 MiB
    if latency.DEVICE.type == "cpu":
        assert [latency.peak_memory(call) for _ in range(2)] == pytest.approx([32, 32], abs=4)


def test_latency_knows_the_ways_of_both_lessons(latency, ways, engines):
    assert list(latency.WAYS) == list(dict.fromkeys([*ways.WAYS, *engines.WAYS]))
    assert latency.NOT_QUICK == engines.NOT_QUICK


def test_a_way_that_cannot_run_is_left_out_with_its_reason(latency, small, capsys):
    model, images = small
    ways = {
        "eager fp32": latency.WAYS["eager fp32"],
        "no package": lambda model, images: model.no_such_attribute,
        "another batch": lambda model, _: torch.export.export(model, (images,)).module(),
    }
    assert list(latency.make_ways(ways, model, images, [1, 4])) == ["eager fp32"]
    assert list(rows_of(capsys.readouterr().out)) == ["no package", "another batch"]


# SCRIPT: the reference project's commands, with a stand-in for uv that only writes them down.
@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize("gpu", [True, False])
def test_run_benchmarks_runs_the_benchmark_lessons(tmp_path, gpu):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "run_benchmarks.sh", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    programs = {
        "uv": 'echo "$*" >> "$LOG"; echo "Result: ways = 1"',
        "nvidia-smi": f"exit {not gpu:d}",
    }
    for name, script in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    plots = tmp_path / "models" / "plots"
    plots.mkdir(parents=True)
    (plots / "04_gpu_vs_cpu_benchmark.png").write_bytes(b"picture")
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(log)}
    command = ["bash", str(tmp_path / "scripts" / "run_benchmarks.sh")]
    subprocess.run(command, check=True, env=environment, cwd="/", capture_output=True)
    commands = log.read_text().splitlines()
    lessons = [re.search(r"advanced/(\d\d)", line)[1] for line in commands]
    assert lessons == ["04", "17", "05", "06", "11", "19"]
    assert ("--matrix-size 8192 --iterations 100" in commands[0]) == gpu
    assert ("--model-name resnet50 --batch-sizes 1,8,16,32" in commands[3]) == gpu
    assert "--batch-sizes 16,32,64,128" in commands[2]
    (collected,) = (tmp_path / "models" / "benchmarks").iterdir()
    assert {path.name for path in collected.iterdir()} >= {
        "04_gpu_vs_cpu_benchmark.txt",
        "05_memory_management.txt",
        "06_inference_comparison.txt",
        "04_gpu_vs_cpu_benchmark.png",
    }
    (tools / "uv").write_text("#!/bin/sh\nexit 3\n")
    failed = subprocess.run(command, check=False, env=environment, cwd="/", capture_output=True)
    assert failed.returncode != 0, "a lesson that fails is not hidden by the pipe"
