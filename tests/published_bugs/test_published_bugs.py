"""Each bug that another library had, planted here, is noticed; without it nothing is."""

from __future__ import annotations

import pytest

from tests.published_bugs.bugs import BUGS, Bug

CHECKS = {bug.check.__name__: bug.check for bug in BUGS}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_nothing_is_found_where_there_is_nothing(check) -> None:
    check()


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_is_noticed(bug: Bug, monkeypatch: pytest.MonkeyPatch) -> None:
    bug.plant(monkeypatch)
    with pytest.raises(AssertionError):
        bug.check()
