"""Which operations of a graph may use random numbers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

_KNOWN = {"aten", "prims", "clipgrad"}
_OF_SYMBOLS = {"_operator", "math"}
"""Python's modules of the functions that a graph calls for sizes with symbols."""


def may_be_random(node: Node) -> bool:
    """Return whether a node may use random numbers; operations of other packages are assumed to."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    target = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__module__", None) not in _OF_SYMBOLS
    if target.namespace not in _KNOWN:
        return True
    return torch.Tag.nondeterministic_seeded in target.tags and _dropout(node) != 0.0


def _dropout(node: Node) -> Any:
    """The probability of dropout in fused attention, which draws nothing without; None for other operations."""
    assert isinstance(node.target, OpOverload)
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.kwargs.get(argument.name, argument.default_value)
            return node.args[index] if index < len(node.args) else given
    return None
