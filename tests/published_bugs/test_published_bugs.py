"""Each bug that another library had, planted here, is noticed; without it nothing is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.published_bugs import accounted
from tests.published_bugs.bugs import BUGS, Bug

assert accounted  # it adds its bugs to the list
CHECKS = {bug.check.__name__: bug.check for bug in BUGS}
PAGE = Path(__file__).parents[2] / "docs" / "published-bugs.md"


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_nothing_is_found_where_there_is_nothing(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_noticed(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    with pytest.raises(AssertionError):
        bug.check()


def test_the_page_lists_them_all() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    wanted = [f"| {bug.name} | {bug.where} | `{bug.check.__name__}` |" for bug in BUGS]
    assert rows == wanted
