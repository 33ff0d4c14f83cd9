"""Compute the black-box score: the model's loss on each canary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def canary_losses(model: nn.Module, loss_fn: Callable[..., Tensor], *canaries: Any) -> torch.Tensor:
    """Return the loss of each canary, one canary at a time, in evaluation mode.

    Compute the losses before and after training; ``before - after``, the decrease of a canary's loss, is the score of
    the black-box audit. It needs the trained model only, and shows much less than :class:`StepRecorder`.

    Args:
        model: The model. Training flags of its modules and the state of the random number generators stay unchanged.
        loss_fn: ``loss_fn(model, *batch) -> scalar``, as for :class:`~clipgrad.DPOptimizer`.
        *canaries: The arguments of ``loss_fn`` after the model: pytrees of tensors, ``[m, ...]``.

    Returns:
        ``[m]``, detached. A loss that is not finite is returned as it is.

    Raises:
        ValueError: If the tensors' first axes differ.

    Examples:
        >>> def loss_fn(model, x, y):
        ...     return torch.nn.functional.mse_loss(model(x), y)
        >>> canary_losses(
        ...     torch.nn.Linear(3, 1), loss_fn, torch.zeros(5, 3), torch.zeros(5, 1)
        ... ).shape
        torch.Size([5])
    """
    m = count(canaries)
    with torch.no_grad(), rng_restored(model), eval_mode(model):
        losses = [
            loss_fn(model, *tree_map(lambda leaf, i=i: leaf[i : i + 1], canaries)) for i in range(m)
        ]
    return torch.stack(losses).reshape(m).detach()


def count(canaries: Any) -> int:
    """Return the number of canaries in a pytree of ``[m, ...]`` tensors, at least 1."""
    leaves = tree_leaves(canaries)
    sizes = {len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size:
        raise ValueError(
            "canaries must be tensors, at least one, whose first axes have the same positive length, got "
            f"{[tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]}."
        )
    return size


@contextmanager
def rng_restored(model: nn.Module) -> Iterator[None]:
    """Restore the state of the random number generators on exit, since dropout changes it."""
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda, key=str), device_type="cuda"):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to ``model.eval()`` and restore each module's own flag on exit."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
