"""Draw the README's explanations that no lesson draws: one idea each, with real numbers.

    uv run scripts/draw_pictures.py

They are saved in data/results/drawings/. Colors mean the same in every drawing: blue is data,
orange is what training changes, gray is fixed, green is a result. The background is white, so that
a drawing can be read on a dark page, too.
"""

import re
import textwrap
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "results" / "drawings"
OUTPUTS = ROOT / "tests" / "outputs"
DATA = "#4C8BE0"
TRAINED = "#F08C2E"
FIXED = "#9AA3AF"
RESULT = "#3FA66B"
INK = "#22272E"


# PARTS: a sheet measured in inches, boxes, arrows, and matrices.
class Sheet:
    def __init__(self, width, height):
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def write(self, x, y, text, size=11, color=INK, **options):
        options = {"ha": "center", "va": "center"} | options
        self.axes.text(x, y, text, fontsize=size, color=color, **options)

    def box(self, x, y, width, height, text, color, size=11):
        """Draw a box with its lower left corner at (x, y); return its four sides' middles."""
        shape = FancyBboxPatch(
            (x, y), width, height, "round,pad=0,rounding_size=0.08", ec=color, lw=1.6
        )
        shape.set_facecolor((*to_rgb(color), 0.22))
        self.axes.add_patch(shape)
        self.write(x + width / 2, y + height / 2, text, size)
        return {
            "left": (x, y + height / 2),
            "right": (x + width, y + height / 2),
            "top": (x + width / 2, y + height),
            "bottom": (x + width / 2, y),
        }

    def arrow(self, start, end, text="", bend=0.0, color=INK, lift=0.16):
        style = f"arc3,rad={bend}"
        self.axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                arrowstyle="-|>",
                mutation_scale=12,
                lw=1.4,
                color=color,
                shrinkA=2,
                shrinkB=2,
                connectionstyle=style,
            )
        )
        if text:
            middle_x = (start[0] + end[0]) / 2
            self.write(middle_x, (start[1] + end[1]) / 2 + lift, text, 9, color)

    def grid(self, x, y, numbers, color, size=0.5, form="{:g}", window=None):
        """Draw a matrix with its lower left corner at (x, y). A larger number is darker.

        window: (row, column, height, width) of a frame, in cells.
        """
        rows, columns = numbers.shape
        strongest = max(abs(numbers).max(), 1e-9)
        for row in range(rows):
            for column in range(columns):
                value = numbers[row, column]
                corner = (x + column * size, y + (rows - 1 - row) * size)
                shade = (*to_rgb(color), 0.08 + 0.72 * max(value, 0) / strongest)
                self.axes.add_patch(Rectangle(corner, size, size, fc=shade, ec="white", lw=1))
                middle = (corner[0] + size / 2, corner[1] + size / 2)
                self.write(*middle, form.format(value), 9)
        if window:
            row, column, height, width = window
            corner = (x + column * size, y + (rows - row - height) * size)
            frame = Rectangle(corner, width * size, height * size, fill=False, ec=INK, lw=2.5)
            self.axes.add_patch(frame)

    def words(self, x, y, words, color, width=0.95, height=0.42):
        """Draw a row of small boxes; return the sides of each."""
        places = enumerate(words)
        return [self.box(x + i * (width + 0.08), y, width, height, w, color, 10) for i, w in places]


# BASICS
def reshape():
    """basics/03: the same twelve numbers, grouped in two ways."""
    numbers = np.arange(12)
    sheet = Sheet(9.2, 2.5)
    sheet.grid(0.3, 0.45, numbers.reshape(3, 4), DATA)
    sheet.write(1.3, 2.2, "x, shape [3, 4]")
    sheet.arrow((2.5, 1.2), (3.4, 1.2), "reshape(2, 6)")
    sheet.grid(3.6, 0.7, numbers.reshape(2, 6), DATA)
    sheet.write(5.1, 2.2, "shape [2, 6]: same order")
    sheet.grid(7.4, 0.3, numbers.reshape(3, 4).T, DATA, size=0.42)
    sheet.write(8.03, 2.2, "x.T: other order")
    return sheet


