"""Ratios, and that files give back what was put in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.records import in_order, load, save, speed
from tests.benchmarks.rows import cell, example, row


def test_ratio_is_that_of_the_medians_with_the_quartiles_of_the_rounds() -> None:
    ours, standard = cell("clipgrad", "a", [2.0, 4.0, 2.0, 8.0]), cell("standard", "b", [1.0] * 4)
    ratio = speed(ours, standard)
    assert ratio.value == pytest.approx(1 / 3)  # median of 2, 4, 2, 8 is 3
    assert ratio.low < 0.25 <= 0.5 <= ratio.high


def test_a_slow_moment_that_hits_both_leaves_the_ratio_alone() -> None:
    ours, standard = (
        cell("clipgrad", "a", [2.0, 20.0, 2.0]),
        cell("standard", "b", [1.0, 10.0, 1.0]),
    )
    ratio = speed(ours, standard)
    assert (ratio.low, ratio.value, ratio.high) == (0.5, 0.5, 0.5)


def test_only_rounds_that_have_both_are_compared() -> None:
    """A slow mode runs in the first rounds only; what the other did later has no say."""
    slow, standard = cell("peer", "a", [4.0, 4.0]), cell("standard", "b", [1.0, 1.0, 9.0, 9.0, 9.0])
    assert speed(slow, standard).value == 0.25
    assert speed(standard, slow).value == 4.0


def test_baseline_is_the_fastest_ordinary_step() -> None:
    found = example()
    assert found.baseline().label == "standard (compiled, fused AdamW)"
    assert found.baseline("1").label == "standard (eager, fused AdamW)"
    with pytest.raises(LookupError, match="batch/4"):
        found.baseline("batch/4")


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cpu.json"
    save(path, [example()])
    assert load(path) == {"cnn-small-32": example()}
    assert load(tmp_path / "none.json") == {}


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"format": 0, "rows": []}))
    with pytest.raises(ValueError, match=r"has format 0.*measure anew"):
        load(path)


def test_order_is_that_of_the_workloads_then_of_the_batches() -> None:
    rows = [
        row(workload="b"),
        row(batch_size=64, workload="a"),
        row(workload="a"),
        row(workload="gone"),
    ]
    assert [found.key for found in in_order(rows, ["a", "b"])] == ["a-32", "a-64", "b-32"]
