"""Every lesson but those on language models, as a short test, in the order of the course."""

import pytest
from conftest import LESSONS
from smoke import check_quick_run, masked


@pytest.mark.parametrize("name", [name for name in LESSONS if not name.startswith("llm/")])
def test_quick_run_prints_the_recorded_words(course, name):
    check_quick_run(course, name)


def test_masking_hides_numbers_but_no_words():
    assert masked("Loss: 0.41\nLoss: 0.32\n") == masked("Loss: 7\n")
    assert masked("Loss: 0.41\n") != masked("Error: 0.41\n")
