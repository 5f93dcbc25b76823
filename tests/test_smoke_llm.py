"""Every lesson on language models, as a short test, in the order of the course."""

import pytest
from conftest import LESSONS
from smoke import check_quick_run


@pytest.mark.parametrize("name", [name for name in LESSONS if name.startswith("llm/")])
def test_quick_run_prints_the_recorded_words(course, name):
    check_quick_run(course, name)