def broadcasting():
    """basics/04: a row is added to every row of a matrix."""
    matrix = np.array([[1, 2, 3], [4, 5, 6]])
    row = np.array([[10, 20, 30]])
    sheet = Sheet(8.4, 2.1)
    sheet.grid(0.3, 0.5, matrix, DATA)
    sheet.write(1.05, 1.8, "[2, 3]")
    sheet.write(2.2, 1.0, "+", 16)
    sheet.grid(2.6, 1.0, row, TRAINED)
    for column in range(3):
        corner = (2.6 + column * 0.5, 0.5)
        sheet.axes.add_patch(Rectangle(corner, 0.5, 0.5, fill=False, ec=TRAINED, ls=":", lw=1.3))
    sheet.write(3.35, 1.8, "[3], used for both rows")
    sheet.write(4.6, 1.0, "=", 16)
    sheet.grid(5.0, 0.5, matrix + row, RESULT)
    sheet.write(5.75, 1.8, "[2, 3]")
    return sheet


def neuron():
    """basics/05: one neuron: multiply, add up, apply the activation function."""
    sheet = Sheet(8.4, 2.7)
    total = sheet.box(4.0, 0.9, 1.5, 0.9, "0.7 + 0.1\n= 0.8", RESULT)
    for number, (value, weight) in enumerate(((2.0, 0.5), (1.0, -0.3))):
        y = 1.8 - number * 1.4
        source = sheet.box(0.3, y, 1.2, 0.6, f"x{number + 1} = {value:g}", DATA)
        product = sheet.box(2.1, y, 1.2, 0.6, f"x {weight:g}", TRAINED)
        sheet.arrow(source["right"], product["left"])
        sheet.arrow(product["right"], total["left"], f"{value * weight:g}", lift=0.2)
    bias = sheet.box(4.15, 2.05, 1.2, 0.5, "bias = 0.1", TRAINED, 10)
    sheet.arrow(bias["bottom"], total["top"])
    relu = sheet.box(6.1, 0.9, 1.0, 0.9, "ReLU", FIXED)
    sheet.arrow(total["right"], relu["left"])
    sheet.arrow(relu["right"], (7.9, 1.35), "0.8")
    sheet.write(4.2, 0.25, "2 x 0.5 - 1 x 0.3 = 0.7; orange numbers are learned", 9)
    return sheet


def forward_and_backward():
    """basics/06: the forward pass computes the loss, the backward pass the gradients."""
    sheet = Sheet(9.2, 2.8)
    x = sheet.box(0.2, 1.2, 1.0, 0.8, "x = 3", DATA)
    w = sheet.box(2.2, 1.2, 1.5, 0.8, "w = 1.5", TRAINED)
    y = sheet.box(4.7, 1.2, 1.5, 0.8, "w x = 4.5", RESULT)
    loss = sheet.box(7.2, 1.2, 1.7, 0.8, "loss\n(4.5 - 7)² = 6.25", RESULT, 10)
    for start, end in ((x, w), (w, y), (y, loss)):
        sheet.arrow(start["right"], end["left"])
    sheet.write(4.6, 2.5, "forward pass: from the input to the loss (the target is 7)")
    sheet.arrow(loss["bottom"], y["bottom"], "2 (4.5 - 7) = -5", -0.35, TRAINED, -0.72)
    sheet.arrow(y["bottom"], w["bottom"], "-5 x 3 = -15", -0.35, TRAINED, -0.72)
    sheet.write(2.5, 0.14, "backward pass: the gradient of the loss for w", color=TRAINED)
    return sheet


