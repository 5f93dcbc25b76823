"""What was recorded, and whether the cards and the documents agree with it.

A lesson's card promises; a capture under tests/outputs/ shows what a full run printed; one file for
each machine under data/results/ keeps the figures. From them the documents are rendered.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEVELS = ["basics", "intermediate", "advanced", "llm"]
DOCUMENTS = ["README.md", "CHEATSHEET.md", "models/README.md"]
PICTURE = "data/results/course.svg"
CLAIMS = [  # what the notes report: in words, in their number, and where this course measures it
    ("y = 2x + 1 at x = 10", "21.00", "basics/06_training", "at_10"),
    ("two clusters, training points", "100 %", "basics/08_classifier", "train_accuracy"),
    ("MNIST, flat network", "97.59 %", "basics/09_mnist", "test_accuracy"),
    ("its parameters", "109,386", "basics/09_mnist", "parameters"),
    ("MNIST, CNN with half the parameters", "98.79 %", "intermediate/02_cnn", "test_accuracy"),
    ("its parameters", "52,138", "intermediate/02_cnn", "parameters"),
    ("20 coin tosses, test", "58 %", "intermediate/03_overfitting_dropout", "noise_test"),
    ("200 samples of a rule, test", "97.80 %", "intermediate/03_overfitting_dropout", "rule_test"),
    ("retrained for digits 0 to 4", "99.77 %", "advanced/01_transfer_learning", "test_accuracy"),
    ("parameters retrained", "650", "advanced/01_transfer_learning", "trainable"),
    ("TorchScript, one image", "1.40 x", "advanced/16_faster_or_not", "torchscript"),
    ("int8 file smaller by", "71 %", "advanced/02_model_optimization", "int8_smaller"),
    ("GPU against CPU, batch of 512", "86 x", "advanced/17_where_a_gpu_pays", "gpu_at_512"),
    ("parameters of a block of width 8", "776", "llm/03_transformer_block", "block"),
    ("parameters of GPT-2 small", "117 M", "llm/03_transformer_block", "gpt2_small"),
    ("parameters of MiniGPT", "25,103", "llm/04_mini_gpt", "parameters"),
    ("its loss", "0.16 to 0.28", "llm/04_mini_gpt", "loss"),
    (
        "trained by LoRA in GPT-2, rank 8 (0.24 %)",
        "294,912",
        "llm/07_finetune_lora",
        "gpt2_trainable",
    ),
    ("the same at rank 64", "2.4 M", "llm/11_lora_by_hand", "gpt2_rank_64"),
]
PREDICTIONS = [  # the lesson, what to change in it, and what its Result line must then say
    ("basics/05_first_nn", "NEURONS=16", "parameters = 81"),
    ("basics/06_training", "LEARNING_RATE=0.001", "at_10 >= 22"),
    ("basics/09_mnist", "LEARNING_RATE=0.1", "test_accuracy <= 90 %"),
    ("intermediate/02_cnn", "EPOCHS=1", "test_accuracy >= 98 %"),
    ("intermediate/03_overfitting_dropout", "DROPOUT=0.9", "dropout_train <= 98 %"),
    ("intermediate/04_lr_scheduler", "LEARNING_RATE=0.01", "worst_gain <= 1"),
    ("advanced/01_transfer_learning", "CLASSES=10", "trainable = 650"),
    ("advanced/03_inference_pipeline", "SIDE=28", "scan_accuracy <= 80 %"),
    ("advanced/07_profiling", "SMALL=64", "waits_before = 4"),
    ("advanced/12_memory_savings", "PARTS=8", "accumulation_kept <= 13 %"),
    ("llm/03_transformer_block", "DEPTH=2", "postnorm_loss <= 0.8"),
    ("llm/04_mini_gpt", "STEPS=100", "loss >= 0.3"),
    ("llm/07_finetune_lora", "LEARNING_RATE=2e-5", "held_out_gain <= 0.4"),
]
MARKER = re.compile(r"(<!-- (output|table|try) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


# CARDS
def find_lessons(root=ROOT):
    """Return every lesson's path, in the order of the course."""
    return [
        path for level in LEVELS for path in sorted((root / "src" / level).glob("[0-9][0-9]_*"))
    ]


def name_of(lesson):
    return f"{lesson.parent.name}/{lesson.stem}"


