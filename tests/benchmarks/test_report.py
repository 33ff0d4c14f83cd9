"""The page says what the figures say, no cell is empty without its reason, and the charts are drawn."""

from __future__ import annotations

from pathlib import Path

from benchmarks import analysis, charts, report
from tests.benchmarks.rows import cell, example, row


def lines_of(table: str, start: str) -> list[list[str]]:
    return [
        [column.strip() for column in line.strip("|").split("|")]
        for line in table.splitlines()
        if line.startswith(start)
    ]


def test_table() -> None:
    table = "\n".join(report.table(example()))
    assert "Standard is *standard (compiled, fused AdamW)*" in table
    whole, one = lines_of(table, "| **clipgrad (eager)**")
    assert whole[1:] == ["32", "320.0", "0.80x", "80 % (80-80)", "–", "110", "–"]
    assert one[1:] == ["1", "40.0", "0.10x", "10 % (10-10)", "50 % (50-50)", "55", "–"]
    (broken,) = lines_of(table, "| Broken")
    assert broken[2] == "error: TypeError: no"
    (wrong,) = lines_of(table, "| Wrong")
    assert wrong[0] == "Wrong ⚠"
    assert "⚠ Wrong: relative error 0.5" in table


def test_sentences_are_computed() -> None:
    said = "\n".join(analysis.sentences([example()]))
    assert "runs at 80 % (cnn-small at batch 32) of the fastest ordinary step" in said
    assert "ahead in 1 row: 2.00x Slow" in said  # Wrong is faster, but computes something else
    assert "0.12x at 1 with 0.50x its memory" in said
    assert "clipgrad reaches 50 % (cnn-small at batch 32) of it" in said
    assert "1.10x in cnn-small at batch 32 (peers: Slow 3.0x)" in said
    assert "Broken has no comparable figure in 1 of 1 row" in said
    assert "another gradient: relative error 0.5" in said
    assert "behind" not in said


def test_being_behind_is_said() -> None:
    found = row(
        cell("standard", "standard (eager, AdamW)", [0.1] * 3),
        cell("clipgrad", "clipgrad (eager)", [0.2] * 3),
        cell("peer", "Fast", [0.15] * 3),
    )
    said = "\n".join(analysis.sentences([found]))
    assert "**behind** the fastest such peer in 1 row: 0.75x Fast" in said
    assert "ahead" not in said


def test_nothing_is_said_of_nothing() -> None:
    assert analysis.sentences([]) == []
    assert analysis.sentences([row(cell("clipgrad", "clipgrad (eager)", [1.0] * 3))]) == []


def test_page_raw_figures_and_charts(tmp_path: Path) -> None:
    swept = row(*example().cells, batch_size=8, sweep=True)
    page = report.write(tmp_path, "cpu", {r.key: r for r in (example(), swept)})
    text = page.read_text()
    assert "| 32x32x3 | 32 | 32 | 18.3 % | 80 % (80-80) | 80 % (80-80) |" in text
    assert "| 64x64x3 | 32 | 32 | never finished | not measured | not measured |" in text
    assert "## cnn-small, batch 8" not in text  # a point of the chart
    for name in ("modes", "microbatch", "batch-size"):
        picture = tmp_path / f"cpu-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"({picture.name})" in text


def test_a_partial_run_keeps_the_other_rows(tmp_path: Path) -> None:
    report.write(tmp_path, "cpu", {"cnn-small-32": example()})
    more = row(*example().cells, batch_size=64)
    text = report.write(tmp_path, "cpu", {more.key: more}).read_text()
    assert "## cnn-small, batch 32" in text
    assert "## cnn-small, batch 64" in text


def test_no_chart_without_its_figures(tmp_path: Path) -> None:
    only = row(
        cell("standard", "standard (eager, AdamW)", [1.0] * 3),
        cell("clipgrad", "clipgrad (eager)", [1.0] * 3),
    )
    assert list(charts.draw(tmp_path, "cpu", [only])) == ["Speed by mode"]
    assert charts.draw(tmp_path, "cpu", []) == {}
