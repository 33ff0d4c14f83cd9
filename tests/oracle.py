"""The slow oracle: per-sample gradients by a python loop, without vmap, and their clipped sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Gradients = dict[str, Tensor]


def batch_size(batch: tuple[Any, ...]) -> int:
    """The length of the first axis of the batch's tensors."""
    return int(
        next(leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
    )


def sample(batch: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """A batch of one: sample `index`, its batch axis kept."""
    one: tuple[Any, ...] = pytree.tree_map(
        lambda leaf: leaf[index : index + 1] if isinstance(leaf, Tensor) else leaf, batch
    )
    return one


def gradients(model: nn.Module, loss: Callable[..., Tensor], batch: tuple[Any, ...]) -> Gradients:
    """The gradient of the loss by trainable parameter; zero where the loss does not reach."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.grad for name, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    # backward() rather than autograd.grad(): reentrant checkpoints forbid the latter.
    value = loss(model, *batch)
    value.backward()  # type: ignore[no-untyped-call]
    found = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        for name, p in trained.items()
    }
    for name, parameter in trained.items():
        parameter.grad = before[name]
    return found


def per_sample_gradients(
    model: nn.Module, loss: Callable[..., Tensor], batch: tuple[Any, ...]
) -> Gradients:
    """For each trainable parameter, (batch, *shape): the gradient of each sample on its own."""
    each = [gradients(model, loss, sample(batch, index)) for index in range(batch_size(batch))]
    return {name: torch.stack([one[name] for one in each]) for name in each[0]}


def clipped_sum(per_sample: Gradients, max_grad_norm: float) -> tuple[Gradients, Tensor]:
    """Sum over samples of min(1, C / norm) times gradient, and the norms before clipping."""
    size = len(next(iter(per_sample.values())))
    sums = {name: torch.zeros_like(stacked[0]) for name, stacked in per_sample.items()}
    norms = []
    for index in range(size):
        pieces = [stacked[index] for stacked in per_sample.values()]
        norm = torch.cat([piece.flatten() for piece in pieces]).norm()
        factor = min(1.0, max_grad_norm / float(norm)) if norm > 0 else 1.0
        for name, stacked in per_sample.items():
            sums[name] += factor * stacked[index]
        norms.append(norm)
    return sums, torch.stack(norms)
