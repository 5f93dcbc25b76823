"""The timing method on simulated clocks, and the lessons that measure GPUs, formats and engines."""

import math
import os
import re
import runpy
import shutil
import subprocess
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load_lesson
from matplotlib.figure import Figure
from torch import nn
from torch.utils.benchmark import Timer

GPU_VS_CPU = "advanced/04_gpu_vs_cpu_benchmark"
TWO_SIDES = {"1 thread": (torch.device("cpu"), 1), "all threads": (torch.device("cpu"), 2)}
INFERENCE = "advanced/07_inference_comparison"


@pytest.fixture(scope="module")
def timing():
    return load_lesson("advanced/05_wrong_timings")


@pytest.fixture
def benchmark():
    return load_lesson(GPU_VS_CPU)


@pytest.fixture
def inference():
    return load_lesson(INFERENCE)


@pytest.fixture
def latency():
    return load_lesson("advanced/08_latency_and_memory")


# METHOD: a machine whose clock we set. Its noise has a heavy tail: one block in ten is disturbed.
def noisy(random, seconds, rounds=21):
    times = seconds * np.exp(random.normal(0, 0.05, rounds))
    disturbed = random.random(rounds) < 0.1
    times[disturbed] *= 1 + random.pareto(1.5, disturbed.sum())
    return times


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, "no difference"), (1.1, "slower"), (1 / 1.1, "faster")]
)
def test_a_tenth_is_found_and_rarely_a_difference_that_is_not_there(timing, factor, expected):
    random = np.random.default_rng(1)
    trials = 400
    verdicts = [timing.compare(noisy(random, 1.0), noisy(random, factor))[3] for _ in range(trials)]
    assert verdicts.count(expected) >= 0.95 * trials


def test_a_ratio_is_how_many_times_as_fast_the_other_one_is(timing):
    assert timing.compare([2.0] * 21, [1.0] * 21) == (2.0, 2.0, 2.0, "faster")
    assert timing.compare([1.0] * 21, [2.0] * 21) == (0.5, 0.5, 0.5, "slower")
    assert timing.compare([1.0] * 21, [1.001] * 21)[3] == "no difference", "as it is shown: 1.00"


class Machine:
    """A clock that only work moves on; speed(now) says how slow the machine is at that time."""

    def __init__(self, speed=lambda now: 1.0):
        self.now = 0.0
        self.pending = 0.0
        self.speed = speed
        self.random = np.random.default_rng(2)

    def perf_counter(self):
        return self.now

    def work(self, seconds):
        return lambda: self.advance(noisy(self.random, seconds, 1)[0])

    def advance(self, seconds):
        self.now += seconds * self.speed(self.now)

    def enqueue(self, seconds):
        self.pending += seconds

    def synchronize(self):
        self.now += self.pending
        self.pending = 0.0


def use(monkeypatch, lesson, machine):
    """Let PyTorch's Timer, as the lesson calls it, read the machine's clock."""
    monkeypatch.setattr(lesson, "Timer", partial(Timer, timer=machine.perf_counter))


def test_the_whole_method_is_right_in_95_of_100_trials(timing, monkeypatch):
    found = []
    for seed in range(60):
        machine = Machine()
        machine.random = np.random.default_rng(seed)
        use(monkeypatch, timing, machine)
        calls = {"base": machine.work(1.0), "same": machine.work(1.0), "slow": machine.work(1.1)}
        times = timing.time_in_turn(calls)
        assert {len(own) for own in times.values()} == {timing.ROUNDS}
        verdicts = [timing.compare(times["base"], times[name])[3] for name in ("same", "slow")]
        found.append(verdicts == ["no difference", "slower"])
    assert np.mean(found) >= 0.9  # both of them at once: 0.95 x 0.95


def test_a_machine_that_slows_down_fools_only_those_who_time_one_after_the_other(
    timing, monkeypatch
):
    machine = Machine(speed=lambda now: 1.0 if now < 45 else 1.5)
    use(monkeypatch, timing, machine)
    first = machine.work(1.0)
    second = machine.work(1.0)
    alone = [timing.time_in_turn({"call": call})["call"] for call in (first, second)]
    assert timing.compare(*alone)[3] == "slower"
    machine.now = 0.0
    times = timing.time_in_turn({"first": first, "second": second})
    assert timing.compare(times["first"], times["second"])[3] == "no difference"


