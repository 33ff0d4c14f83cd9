"""This module flattens a pytree into leaves, and restores it from other leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

Restore = Callable[[Sequence[Any]], Any]
"""A function from leaves to the tree that holds them."""


TENSORS = {Tensor, nn.Parameter}
"""The types of leaves that need no further check."""


class FlatTree(NamedTuple):
    """This tuple holds a flattened pytree.

    Attributes:
        leaves: The leaves in order.
        structure: Equal for two trees exactly if they have the same structure.
        restore: A function from leaves to the tree.
        paths: A function that returns the keys of each leaf.
    """

    leaves: list[Any]
    structure: Any
    restore: Restore
    paths: Callable[[], list[tuple[Any, ...]]]

    def names(self) -> list[str]:
        """Return the keys of each leaf, joined by dots."""
        if type(self.structure) is tuple and self.structure[0] is dict:
            return list(self.structure[1])
        return [".".join(map(_component, path)) for path in self.paths()]


def flatten(tree: Any) -> FlatTree:
    """Flatten a pytree; a flat dictionary or tuple of tensors is handled without PyTorch's slower function."""
    kind = type(tree)
    if (
        kind is dict
        and TENSORS.issuperset(map(type, tree.values()))
        and {str}.issuperset(map(type, tree))
    ):
        keys = tuple(tree)
        return FlatTree(
            list(tree.values()),
            (dict, keys),
            lambda leaves: dict(zip(keys, leaves, strict=True)),
            lambda: _paths(tree),
        )
    if kind is tuple and TENSORS.issuperset(map(type, tree)):
        return FlatTree(list(tree), (tuple, len(tree)), tuple, lambda: _paths(tree))
    leaves, spec = tree_flatten(tree)
    return FlatTree(
        leaves, spec, lambda values: tree_unflatten(list(values), spec), lambda: _paths(tree)
    )


def _paths(tree: Any) -> list[tuple[Any, ...]]:
    return [path for path, _ in tree_flatten_with_path(tree)[0]]


def _component(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
