"""This module has rules for matrix products of weights and activations: ``linear``, ``matmul``, ``mm``, ``addmm``."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.kernels.half_products import missing_to_alignment
from clipgrad.rules.canonical import Outer, PerSample
from clipgrad.rules.names import functional_aten_names_of
from clipgrad.rules.operands import lowered, widen
from clipgrad.rules.registry import Call, Decline, Extent, Recipe, register_rule

# A GPU is fast at products whose rows are aligned. Three products of a layer write its output or read the output's
# gradient. With this many outputs or more, such as a vocabulary, a copy of the weight with rows of zeros aligns both.
_WIDE_OUTPUT = 4096


def positions_first(tensor: Tensor) -> Tensor:
    """Reshape ``[B, ..., features]`` to ``[B, S, features]``."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    return tensor if tensor.dim() == 3 else tensor.flatten(1, -2)


def sum_over_positions(gradient: Tensor) -> PerSample:
    """Return the use of a bias: the output gradient summed over positions, ``[B, features]``."""
    if gradient.dim() == 2:
        return PerSample(gradient)
    return PerSample(gradient.flatten(1, -2).sum(1, dtype=widen(gradient[:0]).dtype))


@register_rule(F.linear, *functional_aten_names_of("linear"), name="linear")
def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Run ``y = x W^T + b``; the output gradient gives the rows of W and the input gives the columns."""
    if not call.has_batch_axis(input):
        raise Decline
    x, w = lowered(call.batched(input)), call.shared(weight)
    if w.dim() != 2 or (bias is not None and bias.shape != w.shape[:1]):
        raise Decline  # the gradient of a broadcast bias differs
    factor, rows = positions_first(x), w.shape[0]
    b = None if bias is None else call.shared(bias)
    # A frozen weight may be sparse, and PyTorch pads no sparse tensor.
    wide = rows >= _WIDE_OUTPUT and w.layout is torch.strided
    zeros = missing_to_alignment(rows, x) if wide else 0
    if zeros:
        w = F.pad(w, (0, 0, 0, zeros))
        b = None if b is None else F.pad(b, (0, zeros))

    def gradient(g: Tensor) -> Tensor:
        return g.reshape(*factor.shape[:2], rows + zeros)

    def view(y: Tensor) -> Tensor:
        if zeros:
            y = y[:, :rows].contiguous()
        return y.view(*x.shape[:-1], rows)

    shape = torch.Size((rows, w.shape[1]))
    return call.finish(
        # The input is flattened because with more axes PyTorch returns a view, which ``finish`` would copy.
        F.linear(factor.flatten(0, 1), w, b),
        Recipe(
            weight,
            lambda g: Outer(gradient(g), factor, shape, zeros=(zeros, 0)),
            Extent(factor.shape[1], *shape),
        ),
        Recipe(bias, lambda g: sum_over_positions(gradient(g)[..., :rows])),
        saved=(x,),
        view=view,
    )


@register_rule(
    torch.matmul, torch.Tensor.matmul, *functional_aten_names_of("matmul"), name="matmul"
)
def matmul(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Run ``x @ W`` with a weight of one or two axes, or ``W @ x`` with a weight of two."""
    left_has_batch_axis, right_has_batch_axis = (
        call.has_batch_axis(input),
        call.has_batch_axis(other),
    )
    if left_has_batch_axis == right_has_batch_axis:
        raise Decline
    return (
        _data_times_weight(call, input, other)
        if left_has_batch_axis
        else _weight_times_data(call, input, other)
    )


@register_rule(torch.Tensor.__rmatmul__, name="rmatmul")
def rmatmul(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Run ``other @ input``; the reflected operator receives its operands in reverse order."""
    return matmul(call, other, input)


@register_rule(torch.mm, torch.Tensor.mm, *functional_aten_names_of("mm"), name="mm")
def mm(call: Call, input: Tensor, mat2: Tensor) -> Tensor:
    """Run ``matmul`` of two matrices; the second argument is named ``mat2``."""
    return matmul(call, input, mat2)


@register_rule(torch.mv, torch.Tensor.mv, *functional_aten_names_of("mv"), name="mv")
def mv(call: Call, input: Tensor, vec: Tensor) -> Tensor:
    """Run ``matmul`` of a matrix and a vector; the second argument is named ``vec``."""
    on_cpu = input.device.type == "cpu"
    # Autocast lowers ``matmul`` on every device, but ``mv`` not on the CPU.
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        return matmul(call, input, vec)


def _data_times_weight(call: Call, data: Tensor, weight: Tensor) -> Tensor:
    x, w = lowered(call.batched(data)), call.shared(weight)
    if w.dim() > 2:
        raise Decline
    matrix = w[:, None] if w.dim() == 1 else w
    factor = positions_first(x)
    return call.finish(
        factor.flatten(0, 1) @ matrix,
        Recipe(
            weight,
            lambda g: Outer(factor, g.reshape(*factor.shape[:2], matrix.shape[1]), w.shape),
            Extent(factor.shape[1], *matrix.shape),
        ),
        saved=(x,),
        view=lambda y: y.view(*x.shape[:-1], *w.shape[1:]),
    )


def _weight_times_data(call: Call, weight: Tensor, data: Tensor) -> Tensor:
    w, x = call.shared(weight), lowered(call.batched(data))
    if w.dim() != 2:
        raise Decline
    vector = x.dim() == 2  # one vector per sample
    columns = x if vector else x.mT
    factor = positions_first(columns)

    def view(y: Tensor) -> Tensor:
        y = y.view(*columns.shape[:-1], w.shape[0])
        return y if vector else y.mT

    return call.finish(
        factor.flatten(0, 1) @ w.t(),
        Recipe(
            weight,
            lambda g: Outer(g.reshape(*factor.shape[:2], w.shape[0]), factor, w.shape),
            Extent(factor.shape[1], *w.shape),
        ),
        saved=(x,),
        view=view,
    )


@register_rule(torch.addmm, torch.Tensor.addmm, *functional_aten_names_of("addmm"), name="addmm")
def addmm(
    call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """Run ``beta * bias + alpha * x @ W`` with the weight on the right, as in Hugging Face's ``Conv1D``."""
    if not call.has_batch_axis(mat1) or call.has_batch_axis(input) or input.shape != mat2.shape[1:]:
        raise Decline  # a bias of any other shape is broadcast and has a different gradient
    x, w, b = lowered(call.batched(mat1)), call.shared(mat2), call.shared(input)
    y = torch.addmm(b, x.flatten(0, 1), w, beta=beta, alpha=alpha)

    def gradient(g: Tensor, scale: float) -> Tensor:
        return (g if scale == 1 else g * scale).reshape(*x.shape[:2], w.shape[1])

    return call.finish(
        y,
        Recipe(mat2, lambda g: Outer(x, gradient(g, alpha), w.shape), Extent(x.shape[1], *w.shape)),
        Recipe(input, lambda g: sum_over_positions(gradient(g, beta))),
        saved=(x,),
        view=lambda y: y.view(*x.shape[:2], w.shape[1]),
    )
