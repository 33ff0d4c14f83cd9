"""Refuse a collate function whose rows hold values of several samples, as mixup and CutMix make them.

Clipping bounds what a row contributes. If a sample is in several rows, or other rows depend on it, it contributes more
than the noise hides.
"""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_ROWS = 3
# Random numbers that change one row of twenty show in the trials, or else are not taken for a mixture: most batches
# hold the sample's row. Mixup with random partners changes most rows.
_TRIALS = 16
_BATCHES = 12
_EVIDENCE = 4
_TOLERANCE = 1e-4  # Mixing a sample with copies of itself gives the sample up to rounding.
_Row = list[Tensor]


class _CollateError(Exception):
    """The collate function raised an error."""


def refuse_mixing(dataset: Any, count: int, collate: Callable[[list[Any]], Any]) -> None:
    """Refuse a collate function that mixes samples.

    A batch of copies of one sample shows what the sample's row should be. In a batch of different samples, some row
    must equal it. The check finds nothing where it cannot compare: if collating draws random numbers for each row, if
    rows have another length in another batch, or if the samples that it takes are equal.

    Args:
        dataset: A map-style dataset.
        count: Number of its samples.
        collate: Makes a batch of samples.

    Raises:
        ValueError: If it mixes samples.
    """
    if count < _ROWS:
        return
    chosen = (0, count // 2, count - 1)
    try:
        with _without_traces():
            sample, *others = [dataset[index] for index in chosen]
            mixes = _mixes(sample, others, collate)
    except _CollateError:
        return  # it fails again, with its own message, when the loader makes a batch
    if mixes:
        first, second, third = chosen
        raise ValueError(
            f"collate_fn={getattr(collate, '__name__', type(collate).__name__)} mixes samples (mixup, CutMix, a mean "
            f"or a weight over the batch): the row of sample {first} is another one beside the samples {second} and "
            f"{third} than beside copies of itself. Clipping bounds a row, so a sample that changes several rows is "
            "not protected. Let each row depend on its own sample alone, or mix views of one sample in the dataset."
        )


def _mixes(sample: Any, others: Sequence[Any], collate: Callable[[list[Any]], Any]) -> bool:
    """Return whether the row of a sample depends on the others."""
    alone = _rows(collate, [sample] * _ROWS)
    for _ in range(_TRIALS):
        again = _rows(collate, [sample] * _ROWS)
        if not all(_equal(*pair) for pair in zip(alone, again, strict=True)):
            return False  # random numbers for each row
    missing = 0
    for trial in range(_BATCHES):
        place = trial % _ROWS
        batch = [*others[:place], sample, *others[place:]]
        others = others[::-1]
        missing += _is_missing(alone, _rows(collate, batch))
    return missing >= _EVIDENCE


def _is_missing(expected: Sequence[_Row], found: Sequence[_Row]) -> bool:
    """Return whether no row is that of the sample.

    Args:
        expected: The sample's row at each place of a batch, which may depend on the place.
        found: The rows of another batch, which may be in another order than its samples.
    """
    at_its_place = any(_equal(*pair) for pair in zip(expected, found, strict=True))
    return not at_its_place and not any(_equal(expected[0], row) for row in found)


def _rows(collate: Callable[[list[Any]], Any], samples: Sequence[Any]) -> list[_Row]:
    """Return the tensors of each row of a batch."""
    try:
        batch = collate([_copied(sample) for sample in samples])
    except Exception as error:
        raise _CollateError from error
    leaves = [leaf for leaf in _leaves(batch) if leaf.dim() and leaf.shape[0] == len(samples)]
    return [[leaf[index] for leaf in leaves] for index in range(len(samples))]


def _leaves(batch: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            if leaf.layout is torch.strided and not leaf.is_nested:
                yield leaf
        elif isinstance(leaf, Mapping):  # one that is no pytree node, such as a BatchEncoding
            yield from _leaves(dict(leaf))


def _copied(sample: Any) -> Any:
    """Return a copy, since some collate functions take columns out of the samples."""
    return copy.copy(sample) if isinstance(sample, Mapping | list) else sample


def _equal(one: _Row, other: _Row) -> bool:
    """Return whether two rows are equal where they have the same tensors of the same shape."""
    if len(one) != len(other):
        return True
    return all(
        torch.allclose(
            a.to(torch.complex128), b.to(torch.complex128), _TOLERANCE, _TOLERANCE, equal_nan=True
        )
        for a, b in zip(one, other, strict=True)
        if a.shape == b.shape
    )


@contextmanager
def _without_traces() -> Iterator[None]:
    """Restore random number generators after the body, and hide its warnings."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), torch.get_rng_state()
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        torch.set_rng_state(states[1])
        if numpy is not None:
            numpy.random.set_state(numpy_state)
