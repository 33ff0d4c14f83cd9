"""The charts, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.analysis import overhead_s
from benchmarks.records import Cell, Row, speed

CLIPGRAD, COMPILED, STANDARD, PEER = "#1b6ca8", "#0b3c5d", "#8a8a8a", "#c9c9c9"
PEER_COLOURS = ("#d1893c", "#b6543f", "#7f9a48", "#8f6aa8", "#c7a940", "#5f9ea0", "#a8788c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(folder: Path, device: str, rows: Sequence[Row]) -> dict[str, str]:
    """Draw what the rows allow; file names by title."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    full = [row for row in rows if row.tabulated]
    drawn: dict[str, str] = {}
    for title, name, make, data in (
        ("Speed beside the fastest peer", "summary", _summary, full),
        ("Speed by mode", "modes", _modes, full),
        ("Throughput and memory against microbatch size", "microbatch", _microbatches, full),
        ("Overhead against batch size", "batch-size", _batch_sizes, _swept(rows)),
    ):
        figure = make(plt, data) if data else None
        if figure is not None:
            file = f"{device}-{name}.png"
            figure.savefig(folder / file, dpi=130, bbox_inches="tight", facecolor="white")
            plt.close(figure)
            drawn[title] = file
    return drawn


def _swept(rows: Sequence[Row]) -> list[Row]:
    workloads = {row.workload for row in rows if row.sweep}
    found = [row for row in rows if row.workload in workloads and overhead_s(row) is not None]
    return found if len(found) > 1 else []


