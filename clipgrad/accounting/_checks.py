"""Check single arguments. An error names the argument, its value and the remedy."""

from __future__ import annotations

import math
import numbers
from enum import Enum
from typing import Literal

Accountant = Literal["pld", "rdp", "rdp_integer"]


def at_least_0(name: str, value: object, *, infinity: bool = False) -> float:
    """Return ``value`` as a float, at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    number = float(value)
    if not (number >= 0.0 and (infinity or math.isfinite(number))):
        allowed = "at least 0" if infinity else "at least 0 and finite"
        raise ValueError(f"{name} must be {allowed}, got {number}.")
    return number


def integer(name: str, value: object, *, least: int) -> int:
    """Return ``value`` as an int, at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ValueError(f"{name} must be an integer, at least {least}, got {value!r}.")
    return int(value)


def rate(name: str, value: object) -> float:
    """Return ``value`` as a probability other than 0."""
    number = at_least_0(name, value)
    if not 0.0 < number <= 1.0:
        raise ValueError(
            f"{name} must be positive and at most 1, got {number}; it is the expected batch "
            "size divided by the size of the dataset."
        )
    return number


def probability(name: str, value: object) -> float:
    """Return ``value`` as a probability other than 0 and 1."""
    number = at_least_0(name, value)
    if not 0.0 < number < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {number}; 1e-5, for example.")
    return number


def accountant_name(value: object) -> str:
    """Return ``value`` if it is an accountant's name."""
    return _one_of("accountant", value, ("pld", "rdp", "rdp_integer"))


def relation_name(value: object) -> str:
    """Return the name of a relation, given by name or as a member of ``clipgrad.Relation`` (which needs torch)."""
    name = value.name.lower() if isinstance(value, Enum) else value
    return _one_of("relation", name, ("add_or_remove_one", "replace_one", "replace_special"))


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
    return value