def read_card(lesson):
    """Return the card in a lesson's docstring: Title, Run, Needs, Makes and Expect."""
    text = ast.get_docstring(ast.parse(lesson.read_text(encoding="utf-8")))
    card = dict(re.findall(r"^(Run|Needs|Makes|Expect): +(.+)$", text, re.MULTILINE))
    return {"Title": text.splitlines()[0], **card}


def files_in(field):
    """Return the files that a card's Needs or Makes names."""
    return re.findall(r"models/[\w./]+", field)


def parse_number(text):
    """Read 98.5 %, 52,138 or 0.05 as a number; return any other text as it is."""
    plain = text.strip().replace(",", "").removesuffix("%").strip()
    return float(plain) if re.fullmatch(r"[-+]?\d+(\.\d+)?", plain) else text.strip()


def read_result(output):
    """Return the names and values of an output's last line, 'Result: name = value, ...'."""
    lines = output.strip().splitlines()
    if not lines or not lines[-1].startswith("Result: "):
        return {}
    return {
        name: parse_number(value)
        for name, value in (part.split(" = ") for part in lines[-1][8:].split(", "))
    }


def broken_promises(expect, output):
    """Return the predicates of a card's Expect that an output's Result line does not fulfil."""
    result, broken = read_result(output), []
    for promise in expect.split(", "):
        name, sign, wanted = promise.split(" ", 2)
        value, wanted = result.get(name), parse_number(wanted)
        comparable = isinstance(value, float) == isinstance(wanted, float) and value is not None
        if (
            not comparable
            or not {"=": value == wanted, ">=": value >= wanted, "<=": value <= wanted}[sign]
        ):
            broken.append(f"promised {promise}, got {value}")
    return broken


def read_constants(lesson):
    """Return the constants that a lesson's top lines set to plain values."""
    constants = {}
    for node in ast.parse(lesson.read_text(encoding="utf-8")).body:
        with contextlib.suppress(ValueError, AttributeError):  # no plain value, or no name
            target, value = node.targets[0], ast.literal_eval(node.value)
            several = isinstance(target, ast.Tuple)
            names = [name.id for name in target.elts] if several else [target.id]
            constants |= zip(names, value if several else [value], strict=True)
    return constants


def has_seed(lesson):
    """Say whether a lesson depends on one seed; one that has TRIALS repeats itself with several."""
    constants = read_constants(lesson)
    return "SEED" in constants and "TRIALS" not in constants


def hash_code(lesson):
    """Return eight digits that change with any change of a lesson."""
    return hashlib.sha256(lesson.read_bytes()).hexdigest()[:8]


def hash_work(lesson):
    """Return eight digits that change with a lesson's work, not with its comments and its words."""
    tree = ast.parse(lesson.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:8]


# MACHINES: what ran here, and where its records lie.
@functools.cache
def describe_gpu():
    import torch

    if torch.backends.mps.is_available():
        return "Apple GPU"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


@functools.cache
def describe_machine():
    """Return what a record says of this machine: in one line, the driver, and the versions."""
    import torch

    cpu, driver = platform.processor() or platform.machine(), None
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(
            r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text() + "model name: " + cpu
        )[1]
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, check=False, capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {describe_gpu()}",
        "driver": driver and driver.splitlines()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record_path(machine, root=ROOT):
    name = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")
    return root / "data" / "results" / f"{name}.json"


def read_records(root=ROOT):
    """Return all machines' records, those with a GPU first, as they take precedence."""
    files = sorted((root / "data" / "results").glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return sorted(records, key=lambda record: record["machine"].endswith("no GPU"))


def read_record(machine, root=ROOT):
    path = record_path(machine, root)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"machine": machine, "lessons": {}, "seeds": {}, "predictions": {}}


def write_record(record, root=ROOT):
    path = record_path(record["machine"], root)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def find_record(kind, name, records):
    """Return (machine, entry) of the first machine that has one of the kind for a lesson."""
    found = ((record["machine"], record.get(kind, {}).get(name)) for record in records)
    return next((pair for pair in found if pair[1]), (None, None))


def capture_path(name, machine, root=ROOT):
    kind = ".txt" if machine.endswith("no GPU") else ".gpu.txt"
    return root / "tests" / "outputs" / f"{name}{kind}"


def stamp(machine, entry):
    """Return the line on when, where and with what a record was made."""
    driver = f", driver {entry['driver']}" if entry["driver"] else ""
    versions = f"torch {entry['torch']}, Python {entry['python']}"
    return f"{entry['date']}, {machine}{driver}, {versions}"


