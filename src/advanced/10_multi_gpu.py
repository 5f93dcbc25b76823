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
from subprocess import PIPE, Popen

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
BATCH_SIZE = 512  # for each process
METHODS = ["one process", "DDP", "FSDP2"]  # "one process" computes the whole batch, for comparison


# LAUNCH: torchrun starts the processes and watches them. Each of them runs this file.
def launch(processes, *arguments, restarts=0):
    """Run this file under torchrun; return its exit code, its output and its errors."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr=127.0.0.1"]  # or torchrun needs a host name with an address
    command += [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", __file__, *arguments]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or restarts fail: pytorch#135712
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # kill has the effect of Ctrl-C
    torchrun = Popen(command, stdout=PIPE, stderr=PIPE, encoding="utf-8", start_new_session=True)
    try:
        output, errors = torchrun.communicate()
    finally:  # torchrun stops all processes that it has started
        torchrun.terminate()
        torchrun.wait()
    return torchrun.returncode, output.rstrip(), errors


# DATA: points in ten classes. With a DataLoader, a DistributedSampler shares them out. The world
# size is the number of processes, and the rank is the number of this one.
def take_share(method, step, count):
    """Return the points [N, 64] and labels [N] that this process computes in a step."""
    generator = torch.Generator().manual_seed(step)  # the same points in each process
    points = torch.randn(count, 64, generator=generator, dtype=torch.float64)
    if method != "one process":
        points = points.chunk(dist.get_world_size())[dist.get_rank()]
    points = points.to(DEVICE)
    return points, points[:, :10].argmax(dim=1)


# MODEL: one network. Older code uses nn.DataParallel instead; PyTorch recommends DDP.
def build(method):
    torch.manual_seed(0)  # the same first weights in each process
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10)).to(DEVICE, torch.float64)
    if method == "DDP":  # each process holds the whole model, and averages its gradients
        model = nn.parallel.DistributedDataParallel(model)
    elif method == "FSDP2":  # each process holds 1 / N, and gathers a layer when it needs it
        mesh = dist.init_device_mesh(DEVICE.type, (dist.get_world_size(),))
        for module in [model[0], model[2], model]:
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer


# TRAIN: the same batches must give the same weights. In float64, rounding cannot hide a mistake.
def train(method, steps):
    """Return the final weights in one row, the bytes that this process holds, and the speed."""
    model, optimizer = build(method)
    batch_size = BATCH_SIZE * dist.get_world_size()
    seconds = []
    for step in range(steps):
        points, labels = take_share(method, step, batch_size)
        start = time.perf_counter()
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    weights = []
    held = 0
    for weight in model.parameters():
        for tensor in (weight, weight.grad, optimizer.state[weight]["momentum_buffer"]):
            held += tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes
        weights.append(weight.full_tensor() if isinstance(weight, DTensor) else weight)
    speed = batch_size / np.median(seconds)
    return nn.utils.parameters_to_vector(weights).detach(), held, speed


# WORK: what each process runs.
def work(quick):
    sys.stdout = os.fdopen(os.dup(1), "w")  # for this program's own lines
    os.dup2(2, 1)  # what libraries such as gloo print goes to the errors
    if ENOUGH_GPUS:
        torch.cuda.set_device(DEVICE)
    backend = "cpu:gloo,cuda:nccl" if ENOUGH_GPUS else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    trained = {method: train(method, 5 if quick else STEPS) for method in METHODS}
    if dist.get_rank() == 0:
        show_methods(trained)
    dist.destroy_process_group()
    os._exit(0)  # at once, because FSDP2 over gloo sometimes aborts while Python ends


def show_methods(trained):
    print(f"{dist.get_world_size()} processes on {DEVICE.type}, {BATCH_SIZE} points for each")
    print("method       | difference | kB held | points/s")
    differences = []
    for method, (weights, held, speed) in trained.items():
        difference = (weights - trained["one process"][0]).abs().max().item()
        differences.append(difference)
        print(f"{method:12} | {difference:10.1e} | {held / 1e3:7,.0f} | {speed:8,.0f}")
    result = f"ddp_difference = {differences[1]:.9f}, fsdp_difference = {differences[2]:.9f}"
    print(f"Result: {result}", flush=True)


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
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped. All processes have ended.")
