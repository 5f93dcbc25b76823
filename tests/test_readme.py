"""The README as its reader meets it: short sentences, known words, pictures, and code that runs."""

import json
import re
import subprocess
import sys

import course
import draw_pictures
import pytest
from conftest import LESSONS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = (ROOT / "data" / "qa.jsonl").read_text(encoding="utf-8").splitlines()
TERMS = {json.loads(line)["term"].lower() for line in LINES}
SECTIONS = dict(
    re.findall(r'<a id="(\w+-\d\d)"></a>\n(### .*?)(?=\n<a id=|\n## )', README, re.DOTALL)
)


def prose(text):
    """Return a document's sentences: without code, tables, comments, headings and addresses."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->|</?(details|summary|sub)>|<a id=.*?></a>", " ", text)
    text = re.sub(r"!\[.*?\]\(.*?\)", "", text)
    text = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-\d|#])", text):
        if not re.match(r"\s*[|#]", paragraph) and "·" not in paragraph:
            paragraphs.append(" ".join(paragraph.replace("*", "").split()))
    return [one for text in paragraphs for one in re.split(r"(?<=[.?!:])\s+", text) if one]


def test_no_sentence_has_more_than_25_words():
    long = [sentence for sentence in prose(README) if len(sentence.split()) > 25]
    assert long == []


def test_at_most_twelve_thousand_words_are_in_sight():
    """All that is not folded counts: prose, tables, code and outputs. A symbol is not a word."""
    visible = re.sub(r"<details>.*?</details>|<!--.*?-->", "", README, flags=re.DOTALL)
    visible = re.sub(r"!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)", "", visible)
    assert len(re.findall(r"\S*\w\S*", visible)) <= 12_000


def test_no_line_begins_with_the_mark_of_a_value():
    """At the start of a line, a comment ends the paragraph, and the rest shows as plain text."""
    assert re.findall(r"(?m)^ *<!-- = .*", README) == []


def test_the_map_counts_every_lesson():
    counts = re.findall(r"(?m)^\| \[[\w ]+\]\(#[\w-]+\) \| .+ \| (\d+) \| [\d.]+ h \|", README)
    assert len(counts) == 5
    assert sum(map(int, counts)) == len(LESSONS)


def test_every_lesson_has_a_section_in_the_same_shape():
    for name in LESSONS:
        section = SECTIONS[name.partition("_")[0].replace("/", "-")]
        parts = [f"<!-- code {name} ", f"<!-- run {name}", "**What it shows.**", "**Try it.**"]
        places = [section.find(part) for part in parts]
        assert -1 not in places, (name, parts[places.index(-1)])
        assert places == sorted(places), name
        assert section.count("<details>") == section.count("</details>"), name


def test_bold_words_are_in_the_glossary():
    linked = re.findall(r"\*\*\[([^\]]+)\]\(#glossary\)\*\*", README)
    assert len(set(linked)) >= 30
    unknown = set()
    for words in linked:
        word = " ".join(words.lower().split())
        forms = {word, word.removesuffix("s"), word.removesuffix("es")}
        if not forms & TERMS:
            unknown.add(word)
    assert unknown == set()


def test_pictures_exist_and_say_what_they_show():
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", README, re.DOTALL)
    assert len({file for _, file in pictures}) >= 25
    for text, file in pictures:
        assert len(text.split()) >= 4, file
        assert (ROOT / file).stat().st_size < 300_000, file
    shown = {file for _, file in pictures}
    for lesson in LESSONS.values():
        for file in lesson.makes:
            if file.endswith(".png"):
                assert f"{course.PICTURES}/{file.split('/')[-1]}" in shown, file


def test_drawings_are_the_ones_that_the_script_draws(tmp_path):
    draw_pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in draw_pictures.FOLDER.iterdir()}
    for name in drawn:
        assert f"data/results/drawings/{name}" in README, f"{name} is not in the README"


SOLUTIONS = re.findall(r"<summary>Solution</summary>\s+```python\n(.*?)```", README, re.DOTALL)


def test_every_level_has_an_exercise():
    starts = [
        match.start() for match in re.finditer(r"^\*\*Write it yourself", README, re.MULTILINE)
    ]
    titles = ["Basics", "Intermediate", "Advanced", "Language models"]
    for title in titles:
        begin = README.index(f"\n## {title}\n")
        end = min(
            README.find(f"\n## {other}\n", begin + 1)
            for other in [*titles, "Glossary"]
            if README.find(f"\n## {other}\n", begin + 1) > 0
        )
        assert any(begin < start < end for start in starts), title


@pytest.mark.parametrize("number", range(len(SOLUTIONS)))
def test_a_solution_runs_and_checks_itself(tmp_path, number):
    assert "assert" in SOLUTIONS[number]
    (tmp_path / "solution.py").write_text(SOLUTIONS[number], encoding="utf-8")
    command = [sys.executable, tmp_path / "solution.py"]
    run = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