def gradient_descent():
    """basics/06: each step goes downhill; the gradient is the slope."""
    figure = Figure(figsize=(8.4, 2.8), layout="constrained")
    w = np.linspace(-0.4, 4.4, 200)
    for axes, rate in zip(figure.subplots(1, 3, sharey=True), (0.02, 0.06, 0.115), strict=True):
        axes.plot(w, 9 * (w - 2) ** 2, color=FIXED)
        path = [0.0]
        for _ in range(8):
            path.append(path[-1] - rate * 18 * (path[-1] - 2))
        axes.plot(path, 9 * (np.array(path) - 2) ** 2, "o-", color=TRAINED, ms=4)
        axes.set(title=f"learning rate {rate:g}", xlabel="w", ylim=(-2, 55))
    figure.axes[0].set_ylabel("loss 9 (w - 2)²")
    return figure


# INTERMEDIATE
def convolution():
    """intermediate/02: one filter slides over an image and gives one number per position."""
    image = np.zeros((6, 6), int)
    image[1:5, 3] = 1  # a vertical stroke
    image[1, 2] = 1
    kernel = np.array([[-1, 2, -1]] * 3)
    output = np.zeros((4, 4), int)
    for row in range(4):
        for column in range(4):
            output[row, column] = (image[row : row + 3, column : column + 3] * kernel).sum()
    sheet = Sheet(9.6, 3.9)
    sheet.grid(0.2, 0.4, image, DATA, window=(2, 2, 3, 3))
    sheet.write(1.7, 3.6, "image, 6 x 6")
    sheet.grid(4.1, 1.15, kernel, TRAINED)
    sheet.write(4.85, 2.9, "filter, 3 x 3: learned")
    sheet.arrow((5.8, 1.9), (6.9, 1.9), "multiply,\nadd up", lift=0.3)
    sheet.grid(7.1, 0.9, output, RESULT, window=(2, 2, 1, 1))
    sheet.write(8.1, 3.15, "output, 4 x 4")
    sheet.write(5.0, 0.4, "framed: 2 x 1 + 2 x 1 + 2 x 1 = 6\nsame 9 weights at every place", 9)
    return sheet


def splits():
    """intermediate/03: what each part of the data is for."""
    sheet = Sheet(9.0, 1.9)
    sheet.box(0.2, 0.7, 5.4, 0.8, "training set\nlearn weights", DATA)
    sheet.box(5.7, 0.7, 1.5, 0.8, "validation\nchoose", TRAINED, 10)
    sheet.box(7.3, 0.7, 1.5, 0.8, "test set\nonce", RESULT, 10)
    sheet.write(4.5, 0.3, "50,000, 10,000 and 10,000 images of MNIST; no image is in two parts", 9)
    return sheet


# ADVANCED
def transfer():
    """advanced/01: the old layers are frozen, so their outputs are computed once."""
    sheet = Sheet(9.2, 2.3)
    images = sheet.box(0.2, 0.8, 1.2, 0.9, "images", DATA)
    frozen = sheet.box(2.0, 0.8, 2.6, 0.9, "conv1, conv2, fc1\nfrozen: 51,488", FIXED)
    features = sheet.box(5.2, 0.8, 1.5, 0.9, "features\n[N, 64]", RESULT)
    head = sheet.box(7.4, 0.8, 1.6, 0.9, "new fc2\n64 x 5 + 5 = 325", TRAINED, 10)
    sheet.arrow(images["right"], frozen["left"])
    sheet.arrow(frozen["right"], features["left"])
    sheet.arrow(features["right"], head["left"])
    sheet.write(3.3, 0.35, "computed once, and kept", 9)
    sheet.write(8.2, 0.35, "trained in every epoch", 9, TRAINED)
    return sheet


def quantization():
    """advanced/02: float32 weights become 8-bit integers and one scale."""
    weights = np.array([[0.42, -1.27, 0.05, 0.88]])
    scale = abs(weights).max() / 127
    sheet = Sheet(9.2, 2.3)
    sheet.grid(0.3, 0.9, weights, TRAINED, size=0.7, form="{:.2f}")
    sheet.write(1.7, 1.95, "float32: 4 x 4 bytes")
    sheet.arrow((3.3, 1.25), (4.3, 1.25), f"/ {scale:.2f}")
    sheet.grid(4.5, 0.9, (weights / scale).round(), FIXED, size=0.7, form="{:.0f}")
    sheet.write(5.9, 1.95, "int8: 4 x 1 byte, and one scale")
    sheet.write(8.3, 1.25, "each weight is off\nby half a step\nat the most", 10)
    sheet.write(4.6, 0.4, f"scale = 1.27 / 127 = {scale:.2f}; weight = integer x scale", 9)
    return sheet


