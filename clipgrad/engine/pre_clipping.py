"""This module lets the user transform per-sample gradients before they are clipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten

from clipgrad.engine.flat_tree import Restore

PreClipping = Callable[[list[Tensor]], list[Tensor]]
"""A function from the per-sample gradients of all parameters to as many gradients of the same shapes."""


def on_leaves(transform: Callable[[Any], Any], restore: Restore) -> PreClipping:
    """Return the user's transform of per-sample gradients as a function from leaves to leaves.

    Args:
        transform: The user's function from a tree of per-sample gradients to such a tree.
        restore: A function from leaves to the tree that ``transform`` receives.
    """

    def apply(gradients: list[Tensor]) -> list[Tensor]:
        before = restore(gradients)
        leaves, structure = tree_flatten(transform(before))
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
        floating = all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        same = structure == tree_flatten(before)[1]
        if not (floating and same and shapes == [tuple(g.shape) for g in gradients]):
            raise ValueError(
                "pre_clipping_transform must return per-sample gradients of the structure and shapes it "
                "received (a floating-point [B, *parameter.shape] for every parameter)."
            )
        return leaves

    return apply
