"""Shapes: read the dimensions of a tensor, and change them without touching a number.

Run:    uv run src/basics/03_shapes.py
Needs:  nothing
Makes:  nothing
Expect: dimensions = 0 1 2 3, flattened = 32 x 784

Count the brackets: a scalar has none, a vector one pair, a matrix two, a stack of matrices three.
The numbers lie in one row in memory; the shape only says how to count them off.
"""

import argparse

import torch


# LOOK: four tensors, one dimension more each time.
def show_tensor(name, tensor):
    print(f"{name}: {tensor}")
    print(f"  shape = {tuple(tensor.shape)}, ndim = {tensor.ndim}, numel = {tensor.numel()}\n")


# RESHAPE: the same numbers, counted off differently.
def reshape():
    numbers = torch.arange(6)
    print("Six numbers:          ", numbers.tolist())
    print("reshape(2, 3):        ", numbers.reshape(2, 3).tolist())
    print("transposed, [3, 2]:   ", numbers.reshape(2, 3).T.tolist())
    print("unsqueeze(0), [1, 6]:", numbers.unsqueeze(0).tolist())


# BATCH: the shape that you will meet all through the course: [images, channels, rows, columns].
def flatten_images():
    images = torch.zeros(32, 1, 28, 28)
    flat = images.flatten(start_dim=1)
    print("\n32 grey images of 28 x 28:", tuple(images.shape), "-> flattened:", tuple(flat.shape))
    return flat


def main():
    tensors = {
        "Scalar": torch.tensor(43.0),
        "Vector": torch.tensor([1.0, 2.0, 3.0]),
        "Matrix": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "3-D tensor": torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]),
    }
    for name, tensor in tensors.items():
        show_tensor(name, tensor)
    reshape()
    flat = flatten_images()
    dimensions = " ".join(str(tensor.ndim) for tensor in tensors.values())
    print(f"Result: dimensions = {dimensions}, flattened = {' x '.join(map(str, flat.shape))}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="changes nothing: this lesson is instant")
    cli.parse_args()
    main()
