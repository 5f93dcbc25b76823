"""Kinds of pictures of a digit, a hundred each, as people draw, photograph and print them.

    uv run tests/drawings.py        how many of each kind are read right, and pictures of the others

The kinds, their ranges and their seeds were fixed before the function that prepares pictures was
written. They are made from MNIST's test images, and from the digits of fonts. All ranges are
uniform, and sizes are in pixels. A sheet has 400 x 400.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager, get_data_path
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torchvision import datasets

ROOT = Path(__file__).resolve().parents[1]
SHEET = 400
COUNT = 100
PAPER = 235
INK = 40
FONT_FILES = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"]
FONT_FILES += ["DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral"]
FONT_FILES += ["STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10"]
FAMILIES = ("Liberation", "Arial", "Helvetica", "Times", "Courier", "Verdana", "Georgia", "Ubuntu")


# STROKES: a digit's ink on a sheet, from 0 to 1.
def cut_out(digit):
    rows = np.flatnonzero(digit.max(axis=1) > 60)
    columns = np.flatnonzero(digit.max(axis=0) > 60)
    return digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def enlarge(digit, longest):
    """Return the cut out digit with sharp edges, its longer side as given."""
    image = Image.fromarray(cut_out(digit))
    factor = longest / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size]
    values = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    return ((values - 0.35) * 4 + 0.5).clip(0, 1)


def lay(ink, rng):
    """Put the ink at any place of a sheet."""
    sheet = np.zeros((SHEET, SHEET), np.float32)
    row = rng.integers(SHEET - ink.shape[0] + 1)
    column = rng.integers(SHEET - ink.shape[1] + 1)
    sheet[row : row + ink.shape[0], column : column + ink.shape[1]] = ink
    return sheet


def strokes(digit, rng, low=150, high=250):
    return lay(enlarge(digit, rng.uniform(low, high)), rng)


def turned(digit, rng):
    ink = np.pad(enlarge(digit, rng.uniform(150, 240)), 2)
    image = Image.fromarray((255 * ink).astype(np.uint8))
    image = image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
    return lay(np.asarray(image, np.float32) / 255, rng)


def on_paper(ink, paper=PAPER, dark=INK):
    return paper + (dark - paper) * ink


def picture(values):
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def thin(ink):
    """Return the skeleton of a stroke, one pixel wide (Zhang and Suen 1984)."""
    ink = np.pad(ink, 1).astype(np.uint8)
    changed = True
    while changed:
        changed = False
        for first in (True, False):
            ring = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
            p = np.stack([np.roll(ink, (-row, -column), (0, 1)) for row, column in ring])
            neighbors = p.sum(axis=0)
            starts = ((p == 0) & (np.roll(p, -1, 0) == 1)).sum(axis=0)
            if first:
                free = (p[0] * p[2] * p[4] == 0) & (p[2] * p[4] * p[6] == 0)
            else:
                free = (p[0] * p[2] * p[6] == 0) & (p[0] * p[4] * p[6] == 0)
            away = (ink == 1) & (neighbors >= 2) & (neighbors <= 6) & (starts == 1) & free
            ink[away] = 0
            changed = changed or away.any()
    return ink[1:-1, 1:-1]


def pen(digit, rng, low, high):
    """Draw the middle line of the digit's strokes again, with another pen."""
    width = rng.uniform(low, high)
    longest = rng.uniform(200, 320)
    points = np.argwhere(thin(enlarge(digit, 72) > 0.5))
    places = {tuple(point) for point in points.tolist()}
    extent = np.ptp(points, axis=0)
    factor = longest / max(extent.max(), 1)
    free = SHEET - width - extent * factor
    start = width / 2 + rng.uniform(0, 1, 2) * free - points.min(axis=0) * factor
    fine = 2
    image = Image.new("L", (fine * SHEET, fine * SHEET))
    draw = ImageDraw.Draw(image)
    radius = fine * width / 2
    for row, column in places:
        y, x = fine * (start + factor * np.array([row, column]))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        for other in ((row, column + 1), (row + 1, column), (row + 1, column + 1)):
            if other in places:
                end = fine * (start + factor * np.array(other))
                draw.line((x, y, end[1], end[0]), 255, max(1, round(2 * radius)))
        other = (row + 1, column - 1)
        if other in places:
            end = fine * (start + factor * np.array(other))
            draw.line((x, y, end[1], end[0]), 255, max(1, round(2 * radius)))
    ink = image.resize((SHEET, SHEET), Image.Resampling.BOX)
    return picture(on_paper(np.asarray(ink, np.float32) / 255))


# LIGHT AND PAPER: what multiplies or covers the sheet.
def shade(rng):
    """Return a shadow with a soft, straight edge."""
    angle = rng.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SHEET, :SHEET] - rng.uniform(120, 280, (2, 1, 1))
    distance = np.cos(angle) * rows + np.sin(angle) * columns
    depth = (distance / rng.uniform(10, 60) + 0.5).clip(0, 1)
    return 1 - rng.uniform(0.25, 0.6) * depth


