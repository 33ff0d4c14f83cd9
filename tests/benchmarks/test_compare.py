"""--compare: a worse ratio beyond the spread is found; a slower machine is not a regression."""

from __future__ import annotations

from benchmarks.compare import regressions
from benchmarks.records import Row
from tests.benchmarks.rows import cell, row


def run(ours: list[float], standard: list[float]) -> dict[str, Row]:
    found = row(cell("standard", "s", standard), cell("clipgrad", "c", ours))
    return {found.key: found}


QUIET = run([1.0, 1.01, 0.99, 1.0], [0.8, 0.8, 0.8, 0.8])


def test_a_worse_ratio_is_found() -> None:
    findings = regressions(QUIET, run([1.3, 1.31, 1.29, 1.3], [0.8] * 4))
    assert len(findings.worse) == 1
    assert not findings.same
    assert "cnn-small-32 c-batch: 80 %" in findings.worse[0]


def test_a_better_ratio_is_told_apart() -> None:
    assert len(regressions(QUIET, run([0.85] * 4, [0.8] * 4)).better) == 1


def test_a_slower_machine_is_no_regression() -> None:
    findings = regressions(QUIET, run([10.0, 10.1, 9.9, 10.0], [8.0] * 4))
    assert (len(findings.worse), len(findings.same)) == (0, 1)


def test_a_difference_within_the_spread_is_no_regression() -> None:
    noisy = run([0.9, 1.3, 1.0, 1.4], [0.8, 0.8, 0.8, 0.8])
    assert not regressions(QUIET, noisy).worse


def test_the_same_variant_of_the_standard_step_is_compared() -> None:
    """Another variant that happens to be faster today does not move the ratio."""
    now = row(
        cell("standard", "s", [0.8] * 4),
        cell("standard", "t", [0.4] * 4),
        cell("clipgrad", "c", [1.0] * 4),
    )
    assert not regressions(QUIET, {now.key: now}).worse


def test_a_mode_that_no_longer_runs_is_worse() -> None:
    now = row(cell("standard", "s", [0.8] * 4), cell("clipgrad", "c", [], reason="error: broken"))
    assert regressions(QUIET, {now.key: now}).worse == ["cnn-small-32 c-batch: error: broken"]


def test_what_only_one_run_has_is_named() -> None:
    new = row(cell("standard", "s", [1.0] * 4), cell("clipgrad", "c", [1.0] * 4), batch_size=64)
    assert regressions(QUIET, {new.key: new}).missing == [
        "cnn-small-64: the earlier run has no such row"
    ]
    other = row(cell("standard", "t", [1.0] * 4), cell("clipgrad", "c", [1.0] * 4))
    assert regressions(QUIET, {other.key: other}).missing == [
        "cnn-small-32: s-batch was not measured now"
    ]
