"""Memory management: measure what fills the memory, need less of it, and survive a full memory.

Run:    uv run src/advanced/06_memory_management.py
Needs:  nothing
Makes:  nothing
Expect: out_of_memory = survived, gradient_difference <= 0.01, checkpoint_kept <= 30%

Weights, gradients and optimizer state need the same memory for every batch size. Activations, the
outputs of the layers, are kept for each image until the backward pass. They fill the memory.
"""

import argparse
import contextlib
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
BATCH_SIZE = 128  # for the comparison of the methods
PARTS = 4  # for gradient accumulation


# DATA: random images, because the memory does not depend on what an image shows.
def make_images(count):
    images = torch.rand(count, 1, 28, 28, device=DEVICE)
    return images, torch.randint(10, (count,), device=DEVICE)


# MODEL: few weights, many activations. GroupNorm, because with BatchNorm the result for an image
# would depend on the other images in its part of the batch.
def build_deep_network():
    model = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1))  # [N, 16, 14, 14]
    for _ in range(4):
        block = []
        for _ in range(2):
            block += [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
        model.append(nn.Sequential(*block))  # [N, 16, 14, 14]
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
    return model.to(DEVICE)


# COUNT: PyTorch calls `pack` for each tensor that it keeps for the backward pass.
@contextlib.contextmanager
def count_kept(known, limit=math.inf):
    """Yield {address: bytes} of what is kept, without the known tensors; allow at most limit."""
    known = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()  # two views of one storage count once
        if sum(kept.values()) > limit:
            raise torch.OutOfMemoryError(f"simulated limit of {limit / 1e6:.0f} MB")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


# THREE METHODS: parts of a batch, activation checkpointing, and activations of 16 bits.
def batch_gradients(
    model, images, labels, parts=1, checkpointing=False, half=False, limit=math.inf
):
    """Return the batch's gradients in one row, and the most bytes kept for a part."""
    known = [images, *model.parameters()]
    most = 0
    # README: start
    model.zero_grad()
    for part, answers in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=half)
        with count_kept(known, limit) as kept, autocast:
            if checkpointing:  # keep only each block's input, and compute the block twice
                logits = checkpoint_sequential(model, len(model), part, use_reentrant=False)
            else:
                logits = model(part)
            loss = F.cross_entropy(logits, answers)
        most = max(most, sum(kept.values()))
        (loss * len(part) / len(images)).backward()  # adds to the gradients of the parts before
    # README: end
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), most


# WHERE THE MEMORY GOES. The fourth method: an optimizer that keeps less state.
def show_optimizers(model):
    """Print what does not depend on the batch size. SGD without momentum keeps no state."""
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e3
    print(f"On {DEVICE.type}: {weights:.0f} kB of weights, {weights:.0f} kB of gradients")
    batch_gradients(model, *make_images(8))
    optimizers = {
        "SGD with momentum": torch.optim.SGD(model.parameters(), momentum=0.9),
        "Adam": torch.optim.Adam(model.parameters()),
    }
    for name, optimizer in optimizers.items():
        optimizer.step()
        tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
        size = sum(tensor.nbytes for tensor in tensors) / 1e3
        print(f"  {name:17} {size:5.0f} kB of optimizer state")


def show_batch_sizes(model, sizes):
    """Print the activations of each batch size; return the bytes for an image."""
    for size in sizes:
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _, kept = batch_gradients(model, *make_images(size))
        row = f"  batch of {size:4}: {kept / 1e6:6.1f} MB kept, {kept / size / 1e3:.0f} kB an image"
        if DEVICE.type == "cuda":
            row += f"; at most {torch.cuda.max_memory_allocated() / 1e6:.1f} MB allocated"
        print(row)
    return kept / size


def show_cache():
    """Show on a CUDA device that the memory of a deleted tensor stays reserved for the next one."""

    def show(event):
        free, total = torch.cuda.mem_get_info()
        counts = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free]
        print(f"  {event:20}", *[f"{count / 2**20:9.0f} MiB" for count in counts])

    print("                          allocated      reserved  used (nvidia-smi)")
    show("at first")
    tensor = torch.empty(512, 2**20, dtype=torch.uint8, device=DEVICE)
    show("a tensor of 512 MiB")
    del tensor
    show("tensor deleted")
    torch.cuda.empty_cache()  # returns the memory, so that other programs can use it
    show("after empty_cache()")


