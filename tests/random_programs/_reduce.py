"""A program that fails, made small: fewer lines, the same failure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from tests.random_programs._check import check
from tests.random_programs._draft import NAMES
from tests.random_programs._program import Program

Lines = tuple[tuple[str, str], ...]
ATTEMPTS = 5


def reduce(program: Program, kind: str) -> Program:
    """The smallest program found by dropping what can be dropped.

    Args:
        program: What fails.
        kind: How it fails.
    """
    shapes = _shapes(program)
    smaller = True
    while smaller:
        smaller = False
        for lines in _candidates(program.lines, shapes):
            candidate = replace(program, lines=lines)
            if _fails(candidate, kind):
                program, smaller = candidate, True
                break
    return program


def _candidates(lines: Lines, shapes: dict[str, tuple[int, ...]]) -> Iterator[Lines]:
    """Ends earlier, values in the place of computed ones, and no line that nothing reads."""
    for index, (target, _) in enumerate(lines[:-1]):
        if target in shapes and index < len(lines) - 2:
            yield (*lines[: index + 1], ("return", f"uneven({target})"))
    for index in reversed(range(len(lines) - 1)):
        target, value = lines[index]
        if target in shapes and not value.startswith("filled("):
            other = f"filled(x, {', '.join(map(str, shapes[target]))})"
            yield (*lines[:index], (target, other), *lines[index + 1 :])
    for index in range(len(lines) - 1):
        target = lines[index][0]
        rest = lines[index + 1 :]
        if target not in shapes or not any(
            re.search(rf"\b{target}\b", part) for line in rest for part in line
        ):
            yield (*lines[:index], *rest)


def _fails(program: Program, kind: str) -> bool:
    try:
        return check(program, runs=ATTEMPTS).kind == kind
    except Exception:  # the shortened text is no program
        return False


def _shapes(program: Program) -> dict[str, tuple[int, ...]]:
    """Of each variable, for one sample."""
    names = {**NAMES, "c": program.constants, "p": program.params}
    names.update(zip(("x", "ids", "y"), (t[:1] for t in program.batch), strict=True))
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        for target, value in program.lines[:-1]:
            exec(f"{target} = {value}" if target else value, names)
            made = names.get(target)
            if isinstance(made, Tensor) and made.is_floating_point():
                shapes[target] = tuple(made.shape)
    return shapes
