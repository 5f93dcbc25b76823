"""Draw a digit: draw it on a page in the browser, and watch the network read every stroke.

Run:    uv run src/advanced/13_draw_a_digit.py
Needs:  models/mnist_cnn.pth
Makes:  nothing
Expect: drawings = 10, read_right >= 8

The page shows what the network really sees: not your drawing, but the 28 x 28 image that is made
of it. A network that reads 99 of 100 test images fails if this image is bad, or its shape is rare.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is sent anywhere
os.environ["no_proxy"] = "127.0.0.1"  # the page is on this computer

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

try:
    import gradio
    from gradio_client import Client, handle_file
except ImportError:  # main says how to install it
    gradio = None

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
SIDE = 20  # the longer side of a digit, in pixels
SHEET = 280  # the side of the sheet to draw on
PEN = 12
INVITATION = "Draw a digit from 0 to 9."


# MODEL AND PREPARATION: as in intermediate/02 and advanced/03.
class CNN(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x):  # [N, 1, 28, 28]
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [N, 8, 14, 14]
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 16, 7, 7]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 16, 7, 7] -> [N, 784] -> [N, 64]
        return self.fc2(x)  # [N, 10], a logit (a score before softmax) per digit


def load(model, path, lesson):
    try:
        model.load_state_dict(torch.load(path, map_location=DEVICE, weights_only=True))
    except Exception as error:  # no such file, or it does not hold this network's weights
        sys.exit(f"Cannot load {path} ({type(error).__name__}). Make it with: uv run {lesson}")
    return model.eval()


def resize(image, factor):
    """Return an image [1, 1, H, W] in another size."""
    size = [max(1, round(factor * side)) for side in image.shape[2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


def find_paper(image):
    """Return the brightness of the paper: what is dark and narrow, such as a stroke, is filled."""
    reach = max(1, max(image.shape) // 6)
    wide = F.pad(image, [2 * reach] * 4, mode="replicate")  # the paper continues
    lightest = F.max_pool2d(wide, 2 * reach + 1, stride=1)
    return -F.max_pool2d(-lightest, 2 * reach + 1, stride=1)


def fit(gray):
    """Return gray values [H, W] as an image [28, 28] that looks like MNIST: ink 1, paper 0."""
    low, high = gray.min(), gray.max()
    if not high - low > 0.05 * max(abs(low), abs(high)):  # also if a value is not a number
        raise ValueError("it is blank")
    page = torch.from_numpy((gray - low) / (high - low)).float()[None, None]  # [1, 1, H, W]
    small = resize(page, min(1, 40 / max(page.shape)))  # to look for paper and ink
    reach = max(small.shape) // 3
    lightest = F.max_pool2d(small, 2 * reach + 1, stride=1, padding=reach)  # around each pixel
    darkest = -F.max_pool2d(-small, 2 * reach + 1, stride=1, padding=reach)
    darkness = lightest + darkest - 2 * small  # above 0: more like the darkest than the lightest
    if darkness.sum() > darkness[..., 1:-1, 1:-1].sum():  # the border is dark: so is the paper
        page = 1 - page
        small = 1 - small
    paper = find_paper(small).clamp(min=0.1)  # with its shadows
    around = F.avg_pool2d(1 - small / paper, 3, stride=1, padding=1)
    digit = around > 0.2 * around.max()  # a speck has little ink around it
    inked = digit.any(dim=2).nonzero()[:, -1]  # the columns with ink
    if (inked.diff() > 1 + 0.1 * digit.any(dim=3).sum()).any():  # a gap: 10% of the height
        raise ValueError("it seems to show several digits, and the network reads one")
    paper = F.interpolate(paper, page.shape[2:], mode="bilinear")
    ink = (1 - page / paper).clamp(min=0) * F.interpolate(digit.float(), page.shape[2:])
    rows, columns = (ink[0, 0] > 0.4 * ink.max()).nonzero(as_tuple=True)
    ink = ink[..., rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    ink = resize(ink, SIDE / max(ink.shape))[0, 0]
    ink = (ink / ink[ink > 0].quantile(0.9)).clamp(max=1)  # a thin pen has become pale
    height, width = ink.shape
    top = 14 - ink.sum(dim=1) @ torch.arange(height).float() / ink.sum()
    left = 14 - ink.sum(dim=0) @ torch.arange(width).float() / ink.sum()
    top = round(top.clamp(0, 28 - height).item())  # the center of mass comes to the middle
    left = round(left.clamp(0, 28 - width).item())
    return F.pad(ink, (left, 28 - width - left, top, 28 - height - top))


# READ: what the page shows after each stroke.
@torch.inference_mode()
def read(model, drawing):
    """Return a sentence, ten probabilities, what the network sees, and where its filters fire."""
    if drawing["composite"] is None:  # the sheet was cleared
        return INVITATION, None, None, None
    sheet = drawing["composite"] / 255  # [H, W, 4]: red, green, blue and opacity
    try:
        image = fit((1 - sheet[..., 0]) * sheet[..., 3])  # black and opaque: ink
    except ValueError as error:
        return f"Nothing to read: {error}.", None, None, None
    x = image[None, None].to(DEVICE)  # [28, 28] -> [1, 1, 28, 28]
    probabilities = model(x)[0].softmax(dim=0).tolist()
    digit = probabilities.index(max(probabilities))
    sentence = f"The network reads {digit}, with a probability of {probabilities[digit]:.2%}."
    fired = F.relu(model.conv1(x))[0]  # [8, 28, 28]: one image for each filter
    top = torch.cat([*fired[:4]], dim=1)  # four images side by side
    bottom = torch.cat([*fired[4:]], dim=1)
    fired = torch.cat([top, bottom])  # [56, 112]
    labels = {str(number): value for number, value in enumerate(probabilities)}
    return sentence, labels, enlarge(image), enlarge(fired / fired.max())


def enlarge(values):
    """Return values from 0 to 1 as a gray image: each becomes 8 x 8 pixels."""
    return np.kron(255 * values.cpu().numpy(), np.ones((8, 8))).astype(np.uint8)


# PAGE: gradio turns a function into a page in the browser, and into an API.
# This JavaScript chooses the brush as soon as the page has one, so that the first stroke draws.
CHOOSE_BRUSH = """() => {
    const timer = setInterval(() => {
        const brush = document.querySelector('button[aria-label="Brush"]');
        if (brush) { brush.click(); clearInterval(timer); }
    }, 100);
}"""


def open_page(model, port=None):
    """Serve the page on this computer alone; return the page and its address."""
    brush = gradio.Brush(default_size=PEN, colors=["#000000"], color_mode="fixed")
    with gradio.Blocks(title="Draw a digit") as page:
        sentence = gradio.Markdown(INVITATION)
        with gradio.Row():
            size = {"canvas_size": (SHEET, SHEET), "min_width": 400}
            sheet = gradio.Sketchpad(brush=brush, show_label=False, **size)
            with gradio.Column():
                seen = gradio.Image(label="What the network sees: 28 x 28", buttons=[], height=250)
                fired = gradio.Image(label="Where its eight filters fire", buttons=[], height=200)
            answer = gradio.Label(label="Ten probabilities", num_top_classes=10)
        outputs = [sentence, answer, seen, fired]
        sheet.change(partial(read, model), sheet, outputs, api_name="read", show_progress="hidden")
        page.load(None, js=CHOOSE_BRUSH)
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")  # no fonts of the web
    options = {"theme": theme, "quiet": True, "prevent_thread_lock": True}
    try:
        _, url, _ = page.launch(server_name="127.0.0.1", server_port=port, **options)
    except (OSError, OverflowError):
        sys.exit(f"Port {port} is taken or not allowed. Without --port, a free one is found.")
    return page, url


def ask(client, digit):
    """Print a digit on a sheet, and ask the page as a program would; return its answer."""
    sheet = Image.new("RGBA", (SHEET, SHEET))
    ImageDraw.Draw(sheet).text((80, 20), str(digit), "black", font_size=200)
    with tempfile.TemporaryDirectory() as folder:
        sheet.save(f"{folder}/sheet.png")
        drawing = {"background": None, "layers": []}
        drawing["composite"] = handle_file(f"{folder}/sheet.png")
        sentence, answer, *_ = client.predict(drawing, api_name="/read")
    print(f"A printed {digit}: {sentence}")
    return int(answer["label"])


def main(quick=False, port=None):
    if gradio is None:
        sys.exit("This page needs gradio. Install it with: python -m pip install gradio")
    path = ROOT / ("models/quick" if quick else "models") / "mnist_cnn.pth"
    lesson = "src/intermediate/02_cnn.py" + (" --quick" if quick else "")
    page, url = open_page(load(CNN().to(DEVICE), path, lesson), port)
    client = Client(url, verbose=False)
    digits = [3] if quick else range(10)
    right = sum(ask(client, digit) == digit for digit in digits)
    print(f"Result: drawings = {len(digits)}, read_right = {right}")
    if quick or not sys.stdout.isatty():
        print("The page closes: this is a short test, or not a terminal.", file=sys.stderr)
    else:
        print(f"Open {url} in your browser, and draw. Ctrl-C closes the page.")
        page.block_thread()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ask about one drawing, and end")
    parser.add_argument("--port", type=int, help="the page's port (the first free from 7860 on)")
    arguments = parser.parse_args()
    try:
        main(arguments.quick, arguments.port)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
