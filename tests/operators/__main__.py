"""Judge every operator of PyTorch's database and print the counts: ``python -m tests.operators [name ...]``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.operators.database import differentiable
from tests.operators.judge import VERDICTS, cases_of, judge

TOLD = ("wrong", "foreign", "refused")


def main() -> int:
    """Print what is not exact while it is found, and the counts at the end; 1 if anything is wrong or foreign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="operators of the database; all if left out")
    parser.add_argument("--samples", type=int, help="calls of each operator; all if left out")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    for operator in differentiable():
        if options.names and operator.name not in options.names:
            continue
        reasons: Counter[str] = Counter()
        for case in cases_of(operator, options.samples):
            verdict = judge(case)
            total[verdict.kind] += 1
            if verdict.kind in TOLD:
                reasons[
                    f"{verdict.kind:8} {case.operator} ({case.road}): {verdict.reason[:150]}"
                ] += 1
        for reason, count in sorted(reasons.items()):
            print(f"{count:5} {reason}", flush=True)
    compared = sum(total.values()) - total["skipped"]
    print(" ".join(f"{kind:>9}" for kind in (*VERDICTS, "compared")))
    print(" ".join(f"{count:>9}" for count in (*(total[kind] for kind in VERDICTS), compared)))
    return int(bool(total["wrong"] + total["foreign"]))


if __name__ == "__main__":
    sys.exit(main())
