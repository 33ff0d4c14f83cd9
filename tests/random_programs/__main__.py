"""Run many random programs and count what became of them."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from tests.random_programs import EXACT, FOREIGN, REFUSED, WRONG, check, make_program
from tests.random_programs._reduce import reduce


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.random_programs", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="how many seeds")
    parser.add_argument("--refused", action="store_true", help="list the reasons of refusals")
    options = parser.parse_args()
    counts: Counter[str] = Counter({EXACT: 0, REFUSED: 0, WRONG: 0, FOREIGN: 0})
    reasons: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.count):
        program = make_program(seed)
        outcome = check(program)
        counts[outcome.kind] += 1
        if outcome.kind == REFUSED:
            reasons[outcome.detail[:120]] += 1
        elif outcome.kind in (WRONG, FOREIGN):
            smaller = reduce(program, outcome.kind)
            print(f"{outcome.kind}: {program.describe()}\n{outcome.detail}")
            print(f"reduced: {smaller.describe()}\n{check(smaller).detail}\n", flush=True)
    if options.refused:
        for reason, count in reasons.most_common():
            print(f"{count:5} {reason}")
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return 1 if counts[WRONG] + counts[FOREIGN] else 0


if __name__ == "__main__":
    sys.exit(main())
