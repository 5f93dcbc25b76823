"""What is untrue of the records: outputs, seeds, settings and predictions against the cards."""

import hashlib

import render
from claims import PREDICTIONS
from course import (
    PICTURES,
    broken_promises,
    capture_path,
    find_lessons,
    find_record,
    first_line,
    has_seed,
    hash_code,
    hash_work,
    name_of,
    read_card,
    read_constants,
    read_records,
)


def check_captures(lesson, records, root):
    """Return what is untrue of a lesson's recorded runs, on all machines."""
    name = name_of(lesson)
    untruths = []
    for record in records:
        machine = record["machine"]
        entry = record["lessons"].get(name)
        if not entry:
            continue
        if not capture_path(name, machine, root).exists():
            untruths.append(f"{name} has no recorded output")
            continue
        line, output = capture_path(name, machine, root).read_text(encoding="utf-8").split("\n", 1)
        if line != first_line(machine, entry):
            untruths.append(f"{name}: its recorded output and its record name other runs")
        if output.splitlines()[-1:] != [entry["result"]]:
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


def check_seeds(lesson, records):
    name = name_of(lesson)
    _, seeds = find_record("seeds", name, records)
    if not seeds:
        return [f"{name} has no record of five seeds"] if has_seed(lesson) else []
    untruths = []
    if len(seeds["results"]) < 5:
        untruths.append(f"{name} has no record of five seeds")
    if seeds["work"] != hash_work(lesson):
        untruths.append(f"{name} has changed since its five seeds were recorded")
    for seed, line in enumerate(seeds["results"]):
        for broken in broken_promises(read_card(lesson)["Expect"], line):
            untruths.append(f"{name}, seed {seed}: {broken}")
    return untruths


def check_settings(lesson, records):
    """Say so if other settings than the lesson's did best on the validation images."""
    _, chosen = find_record("settings", name_of(lesson), records)
    best = {key: value for key, value in chosen["best"].items() if key.isupper()} if chosen else {}
    if best.items() <= read_constants(lesson).items():
        return []
    return [f"{name_of(lesson)}: on the validation images, other settings were better: {best}"]


def check_predictions(records, root):
    untruths = []
    for name, edit, expect in PREDICTIONS:
        _, entry = find_record("predictions", name, records)
        if not entry or entry["edit"] != edit:
            untruths.append(f"{name}: {edit} has not been tried")
            continue
        if entry["work"] != hash_work(root / "src" / f"{name}.py"):
            untruths.append(f"{name} has changed since {edit} was tried")
        for broken in broken_promises(expect, entry["result"]):
            untruths.append(f"{name} with {edit}: {broken}")
    return untruths


def find_untruths(root):
    """Return a sentence for all that records, captures, cards and documents say and is not so."""
    untruths = []
    records = read_records(root)
    for lesson in find_lessons(root):
        if not find_record("lessons", name_of(lesson), records)[1]:
            untruths.append(f"{name_of(lesson)} has no recorded run")
        untruths += check_captures(lesson, records, root)
        untruths += check_seeds(lesson, records)
        untruths += check_settings(lesson, records)
    untruths += check_predictions(records, root)
    if any(" has no recorded " in text or "has not been tried" in text for text in untruths):
        return untruths  # the documents cannot be rendered
    return untruths + render.find_stale(root)
