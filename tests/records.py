"""What is untrue of the records: outputs, seeds, settings and predictions against the cards."""

import hashlib

import render
from claims import PREDICTIONS
from course import PICTURES, broken_promises, capture_path, find_lessons, last_line, read_records


def check_capture(lesson, entry, root):
    """Return what is untrue of a lesson's recorded run."""
    name = lesson.name
    capture = capture_path(name, root)
    if not capture.exists():
        return [f"{name} has no recorded output"]
    untruths = []
    output = capture.read_text(encoding="utf-8")
    if last_line(output) != entry["result"]:
        untruths.append(f"{name}: its recorded output and its record have other results")
    if entry["code"] != lesson.hash_code():
        untruths.append(f"{name} has changed since its output was recorded")
    for broken in broken_promises(lesson.card["Expect"], output):
        untruths.append(f"{name}, recorded output: {broken}")
    for picture, digits in entry["pictures"].items():
        file = root / PICTURES / picture
        if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest()[:8] != digits:
            untruths.append(f"{name}: {picture} is not the recorded picture")
    return untruths


def check_seeds(lesson, seeds):
    name = lesson.name
    if len(seeds["results"]) < 5:
        return [f"{name} has no record of five seeds"] if lesson.has_seed() else []
    untruths = []
    if seeds["work"] != lesson.hash_work():
        untruths.append(f"{name} has changed since its five seeds were recorded")
    for seed, line in enumerate(seeds["results"]):
        for broken in broken_promises(lesson.card["Expect"], line):
            untruths.append(f"{name}, seed {seed}: {broken}")
    return untruths


def check_settings(lesson, chosen):
    """Say so if other settings than the lesson's did best on the validation images."""
    best = {key: value for key, value in chosen["best"].items() if key.isupper()}
    if best.items() <= lesson.constants().items():
        return []
    return [f"{lesson.name}: on the validation images, other settings were better: {best}"]


def check_predictions(records, lessons):
    untruths = []
    for name, edit, expect in PREDICTIONS:
        entry = records["predictions"].get(name, {"edit": None})
        if entry["edit"] != edit:
            untruths.append(f"{name}: {edit} has not been tried")
            continue
        if entry["work"] != lessons[name].hash_work():
            untruths.append(f"{name} has changed since {edit} was tried")
        for broken in broken_promises(expect, entry["result"]):
            untruths.append(f"{name} with {edit}: {broken}")
    return untruths


def find_untruths(root):
    """Return a sentence for all that records, captures, cards and documents say and is not so."""
    records = read_records(root)
    lessons = find_lessons(root)
    captures = [path.relative_to(root / "tests/outputs") for path in root.glob("tests/outputs/*/*")]
    kept = {path.with_suffix("").as_posix() for path in captures}.union(*records.values())
    untruths = [f"{name} is recorded, but there is no such lesson" for name in kept - set(lessons)]
    for name, lesson in lessons.items():
        if name in records["lessons"]:
            untruths += check_capture(lesson, records["lessons"][name], root)
        else:
            untruths.append(f"{name} has no recorded run")
        untruths += check_seeds(lesson, records["seeds"].get(name, {"results": []}))
        untruths += check_settings(lesson, records["settings"].get(name, {"best": {}}))
    untruths += check_predictions(records, lessons)
    if any(" has no recorded " in text or "has not been tried" in text for text in untruths):
        return untruths  # the documents cannot be rendered
    return untruths + render.find_stale(root)
