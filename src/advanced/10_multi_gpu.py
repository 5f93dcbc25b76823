"""Multi-GPU: train one model with several processes, and check that they do what one would do.

Run:    uv run src/advanced/10_multi_gpu.py
Needs:  nothing
Makes:  nothing
Expect: ddp_difference <= 0.000001, fsdp_difference <= 0.000001

Each process computes the gradients of its own share of a batch. Then the processes average their
gradients and take the same step. N processes on N GPUs, or on CPU cores, share the work of one.
"""

import argparse
import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from subprocess import PIPE, Popen, TimeoutExpired

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

# torchrun gives each process a number. Use one GPU for each process, or else no GPU.
ENOUGH_GPUS = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "2"))
DEVICE = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if ENOUGH_GPUS else "cpu")
WIDTH = 512
STEPS = 40
BATCH_SIZE = 32  # for each process
TIMED_SIZE = 1024  # the batch of all processes together while we measure the time
TIMED_STEPS = 10
ROUNDS = 21
TOGETHER = ["DDP", "FSDP2"]  # the other methods need one process only


# LAUNCH: torchrun starts the processes and watches them. Each of them runs this file.
def launch(processes, *arguments, restarts=0):
    """Run this file under torchrun; return its exit code, its output and its errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1"]  # or torchrun needs a host name with an address
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", __file__, *arguments]
    settings = {
        "OMP_NUM_THREADS": "1",  # or each process uses all cores
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or restarts fail: pytorch/pytorch#135712
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill has the effect of Ctrl-C
    options = {"env": os.environ | settings, "encoding": "utf-8", "start_new_session": True}
    torchrun = Popen(command, stdout=PIPE, stderr=PIPE, **options)
    try:
        output, errors = torchrun.communicate(timeout=300)
    except TimeoutExpired:
        sys.exit("The processes did not end within five minutes and were stopped.")
    finally:  # torchrun stops all processes that it has started
        torchrun.terminate()
        torchrun.wait()
    return torchrun.returncode, output.rstrip(), errors


# DATA: points in ten classes, and each process's share of a batch.
def make_points(step, count):
    """Return the points [count, 64] and labels [count] of a step, the same in each process."""
    generator = torch.Generator().manual_seed(step)
    points = torch.randn(count, 64, generator=generator, dtype=torch.float64)
    return points, points[:, :10].argmax(dim=1)


def take_share(method, step, count):
    """Return the part of a batch that this process computes; DDP and FSDP2 share a batch."""
    points, labels = make_points(step, count)
    if method in TOGETHER:  # with a DataLoader, a DistributedSampler does this
        rank = dist.get_rank()
        points = points.chunk(dist.get_world_size())[rank]
        labels = labels.chunk(dist.get_world_size())[rank]
    return points.to(DEVICE), labels.to(DEVICE)


# MODEL: one network, and the methods that share it between processes.
def build(method, dtype):
    torch.manual_seed(0)  # the same first weights in each process
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10)).to(DEVICE, dtype)
    # README: start
    if method == "DDP":  # each process holds the whole model, and averages its gradients
        model = nn.parallel.DistributedDataParallel(model)
    elif method == "FSDP2":  # each process holds 1 / N, and gathers a layer when it needs it
        mesh = dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
        for module in [model[0], model[2], model]:
            fully_shard(module, mesh=mesh)
    elif method == "DataParallel":  # old: one process copies the model to all GPUs at each step
        model = nn.DataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    # README: end
    return model, optimizer


# TRAIN: the same batches must give the same weights. In float64, rounding cannot hide a mistake.
def train_step(model, optimizer, points, labels):
    loss = F.cross_entropy(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(method, steps):
    """Return the final weights in one row, and the bytes that this process holds."""
    model, optimizer = build(method, torch.float64)
    for step in range(steps):
        train_step(model, optimizer, *take_share(method, step, BATCH_SIZE * dist.get_world_size()))
    weights = []
    held = 0
    for weight in model.parameters():
        for tensor in (weight, weight.grad, optimizer.state[weight]["momentum_buffer"]):
            held += tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
        whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
        weights.append(whole.detach().flatten())
    return torch.cat(weights), held


# MEASURE: the methods take turns, round by round, because a machine's speed changes (advanced/05).
def measure(methods, rounds):
    """Return {method: [seconds per step]}; the others wait while one process works alone."""
    calls = {}
    for method in methods:
        points, labels = take_share(method, 0, TIMED_SIZE)
        calls[method] = partial(train_step, *build(method, torch.float32), points.float(), labels)
    times = {method: [] for method in methods}
    for _ in range(1 + rounds):
        for method, call in calls.items():
            dist.barrier()  # wait for all processes
            start = time.perf_counter()
            if method in TOGETHER or dist.get_rank() == 0:
                for _ in range(TIMED_STEPS):
                    loss = call()
                loss.item()  # waits for the GPU
            times[method].append((time.perf_counter() - start) / TIMED_STEPS)
    return {method: seconds[1:] for method, seconds in times.items()}  # the first round warms up


def show_methods(trained, times):
    print(f"{dist.get_world_size()} processes on {DEVICE.type}, {BATCH_SIZE} points for each")
    print("method       | difference | kB held | points/s (middle half of the rounds)")
    differences = {}
    for method, (weights, held) in trained.items():
        differences[method] = (weights - trained["one process"][0]).abs().max().item()
        slow, median, fast = TIMED_SIZE / np.percentile(times[method], [75, 50, 25])
        row = f"{method:12} | {differences[method]:10.1e} | {held / 1e3:7,.0f}"
        print(f"{row} | {median:8,.0f} ({slow:,.0f} to {fast:,.0f})")
    if not ENOUGH_GPUS:
        print("DataParallel needs a GPU for each process: not measured")
    result = f"ddp_difference = {differences['DDP']:.9f}"
    print(f"Result: {result}, fsdp_difference = {differences['FSDP2']:.9f}", flush=True)


# WORK: what each process runs.
def work(quick):
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what gloo prints goes to the errors
    if ENOUGH_GPUS:
        torch.cuda.set_device(DEVICE)
    backend = "cpu:gloo,cuda:nccl" if ENOUGH_GPUS else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    methods = ["one process", "DataParallel", *TOGETHER]
    if not ENOUGH_GPUS:
        methods.remove("DataParallel")
    own = methods if dist.get_rank() == 0 else TOGETHER
    trained = {method: train(method, 5 if quick else STEPS) for method in own}
    times = measure(methods, 2 if quick else ROUNDS)
    if dist.get_rank() == 0:
        show_methods(trained, times)
    dist.destroy_process_group()
    os._exit(0)  # at once, because FSDP2 over gloo sometimes aborts while Python ends


def main(quick=False, processes=2):
    if dist.is_torchelastic_launched():
        work(quick)
    if processes < 2:
        sys.exit(f"--processes must be 2 or more, not {processes}.")
    code, output, errors = launch(processes, *(["--quick"] if quick else []))
    if code:
        sys.exit(f"A process failed, and torchrun ended with exit code {code}:\n{errors}")
    print(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, 5 steps")
    parser.add_argument("--processes", type=int, default=2, help="the number of processes (2)")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.processes)
    except KeyboardInterrupt:
        sys.exit("Stopped. All processes have ended.")
