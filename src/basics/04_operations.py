"""Operations: the arithmetic that every network is made of.

Run:    uv run src/basics/04_operations.py
Needs:  nothing
Makes:  nothing
Expect: dot_product = 32, mean = 3.0

Element by element, row times column, or many numbers boiled down to one: a whole network is these
three kinds of operation repeated, and every one of them runs on whatever device holds the numbers.
"""

import argparse

import torch

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


# ELEMENTWISE: the first with the first, the second with the second, ...
def elementwise(a, b):
    print("a =", a)
    print("b =", b)
    print("a + b =", a + b)
    print("a - b =", a - b)
    print("a * b =", a * b)
    print("a / b =", a / b)


# MATMUL: every row of the left meets every column of the right.
def multiply_matrices():
    left = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
    right = torch.tensor([[5.0, 6.0], [7.0, 8.0]], device=DEVICE)
    row = torch.tensor([10.0, 20.0], device=DEVICE)
    print("\nleft =", left.tolist(), "right =", right.tolist(), "row =", row.tolist())
    print("left @ right =", (left @ right).tolist())
    print("left + row   =", (left + row).tolist(), "(the row is added to each row: broadcasting)")


# REDUCE: a tensor in, fewer numbers out; dim says which dimension disappears.
def reduce():
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=DEVICE)
    print("\nSum: ", numbers.sum().item())
    print("Mean:", numbers.mean().item())
    print("Max: ", numbers.max().item(), "at index", numbers.argmax().item())
    print("Min: ", numbers.min().item())
    table = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
    print("Sum over the rows, dim=0:   ", table.sum(dim=0).tolist())
    print("Sum over the columns, dim=1:", table.sum(dim=1).tolist())
    return numbers.mean().item()


# DOT: multiply element by element, then sum; 1*4 + 2*5 + 3*6.
def dot_product(a, b):
    product = a @ b
    print("\na @ b =", product.item(), "on", product.device)
    return product.item()


def main():
    a = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    b = torch.tensor([4.0, 5.0, 6.0], device=DEVICE)
    elementwise(a, b)
    multiply_matrices()
    mean = reduce()
    print(f"Result: dot_product = {dot_product(a, b):.0f}, mean = {mean:.1f}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="changes nothing: this lesson is instant")
    cli.parse_args()
    main()
