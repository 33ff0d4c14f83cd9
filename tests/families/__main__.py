"""One row per family: ``python -m tests.families [name ...]``."""

from __future__ import annotations

import logging
import sys
import time
import warnings

from tests.families import FAMILIES
from tests.families._measure import Row, measured

HEADER = ("family", "eager today", "captured", "error", "on rules", "capture s", "reason")


def _line(row: Row) -> str:
    return (
        f"{row.name:28} {row.eager:11} {row.captured:8} {row.error:8} {row.on_rules:>8} {row.seconds:9.1f}  "
        f"{row.reason}"
    )


def main(names: list[str]) -> None:
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    print("{:28} {:11} {:8} {:8} {:>8} {:>9}  {}".format(*HEADER), flush=True)
    start, rows = time.perf_counter(), []
    for name in names or FAMILIES:
        rows.append(measured(name, FAMILIES[name]))
        print(_line(rows[-1]), flush=True)
    exact = [sum(getattr(row, kind) == "exact" for row in rows) for kind in ("eager", "captured")]
    print(
        f"{len(rows)} families: {exact[0]} exact in eager mode today, {exact[1]} through the captured loss; "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
