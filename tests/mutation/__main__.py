"""Plant small faults in the rooms on which privacy depends, and check whether a test fails for each.

    python -m tests.mutation sample --count 320    # needs cosmic-ray
    python -m tests.mutation reach --workers 15    # needs coverage
    python -m tests.mutation run --workers 15 --minutes 20
    python -m tests.mutation check
    python -m tests.mutation report

``sample`` makes the mutants, ``reach`` finds which test of the short set reaches which line. In ``run`` a mutant
first meets the quickest tests that reach its line: one of each function, then the next of each, up to ``--first``.
A survivor meets what else reaches the line, as far as ``--seconds`` of tests go, and at last the nightly parameters
of those functions. Each worker has a copy of the checkout. What runs far longer than without the fault counts as
noticed. A run goes on where the one before stopped. ``check`` runs the tests that noticed something once more
without any fault; a mutant whose test fails even then is reported as doubtful. One whose file has changed since the
sample was made is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tests.mutation.judge import Mutant, judge
from tests.mutation.reach import reach_of_files
from tests.mutation.running import Run, failures

LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", ".mypy_cache", ".ruff_cache", ".hypothesis", "build"
)
NOTICED = ("killed", "timeout")


def run(options: argparse.Namespace) -> None:
    sample, reach = read(options, "sample"), read(options, "reach")
    results: list[Mutant] = read(options, "results", [])
    done = {(m["file"], m["diff"]) for m in results}
    waiting = [m for m in sample if (m["file"], m["diff"]) not in done][: options.limit]
    end = time.monotonic() + 60 * options.minutes
    trees: SimpleQueue[Path] = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.workers) as pool:
        for worker in range(options.workers):
            tree = Path(shutil.copytree(".", Path(folder, str(worker)), ignore=LEFT_OUT))
            trees.put(tree)
        status, printed = Run(reach["tests"][:1], [], 600).go(tree, 600)
        if status:  # else every mutant would seem to be noticed
            raise SystemExit(f"a test fails without any fault:\n{printed}")

        def one(mutant: Mutant) -> Mutant | None:
            if time.monotonic() > end:
                return None
            tree = trees.get()
            try:
                return judge(mutant, tree, reach, options, end)
            finally:
                trees.put(tree)

        for future in as_completed([pool.submit(one, mutant) for mutant in waiting]):
            result = future.result()
            if result is not None:
                results.append(result)
                write(options, "results", results)
                place = f"{result['file']}:{result['line']} {result['operator']}"
                print(f"{result['status']:9} {result['seconds']:6} s  {place}", flush=True)
    print(f"{len(results)} of {len(sample)} judged")


def check(options: argparse.Namespace) -> None:
    results: list[Mutant] = read(options, "results")
    tests = sorted({m["by"] for m in results if re.match(r"(tests|clipgrad)/", m["by"])})
    if not tests:
        return
    _, printed = Run(tests, ["--nightly"], 0).go(Path.cwd(), 60 * options.minutes, "--maxfail=0")
    fail_anyway = set(failures(printed))
    for mutant in results:
        mutant["doubtful"] = mutant["by"] in fail_anyway
    write(options, "results", results)
    print(printed.splitlines()[-1], f"of {len(tests)} tests that noticed something", sep="; ")


def report(options: argparse.Namespace) -> None:
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for mutant in read(options, "results"):
        status = "doubtful" if mutant.get("doubtful") else mutant["status"]
        rooms[mutant["file"].split("/")[1]][status] += 1
        if status not in NOTICED:
            changed = re.findall(r"^[-+](?!--|\+\+).*$", mutant["diff"], re.MULTILINE)
            stage = f" ({mutant['reached_by']} tests; {mutant['stage']})"
            print(f"{status}: {mutant['file']}:{mutant['line']}{stage}", *changed, sep="\n    ")
    for room, counts in [*sorted(rooms.items()), ("all", sum(rooms.values(), Counter()))]:
        reached = sum(counts.values()) - counts["unreached"] - counts["stale"]
        score = sum(counts[status] for status in NOTICED) / max(reached, 1)
        print(f"{room:9} {score:6.1%} of {reached} that a test reaches; {dict(counts)}")


def read(options: argparse.Namespace, name: str, missing: Any = None) -> Any:
    path = Path(options.folder, f"{name}.json")
    if missing is not None and not path.exists():
        return missing
    return json.loads(path.read_text(encoding="utf-8"))


def write(options: argparse.Namespace, name: str, value: Any) -> None:
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    new = Path(options.folder, f"{name}.json.new")
    new.write_text(json.dumps(value, indent=None if name == "reach" else 1), encoding="utf-8")
    new.replace(new.with_suffix(""))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=["sample", "reach", "run", "check", "report"])
    parser.add_argument("paths", nargs="*", help="reach: test files (all but tests/compiled)")
    parser.add_argument("--folder", default="build/mutation", help="where the results lie")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread")
    parser.add_argument("--count", type=int, default=320, help="sample: how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="sample: which ones")
    parser.add_argument("--minutes", type=float, default=20, help="run: how long at most")
    parser.add_argument("--limit", type=int, help="run: at most so many mutants")
    parser.add_argument("--first", type=int, default=40, help="run: tests of the first stage")
    parser.add_argument("--seconds", type=float, default=60, help="run: tests of the second stage")
    parser.add_argument(
        "--nightly", type=float, default=90, help="run: limit of the third; 0: none"
    )
    options = parser.parse_args()
    if options.command == "sample":
        from tests.mutation.sample import make_sample

        write(options, "sample", make_sample(options.count, options.seed))
    elif options.command == "reach":
        tests = sorted(map(str, Path("tests").rglob("test_*.py")))
        files = options.paths or [file for file in tests if "compiled" not in file] + ["clipgrad"]
        write(options, "reach", reach_of_files(files, options.workers))
    else:
        {"run": run, "check": check, "report": report}[options.command](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
