"""Tensors: hold numbers where the computing happens.

Run:    uv run src/basics/02_tensors.py
Needs:  nothing
Makes:  nothing
Expect: a_plus_b = 5 7 9, two_devices = refused

A tensor is a box of numbers with a shape, a number type and an address: the device whose memory it
lives in. Arithmetic happens where the numbers are, so two tensors can only meet on one device.
"""

import argparse

import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# CREATE: a new tensor lives in the CPU's memory.
def create():
    numbers = torch.tensor([1.0, 2.0, 3.0])
    print("Tensor:   ", numbers)
    print("Shape:    ", numbers.shape)
    print("Data type:", numbers.dtype)
    print("Device:   ", numbers.device)
    return numbers


# MOVE: .to() returns a copy at the new address, or the tensor itself if it lives there already.
def move(numbers):
    moved = numbers.to(DEVICE)
    print("\nAfter numbers.to(DEVICE)")
    print("Device of the result:  ", moved.device)
    print("Device of the original:", numbers.device)
    print("The same tensor:       ", moved is numbers)


# COMPUTE: the result lives where its inputs live.
def add():
    a = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    b = torch.tensor([4.0, 5.0, 6.0], device=DEVICE)
    total = a + b
    print("\na + b =", total)
    print("Device:", total.device)
    return total


# RULE: the most common beginner's error, met here on purpose.
def mix_devices():
    # Without a GPU the "meta" device plays the second part: it knows shapes but holds no numbers.
    other = DEVICE if DEVICE.type != "cpu" else torch.device("meta")
    try:
        torch.ones(3) + torch.ones(3, device=other)
    except RuntimeError as error:
        print("\nTwo devices in one sum:", str(error).splitlines()[0])
        return "refused"
    return "allowed"


def main():
    move(create())
    total = add()
    a_plus_b = " ".join(f"{number:.0f}" for number in total.tolist())
    print(f"Result: a_plus_b = {a_plus_b}, two_devices = {mix_devices()}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="changes nothing: this lesson is instant")
    cli.parse_args()
    main()