# COMPARE: what each method keeps, how exact its gradients are, and how much it computes.
def compare_methods(model, batch_size):
    """Print a row for each method; return {method: (share kept, gradient difference)}."""
    images, labels = make_images(batch_size)
    options = {
        "plain": {},
        "checkpointing": {"checkpointing": True},
        "accumulation": {"parts": PARTS},
        "bf16 autocast": {"half": True},
    }
    print(f"Gradients of {batch_size} images (accumulation: {PARTS} parts)")
    print("  method           MB kept   share  difference  million operations")
    expected, all_kept = batch_gradients(model, images, labels)
    methods = {}
    for name, option in options.items():
        with FlopCounterMode(display=False) as counter:
            gradients, kept = batch_gradients(model, images, labels, **option)
        difference = ((gradients - expected).abs().max() / expected.abs().max()).item()
        methods[name] = kept / all_kept, difference
        row = f"  {name:13} {kept / 1e6:10.1f} {kept / all_kept:7.0%} {difference:11.6f}"
        print(f"{row} {counter.get_total_flops() / 1e6:19,.0f}")
    return methods


# OUT OF MEMORY: compute fewer images at once. The gradients stay those of the whole batch.
def fit_into_memory(model, images, labels, limit=math.inf):
    """Compute the gradients in as few parts as the memory allows; return the number of parts."""
    parts = 1
    while parts <= len(images):
        try:
            batch_gradients(model, images, labels, parts, limit=limit)
            print(f"  {len(images) // parts:7} images at once: done, {parts} parts")
            return parts
        except torch.OutOfMemoryError as error:
            print(f"  {len(images) // parts:7} images at once: {str(error).split('. ')[0]}")
        # Retry here, outside the except block: the error keeps the failed attempt's tensors.
        parts *= 2
    sys.exit("Not even one image fits into the memory.")


def read_sizes(text):
    sizes = [int(size) for size in text.split(",")]  # argparse reports a ValueError
    if min(sizes) < 8:
        raise argparse.ArgumentTypeError("give batch sizes from 8 up, such as 16,32,64")
    return sizes


def main(quick=False, batch_sizes=None):
    torch.manual_seed(0)
    sizes = batch_sizes or ([8, 16, 32] if quick else [16, 32, 64, 128])
    model = build_deep_network()
    show_optimizers(model)
    bytes_per_image = show_batch_sizes(model, sizes)
    if DEVICE.type == "cuda":
        show_cache()
    methods = compare_methods(model, 8 if quick else BATCH_SIZE)
    batch = sizes[-1]
    limit = 0.3 * batch * bytes_per_image  # simulated
    if DEVICE.type == "cuda":
        batch = int(1.2 * torch.cuda.mem_get_info()[0] / bytes_per_image)
        limit = math.inf
    print(f"A batch of {batch} images, more than the memory holds")
    parts = fit_into_memory(model, *make_images(batch), limit)
    outcome = "survived" if parts > 1 else "did not happen"
    checkpoint_kept, checkpoint_difference = methods["checkpointing"]
    accumulation_kept, accumulation_difference = methods["accumulation"]
    difference = max(checkpoint_difference, accumulation_difference)
    result = f"out_of_memory = {outcome}, gradient_difference = {difference:.6f}"
    result += f", checkpoint_kept = {checkpoint_kept:.1%}"
    print(f"Result: {result}, accumulation_kept = {accumulation_kept:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, small batches")
    parser.add_argument("--batch-sizes", type=read_sizes, metavar="N,N,...", help="16,32,64,128")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.batch_sizes)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    except RuntimeError as error:  # the batch is too large to compute at once
        sys.exit(f"Stopped: {str(error).splitlines()[0]} Give smaller --batch-sizes.")
