"""Shapes: read the dimensions of a tensor, and rearrange its numbers.

Run:    uv run src/basics/03_shapes.py
Needs:  nothing
Makes:  nothing
Expect: dimensions = 0 1 2 3, flattened = 32 x 784

A shape is the length of each dimension. To find the number of dimensions, count opening brackets: a
scalar has none, a vector has one, a matrix has two. In memory, all numbers are in one long row.
"""

import argparse

import torch


# RESHAPE: reshape keeps the order of the numbers. A transpose swaps rows and columns.
def reshape():
    numbers = torch.arange(6)
    print("Six numbers:         ", numbers.tolist())
    print("reshape(2, 3):       ", numbers.reshape(2, 3).tolist())
    print("reshape(3, 2):       ", numbers.reshape(3, 2).tolist())
    print("reshape(2, 3).T:     ", numbers.reshape(2, 3).T.tolist())
    print("unsqueeze(0), [1, 6]:", numbers.unsqueeze(0).tolist())


def main():
    tensors = {
        "Scalar": torch.tensor(43.0),
        "Vector": torch.tensor([1.0, 2.0, 3.0]),
        "Matrix": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "3-D tensor": torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]),
    }
    for name, tensor in tensors.items():  # numel is the number of elements
        print(f"{name}: {tensor}")
        print(f"  shape = {tuple(tensor.shape)}, ndim = {tensor.ndim}, numel = {tensor.numel()}\n")
    reshape()
    images = torch.zeros(32, 1, 28, 28)  # [images, channels, rows, columns]: gray is one channel
    flat = images.flatten(start_dim=1)  # [32, 784]
    print("\n32 gray images of 28 x 28:", tuple(images.shape), "-> flattened:", tuple(flat.shape))
    dimensions = " ".join(str(tensor.ndim) for tensor in tensors.values())
    print(f"Result: dimensions = {dimensions}, flattened = {flat.shape[0]} x {flat.shape[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: this lesson is short")
    parser.parse_args()
    main()