def asynchronous():
    """advanced/05: a GPU call returns before the work is done."""
    sheet = Sheet(9.2, 2.5)
    sheet.write(0.6, 1.75, "Python")
    sheet.write(0.6, 0.95, "GPU")
    for number in range(3):
        sheet.box(1.2 + number * 0.55, 1.55, 0.5, 0.4, "call", DATA, 9)
        sheet.box(1.5 + number * 2.2, 0.75, 2.1, 0.4, f"work {number + 1}", TRAINED, 9)
    sheet.box(2.95, 1.55, 5.15, 0.4, "synchronize: waits", FIXED, 9)
    sheet.arrow((2.85, 0.35), (2.85, 1.5))
    sheet.write(2.85, 0.2, "a clock read here shows the calls only", 9)
    sheet.arrow((8.15, 0.35), (8.15, 1.5))
    sheet.write(8.0, 0.2, "read it here", 9)
    sheet.write(4.6, 2.25, "time goes to the right", 9)
    return sheet


def training_memory():
    """advanced/06: 16 bytes for each parameter with Adam in float32, and the activations."""
    sheet = Sheet(9.2, 2.2)
    parts = (("weights", FIXED), ("gradients", TRAINED), ("Adam: mean", DATA), ("square", DATA))
    for number, (name, color) in enumerate(parts):
        sheet.box(0.2 + number * 1.4, 0.85, 1.35, 0.8, f"{name}\n4 bytes", color, 10)
    sheet.box(5.85, 0.85, 3.1, 0.8, "activations\ngrow with the batch", RESULT, 10)
    sheet.write(3.0, 1.95, "for each parameter: 16 bytes", 10)
    sheet.write(
        4.6, 0.4, "7 billion parameters x 16 bytes = 112 GB before the first image or token", 9
    )
    return sheet


def all_reduce():
    """advanced/10: every process ends with the mean of all gradients."""
    sheet = Sheet(9.2, 2.9)
    middle = sheet.box(3.9, 1.0, 1.5, 0.9, "all-reduce:\nmean", FIXED)
    gradients = ((2.0, 4.0), (6.0, 0.0))
    for number, gradient in enumerate(gradients):
        y = 1.85 - number * 1.6
        process = sheet.box(0.2, y, 2.9, 0.8, f"process {number}: {gradient}", TRAINED, 10)
        result = sheet.box(6.2, y, 2.8, 0.8, f"process {number}: (4.0, 2.0)", RESULT, 10)
        sheet.arrow(process["right"], middle["left"])
        sheet.arrow(middle["right"], result["left"])
    sheet.write(1.65, 1.45, "own part of the batch,\nown gradients", 9)
    sheet.write(7.6, 1.45, "same gradients,\nsame step, same weights", 9)
    return sheet


# LANGUAGE MODELS
def byte_pairs():
    """llm/09: merges join the most frequent pair, again and again."""
    sheet = Sheet(8.8, 2.9)
    rows = (("l o w e s t", "bytes"), ("l o w es t", "merge e + s"), ("l o w est", "merge es + t"))
    rows += (("lo w est", "merge l + o"), ("low est", "merge lo + w"))
    for number, (pieces, reason) in enumerate(rows):
        y = 2.35 - number * 0.53
        color = RESULT if number == len(rows) - 1 else DATA
        sheet.write(0.2, y + 0.2, reason, 10, ha="left")
        x = 2.2
        for piece in pieces.split():
            width = 0.45 * len(piece) + 0.15
            sheet.box(x, y, width, 0.42, piece, color)
            x += width + 0.12
    sheet.write(7.3, 1.3, "two tokens: low, est\nboth are in other words:\nlower, newest", 10)
    return sheet


