"""Rows made by hand, with known ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.records import Cell, Row


def cell(kind: str, label: str, seconds: Sequence[float], **more: Any) -> Cell:
    share = more.pop("share", "batch")
    size = {"batch": 32, "batch/4": 8, "1": 1}[share]
    key = f"{label}-{share}".replace(" ", "-")
    return Cell(
        key=key,
        label=label,
        kind=kind,
        microbatch=size,
        share=share,
        compiled=more.pop("compiled", False),
        seconds=list(seconds),
        **more,
    )


def row(*cells: Cell, workload: str = "cnn-small", batch_size: int = 32, **more: Any) -> Row:
    return Row(
        workload=workload,
        description="images",
        batch_size=batch_size,
        device="cpu",
        cells=list(cells),
        environment={"device": "a CPU", "date": "today"},
        **more,
    )


def example() -> Row:
    """clipgrad at 80 %, at 50 % of accumulating at microbatch 1; a peer at 40 %, one that fails, one that is wrong."""
    mib = 2**20
    return row(
        cell("standard", "standard (eager, AdamW)", [0.12, 0.12, 0.12], peak_bytes=100 * mib),
        cell(
            "standard",
            "standard (compiled, fused AdamW)",
            [0.08] * 3,
            compiled=True,
            peak_bytes=100 * mib,
        ),
        cell("standard", "standard (eager, fused AdamW)", [0.4] * 3, share="1"),
        cell("clipgrad", "clipgrad (eager)", [0.1, 0.1, 0.1], peak_bytes=110 * mib),
        cell("clipgrad", "clipgrad (eager)", [0.8] * 3, share="1", peak_bytes=55 * mib),
        cell("peer", "Slow", [0.2] * 3, peak_bytes=300 * mib),
        cell("peer", "Wrong", [0.05] * 3, check="relative error 0.5"),
        cell("peer", "Broken", [], reason="error: TypeError: no"),
    )
