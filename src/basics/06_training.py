"""Training: let a network find the rule y = 2x + 1 from five points.

Run:    uv run src/basics/06_training.py
Needs:  nothing
Makes:  nothing
Expect: at_6 = 13.00, at_7 = 15.00, at_10 = 21.00, parameters = 25

Guess, measure the error, trace the blame back, take a small step downhill, repeat. Nobody tells the
network the rule; the error alone leads it there.
"""

import argparse
import sys

import torch
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS, LEARNING_RATE, SEED = 1000, 0.01, 42


# DATA: five points on the line y = 2x + 1.
def make_points():
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], device=DEVICE)  # [5, 1]
    return x, 2 * x + 1


# MODEL: one number in, eight neurons, one number out.
class LinearNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(1, 8)
        self.layer2 = nn.Linear(8, 1)

    def forward(self, x):
        return self.layer2(self.layer1(x))


# TRAIN: the five steps that never change, whatever the network.
def train(model, x, y, epochs):
    loss_function = nn.MSELoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        prediction = model(x)  # 1. guess
        loss = loss_function(prediction, y)  # 2. measure the error
        optimizer.zero_grad()  # 3. forget the last step's gradients, which would add up
        loss.backward()  # 4. trace the blame back to every parameter
        optimizer.step()  # 5. move each parameter a little against its gradient
        if epoch % 200 == 0:
            print(f"Epoch {epoch:4d} | Loss: {loss.item():.4f}")


# EVALUATE: inputs that it never saw, and the reason why it gets them right. inference_mode keeps no
# record for gradients, which saves time and memory.
@torch.inference_mode()
def evaluate(model):
    inputs = [6.0, 7.0, 10.0]
    predictions = model(torch.tensor(inputs, device=DEVICE)[:, None]).flatten().tolist()
    for x, prediction in zip(inputs, predictions, strict=True):
        print(f"  x = {x:.0f}: predicted {prediction:.2f}, expected {2 * x + 1:.0f}")
    # Two linear layers in a row are one: W2(W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2).
    slope = model.layer2.weight @ model.layer1.weight
    offset = model.layer2.weight @ model.layer1.bias + model.layer2.bias
    print(f"Its 25 parameters boil down to y = {slope.item():.2f}x + {offset.item():.2f}")
    return predictions


def main(quick=False):
    torch.manual_seed(SEED)
    model = LinearNet().to(DEVICE)
    x, y = make_points()
    train(model, x, y, epochs=200 if quick else EPOCHS)
    at_6, at_7, at_10 = evaluate(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Result: at_6 = {at_6:.2f}, at_7 = {at_7:.2f}, at_10 = {at_10:.2f}, "
        f"parameters = {parameters}"
    )


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="smoke run: 200 epochs")
    try:
        main(**vars(cli.parse_args()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
