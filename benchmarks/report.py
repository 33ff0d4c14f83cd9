"""Tables, sentences and charts from the raw figures.

``python -m benchmarks.report`` writes them again from ``benchmarks/results/*.json`` without measuring.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks import analysis, charts, poisson
from benchmarks.peers import PEERS
from benchmarks.records import Cell, Row, in_order, load, save, speed
from benchmarks.reference import REFERENCE
from benchmarks.workloads import WORKLOADS

COLUMNS = (
    "Mode",
    "Microbatch Size",
    "Throughput (samples/s)",
    "Speedup vs Standard",
    "% of Standard (quartiles)",
    "% of Standard at this Microbatch",
    "Peak Memory (MiB)",
    "First Step (s)",
)


def keep(folder: Path, device: str, measured: Mapping[str, Row]) -> list[Row]:
    """Write ``<device>.json``; rows that were not measured now stay as they are. Returns all rows."""
    raw = folder / f"{device}.json"
    rows = in_order((load(raw) | dict(measured)).values(), list(WORKLOADS))
    save(raw, rows)
    return rows


def write(folder: Path, device: str, measured: Mapping[str, Row]) -> Path:
    """Write ``<device>.json``, ``<device>.md`` and the charts."""
    return render(folder, device, keep(folder, device, measured))


def render(folder: Path, device: str, rows: list[Row]) -> Path:
    pictures = charts.draw(folder, device, rows)
    page = folder / f"{device}.md"
    page.write_text("\n".join(_page(folder, device, rows, pictures)).rstrip() + "\n")
    return page


def _page(folder: Path, device: str, rows: list[Row], pictures: Mapping[str, str]) -> Iterable[str]:
    yield f"# Throughput on {device.upper()}"
    yield ""
    yield (
        "Written by `pytest benchmarks/` from the raw figures in "
        f"[{device}.json]({device}.json); nothing here was typed. How it is measured: "
        "[docs/benchmarks.md](../../docs/benchmarks.md)."
    )
    yield ""
    for title, file in pictures.items():
        yield f"![{title}]({file})"
        yield ""
    yield "## What the numbers say"
    yield ""
    yield from (f"* {sentence}" for sentence in analysis.sentences(rows))
    yield ""
    yield from _reference(rows)
    yield from poisson.section(folder, device)
    for row in rows:
        if row.tabulated:
            yield from table(row)
    yield "## How the peers were set up"
    yield ""
    yield from (f"* **{peer.name}**: {peer.remark}." for peer in PEERS.values())
    yield ""
    yield "## Environment"
    yield ""
    yield from _environments(rows)


def table(row: Row) -> Iterable[str]:
    """One row's table in the format of the reference tables."""
    baseline = row.baseline()
    yield f"## {row.workload}, batch {row.batch_size}"
    yield ""
    yield (
        f"{row.description}. Standard is *{baseline.label}*, the fastest of the ordinary steps here. "
        f"{len(baseline.seconds)} interleaved rounds, medians; slow modes in fewer."
    )
    yield ""
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---:|" * (len(COLUMNS) - 1)
    for cell in row.cells:
        yield "| " + " | ".join(_columns(row, cell, baseline)) + " |"
    yield ""
    yield from _notes(row)


def _columns(row: Row, cell: Cell, baseline: Cell) -> list[str]:
    name = f"**{cell.label}**" if cell.kind == "clipgrad" else cell.label
    name += " ⚠" if cell.check else ""
    if not cell.seconds:
        return [name, str(cell.microbatch), cell.reason or "not measured", *["–"] * 5]
    ratio = speed(cell, baseline)
    same = speed(cell, row.baseline(cell.share)).percent if cell.share != "batch" else "–"
    return [
        name,
        str(cell.microbatch),
        f"{row.throughput(cell):.1f}",
        f"{ratio.value:.2f}x",
        ratio.percent,
        same,
        f"{cell.peak_bytes / 2**20:.0f}"
        if cell.peak_bytes is not None
        else (cell.memory_reason or "–"),
        f"{cell.first_step_s:.1f}" if cell.compiled and cell.first_step_s is not None else "–",
    ]


def _notes(row: Row) -> Iterable[str]:
    differing = [cell for cell in row.cells if cell.check]
    for cell in differing:
        yield f"⚠ {cell.label}: {cell.check}"
        yield ""


def _reference(rows: list[Row]) -> Iterable[str]:
    """The rows of the reference tables beside ours; machines differ, so percentages only."""
    ours = {(row.workload, row.batch_size): row for row in rows if row.device == "cpu"}
    if not ours:
        return
    yield "## Beside the reference tables"
    yield ""
    yield "Clipped speed in percent of the standard step: the reference (JAX on a CPU) and clipgrad."
    yield ""
    yield "| Input | Batch | Microbatch | Reference | clipgrad | clipgrad, vs Standard at this Microbatch |"
    yield "|---|---:|---:|---:|---:|---:|"
    for entry in REFERENCE:
        row = ours.get((entry.workload, entry.batch_size))
        for share, percent in entry.percents.items():
            cells = ["not measured"] * 2
            best = row.best("clipgrad", share) if row else None
            if row is not None and best is not None:
                same = row.baseline(share)
                cells = [speed(best, row.baseline()).percent, speed(best, same).percent]
            size = {"batch": entry.batch_size, "batch/4": entry.batch_size // 4, "1": 1}[share]
            said = "never finished" if percent is None else f"{percent:.1f} %"
            yield (
                f"| {entry.input} | {entry.batch_size} | {size} | {said} | "
                + " | ".join(cells)
                + " |"
            )
    yield ""


def _environments(rows: list[Row]) -> Iterable[str]:
    """Facts shared by all rows once; what differs, per row."""
    names = list(dict.fromkeys(name for row in rows for name in row.environment))
    yield "| | |"
    yield "|---|---|"
    for name in names:
        values = {row.environment.get(name, "–") for row in rows}
        if len(values) == 1:
            yield f"| {name} | {values.pop()} |"
        else:
            each = "; ".join(f"{row.key}: {row.environment.get(name, '–')}" for row in rows)
            yield f"| {name} | {each} |"


def terminal_lines(rows: Iterable[Row]) -> Iterable[str]:
    """A short form for the terminal: clipgrad and the fastest correct peer of each row."""
    yield ""
    for row in rows:
        try:
            baseline = row.baseline()
        except LookupError:
            continue
        yield f"{row.workload}, batch {row.batch_size}: standard is {baseline.label}, {row.throughput(baseline):.1f}/s"
        shown = [*row.of("clipgrad"), *filter(None, [analysis.best_correct_peer(row)])]
        for cell in shown:
            name = f"{cell.label}, microbatch {cell.microbatch}"
            yield f"  {name:<36} {row.throughput(cell):9.1f}/s  {speed(cell, baseline).percent} of standard"


if __name__ == "__main__":
    # Other benchmarks keep their raw figures there too, without a page.
    for page in sorted((Path(__file__).parent / "results").glob("*.md")):
        path = page.with_suffix(".json")
        stored = in_order(load(path).values(), list(WORKLOADS))
        print(render(path.parent, path.stem, stored), file=sys.stdout)