def attention():
    """llm/02: the query of one word is compared with the keys of the words before it."""
    words = ["the", "cat", "sat", "down"]
    scores = np.array([0.6, 2.4, 1.1, 0.5])
    weights = np.exp(scores) / np.exp(scores).sum()
    sheet = Sheet(9.2, 3.6)
    query = sheet.box(6.9, 3.05, 2.0, 0.45, "query of 'down'", TRAINED, 10)
    for number, word in enumerate(words):
        x = 0.3 + number * 1.6
        sheet.box(x, 2.2, 1.4, 0.42, f"key: {word}", DATA, 10)
        sheet.write(x + 0.7, 1.8, f"q . k = {scores[number]:.1f}", 9)
        sheet.box(x, 1.1, 1.4, 0.42, f"{weights[number]:.2f}", RESULT, 10)
        sheet.box(x, 0.3, 1.4, 0.42, f"value: {word}", DATA, 10)
        sheet.write(x + 0.7, 0.91, "x", 10)
    sheet.arrow(query["left"], (0.9, 2.7), bend=0.12)
    sheet.write(7.9, 1.8, "softmax:", 10)
    sheet.write(7.9, 1.3, "weights add up to 1", 10)
    sheet.write(7.9, 0.5, "add up: the\nnew vector of 'down'", 10, RESULT)
    return sheet


def block():
    """llm/03: a transformer block: attention, then an MLP, each added to what came in."""
    sheet = Sheet(9.2, 2.7)
    places = {}
    parts = (("layer\nnorm", FIXED), ("attention", TRAINED), ("+", RESULT))
    parts += (("layer\nnorm", FIXED), ("MLP", TRAINED), ("+", RESULT))
    x = 0.9
    for number, (name, color) in enumerate(parts):
        width = 0.5 if name == "+" else 1.15
        places[number] = sheet.box(x, 0.8, width, 0.8, name, color, 10)
        x += width + 0.35
    sheet.arrow((0.1, 1.2), places[0]["left"])
    for number in range(5):
        sheet.arrow(places[number]["right"], places[number + 1]["left"])
    sheet.arrow(places[5]["right"], (x + 0.2, 1.2))
    sheet.arrow((0.5, 1.2), places[2]["top"], "residual connection", -0.35, RESULT, 0.95)
    sheet.arrow((4.55, 1.2), places[5]["top"], "residual connection", -0.35, RESULT, 0.95)
    sheet.write(4.5, 0.35, "in and out: [tokens, width]; so blocks can be stacked", 9)
    return sheet


def shifted_targets():
    """llm/04: the target of each token is the next one."""
    sheet = Sheet(8.8, 2.3)
    words = ["the", "cat", "sat", "on", "the", "mat"]
    top = sheet.words(1.7, 1.5, words[:-1], DATA)
    bottom = sheet.words(1.7, 0.5, words[1:], RESULT)
    sheet.write(0.8, 1.7, "input")
    sheet.write(0.8, 0.7, "target")
    for source, target in zip(top, bottom, strict=True):
        sheet.arrow(source["bottom"], target["top"])
    sheet.write(4.3, 0.2, "five predictions from one text of six tokens", 9)
    return sheet


def temperature():
    """llm/06: a low temperature sharpens the probabilities, a high one flattens them."""
    words = ["Paris", "the", "a", "not", "blue"]
    logits = np.array([5.0, 3.5, 3.0, 2.0, 0.5])
    figure = Figure(figsize=(8.4, 2.4), layout="constrained")
    for axes, value in zip(figure.subplots(1, 3, sharey=True), (0.5, 1.0, 2.0), strict=True):
        odds = np.exp(logits / value)
        axes.bar(words, odds / odds.sum(), color=RESULT)
        axes.set(title=f"temperature {value:g}", ylim=(0, 1))
    figure.axes[0].set_ylabel("probability")
    return figure


