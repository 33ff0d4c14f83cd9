"""A rule takes the place of an operation, so its parameters have the operation's names, order and defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F

from clipgrad.engine.fallback import CORRECTIONS
from clipgrad.rules import Rule, rules

Defaults = dict[str, Any]
NONE = inspect.Parameter.empty


def of_python(function: Callable[..., Any]) -> Defaults | None:
    """The parameters of a Python function; None for a builtin, and for one that dispatches on a flag first."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    return None if "args" in parameters else {n: p.default for n, p in parameters.items()}


def of_schema(function: Callable[..., Any]) -> Defaults | None:
    """The arguments of an overload of ATen."""
    schema = getattr(function, "_schema", None)
    if schema is None:
        return None
    return {a.name: a.default_value if a.has_default_value() else NONE for a in schema.arguments}


def of_entry(entry: Any) -> Defaults | None:
    """What a rule or a correction takes after ``call``; None for one that hands its arguments on."""
    found = of_python(getattr(entry, "apply", entry))
    if found is None or ("kwargs" in found and next(iter(found.values())) is NONE):
        return None
    names = list(found)[1 if isinstance(entry, Rule) else 0 :]
    return {name: found[name] for name in names}


CASES = [
    (
        f"{getattr(entry, 'name', 'correction')}-{getattr(operation, '__name__', operation)}",
        operation,
        entry,
    )
    for table in (rules(), CORRECTIONS)
    for operation, entry in table.items()
    if of_entry(entry) and (of_python(operation) or of_schema(operation))
]


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, list | tuple) and not isinstance(ours, list | tuple):
        return all(value == ours for value in theirs)  # stride=1 and stride=[1, 1]
    return bool(ours == theirs) or (ours, theirs) == (0, "valid")  # the same padding


@pytest.mark.parametrize(
    ("operation", "entry"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_defaults(operation: Callable[..., Any], entry: Any) -> None:
    ours, theirs = of_entry(entry), of_python(operation) or of_schema(operation)
    assert ours is not None
    assert theirs is not None
    for (name, value), (operations_name, default) in zip(
        ours.items(), theirs.items(), strict=False
    ):
        if name == operations_name and default is not NONE:
            assert same(value, default), f"{name}: {value} here, {default} in PyTorch"


def test_the_operations_with_many_defaults_are_compared() -> None:
    operations = {operation for _, operation, _ in CASES}
    assert len(CASES) > 30
    assert {F.cross_entropy, F.embedding, F.embedding_bag, F.batch_norm} <= operations
    assert F.multi_head_attention_forward in operations