def first_line(machine, entry):
    return f"{stamp(machine, entry)}, {entry['seconds']} s, code {entry['code']}"


def read_capture(name, root=ROOT, on_gpu=True):
    """Return a recorded run as (first line, output), the GPU's if there is one and it is wanted."""
    folder = root / "tests" / "outputs"
    files = [folder / f"{name}.gpu.txt"] if on_gpu else []
    file = next((file for file in files if file.exists()), folder / f"{name}.txt")
    line, output = file.read_text(encoding="utf-8").split("\n", 1)
    return line, output


# TABLES
def lessons_table(root, records):
    rows, total = ["| lesson | makes | result of the recorded run | took |", "|---|---|---|---|"], 0
    stamps = set()
    for lesson in find_lessons(root):
        card = read_card(lesson)
        machine, entry = find_record("lessons", name_of(lesson), records)
        stamps.add(stamp(machine, entry))
        total += entry["seconds"]
        makes = "<br>".join(f"`{file}`" for file in files_in(card["Makes"])) or "–"
        title = card["Title"].split(":")[0]
        title = f"[{title}](#{lesson.stem})<br>`{card['Run']}`"
        result = entry["result"].removeprefix("Result: ")
        rows.append(f"| {title} | {makes} | {result} | {entry['seconds']} s |")
    rows += [f"| all of them | | | {total / 60:.0f} min |", ""]
    return [*rows, *(f"<sub>{text}</sub>" for text in sorted(stamps))]


def start_table(root, records):
    """How long each level took, on each machine that has recorded all of it."""
    rows = ["| recorded on | " + " | ".join(LEVELS) + " | all |", "|---|" + "---|" * 5]
    for record in records:
        minutes = []
        for level in LEVELS:
            names = [
                name_of(lesson) for lesson in find_lessons(root) if lesson.parent.name == level
            ]
            entries = [record["lessons"].get(name) for name in names]
            minutes.append(sum(e["seconds"] for e in entries) / 60 if all(entries) else None)
        cells = ["–" if n is None else f"{n:.0f} min" for n in minutes]
        whole = "–" if None in minutes else f"{sum(minutes):.0f} min"
        rows.append(f"| {record['machine']} | {' | '.join(cells)} | {whole} |")
    return rows


def files_table(root, records):
    rows = ["| file | made by | needed by |", "|---|---|---|"]
    for file, (maker, users) in makers_and_users(root).items():
        users = [f"`{name_of(user)}`" for user in users]
        run = read_card(maker)["Run"]
        rows.append(f"| `{file}` | `{run}` | {', '.join(users) or '–'} |")
    return rows


def makers_and_users(root=ROOT):
    """Return {file: (the lesson that makes it, [the lessons that need it])}."""
    cards = {lesson: read_card(lesson) for lesson in find_lessons(root)}
    return {
        file: (maker, [user for user in cards if file in files_in(cards[user]["Needs"])])
        for maker in cards
        for file in files_in(cards[maker]["Makes"])
    }


def chain_table(root, records):
    """The files that lead from lesson to lesson, as a tree."""
    rows, handed_on = ["```text"], makers_and_users(root)
    makers = max((len(name_of(maker)) for maker, users in handed_on.values() if users), default=0)
    files = max((len(file) for file, (_, users) in handed_on.items() if users), default=0)
    for file, (maker, users) in handed_on.items():
        begin = f"{name_of(maker):{makers}} ── {file.removeprefix('models/'):{files - 7}} ──"
        for number, user in enumerate(users, 1):
            last = number == len(users)
            branch = ("─" if last else "┬") if number == 1 else ("└" if last else "├")
            rows.append(f"{begin if number == 1 else ' ' * len(begin)}{branch}─> {name_of(user)}")
    return [*rows, "```"]


def values(claim, entry, seeds):
    """Return how a claim's value was printed, the number, and those of the five seeds."""
    shown = re.search(rf"\b{claim[3]} = (.+?)(, |$)", entry["result"])[1]
    results = [read_result(line)[claim[3]] for line in (seeds or {"results": []})["results"]]
    return shown, parse_number(shown), results


