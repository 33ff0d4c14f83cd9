"""Turn the arguments of ``backward`` into pytrees of tensors whose first axis counts samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_is_leaf

from clipgrad.sampling._collate import is_text

Loss = Callable[..., Any]


def parts_of(batch: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the positional parts of a batch; arguments by name become a last part, for ``by_name``.

    A mapping that is no pytree, such as Hugging Face's ``BatchEncoding``, becomes a dictionary. Columns of strings,
    which no model takes, are dropped.

    Warns:
        UserWarning: If columns are dropped.
    """
    if not named and all(type(part) is Tensor for part in batch):
        return batch
    parts = list(batch)
    # A comprehension's frame would come between the warning and the caller's line.
    for index, part in enumerate(batch):
        if isinstance(part, Mapping):
            parts[index] = _columns(part)
    return (*parts, _columns(named)) if named else tuple(parts)


def by_name(loss_fn: Loss) -> Loss:
    """Return the loss as a function of parts, the last of which holds arguments by name."""

    def loss(model: Any, *parts: Any) -> Any:
        return loss_fn(model, *parts[:-1], **parts[-1])

    return loss


def _columns(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    dropped = [name for name, column in batch.items() if is_text(column)]
    if dropped:
        warnings.warn(
            f"backward: the batch's columns {', '.join(map(repr, dropped))} hold strings, which have no gradient; they "
            "are dropped before loss_fn sees the batch. Remove them from the dataset, or in collate_fn.",
            stacklevel=4,
        )
    elif not tree_is_leaf(batch):
        return batch
    return {name: column for name, column in batch.items() if name not in dropped}
