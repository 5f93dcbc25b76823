"""Multi-GPU: train one model by several processes, and prove that they do what one would.

Run:    uv run src/advanced/08_multi_gpu.py
Needs:  nothing
Makes:  nothing
Expect: ddp_difference <= 0.000001, fsdp_difference <= 0.000001

Each process works on its own share of a batch; then all of them average their gradients and take the
same step. So N processes are one process with an N-fold batch: on N GPUs, or here on CPU cores.
"""

import argparse
import math
import os
import signal
import sys
import time
from datetime import timedelta
from subprocess import PIPE, Popen, TimeoutExpired

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

# torchrun tells each process its number. One GPU for each of them, or else none for any.
ENOUGH_GPUS = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if ENOUGH_GPUS else "cpu")
WIDTH, LEARNING_RATE, STEPS, BATCH_SIZE, TIMED_SIZE = 512, 0.05, 40, 32, 512
ALONE, TOGETHER = ["one process", "DataParallel"], ["DDP", "FSDP2"]


# LAUNCH: torchrun starts the processes and watches over them; this file is what each of them runs.
def launch(processes, *arguments, restarts=0):
    """Run this file under torchrun; return its exit code, what it printed, and its errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", __file__, *arguments]
    settings = {"OMP_NUM_THREADS": "1"}  # or each process takes all cores from the others
    settings["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # pytorch/pytorch#135712: or restarts fail
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill ends this as Ctrl-C does
    options = {"env": os.environ | settings, "encoding": "utf-8", "start_new_session": True}
    torchrun = Popen(command, stdout=PIPE, stderr=PIPE, **options)
    try:
        output, errors = torchrun.communicate(timeout=300)
    except TimeoutExpired:
        sys.exit("The processes hung for five minutes and were ended.")
    finally:  # whatever happened, nobody stays behind: torchrun ends all that it has started
        torchrun.terminate()
        torchrun.wait()
    return torchrun.returncode, output.rstrip(), errors


# DATA: points in ten classes, and each process's share of a batch of them.
def make_labelled_points():
    numbers = torch.randn(2074, 64, generator=torch.Generator().manual_seed(0))
    points, directions = numbers.double().split([2064, 10])
    return points, (points @ directions.T).argmax(dim=1)  # [N, 64], [N]


def share_of_batch(data, step, size, rank=0, ranks=1):
    """Return the points and labels that one process out of ranks works on, size of each."""
    everybody = torch.arange(step * ranks * size, (step + 1) * ranks * size) % len(data[0])
    mine = everybody.chunk(ranks)[rank]  # with a DataLoader, a DistributedSampler does this
    return [tensor[mine].to(DEVICE) for tensor in data]


# MODEL: one network, trained in four ways.
def build(way, dtype):
    torch.manual_seed(0)  # every process begins with the same weights
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10)).to(DEVICE, dtype)
    if way == "DataParallel":  # the old way: one Python copies the model to all GPUs at every step
        model = nn.DataParallel(model)
    elif way == "DDP":  # each process holds everything, and averages its gradients with the rest
        model = nn.parallel.DistributedDataParallel(model)
    elif way == "FSDP2":  # each holds 1 / N of everything, and borrows a layer when it needs it
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
        for module in [layers[0], layers[2], model]:
            fully_shard(module, mesh=mesh)
    return model, torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)


def train_step(model, optimizer, points, labels):
    loss = F.cross_entropy(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# TRAIN: the same points in the same steps must give the same weights. With numbers of 64 bits, a
# mistake cannot hide behind rounding errors.
def train(way, data, steps, rank, ranks):
    """Return all parameters after the last step, that step's loss, and the bytes that this one holds."""
    model, optimizer = build(way, torch.float64)
    size, rank, ranks = (BATCH_SIZE * ranks, 0, 1) if way in ALONE else (BATCH_SIZE, rank, ranks)
    for step in range(steps):
        loss = train_step(model, optimizer, *share_of_batch(data, step, size, rank, ranks))
    if way in TOGETHER:
        dist.all_reduce(loss)  # the sum over all processes
    held = [*model.parameters(), *(parameter.grad for parameter in model.parameters())]
    held += [tensor for state in optimizer.state.values() for tensor in state.values()]  # momentum
    held_bytes = sum(getattr(tensor, "to_local", lambda t=tensor: t)().nbytes for tensor in held)
    whole = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return whole, loss.item() / ranks, held_bytes


