"""Save and load: keep a trained network in a file, and go on with training after a stop.

Run:    uv run src/intermediate/01_save_load.py
Needs:  nothing
Makes:  models/simplenet.pth, models/simplenet_training.pth
Expect: reloaded_equal = True, resumed_equal = True, error_at_10 <= 0.05

A state_dict is a dictionary with all numbers that an object has learned. If you load it into a new
network, you get the same predictions. To go on with training, you also need the optimizer's state.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
STEPS = 2000
SEED = 42


# MODEL: one number in, eight neurons with a ReLU, one number out.
class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(1, 8)
        self.layer2 = nn.Linear(8, 1)

    def forward(self, x):  # [N, 1]
        return self.layer2(torch.relu(self.layer1(x)))  # [N, 8] -> [N, 1]


# TRAIN: one object holds all that training needs to go on: weights, optimizer state and step.
class Training:
    def __init__(self):
        self.model = SimpleNet().to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.step = 0

    def state_dict(self):
        weights = self.model.state_dict()
        return {"model": weights, "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])  # Adam keeps two averages per weight
        self.step = state["step"]

    def run(self, steps):
        x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], device=DEVICE)  # [5, 1]
        losses = []
        while self.step < steps:
            loss = F.mse_loss(self.model(x), 2 * x + 1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.step += 1
            losses.append(loss.item())
        return losses


# SAVE: write a temporary file, then rename it. A crash never leaves half a checkpoint.
def save(model, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:  # an open file reports a full disk as OSError
            torch.save(model.state_dict(), file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(f"Saved {path.relative_to(ROOT).as_posix()}")


# LOAD: a file can contain code, too. weights_only=True refuses it before the code can run.
def load(model, path, lesson):
    try:
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    except Exception as error:  # no such file, or it does not hold this network's weights
        sys.exit(f"Cannot load {path} ({type(error).__name__}). Make it with: uv run {lesson}")
    return model.eval()


# PREDICT: one input far from the five points, and three near them.
def predict(model):
    for x in (-10, 6, 7, 10):
        y = model(torch.tensor([float(x)], device=DEVICE)).item()
        print(f"  x = {x}: predicted {y:.2f}, expected {2 * x + 1}")
    return abs(y - 21)  # the error at x = 10


def main(quick=False, file=None):
    lesson = "src/intermediate/01_save_load.py" + (" --quick" if quick else "")
    if file:  # load and predict: all that another program needs
        predict(load(SimpleNet().to(DEVICE), file, lesson))
        return
    models = ROOT / ("models/quick" if quick else "models")
    torch.manual_seed(SEED)
    training = Training()
    training.run(100)
    save(training, models / "simplenet_training.pth")
    losses = training.run(STEPS)
    resumed = Training()  # a new network and a new optimizer, as after a crash
    state = torch.load(models / "simplenet_training.pth", map_location=DEVICE, weights_only=True)
    resumed.load_state_dict(state)
    resumed_losses = resumed.run(STEPS)
    print("Next losses without a stop:", losses[:3])
    print("Next losses when resumed:  ", resumed_losses[:3])
    save(training.model, models / "simplenet.pth")
    reloaded = load(SimpleNet().to(DEVICE), models / "simplenet.pth", lesson)
    error = predict(reloaded)
    same = all(map(torch.equal, training.model.parameters(), reloaded.parameters()))
    equal = f"reloaded_equal = {same}, resumed_equal = {losses == resumed_losses}"
    print(f"Result: {equal}, error_at_10 = {error:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short test, saves to models/quick/")
    parser.add_argument("--load", type=Path, metavar="FILE", help="only load this file and predict")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.load)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
