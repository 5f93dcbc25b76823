"""Tensors: create numbers, move them to a device, and add them there.

Run:    uv run src/basics/02_tensors.py
Needs:  nothing
Makes:  nothing
Expect: a_plus_b = 5 7 9, two_devices = refused

A tensor is an array of numbers. It has a shape, a data type, and a device: the CPU or the GPU whose
memory holds its numbers. PyTorch computes on that device, so two tensors must be on the same one.
"""

import argparse

import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# CREATE: a new tensor is in the CPU's memory. .to() returns a copy, unless it is there already.
def create():
    numbers = torch.tensor([1.0, 2.0, 3.0])
    print("Tensor:   ", numbers)
    print("Shape:    ", numbers.shape)
    print("Data type:", numbers.dtype)
    print("Device:   ", numbers.device)
    moved = numbers.to(DEVICE)
    print("\nAfter moved = numbers.to(DEVICE)")
    print("Device:         ", moved.device)
    print("The same tensor:", moved is numbers)


# COMPUTE: the result is on the device of its inputs.
def add():
    a = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    b = torch.tensor([4.0, 5.0, 6.0], device=DEVICE)
    total = a + b
    print("\na + b =", total)
    print("Device:", total.device)
    return total


# MIX: we cause a common error on purpose. Without a GPU, the second device is PyTorch's "meta".
# A tensor there has a shape, but no numbers.
def mix_devices():
    other = DEVICE if DEVICE.type != "cpu" else torch.device("meta")
    try:
        torch.ones(3) + torch.ones(3, device=other)
    except RuntimeError as error:
        print("\nTwo devices in one sum:", str(error).splitlines()[0])
        return "refused"
    return "allowed"


def main():
    create()
    a_plus_b = " ".join(f"{number:.0f}" for number in add().tolist())
    print(f"Result: a_plus_b = {a_plus_b}, two_devices = {mix_devices()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: this lesson is short")
    parser.parse_args()
    main()
