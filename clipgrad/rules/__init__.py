"""This package holds exact, faster rules for known operations; importing the package registers the rules."""

from __future__ import annotations

from clipgrad.rules import (  # noqa: F401 - each registers its rules
    attention,
    channel_normalization,
    convolution,
    einsum,
    embedding,
    embedding_bag,
    linear,
    loss,
    normalization,
    recurrent,
)
from clipgrad.rules.canonical import Outer, PerSample, Use
from clipgrad.rules.one_hot import OneHot
from clipgrad.rules.registry import (
    Call,
    Decline,
    Decomposition,
    Extent,
    Recipe,
    Rule,
    register_decomposition,
    register_rule,
    rules,
    unregister_rule,
)

__all__ = [
    "Call",
    "Decline",
    "Decomposition",
    "Extent",
    "OneHot",
    "Outer",
    "PerSample",
    "Recipe",
    "Rule",
    "Use",
    "register_decomposition",
    "register_rule",
    "rules",
    "unregister_rule",
]
