"""Memory management: measure what fills the memory, need less of it, and survive a full memory.

Run:    uv run src/advanced/06_memory_management.py
Needs:  nothing
Makes:  nothing
Expect: out_of_memory = survived, gradient_difference <= 0.01, checkpoint_kept <= 30%

Weights, gradients and optimizer state need the same memory for every batch size. Activations, the
outputs of the layers, are kept for each image until the backward pass. They fill the memory.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
PARTS = 4  # for gradient accumulation


# DATA: random images, because the memory does not depend on what an image shows.
def make_images(count):
    images = torch.rand(count, 1, 28, 28, device=DEVICE)
    return images, torch.randint(10, (count,), device=DEVICE)


# MODEL: few weights, many activations. GroupNorm gives each group of an image's channels a mean
# of 0 and a variance of 1. BatchNorm would use the other images in the part of the batch, too.
def build_deep_network():
    model = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1))  # [N, 16, 14, 14]
    for _ in range(4):  # blocks of two convolutions
        layers = [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU()]
        model.append(nn.Sequential(*layers))
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))
    return model.to(DEVICE)


# THREE METHODS: parts of a batch, activation checkpointing, and activations of 16 bits.
def batch_gradients(model, images, labels, parts=1, checkpointing=False, half=False):
    """Return the batch's gradients in one row, and the most bytes kept for a part."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [images, *model.parameters()]}
    kept = {}  # {address in memory: bytes}

    def keep(tensor):  # PyTorch calls it for each tensor that it keeps for the backward pass
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()  # two views of one storage count once
        return tensor

    count = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    half_precision = torch.autocast(DEVICE.type, torch.bfloat16, enabled=half)
    most = 0
    model.zero_grad()
    for part, answers in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        kept.clear()
        with count, half_precision:
            if checkpointing:  # keep only each block's input, and compute the block twice
                logits = checkpoint_sequential(model, len(model), part, use_reentrant=False)
            else:
                logits = model(part)
            loss = F.cross_entropy(logits, answers)
        most = max(most, sum(kept.values()))
        (loss * len(part) / len(images)).backward()  # adds to the gradients of the parts before
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), most


# WHERE THE MEMORY GOES: only the activations grow with the batch.
def show_memory(model, sizes):
    """Print the size of each part; return the bytes of activations for an image."""
    print(f"What fills the memory, on {DEVICE.type}")
    for size in sizes:
        _, kept = batch_gradients(model, *make_images(size))
        per_image = kept / size
        print(f"  batch of {size:4}: {kept / 1e6:6.1f} MB kept, {per_image / 1e3:.0f} kB an image")
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e3
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters()) / 1e3
    print(f"  for each batch: {weights:.0f} kB of weights, {gradients:.0f} kB of gradients")
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)  # without momentum, it keeps no state
    for optimizer in (sgd, torch.optim.Adam(model.parameters())):
        optimizer.step()
        state = [tensor.nbytes for one in optimizer.state.values() for tensor in one.values()]
        print(f"  {type(optimizer).__name__:4} keeps {sum(state) / 1e3:.0f} kB of optimizer state")
    if DEVICE.type == "cuda":
        print(f"  at most {torch.cuda.max_memory_allocated() / 1e6:.0f} MB allocated")
        torch.cuda.empty_cache()  # other programs can now use the memory of deleted tensors
        print(f"  {torch.cuda.memory_reserved() / 1e6:.0f} MB reserved after empty_cache()")
    return per_image


# COMPARE: what each method keeps, how exact its gradients are, and how much it computes.
def compare_methods(model, batch_size):
    """Print a row for each method; return {method: share kept} and {method: difference}."""
    images, labels = make_images(batch_size)
    options = {"plain": {}, "checkpointing": {"checkpointing": True}}
    options |= {"accumulation": {"parts": PARTS}, "bf16 autocast": {"half": True}}
    print(f"{batch_size:5} images       MB kept   share  difference  million operations")
    expected, all_kept = batch_gradients(model, images, labels)
    shares = {}
    differences = {}
    for name, option in options.items():
        with FlopCounterMode(display=False) as counter:
            gradients, kept = batch_gradients(model, images, labels, **option)
        shares[name] = kept / all_kept
        differences[name] = ((gradients - expected).abs().max() / expected.abs().max()).item()
        row = f"  {name:13} {kept / 1e6:10.1f} {shares[name]:7.0%} {differences[name]:11.6f}"
        print(f"{row} {counter.get_total_flops() / 1e6:19,.0f}")
    return shares, differences


# OUT OF MEMORY: compute fewer images at once. The gradients stay those of the whole batch.
def fit_into_memory(model, images, labels, limit=float("inf")):
    """Compute the gradients in as few parts as the memory allows; return the number of parts."""
    parts = 1
    while parts <= len(images):
        try:
            _, kept = batch_gradients(model, images, labels, parts)
            if kept > limit:
                raise torch.OutOfMemoryError(f"simulated limit of {limit / 1e6:.0f} MB")
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
    bytes_per_image = show_memory(model, sizes)
    shares, differences = compare_methods(model, sizes[-1])
    batch = sizes[-1]
    limit = 0.3 * batch * bytes_per_image  # simulated
    if DEVICE.type == "cuda":
        batch = int(1.2 * torch.cuda.mem_get_info()[0] / bytes_per_image)
        limit = float("inf")
    print(f"A batch of {batch} images that needs more memory than the limit")
    parts = fit_into_memory(model, *make_images(batch), limit)
    outcome = "survived" if parts > 1 else "did not happen"
    difference = max(differences["checkpointing"], differences["accumulation"])
    result = f"out_of_memory = {outcome}, gradient_difference = {difference:.6f}"
    result += f", checkpoint_kept = {shares['checkpointing']:.1%}"
    print(f"Result: {result}, accumulation_kept = {shares['accumulation']:.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, small batches")
    parser.add_argument("--batch-sizes", type=read_sizes, metavar="N,N,...", help="16,32,64,128")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.batch_sizes)
    except (KeyboardInterrupt, RuntimeError) as error:  # RuntimeError: the batch is too large
        sys.exit(f"Stopped: {error!r:.99}. Smaller --batch-sizes need less memory.")
