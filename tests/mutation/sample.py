"""This module makes a seeded sample of mutants by the operators of cosmic-ray (``pip install cosmic-ray``)."""

from __future__ import annotations

import ast
import difflib
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.mutation.plugin import ROOMS

# They change nothing that could be observed: identity of small values, how a function is cached or described.
EQUIVALENT = re.compile(
    r"_(Is_Eq|IsNot_NotEq|Eq_Is|NotEq_IsNot)$|^(NoOp|VariableReplacer|VariableInserter)$"
)
DESCRIBES = re.compile(r"cache|overload|wraps|override|final|runtime_checkable|dataclass|hookimpl")


def spans_without_effect(tree: ast.Module) -> Iterator[tuple[int, int, int, int]]:
    """Yield the code whose changes no test needs to notice: annotations, error messages, names, docstrings."""
    nodes: list[Any] = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
            or (isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"))
        ):
            nodes.append(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            nodes += [node.returns] if node.returns else []
            nodes += [d for d in node.decorator_list if DESCRIBES.search(ast.unparse(d))]
        elif isinstance(node, ast.ClassDef):
            nodes += [d for d in node.decorator_list if DESCRIBES.search(ast.unparse(d))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("zip", "warnings.warn"):
            nodes += [k.value for k in node.keywords]  # strict=True, stacklevel=2
        elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            nodes.append(node.annotation)
    for node in nodes:
        yield node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def mutants_of(path: str) -> Iterator[dict[str, Any]]:
    """Yield every mutant of a file, each with a patch."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    source = Path(path).read_text(encoding="utf-8")
    tree = get_ast(source)
    dead = list(spans_without_effect(ast.parse(source)))
    nodes, provider = list(ast_nodes(tree)), OperatorProvider()
    for name in provider:
        if EQUIVALENT.search(name):
            continue
        operator = provider[name]()
        starts = [start for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (line, column) in enumerate(starts):
            if any((a, b) <= (line, column) < (c, d) for a, b, c, d in dead):
                continue
            # The decorator begins with its @, one column before the expression that ast knows.
            if name == "RemoveDecorator" and DESCRIBES.search(source.split("\n")[line - 1]):
                continue
            yield {
                "file": path,
                "line": line,
                "operator": name,
                "make": (source, operator, occurrence, mutate_code),
            }


def patch(mutant: dict[str, Any]) -> str | None:
    """Return the mutant as a unified diff; None if it is not valid Python or the same program."""
    source, operator, occurrence, mutate_code = mutant["make"]
    mutated = mutate_code(source, operator, occurrence)
    try:
        same = mutated is None or ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    if same:
        return None
    lines = [text.splitlines(keepends=True) for text in (source, mutated)]
    return "".join(difflib.unified_diff(*lines, f"a/{mutant['file']}", f"b/{mutant['file']}"))


def make_sample(count: int, seed: int) -> list[dict[str, Any]]:
    """Sample in proportion to the rooms' lines, at most one mutant per line, each kind of operator equally likely."""
    random_source = random.Random(seed)
    by_room: dict[str, dict[tuple[str, int], list[dict[str, Any]]]] = {}
    for room in ROOMS:
        found = defaultdict(list)
        for path in sorted(Path("clipgrad", room).rglob("*.py")):
            for mutant in mutants_of(str(path)):
                found[mutant["file"], mutant["line"]].append(mutant)
        by_room[room] = found
    total = sum(map(len, by_room.values()))
    sample = []
    for room in ROOMS:
        places = sorted(by_room[room])
        random_source.shuffle(places)
        wanted = round(count * len(places) / total)
        for place in places:
            if not wanted:
                break
            kinds = defaultdict(list)
            for mutant in by_room[room][place]:
                kinds[mutant["operator"].split("_")[0]].append(mutant)
            chosen = random_source.choice(kinds[random_source.choice(sorted(kinds))])
            diff = patch(chosen)
            if diff:
                wanted -= 1
                sample.append({k: v for k, v in chosen.items() if k != "make"} | {"diff": diff})
    random_source.shuffle(sample)  # a run that is cut short has some of each room
    return sample