# MEASURE: in turn, as in advanced/04_gpu_vs_cpu_benchmark.py; all must take equally many steps.
def measure(ways, data, rank, ranks, seconds, rounds):
    """Return {way: seconds per step, [rounds]}; the others wait while the first process works alone."""
    calls, times, counts = {}, {way: [] for way in ways}, torch.ones(len(ways), dtype=torch.long)
    for way in ways:
        size = TIMED_SIZE * (ranks if way == "DataParallel" else 1)
        points, labels = share_of_batch(data, rank, size)
        step = (*build(way, torch.float32), points.float(), labels)
        calls[way] = lambda step=step: train_step(*step)
    for turn in range(-3, rounds):  # three turns warm up, and find how many steps fill the time
        for place, way in enumerate(ways):
            count, start = int(counts[place]), time.perf_counter()
            losses = [calls[way]() for _ in range(count if rank == 0 or way in TOGETHER else 0)]
            float(sum(losses))  # waits for the GPU
            times[way].append((time.perf_counter() - start) / count)
            if turn < 0:
                counts[place] = math.ceil(seconds / rounds / max(times[way].pop(), 1e-6))
            dist.broadcast(counts, src=0)  # the first process decides; here the others wait for it
    return times


def compare(base, other):
    """Return how many times as fast other is, the bootstrap's 95 % interval of that, and a verdict."""
    base, other = np.array(base), np.array(other)
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))  # Efron 1979
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


def show_ways(trained, times, ranks):
    print(f"{ranks} processes on {DEVICE.type}, a batch of {BATCH_SIZE} for each; alone, all of it")
    print("way          |   loss | difference | kB held | points/s | speed-up")
    reference, differences = trained["one process"][0], {}
    for way, (weights, loss, held_bytes) in trained.items():
        gaps = [a - b for a, b in zip(weights, reference, strict=True)]
        differences[way] = max(gap.abs().max().item() for gap in gaps)
        share = 1 if way == "one process" else ranks
        seconds = np.array(times[way]) / share  # all of them for as many points
        ratio, low, high, verdict = compare(times["one process"], seconds)
        row = f"{way:12} | {loss:.4f} | {differences[way]:10.1e} | {held_bytes / 1e3:7,.0f}"
        row += f" | {TIMED_SIZE / np.median(seconds):8,.0f} | {ratio:.2f} ({low:.2f} to {high:.2f})"
        print(f"{row}, {verdict}; efficiency {ratio / share:.0%}")
    if not ENOUGH_GPUS:
        print("DataParallel needs a GPU for each process: not measured")
    ddp, fsdp = (differences[way] for way in TOGETHER)
    print(f"Result: ddp_difference = {ddp:.9f}, fsdp_difference = {fsdp:.9f}", flush=True)


# WORK: what each process runs.
def work(quick):
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what gloo has to say goes to the errors, and Python's lines where they went
    if ENOUGH_GPUS:
        torch.cuda.set_device(DEVICE)
    backend = "cpu:gloo,cuda:nccl" if ENOUGH_GPUS else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))  # no longer for a lost process
    rank, ranks, data = dist.get_rank(), dist.get_world_size(), make_labelled_points()
    ways = [way for way in ALONE + TOGETHER if ENOUGH_GPUS or way != "DataParallel"]
    mine, steps = ways if rank == 0 else TOGETHER, 5 if quick else STEPS
    trained = {way: train(way, data, steps, rank, ranks) for way in mine}
    times = measure(ways, data, rank, ranks, *((0.05, 5) if quick else (2.0, 21)))
    if rank == 0:  # only the first one speaks
        show_ways(trained, times, ranks)
    dist.destroy_process_group()
    os._exit(0)  # at once: FSDP2 over gloo sometimes aborts while Python tidies up


def main(quick=False, processes=2):
    if dist.is_torchelastic_launched():
        work(quick)
    if processes < 2:
        sys.exit(f"--processes must be 2 or more, not {processes}.")
    code, output, errors = launch(processes, *["--quick"] * quick)
    print(output)
    sys.exit(f"A process failed ({code}):\n{errors}" if code else 0)


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 5 steps, short measurements")
    cli.add_argument("--processes", type=int, default=2, help="how many (2)")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; all processes have ended.")