def _modes(plt: Any, rows: Sequence[Row]) -> Any:
    """A panel a row: every private mode at microbatch = batch, in percent of the fastest ordinary step."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    tallest = max(len(_bars(row)) for row in rows)
    figure, axes = plt.subplots(
        lines, columns, figsize=(5.4 * columns, (0.36 * tallest + 1.1) * lines), squeeze=False
    )
    for axis, row in zip(axes.flat, rows, strict=False):
        bars = _bars(row)
        baseline = row.baseline()
        ratios = [speed(cell, baseline) for cell in bars]
        values = [100 * ratio.value for ratio in ratios]
        spread = [
            [100 * (ratio.value - ratio.low) for ratio in ratios],
            [100 * (ratio.high - ratio.value) for ratio in ratios],
        ]
        colours = [_colour(cell) for cell in bars]
        axis.barh(range(len(bars)), values, xerr=spread, color=colours, error_kw={"elinewidth": 1})
        end = max(100.0, *[100 * ratio.high for ratio in ratios])
        for position, (value, ratio) in enumerate(zip(values, ratios, strict=True)):
            place = 100 * ratio.high + 0.02 * end, position
            # It may lie on the line at 100.
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axis.text(*place, f"{value:.0f}", va="center", fontsize=8, bbox=box)
        axis.set_yticks(range(len(bars)), [_short(cell) for cell in bars], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.12 * end)
        axis.axvline(100, color=STANDARD, linestyle="--", linewidth=1)
        axis.set_title(f"{row.workload}, batch {row.batch_size}", fontsize=10)
        axis.set_xlabel(f"% of standard ({baseline.label[10:-1]})", fontsize=8)
        _tidy(axis)
    for axis in list(axes.flat)[len(rows) :]:
        axis.set_visible(False)
    figure.suptitle("Speed of the private step, microbatch = batch; bars: quartiles", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    return figure


def _summary(plt: Any, rows: Sequence[Row]) -> Any:
    """Bars of a row: clipgrad compiled and eager, and the fastest peer that computes the same. None without peers."""
    if not any(cell.kind == "peer" for row in rows for cell in _bars(row)):
        return None
    kinds = (
        ("clipgrad, compiled", COMPILED, lambda c: c.kind == "clipgrad" and c.compiled),
        ("clipgrad, eager", CLIPGRAD, lambda c: c.kind == "clipgrad" and not c.compiled),
        ("fastest peer", PEER, lambda c: c.kind == "peer" and not c.check),
    )
    figure, axis = plt.subplots(figsize=(9, 0.62 * len(rows) + 1.2))
    for line, (label, colour, chosen) in enumerate(kinds):
        for position, row in enumerate(rows):
            fastest = next((cell for cell in _bars(row) if chosen(cell)), None)
            if fastest is not None:
                place, value = (
                    position + 0.27 * (line - 1),
                    100 * speed(fastest, row.baseline()).value,
                )
                axis.barh(place, value, 0.25, color=colour, label=label if position == 0 else None)
                name = f" {fastest.label}" if fastest.kind == "peer" else ""
                box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
                axis.text(value + 1, place, f"{value:.0f}{name}", va="center", fontsize=7, bbox=box)
    names = [f"{row.workload}, batch {row.batch_size}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=9)
    axis.invert_yaxis()
    axis.axvline(100, color=STANDARD, linestyle="--", linewidth=1)
    axis.set_xlabel("% of the speed of the fastest ordinary PyTorch step", fontsize=9)
    axis.legend(fontsize=8, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _tidy(axis)
    figure.tight_layout()
    return figure


def _bars(row: Row) -> list[Cell]:
    private = [c for c in row.measured if c.kind != "standard" and c.share == "batch"]
    return sorted(private, key=lambda cell: cell.median_s)


def _short(cell: Cell) -> str:
    return cell.label + (" ⚠" if cell.check else "")


def _colour(cell: Cell) -> str:
    if cell.kind == "clipgrad":
        return COMPILED if cell.compiled else CLIPGRAD
    return PEER


def _microbatches(plt: Any, rows: Sequence[Row]) -> Any:
    """Two panels: throughput, and peak memory, at microbatch 1, batch/4 and batch."""
    series = [
        (row, kind, cells)
        for row in rows
        for kind in ("standard", "clipgrad")
        if len(cells := _by_microbatch(row, kind)) > 1
    ]
    if not series:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    colour_of = {
        key: PEER_COLOURS[i % 7] for i, key in enumerate(dict.fromkeys(r.key for r, _, _ in series))
    }
    for row, kind, cells in series:
        style = {
            "color": colour_of[row.key],
            "marker": MARKERS[list(colour_of).index(row.key) % len(MARKERS)],
            "linestyle": "--" if kind == "standard" else "-",
            "markersize": 5,
        }
        sizes = [cell.microbatch for cell in cells]
        name = f"{row.workload}, batch {row.batch_size}, {kind}"
        left.plot(sizes, [row.throughput(cell) for cell in cells], label=name, **style)
        with_peak = _by_microbatch(row, kind, with_peak=True)
        right.plot(
            [cell.microbatch for cell in with_peak],
            [(cell.peak_bytes or 0) / 2**20 for cell in with_peak],
            **style,
        )
    left.set_ylabel("throughput (samples/s)")
    right.set_ylabel("peak memory (MiB)")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("microbatch size (samples)")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _logarithmic(axis)
        _tidy(axis)
    figure.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.suptitle("The fastest variant at each microbatch size", fontsize=11)
    figure.tight_layout()
    return figure


def _by_microbatch(row: Row, kind: str, *, with_peak: bool = False) -> list[Cell]:
    """The fastest mode at each microbatch size; of those whose memory is known, if that is asked for."""
    found = []
    for share in ("1", "batch/4", "batch"):
        cells = [cell for cell in row.of(kind, share) if cell.peak_bytes or not with_peak]
        found += sorted(cells, key=lambda cell: cell.median_s)[:1]
    return found


def _batch_sizes(plt: Any, rows: Sequence[Row]) -> Any:
    """Two panels: milliseconds that privacy adds, and percent of the ordinary step, against batch size."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for index, workload in enumerate(dict.fromkeys(row.workload for row in rows)):
        found = [row for row in rows if row.workload == workload]
        sizes = [row.batch_size for row in found]
        style = {"marker": MARKERS[index], "color": CLIPGRAD}
        left.plot(sizes, [1e3 * (overhead_s(row) or 0.0) for row in found], label=workload, **style)
        left.plot(
            sizes,
            [1e3 * row.baseline().median_s for row in found],
            label=f"{workload}, the ordinary step",
            color=STANDARD,
            linestyle="--",
            marker=MARKERS[index],
        )
        labels = dict.fromkeys(c.label for row in found for c in row.of("clipgrad", "batch"))
        labels |= dict.fromkeys(c.label for row in found for c in row.of("peer", "batch"))
        for position, label in enumerate(labels):
            points = [
                (row.batch_size, 100 * speed(cell, row.baseline()).value)
                for row in found
                for cell in row.measured
                if cell.label == label and cell.share == "batch"
            ]
            ours = label.startswith("clipgrad")
            right.plot(
                *zip(*points, strict=True),
                label=label,
                marker=MARKERS[position % len(MARKERS)],
                markersize=5,
                linewidth=2.2 if ours else 1.2,
                color=(CLIPGRAD if "eager" in label else COMPILED)
                if ours
                else PEER_COLOURS[position % 7],
            )
    left.set_ylabel("added by privacy, and the ordinary step (ms)")
    right.set_ylabel("% of the fastest standard step")
    right.set_ylim(bottom=0)
    right.axhline(100, color=STANDARD, linestyle="--", linewidth=1)
    ticks = sorted({row.batch_size for row in rows})
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("batch size (samples)")
        _tidy(axis)
    left.axhline(0, color=STANDARD, linewidth=0.8)  # what privacy adds may be less than nothing
    left.legend(fontsize=8, frameon=False)
    right.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle("Overhead against batch size, microbatch = batch", fontsize=11)
    figure.tight_layout()
    return figure


def _logarithmic(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _tidy(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(axis="both", linewidth=0.3, alpha=0.6)
    axis.set_axisbelow(True)
