"""Print one row per family: ``python -m tests.families [name ...] [--compile trace|inductor] [--markdown]``."""

from __future__ import annotations

import argparse
import logging
import time
import warnings

from tests.families import FAMILIES
from tests.families._measure import Row, measured

HEADER = (
    "family", "eager", "captured", "compiled", "compiled error", "compile s",
    "error", "on rules", "capture s", "reason",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """Return the cells of a row as text."""
    compiling, capturing = (
        f"{seconds:.1f}" if seconds else "" for seconds in (row.compile_seconds, row.seconds)
    )
    compiled = (row.compiled, row.compiled_error, compiling)
    return [
        row.name, row.eager, row.captured, *compiled, row.error, row.on_rules, capturing, row.reason
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("names", nargs="*", metavar="name")
    parser.add_argument("--compile", choices=("trace", "inductor"))
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")

    def show(line: list[str]) -> None:
        widths = (28, 8, 8, 8, 14, 9, 8, 8, 9, 0)
        text = " | ".join(line) if args.markdown else " ".join(map(str.ljust, line, widths))
        print(f"| {text} |" if args.markdown else text, flush=True)

    show(list(HEADER))
    if args.markdown:
        show(["---"] * len(HEADER))
    start, rows = time.perf_counter(), []
    for name in args.names or FAMILIES:
        rows.append(measured(name, FAMILIES[name], compile=args.compile))
        show(cells(rows[-1]))
    exact = {
        kind: sum(getattr(row, kind) == "exact" for row in rows)
        for kind in ("eager", "captured", "compiled")
    }
    found = ", ".join(f"{count} exact {kind}" for kind, count in exact.items())
    print(f"\n{len(rows)} rows: {found}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