def test_neither_a_compiler_nor_a_cold_start_moves_the_result(timing, monkeypatch):
    machine = Machine()
    use(monkeypatch, timing, machine)
    starts = []

    def compiles_first():
        starts.append(machine.now)
        machine.advance(max(0.01, 20.0 / 2 ** len(starts)))

    times = timing.time_in_turn({"call": compiles_first})["call"]
    assert np.median(times) == pytest.approx(0.01)
    assert len(starts) * 0.01 >= 1.9, "each call runs for the seconds that it is given"


def test_calls_that_really_differ_are_told_apart(timing):
    calls = {"one": partial(time.sleep, 0.002), "three": partial(time.sleep, 0.006)}
    times = timing.time_in_turn(calls, seconds=0.2)
    ratio, low, high, verdict = timing.compare(times["one"], times["three"])
    assert verdict == "slower"
    assert low - 0.01 <= ratio <= high + 0.01  # they are rounded
    assert 0.2 < ratio < 0.6


@pytest.mark.parametrize("name", ["advanced/05_wrong_timings", "advanced/08_latency_and_memory"])
def test_the_clock_is_read_when_the_device_is_idle(name, monkeypatch):
    lesson = load_lesson(name)
    machine = Machine()
    monkeypatch.setattr(lesson, "time", machine)
    monkeypatch.setattr(lesson, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.synchronize)
    machine.enqueue(5.0)  # the work of another program, which must not count
    call = partial(machine.enqueue, 0.1)
    assert lesson.time_once(call) == pytest.approx(0.1)
    if name.endswith("wrong_timings"):
        assert lesson.time_without_waiting(call) == 0.0


# GPU AGAINST CPU: what is counted, and where the crossing is.
@pytest.mark.parametrize(
    ("verdicts", "limit"),
    [
        (["slower", "no difference", "faster", "faster"], 8),
        (["faster", "faster", "faster", "faster"], 0),
        (["slower", "faster", "slower", "faster"], 32),
        (["slower", "faster", "faster", "no difference"], None),
    ],
)
def test_the_crossing_is_where_nothing_slower_follows(
    benchmark, capsys, monkeypatch, verdicts, limit
):
    told = iter(verdicts)
    took = {"1 thread": [0.5] * 5, "all threads": [0.25] * 5}
    monkeypatch.setattr(benchmark, "time_in_turn", lambda *_: took)
    monkeypatch.setattr(benchmark, "compare", lambda *_: (1.0, 1.0, 1.0, next(told)))
    monkeypatch.setattr(benchmark, "SIDES", TWO_SIDES)
    axes = Figure().subplots()
    rows = benchmark.measure("Inference", [1, 8, 32, 128], 1.0, axes)
    shown = capsys.readouterr().out
    if limit is None:
        assert "all threads: not faster at the largest size\n" in shown
    else:
        assert f"all threads: faster at every measured size above {limit}\n" in shown
    assert re.search(r"^ +32 \| +64 \| +128 \|", shown, re.MULTILINE)
    assert [line.get_ydata()[2] for line in axes.lines] == [64, 128], "images are counted"
    interval, difference = rows[32]
    assert interval == "1.00 to 1.00"
    assert difference <= 1e-5


def test_operations_are_counted(benchmark, capsys, monkeypatch):
    took = {"1 thread": [0.5] * 5, "all threads": [0.25] * 5}
    monkeypatch.setattr(benchmark, "time_in_turn", lambda *_: took)
    monkeypatch.setattr(benchmark, "SIDES", TWO_SIDES)
    axes = Figure().subplots()
    rows = benchmark.measure("Matrix product", [500, 1000], 1.0, axes)
    one, two = (line.get_ydata() for line in axes.lines)
    assert one[0] == 0.5  # 2 x 500^3 operations in half a second
    assert two[1] == 8.0
    assert rows[1000][1] <= 1e-5
    assert "2.00 (2.00 to 2.00): faster" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["Matrix product", "Inference"])
def test_both_sides_do_the_same_work_with_their_own_threads(benchmark, kind):
    threads = torch.get_num_threads()
    cpu = torch.device("cpu")
    try:
        one, two = (benchmark.make_call(kind, 4, cpu, count) for count in (1, 2))
        first = one().clone()
        assert torch.get_num_threads() == 1
        torch.testing.assert_close(two(), first)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def main_with(benchmark, monkeypatch, tmp_path, **options):
    """Run main with a measurement that takes no time; return the sizes that it was asked for."""
    asked = {}

    def measure(kind, sizes, seconds, axes):
        asked[kind] = sizes
        return {size: (f"1.40 to 1.{size}", 0.0) for size in sizes}

    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "measure", measure)
    benchmark.main(**options)
    return asked


