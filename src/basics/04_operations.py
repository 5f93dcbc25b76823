"""Operations: do the arithmetic that every network is made of.

Run:    uv run src/basics/04_operations.py
Needs:  nothing
Makes:  nothing
Expect: dot_product = 32, mean = 3.0

A network needs three kinds of operation. An elementwise one combines numbers at the same place.
A matrix product combines rows with columns. A reduction turns many numbers into one, as a sum does.
"""

import argparse

import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ELEMENTWISE: the first number with the first, the second with the second, and so on.
def elementwise(a, b):
    print("a =", a)
    print("b =", b)
    print("a + b =", a + b)
    print("a - b =", a - b)
    print("a * b =", a * b)
    print("a / b =", a / b)


# MATRIX PRODUCT: each row of left with each column of right. The first result is 1 * 5 + 2 * 7.
def multiply_matrices():
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
    right = torch.tensor([[5.0, 6.0], [7.0, 8.0]], device=DEVICE)
    row = torch.tensor([10.0, 20.0], device=DEVICE)
    print("\nleft =", left.tolist(), "right =", right.tolist(), "row =", row.tolist())
    print("left * right =", (left * right).tolist())  # elementwise
    print("left @ right =", (left @ right).tolist())  # row by column
    print("left + row   =", (left + row).tolist())  # broadcasting: the row is added to each row
    print("Sum over the rows, dim=0:   ", left.sum(dim=0).tolist())  # dimension 0 disappears
    print("Sum over the columns, dim=1:", left.sum(dim=1).tolist())


# REDUCE: many numbers become one. item() turns a tensor of one number into a Python number.
def reduce():
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=DEVICE)
    print("\nSum: ", numbers.sum().item())
    print("Mean:", numbers.mean().item())
    print("Max: ", numbers.max().item(), "at index", numbers.argmax().item())
    print("Min: ", numbers.min().item())
    return numbers.mean().item()


def main():
    a = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    b = torch.tensor([4.0, 5.0, 6.0], device=DEVICE)
    elementwise(a, b)
    multiply_matrices()
    mean = reduce()
    product = a @ b  # the dot product of two vectors: 1 * 4 + 2 * 5 + 3 * 6
    print("\na @ b =", product.item(), "on", product.device)
    print(f"Result: dot_product = {product.item():.0f}, mean = {mean:.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: this lesson is short")
    parser.parse_args()
    main()