def corner(rng):
    """Return light that fades toward one corner."""
    rows, columns = np.mgrid[:SHEET, :SHEET] - SHEET * rng.integers(0, 2, (2, 1, 1))
    near = (1 - np.hypot(rows, columns) / rng.uniform(200, 450)).clip(0, 1)
    return 1 - rng.uniform(0.4, 0.75) * near


def ruled(rng):
    """Return paper with lines, or squares, each 15 to 45% as dark as the ink."""
    sheet = np.full((SHEET, SHEET), float(PAPER))
    step = rng.uniform(25, 50)
    width = rng.integers(1, 4)
    dark = PAPER - rng.uniform(0.15, 0.45) * (PAPER - INK)
    squares = rng.random() < 0.5
    for start in np.arange(rng.uniform(0, step), SHEET, step).astype(int):
        sheet[start : start + width] = dark
        if squares:
            sheet[:, start : start + width] = dark
    return sheet


def add_specks(ink, rng):
    """Add 1 to 5 specks as dark as the ink, at least 20 pixels away from the digit."""
    rows, columns = np.mgrid[:SHEET, :SHEET]
    places = np.argwhere(ink > 0.5)
    left = rng.integers(1, 6)
    specks = np.zeros_like(ink)
    while left:
        place = rng.integers(5, SHEET - 5, 2)
        radius = rng.uniform(1, 5)
        if np.abs(places - place).max(axis=1).min() > 20 + radius:
            specks[np.hypot(rows - place[0], columns - place[1]) <= radius] = 1
            left -= 1
    return np.maximum(ink, specks)


def as_file(image, suffix, **options):
    """Return (suffix, content): what a person would save."""
    content = io.BytesIO()
    image.save(content, suffix, **options)
    return suffix, content.getvalue()


def photo(digit, rng):
    """Everything at once: turned, ruled, a shadow or a dark corner, a color, noise, JPEG."""
    ink = turned(digit, rng)
    paper = ruled(rng) if rng.random() < 0.5 else np.full((SHEET, SHEET), float(PAPER))
    light = shade(rng) if rng.random() < 0.5 else corner(rng)
    values = on_paper(ink, paper) * light
    colors = values[..., None] * rng.uniform(0.8, 1, 3)
    colors += rng.normal(0, rng.uniform(2, 10), (SHEET, SHEET, 1))
    return as_file(picture(colors), "jpeg", quality=int(rng.integers(40, 90)))


def any_paper(digit, rng):
    """Light or dark paper, any ink on it that differs by at least 60 of 255 gray values."""
    grays = rng.uniform(0, 255, 2)
    while abs(grays[0] - grays[1]) < 60:
        grays = rng.uniform(0, 255, 2)
    return picture(on_paper(strokes(digit, rng), *grays))


def in_a_corner(digit, rng):
    part = cut_out(digit)
    canvas = np.zeros((28, 28), np.uint8)
    row = (28 - part.shape[0]) * rng.integers(0, 2)
    column = (28 - part.shape[1]) * rng.integers(0, 2)
    canvas[row : row + part.shape[0], column : column + part.shape[1]] = part
    return Image.fromarray(255 - canvas)


