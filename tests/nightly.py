"""Which parameters of a test always run, and which with ``--nightly`` only: nothing is left out for good."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest

Parameter = Any
"""What ``pytest.param`` returns; its class is private."""


def _named(value: Any) -> str:
    return str(getattr(value, "name", getattr(value, "__name__", value)))


def thinned(
    values: Iterable[Any], short: Callable[[Any], bool], name: Callable[[Any], str] = _named
) -> list[Parameter]:
    """Each value as a parameter; nightly where ``short`` says no.

    Args:
        values: In order.
        short: Whether a value always runs.
        name: The id of a value: by default its own name, or how it is printed.
    """
    return [_parameter((value,), short(value), name(value)) for value in values]


def chosen(values: Iterable[str], short: Collection[str]) -> list[Parameter]:
    """Names of which ``short`` always run.

    Raises:
        ValueError: If ``short`` holds another name.
    """
    values = list(values)
    unknown = set(short) - set(values)
    if unknown:
        raise ValueError(f"{sorted(unknown)} is not among {values}")
    return thinned(values, short.__contains__)


def picked(values: Iterable[tuple[Any, ...]], short: Collection[str]) -> list[Parameter]:
    """Values of several arguments, of which those whose ids are in ``short`` always run.

    Args:
        values: In order.
        short: Ids, which are the names of the arguments with a hyphen in between.

    Raises:
        ValueError: If ``short`` holds another id.
    """
    named = [("-".join(map(_named, row)), row) for row in values]
    unknown = set(short) - {name for name, _ in named}
    if unknown:
        raise ValueError(f"{sorted(unknown)} is not among {[name for name, _ in named]}")
    return [_parameter(row, name in short, name) for name, row in named]


def every(step: int, values: Iterable[Any], name: Callable[[Any], str] = _named) -> list[Parameter]:
    """Each ``step``-th value always runs, from the first on."""
    return [
        _parameter((value,), index % step == 0, name(value)) for index, value in enumerate(values)
    ]


def rows(step: int, values: Iterable[tuple[Any, ...]]) -> list[Parameter]:
    """The same for values of several arguments."""
    return [
        _parameter(row, index % step == 0, "-".join(map(_named, row)))
        for index, row in enumerate(values)
    ]


def pairs(*axes: Sequence[Any]) -> list[Parameter]:
    """The full product; what always runs holds each two values of two axes together at least once.

    Args:
        *axes: The values of each axis, hashable.
    """
    product = list(itertools.product(*axes))
    wanted = {pair for row in product for pair in _pairs_of(row)}
    short = set()
    while wanted:
        best = max(product, key=lambda row: len(wanted & _pairs_of(row)))
        short.add(best)
        wanted -= _pairs_of(best)
    return [_parameter(row, row in short, "-".join(map(_named, row))) for row in product]


def some(count: int, *axes: Sequence[Any]) -> list[Parameter]:
    """The full product; one of ``count`` rows always runs, taken so that each value of each axis is among them."""
    places = itertools.product(*(range(len(axis)) for axis in axes))
    product = itertools.product(*axes)
    return [
        _parameter(row, sum(place) % count == 0, "-".join(map(_named, row)))
        for row, place in zip(product, places, strict=True)
    ]


def _pairs_of(row: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(enumerate(row), 2))


def _parameter(values: tuple[Any, ...], short: bool, name: str) -> Parameter:
    return pytest.param(*values, id=name, marks=[] if short else [pytest.mark.nightly])