def test_matrix_size_and_batches_choose_what_is_measured(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "BATCHES", [8, 64])
    monkeypatch.setattr(benchmark, "SIDES", TWO_SIDES)
    asked = main_with(benchmark, monkeypatch, tmp_path, matrix_size=300)
    assert asked == {"Matrix product": [64, 256, 300], "Inference": [8, 64]}
    shown = capsys.readouterr().out
    assert "products = 3" in shown
    assert "measurements = 2, gpu_at_64 = none" in shown


def test_the_gain_of_a_gpu_is_an_interval(benchmark, monkeypatch, tmp_path, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(benchmark, "SIDES", {"CPU": (cpu, 1), "GPU": (cpu, 1)})
    main_with(benchmark, monkeypatch, tmp_path)
    assert "gpu_at_512 = 1.40 to 1.512\n" in capsys.readouterr().out


# VERSIONS: a small classifier through all of them.
@pytest.fixture
def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)]
    return nn.Sequential(*layers).eval().requires_grad_(False), torch.rand(4, 3, 8, 8)


def rows_of(shown):
    return dict(re.findall(r"^(\w[\w. ]*\w) +\| (.+)$", shown, re.MULTILINE))


def reasons_of(shown):
    """Return why a version or an engine did not run."""
    rows = rows_of(shown).items()
    return {name: words for name, words in rows if words.startswith("not run: ")}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_every_version_is_within_its_tolerance(inference, small, capsys):
    _, differences = inference.check_versions(inference.VERSIONS, *small, [1, 4])
    reasons = reasons_of(capsys.readouterr().out)
    assert {*differences, *reasons} == {*inference.VERSIONS}
    for version, difference in differences.items():
        assert difference <= inference.ALLOWED.get(version, 0.001), version
    assert {*differences} >= {"eager", "channels_last", "fp16 autocast", "bf16 autocast"}
    assert {*differences} >= {"TorchScript", "ONNX Runtime"}
    if inference.DEVICE.type != "cuda":
        for version in ("TF32", "CUDA graphs", "TensorRT"):
            assert "needs a CUDA device" in reasons[version]


def test_a_wrong_version_is_found(inference, small, monkeypatch, capsys):
    model, images = small
    buffer = torch.zeros(4, 10)

    def keep_one_buffer(x):  # as a CUDA graph does: correct, although each answer replaces the last
        buffer[: len(x)] = model(x)
        return buffer[: len(x)]

    spoiled = {
        "eager": model,
        "in training": lambda x: model.train()(x),
        "one image": lambda x: model(x) + (len(x) == 1),
        "nan": lambda x: model(x) * math.nan,
        "one size only": torch.export.export(model, (images,)).module(),
        "one buffer": keep_one_buffer,
    }
    monkeypatch.setattr(inference, "make_version", lambda version, *_: spoiled[version])
    order = ["eager", "one image", "nan", "one size only", "one buffer", "in training"]
    _, differences = inference.check_versions(order, model, images, [1, 4])
    inside = {version for version, difference in differences.items() if difference <= 1e-3}
    assert inside == {"eager", "one buffer"}
    assert {*differences} - inside == {"in training", "one image", "nan"}
    assert list(reasons_of(capsys.readouterr().out)) == ["one size only"]


def test_the_result_counts_what_is_outside_its_tolerance(inference, monkeypatch, capsys):
    differences = {"eager": 0.0, "TF32": math.nan, "fp16 autocast": 0.5, "bf16 autocast": 0.04}
    monkeypatch.setattr(inference, "check_versions", lambda *_: ({}, differences))
    monkeypatch.setattr(inference, "time_versions", lambda *_, **__: None)
    inference.main(quick=True)
    assert "Result: versions = 4, outside_tolerance = 2" in capsys.readouterr().out


