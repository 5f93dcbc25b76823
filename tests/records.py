"""What is untrue of the records: outputs, seeds, settings and predictions against the cards."""

import hashlib

import render
from claims import PREDICTIONS
from course import (
    PICTURES,
    broken_promises,
    capture_path,
    find_lessons,
    has_seed,
    hash_code,
    hash_work,
    last_line,
    name_of,
    read_capture,
    read_card,
    read_constants,
    read_records,
)


def check_capture(lesson, entry, root):
    """Return what is untrue of a lesson's recorded run."""
    name = name_of(lesson)
    if not capture_path(name, root).exists():
        return [f"{name} has no recorded output"]
    untruths = []
    output = read_capture(name, root)
    if last_line(output) != entry["result"]:
        untruths.append(f"{name}: its recorded output and its record have other results")
    if entry["code"] != hash_code(lesson):
        untruths.append(f"{name} has changed since its output was recorded")
    for broken in broken_promises(read_card(lesson)["Expect"], output):
        untruths.append(f"{name}, recorded output: {broken}")
    for picture, digits in entry["pictures"].items():
        file = root / PICTURES / picture
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest()[:8] != digits:
            untruths.append(f"{name}: {picture} is not the recorded picture")
    return untruths


def check_seeds(lesson, seeds):
    name = name_of(lesson)
    if len(seeds["results"]) < 5:
        return [f"{name} has no record of five seeds"] if has_seed(lesson) else []
    untruths = []
    if seeds["work"] != hash_work(lesson):
        untruths.append(f"{name} has changed since its five seeds were recorded")
    for seed, line in enumerate(seeds["results"]):
        for broken in broken_promises(read_card(lesson)["Expect"], line):
            untruths.append(f"{name}, seed {seed}: {broken}")
    return untruths


def check_settings(lesson, chosen):
    """Say so if other settings than the lesson's did best on the validation images."""
    best = {key: value for key, value in chosen["best"].items() if key.isupper()}
    if best.items() <= read_constants(lesson).items():
        return []
    return [f"{name_of(lesson)}: on the validation images, other settings were better: {best}"]


def check_predictions(records, root):
    untruths = []
    for name, edit, expect in PREDICTIONS:
        entry = records["predictions"].get(name, {"edit": None})
        if entry["edit"] != edit:
            untruths.append(f"{name}: {edit} has not been tried")
            continue
        if entry["work"] != hash_work(root / "src" / f"{name}.py"):
            untruths.append(f"{name} has changed since {edit} was tried")
        for broken in broken_promises(expect, entry["result"]):
            untruths.append(f"{name} with {edit}: {broken}")
    return untruths


def find_untruths(root):
    """Return a sentence for all that records, captures, cards and documents say and is not so."""
    records = read_records(root)
    names = {name_of(lesson): lesson for lesson in find_lessons(root)}
    captures = [path.relative_to(root / "tests/outputs") for path in root.glob("tests/outputs/*/*")]
    kept = {path.with_suffix("").as_posix() for path in captures}.union(*records.values())
    untruths = [f"{name} is recorded, but there is no such lesson" for name in kept - set(names)]
    for name, lesson in names.items():
        if name in records["lessons"]:
            untruths += check_capture(lesson, records["lessons"][name], root)
        else:
            untruths.append(f"{name} has no recorded run")
        untruths += check_seeds(lesson, records["seeds"].get(name, {"results": []}))
        untruths += check_settings(lesson, records["settings"].get(name, {"best": {}}))
    untruths += check_predictions(records, root)
    if any(" has no recorded " in text or "has not been tried" in text for text in untruths):
        return untruths  # the documents cannot be rendered
    return untruths + render.find_stale(root)
