"""A first network: compute an output from three numbers, and a gradient for each parameter.

Run:    uv run src/basics/05_first_nn.py
Needs:  nothing
Makes:  nothing
Expect: parameters = 41, gradients = 41

A network is a chain of matrix products. PyTorch records each operation so that it can compute
gradients. The gradient of a parameter says how much the output changes if you change the parameter.
"""

import argparse

import torch
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
NEURONS = 8
SEED = 42  # the parameters start as random numbers


# MODEL: two layers. nn.Linear holds a matrix of weights, and one bias for each neuron.
class SimpleNeuralNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(3, NEURONS)
        self.layer2 = nn.Linear(NEURONS, 1)

    def forward(self, x):  # [3]
        return self.layer2(self.layer1(x))  # [3] -> [8] -> [1]


# PARAMETERS: the numbers that training will change.
def count_parameters(model):
    for name, parameter in model.named_parameters():
        print(f"  {name:14} {tuple(parameter.shape)!s:7} {parameter.numel():3} numbers")
    return sum(parameter.numel() for parameter in model.parameters())


# GRADIENTS: grad_fn names the last recorded operation. backward() follows the record to its start.
def compute_gradients(model, sample):
    output = model(sample)
    print("Input: ", sample)
    print("Output:", output)
    output.backward()
    print("layer2.bias.grad =", model.layer2.bias.grad.item(), "(the bias is added to the output)")
    return sum(parameter.grad.numel() for parameter in model.parameters())


def main():
    torch.manual_seed(SEED)
    model = SimpleNeuralNetwork().to(DEVICE)
    print(model)
    parameters = count_parameters(model)
    sample = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    gradients = compute_gradients(model, sample)
    print(f"Result: parameters = {parameters}, gradients = {gradients}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="no effect: this lesson is short")
    parser.parse_args()
    main()
