"""Training: let a network find the rule y = 2x + 1 from five points.

Run:    uv run src/basics/06_training.py
Needs:  nothing
Makes:  nothing
Expect: at_6 = 13.00, at_7 = 15.00, at_10 = 21.00, parameters = 25

Training repeats five steps: predict, measure the error, clear the old gradients, compute new ones,
and change each parameter a little, so that the error shrinks. Nobody tells the network the rule.
"""

import argparse

import torch
from torch import nn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
EPOCHS = 1000  # an epoch uses each point once
LEARNING_RATE = 0.01  # how far each step moves
SEED = 42


# MODEL: one number in, eight neurons, one number out.
class LinearNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(1, 8)
        self.layer2 = nn.Linear(8, 1)

    def forward(self, x):  # [N, 1]
        return self.layer2(self.layer1(x))  # [N, 8] -> [N, 1]


# TRAIN: these five steps are the same for every network in this course.
def train(model, x, y, epochs):
    loss_function = nn.MSELoss()  # the mean of the squared errors
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for epoch in range(epochs):
        prediction = model(x)  # 1. forward pass: predict
        loss = loss_function(prediction, y)  # 2. measure the error
        optimizer.zero_grad()  # 3. clear the old gradients, because new ones are added to them
        loss.backward()  # 4. backward pass: compute the gradient of each parameter
        optimizer.step()  # 5. move each parameter a little against its gradient
        if epoch % 200 == 0:
            print(f"Epoch {epoch:4d} | Loss: {loss.item():.4f}")


# EVALUATE: three new inputs. inference_mode records nothing, which saves time and memory.
@torch.inference_mode()
def evaluate(model):
    inputs = torch.tensor([[6.0], [7.0], [10.0]], device=DEVICE)
    predictions = model(inputs).flatten().tolist()
    for x, prediction in zip([6, 7, 10], predictions, strict=True):
        print(f"  x = {x}: predicted {prediction:.2f}, expected {2 * x + 1}")
    # Two linear layers are one: W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2).
    slope = model.layer2.weight @ model.layer1.weight
    offset = model.layer2.weight @ model.layer1.bias + model.layer2.bias
    print(f"Together, the layers compute y = {slope.item():.2f}x + {offset.item():.2f}")
    return predictions


def main(quick=False):
    torch.manual_seed(SEED)
    model = LinearNet().to(DEVICE)
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], device=DEVICE)  # [5, 1]
    train(model, x, 2 * x + 1, epochs=200 if quick else EPOCHS)
    at_6, at_7, at_10 = evaluate(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    predictions = f"at_6 = {at_6:.2f}, at_7 = {at_7:.2f}, at_10 = {at_10:.2f}"
    print(f"Result: {predictions}, parameters = {parameters}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test: 200 epochs")
    arguments = parser.parse_args()
    main(arguments.quick)
