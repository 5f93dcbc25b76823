"""Save and load: keep a trained network in a file, and go on with training after a stop.

Run:    uv run src/intermediate/01_save_load.py
Needs:  nothing
Makes:  models/simplenet.pth, models/simplenet_training.pth
Expect: reloaded_equal = True, resumed_equal = True, error_at_10 <= 0.05

A network's state_dict is a dictionary: it gives each of its tensors a name. If you load it into a
new network, you get the same predictions. To go on with training, you need the optimizer's, too.
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


# TRAIN: the five steps of basics/06.
def train(model, optimizer, steps):
    """Train, and return the loss of each step."""
    x = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], device=DEVICE)  # [5, 1]
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), 2 * x + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# SAVE: write a temporary file, then rename it. A crash never leaves half a checkpoint.
def save(state, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:  # an open file reports a full disk as OSError
            torch.save(state, file)
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


# PREDICT: one input to the left of the five points, and three to the right.
def predict(model):
    for x in (-10, 6, 7, 10):
        y = model(torch.tensor([float(x)], device=DEVICE)).item()
        print(f"  x = {x}: predicted {y:.2f}, expected {2 * x + 1}")
    return abs(y - 21)  # the error at x = 10, the last one


def main(quick=False, file=None):
    lesson = "src/intermediate/01_save_load.py" + (" --quick" if quick else "")
    if file:  # load and predict: all that another program needs
        predict(load(SimpleNet().to(DEVICE), file, lesson))
        return
    models = ROOT / ("models/quick" if quick else "models")
    torch.manual_seed(SEED)
    model = SimpleNet().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, 100)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 100}
    save(checkpoint, models / "simplenet_training.pth")
    losses = train(model, optimizer, STEPS - 100)

    # RESUME, as after a crash: a new network, a new optimizer, and the file.
    resumed = SimpleNet().to(DEVICE)
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.01)
    path = models / "simplenet_training.pth"
    checkpoint = torch.load(path, map_location=DEVICE, weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])  # Adam keeps two averages per weight
    resumed_losses = train(resumed, optimizer, STEPS - checkpoint["step"])
    print("Next losses without a stop:", losses[:3])
    print("Next losses when resumed:  ", resumed_losses[:3])

    save(model.state_dict(), models / "simplenet.pth")
    reloaded = load(SimpleNet().to(DEVICE), models / "simplenet.pth", lesson)
    error = predict(reloaded)
    weights = nn.utils.parameters_to_vector(model.parameters())  # all of them in one row
    same = torch.equal(weights, nn.utils.parameters_to_vector(reloaded.parameters()))
    equal = f"reloaded_equal = {same}, resumed_equal = {losses == resumed_losses}"
    print(f"Result: {equal}, error_at_10 = {error:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the same, saves to models/quick/")
    parser.add_argument("--load", type=Path, metavar="FILE", help="only load this file and predict")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.load)
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(f"Stopped: {error!r}. Finished files are unchanged.")
