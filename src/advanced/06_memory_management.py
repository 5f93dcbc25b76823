"""Memory management: know what fills the memory in training, and go on when it is full.

Run:    uv run src/advanced/05_memory_management.py
Needs:  nothing
Makes:  nothing
Expect: out_of_memory = survived, gradient_difference <= 0.01

Weights, gradients and the optimizer's notes take the same memory at any batch size. What every layer
keeps of every image until the way back, the activations, grows with the batch, and fills the card.
"""

import argparse
import contextlib
import math
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
WIDTH, DEPTH = 16, 4


# DATA: random images, since memory does not depend on what they show.
def make_images(count):
    return torch.rand(count, 1, 28, 28, device=DEVICE), torch.randint(10, (count,), device=DEVICE)


# MODEL: a deep convolutional network: few weights, many activations. GroupNorm, because BatchNorm would
# let an image's result depend on the others in its part of the batch.
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


# COUNT: whatever is kept for the way back passes through a hook, on any device.
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


def show_batch_sizes(sizes):
    model = DeepCNN().to(DEVICE)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    print(
        f"On {DEVICE.type}: weights {weights / 1e3:.0f} kB, as much for gradients, twice for Adam"
    )
    for size in sizes:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        kept = compute_gradients(model, *make_images(size))
        row = f"  batch of {size:4}: {kept / 1e6:6.1f} MB kept, {kept / size / 1e3:.0f} kB an image"
        if DEVICE.type == "cuda":
            row += f"; at most {torch.cuda.max_memory_allocated() / 1e6:.1f} MB allocated"
        print(row)
    return kept / size


# CACHE: PyTorch keeps what you free for its next tensor. Its own count, what it holds, and the card's.
def ask_nvidia_smi():
    card = f"--id=GPU-{torch.cuda.get_device_properties(DEVICE).uuid}"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["--query-gpu=memory.used", "--format=csv,noheader"]
        return subprocess.check_output(["nvidia-smi", card, *query], text=True).strip()
    return "no answer"


def show_cache():
    def row(name):
        counts = torch.cuda.memory_allocated() / 2**20, torch.cuda.memory_reserved() / 2**20
        print(f"  {name:30} {counts[0]:9.0f} MiB {counts[1]:9.0f} MiB  {ask_nvidia_smi()}")

    if DEVICE.type != "cuda":
        print("Allocated, reserved and nvidia-smi: needs a CUDA device, not measured")
        return
    print("                                 allocated      reserved  nvidia-smi")
    row("at first")
    large, small = (torch.empty(mib, 2**20, dtype=torch.uint8, device=DEVICE) for mib in (512, 128))
    row("tensors of 512 and 128 MiB")
    del large
    row("the larger one deleted")  # still reserved, so nvidia-smi still counts it
    torch.cuda.empty_cache()
    row("after empty_cache()")  # given back to other programs; what has a name stays
    del small


# OUT OF MEMORY: halve what is computed at once, and the batch stays what it was.
def fit_into_memory(model, images, labels, limit):
    """Compute the batch's gradients in as many parts as the memory asks for; return how many."""
    parts = 1
    while parts <= len(images):
        try:
            compute_gradients(model, images, labels, parts, limit=limit)
            print(f"  {len(images) // parts:7} at once: done, {parts} parts")
            return parts
        except torch.OutOfMemoryError as error:
            print(f"  {len(images) // parts:7} at once: {str(error).split('. ')[0]}")
        parts *= 2  # only here, outside of except: the error holds every tensor of the failed try
        model.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    sys.exit("Not even one image fits into the memory.")


def read_sizes(text):
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 8:
        sys.exit(f"--batch-sizes wants whole numbers from 8 up, such as 16,32,64: not {text!r}.")
    return sizes


def main(quick=False, batch_sizes=None):
    usual = "8,16,32" if quick else "16,32,64,128"
    sizes = read_sizes(usual if batch_sizes is None else batch_sizes)
    torch.manual_seed(0)
    bytes_per_image = show_batch_sizes(sizes)
    show_cache()
    if DEVICE.type == "cuda":  # a batch that cannot fit: 1.2 times what is free
        batch, limit = int(1.2 * torch.cuda.mem_get_info()[0] / bytes_per_image), math.inf
        print(f"A batch of {batch} images is too large for this card")
    else:
        batch, limit = sizes[-1], 0.3 * sizes[-1] * bytes_per_image
        print("No CUDA device: a limit is simulated, at 0.3 of what the batch keeps")
    model, whole = DeepCNN().to(DEVICE), DeepCNN().to(DEVICE)
    parts = fit_into_memory(model, *make_images(batch), limit)
    whole.load_state_dict(model.state_dict())
    images, labels = make_images(sizes[-1])
    compute_gradients(model, images, labels, min(parts, len(images)))
    compute_gradients(whole, images, labels)
    difference = largest_difference(model, whole)
    outcome = "survived" if parts > 1 else "did not happen"
    print(f"Result: out_of_memory = {outcome}, gradient_difference = {difference:.6f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: small batches")
    cli.add_argument("--batch-sizes", metavar="N,N,...", help="the sizes (16,32,64,128)")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except RuntimeError as error:  # a batch that is too large at once
        sys.exit(f"Stopped: {str(error).splitlines()[0]} Give smaller --batch-sizes.")