def lora():
    """llm/07: W stays frozen; only A and B are trained."""
    sheet = Sheet(8.8, 3.3)
    x = sheet.box(0.2, 1.25, 1.1, 0.8, "x\n[576]", DATA)
    big = sheet.box(2.4, 1.9, 3.8, 1.2, "W  [576 x 576]: frozen\n331,776 numbers", FIXED)
    down = sheet.box(2.4, 0.25, 1.4, 0.9, "A  [8 x 576]\n4,608", TRAINED)
    up = sheet.box(4.8, 0.25, 1.4, 0.9, "B  [576 x 8]\n4,608", TRAINED)
    out = sheet.box(7.0, 1.15, 1.6, 1.0, "add both:\nW x + s B A x", RESULT)
    sheet.arrow(x["right"], big["left"])
    sheet.arrow(x["right"], down["left"])
    sheet.arrow(down["right"], up["left"], "8 numbers")
    sheet.arrow(big["right"], out["left"])
    sheet.arrow(up["right"], out["left"])
    sheet.write(4.3, 1.5, "s is a fixed scale; 9,216 trained numbers", 9)
    return sheet


def kv_cache():
    """llm/10: keys and values of earlier tokens are kept; only the new token is computed."""
    sheet = Sheet(9.2, 2.5)
    words = ["the", "cat", "sat", "down"]
    for row, name in enumerate(("keys", "values")):
        y = 1.5 - row * 0.65
        sheet.write(0.7, y + 0.2, name)
        sheet.words(1.4, y, words[:3], FIXED)
        sheet.words(1.4 + 3 * 1.03, y, words[3:], TRAINED)
    sheet.write(2.9, 2.2, "kept in the cache", 10)
    sheet.write(5.0, 2.2, "new", 10, TRAINED)
    sheet.arrow((5.6, 1.4), (6.6, 1.4))
    sheet.box(6.7, 1.0, 2.2, 0.8, "next token: one row\nof attention, not four", RESULT, 10)
    sheet.write(4.6, 0.35, "without a cache, every step computes all rows again", 9)
    return sheet


def terminal():
    """llm/13: two questions to your own model, and what Ollama answered in the recorded run."""
    output = (OUTPUTS / "llm" / "13_your_model_in_ollama.txt").read_text(encoding="utf-8")
    answers = re.findall(r"^(.+)\n  PyTorch: .*\n  Ollama:  ['\"](.*)['\"]$", output, re.MULTILINE)
    sheet = Sheet(5.4, 3.4)  # small, with large letters: it is also on the README's first screen
    sheet.axes.add_patch(Rectangle((0, 0), 5.4, 3.4, fc="#1E2329"))
    y = 3.15
    style = {"ha": "left", "va": "top", "family": "monospace"}
    for question, answer in answers[:2]:
        command = f'$ ollama run my-tutor "{question}"'
        for text, color in ((command, "#8FD3A8"), (answer, "#F2F4F7")):
            lines = textwrap.wrap(text, 42)
            sheet.write(0.25, y, "\n".join(lines), 11, color, **style)
            y -= 0.25 * len(lines) + 0.12
        y -= 0.16
    return sheet


DRAWINGS = {
    "basics-03_reshape": reshape,
    "basics-04_broadcasting": broadcasting,
    "basics-05_neuron": neuron,
    "basics-06_forward_and_backward": forward_and_backward,
    "basics-06_gradient_descent": gradient_descent,
    "intermediate-02_convolution": convolution,
    "intermediate-04_splits": splits,
    "advanced-01_transfer": transfer,
    "advanced-02_quantization": quantization,
    "advanced-05_asynchronous": asynchronous,
    "advanced-06_training_memory": training_memory,
    "advanced-10_all_reduce": all_reduce,
    "llm-02_attention": attention,
    "llm-03_block": block,
    "llm-04_shifted_targets": shifted_targets,
    "llm-06_temperature": temperature,
    "llm-07_lora": lora,
    "llm-09_byte_pairs": byte_pairs,
    "llm-10_kv_cache": kv_cache,
    "llm-13_terminal": terminal,
}


def main(folder=FOLDER):
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "course"}):
        for name, draw in DRAWINGS.items():
            drawing = draw()
            figure = drawing.figure if isinstance(drawing, Sheet) else drawing
            figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main()