def filling(digit, rng):
    image = Image.fromarray(cut_out(digit))
    size = [max(1, round(side * 28 / max(image.size))) for side in image.size]
    canvas = Image.new("L", (28, 28))
    image = image.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(image, ((28 - size[0]) // 2, (28 - size[1]) // 2))
    return Image.fromarray(255 - np.asarray(canvas))


def jpeg(digit, rng):
    image = picture(on_paper(strokes(digit, rng)))
    return as_file(image, "jpeg", quality=int(rng.integers(10, 41)))


def held_sideways(digit, rng):
    turn, tag = ((180, 3), (90, 6), (270, 8))[rng.integers(3)]
    exif = Image.Exif()
    exif[0x0112] = tag
    image = picture(on_paper(strokes(digit, rng))).rotate(turn, expand=True)
    return as_file(image, "jpeg", quality=90, exif=exif)


def transparent(digit, rng):
    """Ink of any color on nothing; what lies below the nothing is black or white."""
    opacity = strokes(digit, rng)
    values = np.full((SHEET, SHEET, 4), 255 * rng.integers(0, 2), np.float32)
    values[opacity > 0, :3] = rng.uniform(0, 255, 3)
    values[..., 3] = 255 * opacity
    return as_file(picture(values), "png")


def printed(files, rng, number):
    font = ImageFont.truetype(str(files[rng.integers(len(files))]), int(rng.integers(150, 350)))
    image = Image.new("L", (2 * SHEET, 2 * SHEET))
    ImageDraw.Draw(image).text((100, 100), str(number), 255, font)
    ink = np.asarray(image.crop(image.getbbox()), np.float32)[:SHEET, :SHEET] / 255
    return picture(on_paper(lay(ink, rng)))


KINDS = {  # name: (how to draw it, how many percent must be read right)
    "as MNIST has it, black on white": (lambda d, r: Image.fromarray(255 - d), 95),
    "28 x 28, in a corner": (in_a_corner, 95),
    "28 x 28, enlarged until it fills them": (filling, 95),
    "any place, 150 to 250 large": (lambda d, r: picture(on_paper(strokes(d, r))), 95),
    "any size from 40 to 400": (lambda d, r: picture(on_paper(strokes(d, r, 40, 400))), 95),
    "turned by up to 15 degrees": (lambda d, r: picture(on_paper(turned(d, r))), 95),
    "light or dark paper, any ink": (any_paper, 95),
    "a shadow": (lambda d, r: picture(on_paper(strokes(d, r)) * shade(r)), 95),
    "a dark corner": (lambda d, r: picture(on_paper(strokes(d, r)) * corner(r)), 95),
    "ruled or squared paper": (lambda d, r: picture(on_paper(strokes(d, r), ruled(r))), 95),
    "1 to 5 specks": (lambda d, r: picture(on_paper(add_specks(strokes(d, r), r))), 95),
    "JPEG of quality 10 to 40": (jpeg, 95),
    "a camera held sideways (EXIF)": (held_sideways, 95),
    "ink of any color on nothing": (transparent, 95),
    "a photo: all of these at once": (photo, 95),
    "a pen of 2 to 5 pixels": (lambda d, r: pen(d, r, 2, 5), 85),
    "a pen of 5 to 15 pixels": (lambda d, r: pen(d, r, 5, 15), 85),
    "a pen of 15 to 40 pixels": (lambda d, r: pen(d, r, 15, 40), 85),
    "the fonts of matplotlib": ("bundled", 85),
    "fonts of this machine": ("installed", 85),
}


def find_fonts(which):
    if which == "bundled":
        return [Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf" for name in FONT_FILES]
    files = sorted(font_manager.findSystemFonts())
    return [file for file in files if Path(file).name.startswith(FAMILIES)]


def make_pictures(kind, root=ROOT, seed=0):
    """Return a hundred pictures of a kind and their labels; none if the machine has no font."""
    how = KINDS[kind][0]
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    if isinstance(how, str):
        files = find_fonts(how)
        labels = [number % 10 for number in range(COUNT if files else 0)]
        return [printed(files, rng, label) for label in labels], labels
    test = datasets.MNIST(root / "data", train=False)
    chosen = rng.choice(len(test.data), COUNT, replace=False)
    return [how(digit, rng) for digit in test.data[chosen].numpy()], test.targets[chosen].tolist()


def read(pipeline, pictures):
    """Return the pipeline's answer to each picture; files are read as files."""
    with tempfile.TemporaryDirectory() as folder:
        images = []
        for number, image in enumerate(pictures):
            if isinstance(image, tuple):
                path = Path(folder) / f"{number}.{image[0]}"
                path.write_bytes(image[1])
                image = path
            images.append(image)
        return [result["digit"] for result in pipeline.predict_batch(images)]


def show_failures(failures, path):
    """Save pictures that are read wrong, each beside what the network sees of it."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    cells = figure.subplots(4, 8)
    for axes in cells.flat:
        axes.axis("off")
    for number, (image, seen, label, answer) in enumerate(failures[:16]):
        row, column = divmod(number, 4)
        cells[row, 2 * column].imshow(image, cmap="gray", vmin=0, vmax=255)
        cells[row, 2 * column].set_title(f"a {label}", fontsize=9)
        cells[row, 2 * column + 1].imshow(seen, cmap="gray", vmin=0, vmax=1)
        cells[row, 2 * column + 1].set_title(f"read as {answer}", fontsize=9)
    figure.savefig(path, dpi=80)


def as_image(image):
    """Return a picture as a person would see it, on white."""
    if isinstance(image, tuple):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(image[1])))
    image = image.convert("RGBA")
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    return page.convert("RGB")


def main():
    from conftest import load_lesson

    lesson = load_lesson("advanced/03_inference_pipeline")
    pipeline = lesson.MNISTInferencePipeline(ROOT / "models" / "mnist_cnn.pth")
    failures = []
    print("| Kind | Read right, of 100 | Needed |\n|---|---|---|")
    for kind, (_, least) in KINDS.items():
        pictures, labels = make_pictures(kind)
        answers = read(pipeline, pictures)
        print(f"| {kind} | {sum(np.equal(answers, labels))} | {least} |", flush=True)
        wrong = [
            place for place in range(len(labels)) if answers[place] not in (labels[place], None)
        ]
        for place in wrong[:2]:
            image = as_image(pictures[place])
            seen = lesson.fit(lesson.to_gray(image))
            failures.append((image, seen, labels[place], answers[place]))
    show_failures(failures[-16:], ROOT / "data/results/pictures/advanced-13_failures.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
