"""Judge every operator of PyTorch's database and print the counts: ``python -m tests.operators [name ...]``."""

from __future__ import annotations

import sys
from collections import Counter

from tests.operators.database import differentiable
from tests.operators.judge import VERDICTS, cases_of, judge


def main(names: list[str]) -> int:
    """The number of cases that are wrong or end in an error that is not clipgrad's."""
    total: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for operator in differentiable():
        if names and operator.name not in names:
            continue
        counts: Counter[str] = Counter()
        for case in cases_of(operator):
            verdict = judge(case)
            counts[verdict.kind] += 1
            if verdict.kind in ("wrong", "foreign", "refused"):
                reasons[f"{verdict.kind:8} {case.operator} ({case.road}): {verdict.reason[:160]}"] += 1
        total += counts
        if names:
            print(operator.name, dict(counts))
    for reason, count in sorted(reasons.items()):
        print(f"{count:5} {reason}")
    print()
    print(" ".join(f"{kind:>9}" for kind in (*VERDICTS, "compared")))
    compared = sum(total.values()) - total["skipped"]
    print(" ".join(f"{count:>9}" for count in (*(total[kind] for kind in VERDICTS), compared)))
    return total["wrong"] + total["foreign"]


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
