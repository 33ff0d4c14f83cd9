"""Each mistake of ``tests/mistakes.py`` ends in the text that ``docs/troubleshooting.md`` shows."""

from __future__ import annotations

import pytest

from tests.mistakes import MISTAKES, heading, row, sections, told

SHOWN = {heading(section): section.splitlines() for section in sections()}
CLASSES = {
    "EscapedParameterError", "NotPerSampleError", "PrivacyBudgetError", "RuntimeError", "TypeError",
    "UnaccountedBatchError", "UnclippedGradientError", "ValueError",
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_the_page_shows_what_a_user_sees(what: str) -> None:
    kind, text = told(what)
    assert kind in CLASSES
    assert len(text) < 520, text  # a sentence of what is wrong and one or two of what to do
    kind, line = row(what)
    assert line in SHOWN[kind], line


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 60
    shown = [line for kind in CLASSES for line in SHOWN[kind] if line.startswith("| ")]
    assert len(shown) - len(CLASSES) == len(MISTAKES)  # the headings of the tables, and the rows