def test_a_version_that_takes_too_long_is_not_waited_for(inference, small, monkeypatch, capsys):
    model, images = small
    pauses = {"eager": 0.01, "patient": 0.03, "slow": 0.2}

    def make_version(version, *_):
        def call(x):
            time.sleep(pauses[version])
            return model(x)

        return call

    monkeypatch.setattr(inference, "make_version", make_version)
    calls, differences = inference.check_versions(pauses, model, images, [4])
    assert list(calls) == ["eager", "patient"]
    assert list(differences) == ["eager", "patient", "slow"]
    rows = rows_of(capsys.readouterr().out)
    assert rows["slow"].endswith(" | too slow to time")
    assert "too slow" not in rows["patient"]
    monkeypatch.setattr(inference, "time_in_turn", lambda calls, _: dict.fromkeys(calls, [0.5] * 5))
    inference.time_versions(calls, images, 1.0)
    rows = rows_of(capsys.readouterr().out)
    assert rows["patient"].endswith("8.0 | 1.00 (1.00 to 1.00): no difference")  # 4 images in 0.5 s


def test_a_slow_second_call_is_warm_up(inference, small, monkeypatch):
    model, images = small
    pauses = iter([0.01, 0.2])  # as TorchScript, which optimizes in its second call

    def sleep(x, pauses):
        time.sleep(next(pauses, 0.01))
        return model(x)

    versions = {
        "eager": partial(sleep, pauses=iter([])),
        "TorchScript": partial(sleep, pauses=pauses),
    }
    monkeypatch.setattr(inference, "make_version", lambda version, *_: versions[version])
    calls, _ = inference.check_versions(versions, model, images, [4])
    assert list(calls) == ["eager", "TorchScript"]


