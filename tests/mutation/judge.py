"""This module decides whether a test fails for one mutant."""

from __future__ import annotations

import re
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutation.reach import Reach, reaching
from tests.mutation.running import Run, failures

PATIENCE = 120.0
"""Seconds, beyond four times the duration of its tests, after which a run counts as hanging."""
PASSED = (0, 5)  # 5: no test
Mutant = dict[str, Any]


def mutated(source: str, diff: str) -> str:
    """Apply a unified diff of one file.

    Raises:
        ValueError: If the file has changed since the diff was made.
    """
    old, new, last = source.splitlines(keepends=True), [], 0
    for hunk in re.split(r"^(?=@@ )", diff, flags=re.MULTILINE)[1:]:
        head, *body = hunk.splitlines(keepends=True)
        start = int(head.split()[1].split(",")[0][1:]) - 1
        before = [line[1:] for line in body if line[0] in " -"]
        if old[start : start + len(before)] != before:
            raise ValueError("the file has changed since the sample was made; make it anew")
        new += old[last:start] + [line[1:] for line in body if line[0] in " +"]
        last = start + len(before)
    return "".join(new + old[last:])


def stages(numbers: list[int], reach: Reach, options: Namespace) -> Iterator[tuple[str, Run]]:
    """Return the checks of a mutant, each as a name and a function of the checkout's copy and a time limit."""
    rest, left = [], options.seconds
    for test in numbers[options.first :]:
        left -= reach["seconds"][test]
        if left > 0:
            rest.append(test)
    for name, chosen in (("first", numbers[: options.first]), ("short", rest)):
        if chosen:
            takes = sum(reach["seconds"][test] for test in chosen)
            tests = [reach["tests"][test] for test in chosen]
            yield name, Run(tests, [], PATIENCE + 4 * takes)
    functions = {reach["tests"][test].split("[")[0] for test in numbers}
    if options.nightly and functions:
        yield "nightly", Run(sorted(functions), ["--nightly", "-m", "nightly"], options.nightly)


def judge(
    mutant: Mutant, tree: Path, reach: Reach, options: Namespace, end: float
) -> Mutant | None:
    """Run the tests of a mutant in a copy of the checkout; return None if the time ends before a verdict."""
    path, start = tree / mutant["file"], time.monotonic()
    source = path.read_text(encoding="utf-8")
    numbers = reaching(source, mutant["file"], mutant["line"], reach)
    result = mutant | {
        "status": "survived" if numbers else "unreached",
        "reached_by": len(numbers),
    }
    result |= {"stage": "", "by": "", "seconds": 0.0}
    try:
        changed = mutated(source, mutant["diff"])
    except ValueError:
        return result | {"status": "stale"}
    path.write_text(changed, encoding="utf-8")
    forget_bytecode(path)
    try:
        for stage, tests in stages(numbers, reach, options):
            left = end - time.monotonic()
            status, printed = tests.go(tree, min(tests.limit, max(left, 1)))
            result["stage"] = stage
            if status is None and time.monotonic() >= end:
                return None
            if status is None and stage == "nightly":  # many tests rather than a hang
                result["stage"] = "nightly, in part"
            elif status not in PASSED:
                result["status"] = "timeout" if status is None else "killed"
                result["by"] = next(iter(failures(printed)), printed[-300:])
                break
    finally:
        path.write_text(source, encoding="utf-8")
        forget_bytecode(path)
    return result | {"seconds": round(time.monotonic() - start, 1)}


def forget_bytecode(path: Path) -> None:
    """Delete cached bytecode: Python compares size and time in seconds, which a patch may leave unchanged."""
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()
