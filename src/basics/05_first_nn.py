"""A first network: numbers in, a number out, and a record of how it came about.

Run:    uv run src/basics/05_first_nn.py
Needs:  nothing
Makes:  nothing
Expect: parameters = 41, gradients = 41

A network is layers of matrix products. While it computes, PyTorch writes down every step, and can
later walk back through the record and tell each parameter how the output would react to changing it.
"""

import argparse

import torch
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
INPUTS, NEURONS, OUTPUTS, SEED = 3, 8, 1, 42


# MODEL: two layers; nn.Linear holds a weight matrix and a bias for each neuron.
class SimpleNeuralNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(INPUTS, NEURONS)
        self.layer2 = nn.Linear(NEURONS, OUTPUTS)

    def forward(self, x):  # [3]
        return self.layer2(self.layer1(x))  # [8] -> [1]


# PARAMETERS: what training will adjust.
def count_parameters(model):
    for name, parameter in model.named_parameters():
        print(f"  {name:14} {tuple(parameter.shape)!s:7} {parameter.numel():3} numbers")
    return sum(parameter.numel() for parameter in model.parameters())


# AUTOGRAD: grad_fn is the last entry of the record; backward() walks it to the start.
def show_autograd(output, model):
    print("Output: ", output)
    print("Made by:", output.grad_fn.name())
    output.backward()
    print("layer2.bias.grad =", model.layer2.bias.grad.item(), "(the bias is added to the output)")
    return sum(parameter.grad.numel() for parameter in model.parameters())


def main():
    torch.manual_seed(SEED)
    model = SimpleNeuralNetwork().to(DEVICE)
    print(model)
    parameters = count_parameters(model)
    sample = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    print("Input:  ", sample)
    gradients = show_autograd(model(sample), model)
    print(f"Result: parameters = {parameters}, gradients = {gradients}")


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="changes nothing: this lesson is instant")
    cli.parse_args()
    main()