def test_tf32_lasts_as_long_as_a_call(inference, monkeypatch):
    monkeypatch.setattr(inference, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = SimpleNamespace(forward=lambda x: torch.backends.cudnn.allow_tf32)
    call = inference.make_version("TF32", model, None)
    assert [call(1), call(1), torch.backends.cudnn.allow_tf32] == [True, True, False]


def test_logits_that_are_all_zero_are_no_difference(inference, small):
    model, images = small
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    assert inference.check_versions(["eager"], model, images, [4])[1] == {"eager": 0.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-sizes", str(10**12)], "Stopped: RuntimeError"),  # no memory for them
        (["--batch-sizes", "0"], "Stopped: "),
        (["--batch-sizes", "-8"], "Stopped: RuntimeError"),
        (["--model-name", "vit_b_16"], "Stopped: AssertionError.*224"),  # 224 x 224 only
        (["--model-name", "resnet_50"], "Stopped: ValueError.*Unknown model resnet_50"),
    ],
)
def test_images_that_a_network_cannot_read_end_in_a_sentence(monkeypatch, flags, words):
    path = str(ROOT / "src" / f"{INFERENCE}.py")
    monkeypatch.setattr("sys.argv", [path, "--quick", *flags])
    with pytest.raises(SystemExit, match=words):
        runpy.run_path(path, run_name="__main__")


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        (INFERENCE, ["--batch-sizes", "1;8"], "invalid batch_sizes value: '1;8'"),
        (GPU_VS_CPU, ["--matrix-size", "4"], "must be 5 or more"),
        (GPU_VS_CPU, ["--iterations", "-8"], "must be 5 or more"),
        (GPU_VS_CPU, ["--iterations", "many"], "invalid int value: 'many'"),
    ],
)
def test_a_bad_value_of_a_flag_exits_2(monkeypatch, capsys, name, flags, words):
    monkeypatch.setattr("sys.argv", [f"{name}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "src" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_matrices_that_do_not_fit_end_in_a_sentence(monkeypatch):
    path = str(ROOT / "src" / f"{GPU_VS_CPU}.py")
    monkeypatch.setattr("sys.argv", [path, "--quick", "--matrix-size", "10000000"])
    monkeypatch.setattr(Timer, "blocked_autorange", lambda *_, **__: SimpleNamespace(median=1.0))
    with pytest.raises(SystemExit, match="Stopped: RuntimeError.*Finished files are unchanged"):
        runpy.run_path(path, run_name="__main__")


# LATENCY: each engine gets its calls in turn, once it is warm.
def test_the_engines_take_turns_and_percentiles_are_those_of_single_calls(
    latency, monkeypatch, capsys
):
    order = []
    seconds = {"fast": iter(range(1, 102)), "slow": iter(range(1001, 1102))}

    def time_once(call):
        order.append(call.func)
        return next(seconds[call.func]) / 1000

    monkeypatch.setattr(latency, "time_once", time_once)
    monkeypatch.setattr(latency, "measure_memory", lambda call: 7.0)
    monkeypatch.setattr(latency, "partial", lambda call, images: SimpleNamespace(func=call))
    rows = latency.measure({"fast": "fast", "slow": "slow"}, torch.ones(8), 101)
    assert order == ["fast", "slow"] * 101
    assert rows["fast"].tolist() == pytest.approx([51.0, 96.0])
    assert re.search(
        r"^fast +\|    51\.00 \|    96\.00 \| +1\.88 \| +7\.0$",
        capsys.readouterr().out,
        re.MULTILINE,
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux")
def test_memory_that_a_call_gives_back_is_counted_once(latency):
    call = lambda: torch.ones(32, 2**18)  # 32 MiB
    if latency.DEVICE.type == "cpu":
        # Less is measured while Linux takes other pages away from this process, and never more.
        pairs = [[latency.measure_memory(call) for _ in range(2)] for _ in range(5)]
        assert any(pair == pytest.approx([32, 32], abs=4) for pair in pairs), pairs
        assert max(max(pair) for pair in pairs) <= 36


def test_an_engine_that_cannot_run_is_left_out_with_its_reason(latency, small, capsys, monkeypatch):
    model, images = small
    warm = []
    one_size = torch.export.export(model, (images,)).module()
    monkeypatch.setattr(latency, "BATCHES", [1, 4])
    monkeypatch.setattr(torch.jit, "script", lambda model: lambda x: warm.append(len(x)))
    monkeypatch.setattr(torch, "compile", lambda model, **_: one_size)
    monkeypatch.delattr(latency.onnxruntime, "InferenceSession")
    calls = latency.make_engines(model, images, quick=False)
    assert list(calls) == ["eager", "TorchScript"]
    assert warm == [1, 4] * 3
    assert set(reasons_of(capsys.readouterr().out)) >= {"torch.compile", "ONNX Runtime"}


@pytest.mark.filterwarnings("ignore")  # TorchScript is deprecated
def test_engines_that_need_no_compiler_give_the_same_answers(latency, small, monkeypatch):
    model, images = small
    monkeypatch.setattr(latency, "BATCHES", [1, 4])
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    calls = latency.make_engines(model, images, quick=False)
    assert {*calls} >= {"eager", "TorchScript"}
    for call in calls.values():
        torch.testing.assert_close(call(images), model(images))


# SCRIPT: the reference project's commands, with a stand-in for uv that only writes them down.
@pytest.mark.skipif(os.name != "posix", reason="a shell script")
@pytest.mark.parametrize("gpu", [True, False])
def test_run_benchmarks_runs_the_benchmark_lessons(tmp_path, gpu):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "run_benchmarks.sh", tmp_path / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    programs = {
        "uv": 'echo "$*" >> "$LOG"; echo "Result: versions = 1"',
        "nvidia-smi": f"exit {not gpu:d}",
    }
    for name, script in programs.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    plots = tmp_path / "models" / "plots"
    plots.mkdir(parents=True)
    (plots / "advanced-04_gpu_vs_cpu_benchmark.png").write_bytes(b"picture")
    log = tmp_path / "log"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "LOG": str(log)}
    command = ["bash", str(tmp_path / "scripts" / "run_benchmarks.sh")]
    subprocess.run(command, check=True, env=environment, cwd="/", capture_output=True)
    commands = log.read_text().splitlines()
    lessons = [re.search(r"src/(advanced/\S+)\.py", line)[1] for line in commands]
    assert [lesson[:11] for lesson in lessons] == [f"advanced/0{n}" for n in (4, 5, 6, 7, 8)]
    assert all((ROOT / "src" / f"{lesson}.py").exists() for lesson in lessons)
    assert ("--matrix-size 8192 --iterations 100" in commands[0]) == gpu
    assert ("--model-name resnet50 --batch-sizes 1,8,16,32" in commands[3]) == gpu
    assert "--batch-sizes 16,32,64,128" in commands[2]
    (collected,) = (tmp_path / "models" / "benchmarks").iterdir()
    assert {path.name for path in collected.iterdir()} >= {
        "04_gpu_vs_cpu_benchmark.txt",
        "06_memory_management.txt",
        "07_inference_comparison.txt",
        "advanced-04_gpu_vs_cpu_benchmark.png",
    }
    (tools / "uv").write_text("#!/bin/sh\nexit 3\n")
    failed = subprocess.run(command, check=False, env=environment, cwd="/", capture_output=True)
    assert failed.returncode != 0, "a lesson that fails is not hidden by the pipe"