def in_words(spread, decimals):
    """Write a value's mean over the seeds, its lowest and its highest."""
    if not spread:
        return "one run"
    mean, low, high = (
        f"{n:,.{decimals}f}" for n in (sum(spread) / len(spread), min(spread), max(spread))
    )
    return "always the same" if low == high else f"{mean} ({low} to {high})"


def holds(theirs, ours, spread):
    """Say whether a claim of the notes shows here; numbers are compared as the notes round them."""
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", theirs.replace(",", ""))]
    if not isinstance(ours, float):  # a 95 % interval, such as 1.07 to 1.48, or none
        low, _, high = ours.partition(" to ")
        if not high:
            return "not measured"
        return "within the interval" if float(low) <= numbers[0] <= float(high) else "does not hold"
    low, high = min([ours, *spread]), max([ours, *spread])
    if " to " in theirs:
        return "holds" if low <= numbers[1] else "does not hold"
    scale = 1e6 if theirs.endswith("M") else 1
    rounding = scale / 10 ** len(theirs.rstrip(" %Mx").partition(".")[2]) / 2
    if theirs.endswith("%") and "." in theirs:  # an accuracy: more is better
        return "reached" if high >= numbers[0] - rounding else "not reached"
    return "holds" if abs(ours - numbers[0] * scale) <= rounding else "does not hold"


def results_table(root, records):
    """What the notes report on their L4, beside the recorded run and the five seeds of each lesson."""
    rows = [
        "| | the notes (L4) | recorded run | five seeds: mean (lowest to highest) | the claim |",
        "|---|---|---|---|---|",
    ]
    stamps = set()
    for claim in CLAIMS:
        text, theirs, name, _ = claim
        machine, entry = find_record("lessons", name, records)
        place, seeds = find_record("seeds", name, records)
        shown, ours, spread = values(claim, entry, seeds)
        stamps |= {stamp(machine, entry)} | ({stamp(place, seeds)} if seeds else set())
        several = in_words(spread, len(shown.rstrip("%").partition(".")[2]))
        verdict = holds(theirs, ours, spread)
        rows.append(f"| {text}, `{name}` | {theirs} | {shown} | {several} | {verdict} |")
    return [*rows, "", *(f"<sub>Measured {text}</sub>" for text in sorted(stamps))]


TABLES = {
    "lessons": lessons_table,
    "minutes": start_table,
    "files": files_table,
    "chain": chain_table,
    "results": results_table,
}


def show_prediction(name, records):
    """One line: the command, what was predicted, and what the recorded try gave."""
    _, edit, expect = next(prediction for prediction in PREDICTIONS if prediction[0] == name)
    machine, entry = find_record("predictions", name, records)
    value = re.search(rf"\b{expect.split()[0]} = [^,]+", entry["result"])[0]
    command = f"uv run scripts/run_course.py try {name} --set {edit}"
    return f"`{command}` · predicted: `{expect}` · recorded: `{value}`\n<sub>{stamp(machine, entry)}</sub>"


def render(text, root=ROOT):
    """Return a document with each marked place filled from the records; nothing else changes."""
    records = read_records(root)

    def fill(match):
        start, kind, name, end = match.groups()
        if kind == "table":
            return "\n".join([start.rstrip("\n"), *TABLES[name](root, records), end])
        if kind == "try":
            return f"{start}{show_prediction(name, records)}\n{end}"
        _, output = read_capture(name, root)
        where = stamp(*find_record("lessons", name, records))
        return f"{start}```text\n{output.rstrip()}\n```\n<sub>Recorded {where}</sub>\n{end}"

    return MARKER.sub(fill, text)


