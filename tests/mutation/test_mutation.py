"""These tests cover the choice of tests for a mutant, and the patch that makes it."""

from __future__ import annotations

import difflib

import pytest

from tests.mutation.judge import mutated
from tests.mutation.reach import lines_of_statement, reaching
from tests.mutation.sample import spans_without_effect

SOURCE = """\
LIMIT = 3

@decorated
def function(
    a=1,
):
    if (
        a
    ):
        first()
    else:
        second(
            a
        )
    try:
        third()
    except ValueError:
        raise
    return a
"""


@pytest.mark.parametrize(
    ("line", "first", "last"),
    [(1, 1, 20), (3, 7, 19), (5, 7, 19), (8, 7, 9), (10, 10, 10), (13, 12, 14), (17, 17, 17), (19, 19, 19)],
)  # fmt: skip
def test_lines_that_count_for_a_line(line: int, first: int, last: int) -> None:
    assert lines_of_statement(SOURCE, line) == range(first, last + 1)


def test_functions_alternate_and_the_fastest_tests_come_first() -> None:
    reach = {
        "tests": ["t.py::a[1]", "t.py::a[2]", "t.py::b", "t.py::c"],
        "seconds": [2.0, 1.0, 3.0, 0.5],
        "lines": {"file": {"10": [0, 1, 2], "19": [3]}},
    }
    assert reaching(SOURCE, "file", 10, reach) == [1, 2, 0]
    assert reaching(SOURCE, "file", 5, reach) == [3, 1, 2, 0]
    assert reaching(SOURCE, "file", 16, reach) == []
    assert reaching(SOURCE, "another", 10, reach) == []


def test_a_diff_is_applied_at_its_line() -> None:
    other = SOURCE.replace("LIMIT = 3", "LIMIT = 4").replace("return a", "return not a")
    lines = [text.splitlines(keepends=True) for text in (SOURCE, other)]
    diff = "".join(difflib.unified_diff(*lines, "a/x.py", "b/x.py"))
    assert mutated(SOURCE, diff) == other
    with pytest.raises(ValueError, match="changed"):
        mutated("\n" + SOURCE, diff)


@pytest.mark.parametrize(
    ("source", "dead"),
    [
        ("raise ValueError(1 + 1)", True),
        ("def f(x: int | None = 1): pass", True),
        ("f'{1 + 1}'", True),
        ("__all__ = ['a']", True),
        ("x = 1 + 1", False),
        ("if x > 1: y = 2", False),
    ],
)
def test_code_that_no_test_notices_is_not_changed(source: str, dead: bool) -> None:
    import ast

    assert bool(list(spans_without_effect(ast.parse(source)))) == dead
