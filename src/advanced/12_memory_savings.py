"""Memory savings: four ways to need less memory in training, and what each costs in time.

Run:    uv run src/advanced/12_memory_savings.py
Needs:  nothing
Makes:  nothing
Expect: checkpoint_kept <= 30 %, accumulation_kept <= 30 %, checkpoint_difference <= 0.01

Memory is bought with time: compute again instead of keeping, take a batch in parts, keep half as many
bits, or let the optimizer take fewer notes. The first two leave the gradients as they are.
"""

import argparse
import contextlib
import math
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH, DEPTH, BATCH_SIZE, PARTS = 16, 4, 128, 4


# DATA, MODEL, COUNT: as in advanced/05_memory_management.py.
def make_images(count):
    return torch.rand(count, 1, 28, 28, device=DEVICE), torch.randint(10, (count,), device=DEVICE)


class DeepCNN(nn.Module):
    def __init__(self, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        self.first = nn.Conv2d(1, WIDTH, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList()
        for _ in range(DEPTH):
            twice = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU()]
            twice += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU()]
            self.blocks.append(nn.Sequential(*twice))
        self.last = nn.Linear(WIDTH, 10)

    def forward(self, x):  # [N, 1, 28, 28]
        x = self.first(x)  # [N, 16, 14, 14], as after each block
        for block in self.blocks:
            # checkpointed, a block keeps its input only, and computes the rest anew on the way back
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.last(x.mean(dim=(2, 3)))


@contextlib.contextmanager
def count_kept(there_before, limit=math.inf):
    """Yield {storage: bytes} of all that is kept and was not there before; refuse more than limit."""
    before = {tensor.untyped_storage().data_ptr() for tensor in there_before}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in before:
            kept[storage.data_ptr()] = storage.nbytes()  # two views of one storage count once
        if sum(kept.values()) > limit:
            raise torch.OutOfMemoryError(f"simulated limit of {limit / 1e6:.0f} MB")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def compute_gradients(model, images, labels, parts=1, half=False, limit=math.inf):
    """Leave the batch's gradients in model, a part at a time; return the most bytes kept for a part."""
    model.zero_grad()
    most = 0
    for some, answers in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        autocast = torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=half)
        with count_kept([images, *model.parameters()], limit) as kept, autocast:
            loss = F.cross_entropy(model(some), answers)
        (loss * len(some) / len(images)).backward()  # its share: the last part may be smaller
        most = max(most, sum(kept.values()))
    return most


def largest_difference(model, other):
    """Return how far two models' gradients differ, in parts of the largest gradient."""
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    largest = max(a.abs().max().item() for a, _ in pairs)
    return max((a - b).abs().max().item() for a, b in pairs) / largest


# MEASURE: every candidate in turn, so that what disturbs the machine disturbs them all alike.
def time_block(call, count):
    """Return the seconds that each of count calls takes."""
    synchronize = torch.get_device_module(DEVICE).synchronize  # a GPU works on after a call is back
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count


def time_in_turn(calls, seconds=2.0, rounds=21):
    """Return {name: seconds per call, [rounds]}; each call runs for `seconds` or longer in all."""
    counts = {}
    for name, call in calls.items():  # warm up until it no longer gets faster
        before, now, count = math.inf, time_block(call, 1), 1
        while now < 0.9 * before or now * count < seconds / rounds:
            count = max(count, math.ceil(seconds / rounds / now))
            before, now = now, time_block(call, count)
        counts[name] = count
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_block(call, counts[name]))
    return times


def compare(base, other):
    """Return how many times as fast other is, the bootstrap's 95 % interval of that, and a verdict."""
    base, other = np.array(base), np.array(other)
    picks = np.random.default_rng(0).integers(len(base), size=(1000, len(base)))  # Efron 1979
    ratios = np.median(base[picks], axis=1) / np.median(other[picks], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5]).round(2)  # as it is shown
    verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference"
    return np.median(base) / np.median(other), low, high, verdict


# WAYS: each against the plain one, in bytes, in the gradients, and in time.
def compare_savings(size, **amount):
    plain, recompute, reference = (DeepCNN(again).to(DEVICE) for again in (False, True, False))
    for model in (recompute, reference):
        model.load_state_dict(plain.state_dict())
    batch, results = make_images(size), []
    calls = {
        "plain": partial(compute_gradients, plain, *batch),
        "checkpointing": partial(compute_gradients, recompute, *batch),
        f"accumulation in {PARTS} parts": partial(compute_gradients, plain, *batch, PARTS),
        "bf16 autocast": partial(compute_gradients, plain, *batch, 1, True),
    }
    times, all_kept = time_in_turn(calls, **amount), compute_gradients(reference, *batch)
    print(f"Gradients of {size} images       MB kept   share  difference       ms")
    for name, call in calls.items():
        kept = call()
        results.append((kept / all_kept, largest_difference(reference, call.args[0])))
        row = f"  {name:28} {kept / 1e6:7.1f} {results[-1][0]:7.0%} {results[-1][1]:11.6f}"
        print(row + describe(times[name], times["plain"]))
    return results


def compare_optimizers(**amount):
    makers = {
        "SGD": torch.optim.SGD,
        "SGD with momentum": partial(torch.optim.SGD, momentum=0.9),
        "Adam": torch.optim.Adam,
    }
    optimizers, model = {}, DeepCNN().to(DEVICE)
    compute_gradients(model, *make_images(2))
    for name, make in makers.items():
        optimizers[name] = make(model.parameters(), lr=0.0)  # the weights stay as they are
    times = time_in_turn({name: made.step for name, made in optimizers.items()}, **amount)
    print("Steps of an optimizer   bytes of state for each weight       ms")
    count = sum(parameter.numel() for parameter in model.parameters())
    for name, optimizer in optimizers.items():
        state = [t for notes in optimizer.state.values() for t in notes.values() if t is not None]
        row = f"  {name:28} {sum(tensor.nbytes for tensor in state) / count:27.1f}"
        print(row + describe(times[name], times["SGD"]))


def describe(spent, base):
    speed = "  {:.2f}x ({:.2f} to {:.2f}), {}".format(*compare(base, spent))
    return f" {np.median(spent) * 1e3:8.2f}" + speed * (spent is not base)


def main(quick=False):
    torch.manual_seed(0)
    amount = {"seconds": 0.02, "rounds": 5} if quick else {}
    _, checkpointing, accumulation, _ = compare_savings(8 if quick else BATCH_SIZE, **amount)
    compare_optimizers(**amount)
    names = {"checkpoint": checkpointing, "accumulation": accumulation}
    results = [f"{name}_kept = {kept:.1%}" for name, (kept, _) in names.items()]
    results += [f"{name}_difference = {gap:.6f}" for name, (_, gap) in names.items()]
    print("Result:", ", ".join(results))


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 8 images, short timing")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
