"""Each mistake of ``tests/mistakes.py`` ends in the text that ``docs/troubleshooting.md`` shows."""

from __future__ import annotations

import pytest

from tests.mistakes import MISTAKES, PAGE, row, told

SHOWN = PAGE.read_text(encoding="utf-8").splitlines()
CLASSES = {
    "EscapedParameterError", "NotPerSampleError", "PrivacyBudgetError", "RuntimeError", "TypeError",
    "UnaccountedBatchError", "UnclippedGradientError", "ValueError",
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_the_page_shows_what_a_user_sees(what: str) -> None:
    kind, text = told(what)
    assert kind in CLASSES
    assert len(text) < 520, text  # a sentence of what is wrong and one or two of what to do
    assert row(what) in SHOWN, row(what)


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 60
    assert sum(line.count("` | ") for line in SHOWN if line.startswith("| ")) >= 60
