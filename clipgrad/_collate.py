"""What a batch without samples looks like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate


class EmptyBatchCollate:
    """Collates as ``collate_fn`` does, and an empty batch into tensors of length 0.

    ``default_collate([])`` fails. What an empty batch looks like follows from how the example
    collates once and twice: tensors and lists that grow by one get length 0, numbers and strings
    stay.

    Args:
        example: One sample, such as ``dataset[0]``.
        collate_fn: Makes tensors whose first axis is the batch, in any nesting of mappings, tuples,
            named tuples and lists.

    Raises:
        TypeError: If ``collate_fn`` returns something of which no empty version is known.

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
        self._empty = _emptied("", collate_fn([example]), collate_fn([example, example]))

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of these samples, of which there may be none."""
        return self._collate(samples) if samples else copy.deepcopy(self._empty)


def _emptied(path: str, one: Any, two: Any) -> Any:
    """The batch of no samples, from the batches of one and of two."""
    kind: Any = type(one)
    if isinstance(one, Tensor):
        if one.dim() and two.dim() and (one.shape[0], two.shape[0]) == (1, 2):
            return one[:0].clone()
    elif isinstance(one, Mapping):
        fields = {key: _emptied(f"{path}[{key!r}]", one[key], two[key]) for key in one}
        if not isinstance(one, MutableMapping):
            return fields
        batch = copy.copy(one)
        batch.update(fields)
        return batch
    elif isinstance(one, Sequence) and not isinstance(one, str | bytes):
        if len(one) == len(two):
            columns: list[Any] = [
                _emptied(f"{path}[{i}]", *pair) for i, pair in enumerate(zip(one, two, strict=True))
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
