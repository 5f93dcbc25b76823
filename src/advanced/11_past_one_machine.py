"""Past one machine: lose a process, continue from a checkpoint, and count the bytes of a 7B model.

Run:    uv run src/advanced/11_past_one_machine.py
Needs:  nothing
Makes:  nothing
Expect: exit_code = 1, restart_difference = 0.000000000, seven_b = 6,738,415,616

While 16,384 GPUs trained Llama 3, something failed every three hours (arXiv:2407.21783). After such
a failure, torchrun starts all processes again, and they continue from the last checkpoint.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE, Popen

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

STEPS = 20
BATCH_SIZE = 32  # for each process
CHECKPOINT_EVERY = 5  # steps
KILL_AFTER = 7  # steps, in each attempt


# LAUNCH: as in advanced/10, here on the CPU. A lost process has the same effect on GPUs.
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


# STEP: the same points in each process, and of these the share of one process.
def train_step(model, optimizer, step, count, rank=0, ranks=1):
    generator = torch.Generator().manual_seed(step)
    points = torch.randn(count, 64, generator=generator, dtype=torch.float64).chunk(ranks)[rank]
    loss = F.cross_entropy(model(points), points[:, :10].argmax(dim=1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


# MODEL AND CHECKPOINT
def build_small():
    torch.manual_seed(0)  # the same first weights in each process
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).double()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def save_state(model, optimizer, step, path):
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)  # a crash never leaves half a checkpoint


def resume(model, optimizer, path):
    """Load the checkpoint, if there is one; return the number of finished steps."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])  # its momentum: a fading sum of past gradients
    return state["step"]


# WORK: what each process runs. In each attempt, the last process is killed after some steps.
def work_until_killed(path):
    sys.stdout = os.fdopen(os.dup(1), "w")  # for this program's own lines
    os.dup2(2, 1)  # what libraries such as gloo print goes to the errors
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ranks = dist.get_world_size()
    model, optimizer = build_small()
    first = resume(model, optimizer, path)
    parallel = nn.parallel.DistributedDataParallel(model)
    if rank == 0:
        print(f"  {ranks} processes begin at step {first}", flush=True)
    for step in range(first, STEPS):
        if rank == ranks - 1 and step == first + KILL_AFTER:
            print(f"  process {rank} is killed at step {step}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(parallel, optimizer, step, BATCH_SIZE * ranks, rank, ranks)
        if rank == 0 and (step + 1) % CHECKPOINT_EVERY == 0:  # all processes have the same state
            save_state(model, optimizer, step + 1, path)


def train_alone(path, count):
    """Train from the checkpoint, if there is one, to the end; return the weights in one row."""
    model, optimizer = build_small()
    first = resume(model, optimizer, path)
    print(f"One process trains alone from step {first}, with the whole batch")
    for step in range(first, STEPS):
        train_step(model, optimizer, step, count)
    return nn.utils.parameters_to_vector(model.parameters())


# COUNT: what a model of 7 billion parameters needs, before the first activation.
def count_seven_b():
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds

    with torch.device("meta"):  # shapes without numbers: this needs no memory
        count = LlamaForCausalLM(LlamaConfig()).num_parameters()  # LLaMA 7B, Touvron et al. 2023
    lora = 32 * 2 * 8 * (4096 + 4096)  # rank 8 beside two matrices of each of the 32 layers
    needs = {  # bytes for the weights; for gradients and optimizer state (4 + 8 for a parameter)
        "train all with Adam": (4 * count, 12 * count),
        "the same with FSDP2, each of 8 GPUs": (4 * count / 8, 12 * count / 8),
        "train LoRA beside bf16 weights": (2 * count + 4 * lora, 12 * lora),
        "answer in int4": (count / 2, 0),
    }
    print(f"{count:,} parameters               weights  gradients and optimizer state")
    for name, (weights, others) in needs.items():
        print(f"  {name:36} {weights / 1e9:6.1f} GB {others / 1e9:6.1f} GB")
    return count


def main(quick=False, processes=2, checkpoint=None):
    if checkpoint:
        return work_until_killed(checkpoint)
    if processes < 2:
        sys.exit(f"--processes must be 2 or more, not {processes}.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pth")
        undisturbed = train_alone(path, BATCH_SIZE * processes)  # there is no checkpoint yet
        print("torchrun may restart the processes once, and a process is killed twice")
        code, output, errors = launch(processes, "--checkpoint", str(path), restarts=1)
        if "Signal 9 (SIGKILL)" not in errors:  # for example, they did not find each other
            sys.exit(f"The processes did not fail as planned (exit code {code}):\n{errors}")
        print(f"{output}\n  torchrun ends with exit code {code}, because of signal 9 (SIGKILL)")
        restarted = train_alone(path, BATCH_SIZE * processes)
    difference = (restarted - undisturbed).abs().max().item()
    count = count_seven_b()
    result = f"exit_code = {code}, restart_difference = {difference:.9f}"
    print(f"Result: {result}, seven_b = {count:,}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the same, because it takes seconds")
    parser.add_argument("--processes", type=int, default=2, help="the number of processes (2)")
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)  # used by torchrun
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped. All processes have ended.")
