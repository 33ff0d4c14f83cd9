"""This file defines the result, in code that is written to be obviously right: it is the oracle of every test.

For each sample it computes gradient, norm and clipping factor, and then the sum. Fast code never imports this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

Params = dict[str, Tensor]


def per_sample_gradients(fn: Callable[..., Tensor], params: Params, *batch: Any) -> Params:
    """Compute ``vmap(grad(fn))`` over the samples of ``batch``; ``fn`` sees a batch of one.

    Args:
        fn: ``fn(params, *batch) -> scalar``.
        params: Parameters by name.
        *batch: Tensors (or pytrees of tensors) with a leading batch axis.

    Returns:
        ``[B, *shape]`` for every parameter.
    """

    def one_sample(params: Params, *sample: Any) -> Tensor:
        return fn(params, *tree_map(lambda leaf: leaf[None], sample))

    result: Params = vmap(
        grad(one_sample), in_dims=(None, *[0] * len(batch)), randomness="different"
    )(params, *batch)
    return result


def per_sample_gradients_by_loop(
    fn: Callable[..., Tensor], params: Params, *batch: Any
) -> tuple[Tensor, Params]:
    """Compute per-sample gradients in a plain loop, which also runs operations that ``vmap`` does not support.

    Args:
        fn: ``fn(params, *batch) -> scalar``.
        params: Parameters by name.
        *batch: Tensors (or pytrees of tensors) with a leading batch axis.

    Returns:
        The losses ``[B]``, and ``[B, *shape]`` for every parameter; zeros where a loss does not depend on it.
    """
    losses, gradients = [], []
    for i in range(len(tree_leaves(batch)[0])):
        leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        loss = fn(leaves, *tree_map(lambda leaf, i=i: leaf[i : i + 1], batch))
        found = torch.autograd.grad(
            loss, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        losses.append(loss.detach())
        gradients.append({n: g.to_dense() for n, g in zip(leaves, found, strict=True)})
    return torch.stack(losses), {
        name: torch.stack([gradient[name] for gradient in gradients]) for name in params
    }


def clipped_sum(gradients: Params, max_grad_norm: float) -> tuple[Params, Tensor]:
    """Return ``sum_i min(1, C / ||g_i||) g_i`` and norms ``||g_i||``, ``[B]``; gradients with NaN or inf count as 0."""
    size = len(next(iter(gradients.values())))
    total = {name: torch.zeros_like(gradient[0]) for name, gradient in gradients.items()}
    norms = []
    for i in range(size):
        squares = [gradient[i].square().sum() for gradient in gradients.values()]
        norm = torch.stack(squares).sum().sqrt()
        norms.append(norm)
        factor = 1.0 if norm <= max_grad_norm else max_grad_norm / norm
        if not torch.isfinite(norm):
            continue
        for name, gradient in gradients.items():
            total[name] += factor * gradient[i]
    return total, torch.stack(norms)
