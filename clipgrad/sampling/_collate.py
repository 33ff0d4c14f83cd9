"""Collate samples into batches that can be empty, padded or grouped by user."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

T = TypeVar("T")


class EmptyBatchCollate:
    """This class collates as ``collate_fn`` does, and collates an empty batch into tensors of length 0.

    ``default_collate([])`` fails. The structure of an empty batch is inferred from two batches, of the example once and
    of the example twice: tensors and lists that differ by one entry get length 0, numbers and strings stay.

    Args:
        example: One sample, such as ``dataset[0]``.
        collate_fn: Makes tensors whose first axis is the batch axis, in any nesting of mappings, tuples, named tuples
            and lists.

    Raises:
        TypeError: If ``collate_fn`` returns an object whose empty version is unknown.

    Examples:
        >>> import torch
        >>> collate = EmptyBatchCollate({"x": torch.zeros(3), "label": 1})
        >>> {name: tuple(column.shape) for name, column in collate([]).items()}
        {'x': (0, 3), 'label': (0,)}
    """

    def __init__(
        self, example: Any, collate_fn: Callable[[list[Any]], Any] = default_collate
    ) -> None:
        self._collate = collate_fn
        self._empty = _infer_empty("", collate_fn([example]), collate_fn([example, example]))

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch of these samples; the list may be empty."""
        return self._collate(samples) if samples else copy.deepcopy(self._empty)


class PaddedBatch(NamedTuple):
    """This class holds a batch with a fixed number of rows, and marks the rows that are padding.

    Attributes:
        batch: The batch that ``collate_fn`` makes of the samples, followed by repetitions of them.
        is_padding: Boolean ``[rows]``: True for the repetitions. Pass it to ``backward``.
    """

    batch: Any
    is_padding: Tensor


class PaddingCollate:
    """This class collates into a :class:`PaddedBatch` with ``size`` rows.

    Padding repeats the samples of the batch, or ``example`` if the batch is empty. It is not zeros, because the loss of
    a zero row might not be finite.
    """

    def __init__(self, example: Any, collate_fn: Callable[[list[Any]], Any], size: int) -> None:
        self._example, self._collate, self._size = example, collate_fn, size

    def __call__(self, samples: list[Any]) -> PaddedBatch:
        """Return the padded batch of at most ``size`` samples."""
        rows = _repeat(samples or [self._example], self._size)
        return PaddedBatch(self._collate(rows), torch.arange(self._size) >= len(samples))


class UserCollate:
    """This class collates users, each a list of samples, into ``[users, width, ...]``.

    Free places repeat samples of the same user. ``collate_fn`` is as for :class:`EmptyBatchCollate`.
    """

    def __init__(self, example: Any, collate_fn: Callable[[list[Any]], Any], width: int) -> None:
        self._collate, self._width = EmptyBatchCollate(example, collate_fn), width

    def __call__(self, users: list[list[Any]]) -> tuple[Any, ...]:
        """Return the tensors of ``collate_fn`` and, last, ``present``: boolean ``[users, width]``."""
        flat = self._collate([s for samples in users for s in _repeat(samples, self._width)])
        batch = tree_map(lambda leaf: self._split(leaf, len(users)), flat)
        sizes = torch.tensor([len(samples) for samples in users], dtype=torch.int64)
        present = torch.arange(self._width) < sizes[:, None]
        return (*batch, present) if isinstance(batch, tuple | list) else (batch, present)

    def _split(self, leaf: Any, users: int) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.unflatten(0, (users, self._width))
        if leaf is None or isinstance(leaf, str | bytes | int | float):
            return leaf
        raise TypeError(
            f"collate_fn made a {type(leaf).__name__}, whose tensors cannot be split by user; return "
            "tensors in dicts, tuples or lists, such as dict(batch)."
        )


def padded(
    pad: bool,
    name: str,
    size: int | None,
    example: Any,
    collate: Callable[[list[Any]], Any],
) -> Callable[[list[Any]], Any]:
    """Return ``collate``, or with ``pad`` a :class:`PaddingCollate` around it; ``name`` is the argument of the size."""
    if not pad:
        return collate
    if size is None:
        raise ValueError(f"pad = True needs a size to pad to, but {name} is None; give {name}.")
    return PaddingCollate(example, collate, size)


def _repeat(samples: Sequence[T], size: int) -> list[T]:
    return list(islice(cycle(samples), size))


def _infer_empty(path: str, one: Any, two: Any) -> Any:
    """Return the batch of no samples, inferred from the batches of one and of two samples."""
    kind: Any = type(one)
    if isinstance(one, Tensor):
        if one.dim() and two.dim() and (one.shape[0], two.shape[0]) == (1, 2):
            return one[:0].clone()
    elif isinstance(one, Mapping):
        fields = {key: _infer_empty(f"{path}[{key!r}]", one[key], two[key]) for key in one}
        if not isinstance(one, MutableMapping):
            return fields
        batch = copy.copy(one)
        batch.update(fields)
        return batch
    elif isinstance(one, Sequence) and not isinstance(one, str | bytes):
        if len(one) == len(two):
            columns: list[Any] = [
                _infer_empty(f"{path}[{i}]", *pair)
                for i, pair in enumerate(zip(one, two, strict=True))
            ]
            return kind(*columns) if hasattr(one, "_fields") else kind(columns)
        if (len(one), len(two)) == (1, 2):
            return kind()
    elif one is None or (isinstance(one, str | bytes | int | float) and one == two):
        return one
    raise TypeError(
        f"collate_fn made batch{path} a {kind.__name__} that does not grow by one entry per "
        "sample, so its empty version is unknown; return tensors whose first axis is the batch, in "
        "mappings, tuples or lists."
    )


def is_text(column: Any) -> bool:
    """Return whether a column of a batch holds strings, which have no gradient."""
    if not isinstance(column, list | tuple):
        return False
    return bool(column) and all(isinstance(value, str | bytes) for value in column)
