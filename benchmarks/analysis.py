"""What the numbers say, in sentences that are computed from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.records import Cell, Row, speed


def sentences(rows: Sequence[Row]) -> list[str]:
    """Every statement names its figures; one that the figures do not carry is left out."""
    full = [row for row in rows if row.tabulated]
    return [
        *_headline(full),
        *_peers(full),
        *_microbatches(full),
        *_accumulating(full),
        *_memory(full),
        *_batch_sizes(rows),
        *_compiling(full),
        *_failures(full),
    ]


def _name(row: Row) -> str:
    return f"{row.workload} at batch {row.batch_size}"


def _headline(rows: Sequence[Row]) -> Iterable[str]:
    shares = [
        (speed(cell, row.baseline()).value, row)
        for row in rows
        if (cell := row.best("clipgrad", "batch"))
    ]
    if not shares:
        return
    yield f"clipgrad's clipped, noisy step runs at {_range(shares)} of the fastest ordinary step, microbatch = batch."


def _peers(rows: Sequence[Row]) -> Iterable[str]:
    ahead, behind = [], []
    for row in rows:
        ours, peer = row.best("clipgrad", "batch"), best_correct_peer(row)
        if ours is None or peer is None:
            continue
        ratio = speed(ours, peer)
        text = f"{ratio.value:.2f}x {peer.label} ({_name(row)})"
        (ahead if ratio.value >= 1 else behind).append((ratio.value, text))
    if ahead:
        each = "; ".join(text for _, text in sorted(ahead, reverse=True))
        yield f"Against the fastest peer that computes the same gradient, it is ahead in {_count(ahead)}: {each}."
    if behind:
        each = "; ".join(text for _, text in sorted(behind))
        yield f"It is **behind** the fastest such peer in {_count(behind)}: {each}."


def _count(found: Sequence[object]) -> str:
    return "1 row" if len(found) == 1 else f"{len(found)} rows"


def best_correct_peer(row: Row) -> Cell | None:
    """The fastest peer of a row whose gradient is the oracle's."""
    correct = [cell for cell in row.of("peer") if cell.check is None]
    return min(correct, key=lambda cell: cell.median_s, default=None)


def _microbatches(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        whole = row.best("clipgrad", "batch")
        parts = [(share, row.best("clipgrad", share)) for share in ("batch/4", "1")]
        found = [
            f"{speed(cell, whole).value:.2f}x at {cell.microbatch}{_memory_note(cell, whole)}"
            for _, cell in parts
            if cell is not None and whole is not None
        ]
        if found:
            yield (
                f"{_name(row)}: smaller microbatches run at {' and '.join(found)}, of clipgrad's speed at "
                "microbatch = batch."
            )


def _memory_note(cell: Cell, whole: Cell) -> str:
    if not cell.peak_bytes or not whole.peak_bytes:
        return ""
    return f" with {cell.peak_bytes / whole.peak_bytes:.2f}x its memory"


def _accumulating(rows: Sequence[Row]) -> Iterable[str]:
    """At microbatch 1 the ordinary step is slow as well: the honest limit."""
    for share in ("batch/4", "1"):
        found = [
            (speed(cell, row.baseline(share)).value, row)
            for row in rows
            if (cell := row.best("clipgrad", share)) and row.of("standard", share)
        ]
        if found:
            yield (
                f"At microbatch = {share}, an ordinary step that accumulates gradients at that microbatch is the "
                f"limit; clipgrad reaches {_range(found)} of it."
            )


def _range(found: Sequence[tuple[float, Row]]) -> str:
    """From the lowest to the highest share, each with its row."""
    low, high = min(found, key=lambda f: f[0]), max(found, key=lambda f: f[0])
    first = f"{100 * low[0]:.0f} % ({_name(low[1])})"
    return first if len(found) == 1 else f"{first} to {100 * high[0]:.0f} % ({_name(high[1])})"


def _memory(rows: Sequence[Row]) -> Iterable[str]:
    found = []
    for row in rows:
        known = [cell for cell in row.of("clipgrad", "batch") if cell.peak_bytes]
        ours, base = min(known, key=lambda c: c.median_s, default=None), row.memory_baseline()
        if ours is not None and base is not None and ours.peak_bytes and base.peak_bytes:
            others = [
                f"{cell.label} {cell.peak_bytes / base.peak_bytes:.1f}x"
                for cell in row.of("peer")
                if cell.peak_bytes
            ]
            beside = f" (peers: {', '.join(others)})" if others else ""
            found.append(f"{ours.peak_bytes / base.peak_bytes:.2f}x in {_name(row)}{beside}")
    if found:
        yield f"Peak memory of clipgrad's step beside the leanest ordinary one's: {'; '.join(found)}."


def _batch_sizes(rows: Sequence[Row]) -> Iterable[str]:
    for workload in dict.fromkeys(row.workload for row in rows if row.sweep):
        found = [
            f"{1e3 * overhead:.1f} ms at {row.batch_size}"
            for row in rows
            if row.workload == workload and (overhead := overhead_s(row)) is not None
        ]
        if len(found) > 1:
            yield f"{workload}: the clipped step takes longer than the ordinary one by {', '.join(found)} samples."


def overhead_s(row: Row) -> float | None:
    """Seconds that clipgrad adds to the fastest ordinary step."""
    ours = row.best("clipgrad", "batch")
    return None if ours is None else ours.median_s - row.baseline().median_s


def _compiling(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        compiled = [c for c in row.of("clipgrad", "batch") if c.compiled]
        eager = [c for c in row.of("clipgrad", "batch") if not c.compiled]
        if compiled and eager and compiled[0].first_step_s:
            gain = speed(compiled[0], eager[0]).value
            yield (
                f"{_name(row)}: compiling makes clipgrad's step {gain:.2f}x as fast; the first step, with its "
                f"compilation, takes {compiled[0].first_step_s:.0f} s."
            )


def _failures(rows: Sequence[Row]) -> Iterable[str]:
    """Peers by what happened to them: unable, or another gradient."""
    by_label: dict[str, list[str]] = {}
    for row in rows:
        for cell in row.cells:
            if cell.kind == "peer" and not cell.seconds:
                by_label.setdefault(cell.label, []).append(f"{_name(row)} ({cell.reason})")
            elif cell.kind == "peer" and cell.check:
                by_label.setdefault(cell.label, []).append(
                    f"{_name(row)} (another gradient: {cell.check})"
                )
    for label, found in by_label.items():
        yield f"{label} has no comparable figure in {len(found)} of {_count(rows)}: {'; '.join(found)}."
