"""Past one machine: lose a process, go on from the last checkpoint, and count what 7B weights need.

Run:    uv run src/advanced/13_past_one_machine.py
Needs:  nothing
Makes:  nothing
Expect: exit_code = 1, restart_difference = 0.000000000, seven_b = 6,738,415,616

While 16,384 GPUs trained Llama 3, something failed every three hours (arXiv:2407.21783). The rest must
then neither wait nor begin anew: torchrun ends all, starts all, and they go on from what was saved.
"""

import argparse
import math
import os
import re
import signal
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

DEVICE = torch.device("cpu")  # what happens to a lost process is the same on GPUs
WIDTH, LEARNING_RATE, BATCH_SIZE, CHECKPOINT_EVERY, KILL_AFTER = 64, 0.05, 32, 5, 7
L4_BYTES = 23_034 * 2**20  # what nvidia-smi reports for the reference machine's card


# LAUNCH, DATA: as in advanced/08_multi_gpu.py.
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


def make_labelled_points():
    numbers = torch.randn(2074, 64, generator=torch.Generator().manual_seed(0))
    points, directions = numbers.double().split([2064, 10])
    return points, (points @ directions.T).argmax(dim=1)  # [N, 64], [N]


def share_of_batch(data, step, size, rank=0, ranks=1):
    """Return the points and labels that one process out of ranks works on, size of each."""
    everybody = torch.arange(step * ranks * size, (step + 1) * ranks * size) % len(data[0])
    mine = everybody.chunk(ranks)[rank]  # with a DataLoader, a DistributedSampler does this
    return [tensor[mine].to(DEVICE) for tensor in data]


# MODEL
def build_small():
    torch.manual_seed(0)  # every process begins with the same weights
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)]
    model = nn.Sequential(*layers).to(DEVICE, torch.float64)
    return model, torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)


def averaged_step(model, optimizer, points, labels, ranks=1):
    """Take a step with the gradients' mean over all processes: this is what DDP does, layer by layer."""
    loss = F.cross_entropy(model(points), labels)
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():
        if ranks > 1:
            dist.all_reduce(parameter.grad)  # the sum
            parameter.grad /= ranks
    optimizer.step()


# WORK: what each process runs. In every attempt, the last of them is killed after some steps.
def work_until_killed(folder, steps):
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what gloo has to say goes to the errors, and Python's lines where they went
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # wait no longer for a lost one
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attempt, file = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), folder / "checkpoint.pth"
    (model, optimizer), data = build_small(), make_labelled_points()
    first = resume(model, optimizer, file)
    if rank == 0:
        print(f"  attempt {attempt + 1}: {ranks} processes begin at step {first}", flush=True)
    for step in range(first, steps):
        if rank == ranks - 1 and step == first + KILL_AFTER:
            print(f"  process {rank} is killed at step {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        averaged_step(model, optimizer, *share_of_batch(data, step, BATCH_SIZE, rank, ranks), ranks)
        if rank == 0 and (step + 1) % CHECKPOINT_EVERY == 0:  # one file will do: all have the same
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"step": step + 1}, folder / "part")
            (folder / "part").replace(file)
    dist.destroy_process_group()
    os._exit(0)


def resume(model, optimizer, file):
    """Load the checkpoint, if there is one; return the number of steps that it has behind it."""
    if not file.exists():
        return 0
    state = torch.load(file, map_location=DEVICE, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])  # momentum, too, or the way would be another
    return state["step"]


def lose_processes(processes, steps):
    """Return torchrun's exit code, and how far the weights end from those of an undisturbed run."""
    print("A process may be lost and come back once; it is killed twice")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--folder", folder, "--steps", str(steps)]
        code, output, errors = launch(processes, *arguments, restarts=1)
        (model, optimizer), data = build_small(), make_labelled_points()
        first = resume(model, optimizer, Path(folder, "checkpoint.pth"))
    print(output)
    cause = re.search(r"Root Cause.*?rank +: (\d+).*?exitcode +: (\S+)", errors, re.DOTALL)
    if not code or not cause:
        sys.exit(f"The processes ended otherwise, with exit code {code}:\n{errors}")
    seconds = time.perf_counter() - start
    print(f"  torchrun ends after {seconds:.0f} s: process {cause[1]} had exit code {cause[2]}")
    print(f"One process alone goes on from step {first}, with the whole batch")
    undisturbed, other = build_small()
    for step in range(steps):
        batch = share_of_batch(data, step, BATCH_SIZE * processes)
        averaged_step(undisturbed, other, *batch)
        if step >= first:
            averaged_step(model, optimizer, *batch)
    pairs = zip(model.parameters(), undisturbed.parameters(), strict=True)
    return code, max((a - b).abs().max().item() for a, b in pairs)


# COUNT: what a model of 7 billion parameters needs, before the first activation.
def count_seven_b():
    width, layers, hidden, vocabulary = 4096, 32, 11008, 32000  # LLaMA, Touvron et al. 2023
    block = 4 * width**2 + 3 * width * hidden + 2 * width  # attention, feed-forward, two norms
    count = 2 * vocabulary * width + layers * block + width  # a table at each end, a last norm
    lora = layers * 2 * 8 * (width + width)  # rank 8 beside two matrices of each block
    cache = 2 * layers * width * 4096 * 2  # keys and values of 4,096 tokens in 16 bits
    needs = {
        "train all by Adam: 4 + 4 + 8 bytes each": 16 * count,
        "train LoRA beside bf16 weights": 2 * count + 16 * lora,
        "answer in bf16, with 4,096 tokens": 2 * count + cache,
        "answer in int8, with 4,096 tokens": count + cache,
        "answer in int4, with 4,096 tokens": count // 2 + cache,
    }
    print(f"{count:,} parameters, and what they need besides the activations")
    for name, size in needs.items():
        print(f"  {name:40} {size / 1e9:6.1f} GB {math.ceil(size / L4_BYTES):4} x L4 with 23 GB")
    for cards in (2, 4, 8, 16):
        name = f"train all by FSDP2 on {cards} cards"
        print(f"  {name:40} {16 * count / cards / 1e9:6.1f} GB each")
    return count


def main(processes=2, steps=20, folder=None, quick=False):
    if folder:
        work_until_killed(folder, steps)
    if processes < 2:
        sys.exit(f"--processes must be 2 or more, not {processes}.")
    code, difference = lose_processes(processes, 15 if quick else steps)
    numbers = f"restart_difference = {difference:.9f}, seven_b = {count_seven_b():,}"
    print(f"Result: exit_code = {code}, {numbers}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 15 steps")
    cli.add_argument("--processes", type=int, default=2, help="how many (2)")
    cli.add_argument("--steps", type=int, default=20, help=argparse.SUPPRESS)
    cli.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # torchrun's processes get it
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped; all processes have ended.")
