"""Weights that meet an activation in a matrix product: ``linear``, ``matmul``, ``mm``, ``addmm``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules._canonical import Outer, PerSample, widen
from clipgrad.rules._registry import Call, Decline, Extent, Recipe, register_rule


def positions_first(tensor: Tensor) -> Tensor:
    """``[B, ..., features]`` to ``[B, S, features]``."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor if tensor.dim() == 3 else tensor.flatten(1, -2)


def summed_over_positions(gradient: Tensor) -> PerSample:
    """The use of a bias: the output gradient summed over positions, ``[B, features]``."""
    if gradient.dim() == 2:
        return PerSample(gradient)
    return PerSample(gradient.flatten(1, -2).sum(1, dtype=widen(gradient[:0]).dtype))


def count_positions(tensor: Tensor) -> int:
    """Positions of ``[B, ..., features]``, per sample."""
    return tensor.shape[1:-1].numel()


@register_rule(F.linear, name="linear")
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + b``: rows of W from the output gradient, columns from the input."""
    if not call.has_lanes(input):
        raise Decline
    x, w = call.batched(input), call.shared(weight)
    if w.dim() != 2:
        raise Decline
    y = F.linear(x, w, None if bias is None else call.shared(bias))
    return call.finish(
        y,
        Recipe(
            weight,
            lambda g: Outer(positions_first(g), positions_first(x), w.shape),
            Extent(count_positions(x), w.shape[0], w.shape[1]),
        ),
        Recipe(bias, summed_over_positions),
        saved=(x,),
    )


@register_rule(
    torch.matmul, torch.Tensor.matmul, torch.mm, torch.Tensor.mm, torch.mv, torch.Tensor.mv,
    torch.Tensor.__rmatmul__, name="matmul",
)  # fmt: skip
def matmul(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """``x @ W`` or ``W @ x`` with a weight of one or two axes."""
    left_lanes, right_lanes = call.has_lanes(input), call.has_lanes(other)
    if left_lanes == right_lanes:
        raise Decline
    return _data_times_weight(call, input, other) if left_lanes else _weight_times_data(call, input, other)


def _data_times_weight(call: Call, data: Tensor, weight: Tensor) -> Tensor:
    x, w = call.batched(data), call.shared(weight)
    if w.dim() > 2:
        raise Decline
    vector = w.dim() == 1
    columns = 1 if vector else w.shape[1]
    return call.finish(
        torch.matmul(x, w),
        Recipe(
            weight,
            lambda g: Outer(positions_first(x), positions_first(g[..., None] if vector else g), w.shape),
            Extent(count_positions(x), w.shape[0], columns),
        ),
        saved=(x,),
    )


def _weight_times_data(call: Call, weight: Tensor, data: Tensor) -> Tensor:
    w, x = call.shared(weight), call.batched(data)
    if w.dim() != 2:
        raise Decline
    if x.dim() == 2:  # a vector per sample
        y, columns = torch.matmul(x, w.t()), x
        return call.finish(
            y,
            Recipe(weight, lambda g: Outer(g[:, None], columns[:, None], w.shape), Extent(1, *w.shape)),
            saved=(x,),
        )
    return call.finish(
        torch.matmul(w, x),
        Recipe(
            weight,
            lambda g: Outer(positions_first(g.mT), positions_first(x.mT), w.shape),
            Extent(count_positions(x.mT), *w.shape),
        ),
        saved=(x,),
    )


@register_rule(torch.addmm, torch.Tensor.addmm, name="addmm")
def addmm(
    call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """``beta * bias + alpha * x @ W`` with the weight on the right, as in Hugging Face's ``Conv1D``."""
    if not call.has_lanes(mat1) or call.has_lanes(input) or input.dim() != 1:
        raise Decline
    x, w, b = call.batched(mat1), call.shared(mat2), call.shared(input)
    y = torch.addmm(b, x.flatten(0, 1), w, beta=beta, alpha=alpha).unflatten(0, x.shape[:2])
    return call.finish(
        y,
        Recipe(
            mat2,
            lambda g: Outer(x, g if alpha == 1 else g * alpha, w.shape),
            Extent(x.shape[1], w.shape[0], w.shape[1]),
        ),
        Recipe(input, lambda g: summed_over_positions(g if beta == 1 else g * beta)),
        saved=(x,),
    )