# PICTURE
def draw_course(root=ROOT):
    """Return a figure: the time of each lesson, and the results beside the notes'."""
    from matplotlib.figure import Figure

    records = read_records(root)
    names = [name_of(lesson) for lesson in find_lessons(root)]
    seconds = [find_record("lessons", name, records)[1]["seconds"] for name in names]
    figure = Figure(figsize=(11, 8), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = [f"C{LEVELS.index(name.split('/')[0])}" for name in names]
    left.barh(names, seconds, color=colors)
    left.set(xlabel="seconds of the recorded run", xscale="log")
    left.invert_yaxis()
    left.margins(y=0.01)
    shown = []
    for claim in CLAIMS:
        theirs = parse_number(claim[1])
        if claim[1].endswith("%") and isinstance(theirs, float):
            entry = find_record("lessons", claim[2], records)[1]
            _, ours, spread = values(claim, entry, find_record("seeds", claim[2], records)[1])
            shown.append((claim[0], theirs, ours, spread or [ours]))
    rows = range(len(shown))
    right.plot([row[1] for row in shown], rows, "kx", label="the notes (L4)")
    right.plot([row[2] for row in shown], rows, "o", mfc="none", label="recorded run")
    right.hlines(rows, [min(row[3]) for row in shown], [max(row[3]) for row in shown], lw=3)
    right.set_yticks(rows, [row[0] for row in shown])
    right.set(xlabel="%, with the spread of five seeds")
    right.invert_yaxis()
    right.legend()
    return figure


def hash_records(root=ROOT):
    return hashlib.sha256(json.dumps(read_records(root)).encode()).hexdigest()[:16]


# CHECK
def check_captures(lesson, records, root):
    """Return what is untrue of a lesson's recorded runs, on whatever machines."""
    name, card, untruths = name_of(lesson), read_card(lesson), []
    for record in records:
        entry, path = record["lessons"].get(name), capture_path(name, record["machine"], root)
        if not entry:
            continue
        if not path.exists():
            untruths.append(f"{name} has no recorded output")
            continue
        line, output = path.read_text(encoding="utf-8").split("\n", 1)
        if line != first_line(record["machine"], entry):
            untruths.append(
                f"{name}: the recorded output does not say when and where, as its record"
            )
        if output.splitlines()[-1:] != [entry["result"]]:
            untruths.append(f"{name}: the recorded output and its record have other results")
        if entry["code"] != hash_code(lesson):
            untruths.append(f"{name} has changed since its output was recorded")
        for broken in broken_promises(card["Expect"], output):
            untruths.append(f"{name}, recorded output: {broken}")
    return untruths


def check_seeds(lesson, records):
    name, expect, untruths = name_of(lesson), read_card(lesson)["Expect"], []
    _, seeds = find_record("seeds", name, records)
    if has_seed(lesson) and (not seeds or len(seeds["results"]) < 5):
        untruths.append(f"{name} has no record of five seeds")
    if seeds and seeds["work"] != hash_work(lesson):
        untruths.append(f"{name} works otherwise than when its five seeds were recorded")
    for seed, line in enumerate(seeds["results"] if seeds else []):
        for broken in broken_promises(expect, line):
            untruths.append(f"{name}, seed {seed}: {broken}")
    return untruths


def check_settings(lesson, records):
    """Say so if the settings that did best on the images kept back are not the lesson's."""
    _, chosen = find_record("settings", name_of(lesson), records)
    best = {key: value for key, value in chosen["best"].items() if key.isupper()} if chosen else {}
    if best.items() <= read_constants(lesson).items():
        return []
    return [f"{name_of(lesson)}: on the images kept back, other settings were better: {best}"]


def check_predictions(records, root):
    untruths = []
    for name, edit, expect in PREDICTIONS:
        _, entry = find_record("predictions", name, records)
        if not entry or entry["edit"] != edit:
            untruths.append(f"{name}: nobody has tried {edit}")
            continue
        if entry["work"] != hash_work(root / "src" / f"{name}.py"):
            untruths.append(f"{name} works otherwise than when {edit} was tried")
        for broken in broken_promises(expect, entry["result"]):
            untruths.append(f"{name} with {edit}: {broken}")
    return untruths


def find_untruths(root=ROOT):
    """Return a sentence for everything that the documents, captures and cards say and is not so."""
    untruths, records = [], read_records(root)
    for lesson in find_lessons(root):
        if not find_record("lessons", name_of(lesson), records)[1]:
            untruths.append(f"{name_of(lesson)} has no recorded run")
        untruths += check_captures(lesson, records, root)
        untruths += check_seeds(lesson, records)
        untruths += check_settings(lesson, records)
    untruths += check_predictions(records, root)
    if any(" has no recorded " in text or "nobody has tried" in text for text in untruths):
        return untruths  # the documents cannot be rendered
    for document in DOCUMENTS:
        text = (root / document).read_text(encoding="utf-8")
        if render(text, root) != text:
            untruths.append(f"{document} differs from the records: run_course.py readme")
    picture = root / PICTURE
    if not picture.exists() or hash_records(root) not in picture.read_text(encoding="utf-8"):
        untruths.append(f"{PICTURE} differs from the records: run_course.py readme")
    return untruths
