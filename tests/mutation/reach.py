"""This module finds which tests reach which lines."""

from __future__ import annotations

import ast
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.mutation.running import run_pytest

Reach = dict[str, Any]


def reach_of_files(files: Iterable[str], workers: int) -> Reach:
    """Run each test file in a process of its own, and merge the results."""
    tests: list[str] = []
    seconds: list[float] = []
    lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    failed: list[str] = []

    def one(file: str) -> tuple[str, dict[str, Any] | None]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "reached.json")
            _, printed = run_pytest(Path.cwd(), [file], REACHED=str(out))
            if not out.exists():
                print(f"{file}: no map\n{printed[-500:]}", flush=True)
                return file, None
            return file, json.loads(out.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(workers) as pool:
        for done in as_completed([pool.submit(one, file) for file in files]):
            file, found = done.result()
            if found is None:
                continue
            print(f"{file}: {len(found['seconds'])} tests, {sum(found['seconds'].values()):.0f} s")
            failed += found["failed"]
            number = {test: len(tests) + index for index, test in enumerate(found["seconds"])}
            tests += found["seconds"]
            seconds += found["seconds"].values()
            for path, by_line in found["lines"].items():
                for line, reached_by in by_line.items():
                    lines[path][line] += [number[test] for test in reached_by if test in number]
    return {"tests": tests, "seconds": seconds, "failed": failed, "lines": lines}


def lines_of_statement(source: str, line: int) -> range:
    """Return the lines that count as reaching a line: its statement's, a ``def``'s body, all lines for import code."""
    block, inside = ast.parse(source).body, False
    while True:
        node = next((n for n in block if first_line(n) <= line <= (n.end_lineno or 0)), None)
        if node is None:  # else, finally or a comment; what follows it speaks for it
            later = [first_line(n) for n in block if first_line(n) > line]
            return range(line, min(later, default=line) + 1) if inside else all_lines(source)
        blocks = [
            inner
            for part in (node, *getattr(node, "handlers", ()), *getattr(node, "cases", ()))
            for inner in (getattr(part, name, []) for name in ("body", "orelse", "finalbody"))
            if inner
        ]
        within = [b for b in blocks if first_line(b[0]) <= line <= (b[-1].end_lineno or 0)]
        is_function = isinstance(node, ast.FunctionDef)
        if is_function and not within:
            return range(first_line(node.body[0]), (node.end_lineno or 0) + 1)
        inside = inside or is_function
        if within:
            block = within[0]
        elif inside:
            heads = [first_line(b[0]) - 1 for b in blocks if first_line(b[0]) > line]
            # An except clause lies behind the body of its try.
            start = max(
                [b[-1].end_lineno + 1 for b in blocks if b[-1].end_lineno < line], default=0
            )
            return range(start or first_line(node), min(heads, default=node.end_lineno) + 1)
        else:
            return all_lines(source)


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])


def all_lines(source: str) -> range:
    return range(1, source.count("\n") + 2)


def reaching(source: str, file: str, line: int, reach: Reach) -> list[int]:
    """Return the tests that reach a line: first the fastest test of each function, then the next of each."""
    by_line = reach["lines"].get(file, {})
    lines = lines_of_statement(source, line)
    reached = {test for each in lines for test in by_line.get(str(each), ())}
    functions: dict[str, list[int]] = defaultdict(list)
    for test in sorted(reached, key=lambda test: reach["seconds"][test]):
        functions[reach["tests"][test].split("[")[0]].append(test)
    turns = zip_longest(*functions.values())
    return [test for turn in turns for test in turn if test is not None]
