"""This module decomposes ``embedding_bag`` into an embedding lookup and a sum, mean or maximum per bag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad._functorch import Decline, below_vmap, current_level, expose_batch_axis
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.embedding_definition import refuse_max_norm
from clipgrad.rules.registry import register_decomposition


@register_decomposition(F.embedding_bag, name="embedding_bag")
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Look up rows and reduce them per bag; ``sparse`` is ignored, because clipped sums are dense.

    Calls that PyTorch refuses are declined, so that the user reads PyTorch's message.
    """
    refuse_max_norm(max_norm)
    if scale_grad_by_freq:
        raise Decline  # PyTorch's divisor depends on the device, so PyTorch's own function runs
    if input.is_floating_point() or mode not in ("sum", "mean", "max") or input.numel() == 0:
        raise Decline
    if input.dim() not in (1, 2) or (input.dim() == 2) != (offsets is None):
        raise Decline
    if offsets is not None and offsets.numel() == 0:
        raise Decline
    rows = F.embedding(input, weight, padding_idx)
    if per_sample_weights is not None:
        if mode != "sum" or per_sample_weights.shape != input.shape:
            raise Decline
        rows = rows * per_sample_weights.unsqueeze(-1)
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
    if offsets is None:
        return _reduce(rows, counted, mode)
    _check_offsets(offsets, input.shape[0])
    positions = torch.arange(input.shape[0], device=input.device)
    bag = (positions[:, None] >= offsets[None, :]).sum(1) - 1  # of each position
    bags = offsets.shape[0] - include_last_offset
    return _reduce_by_bag(rows, bag.where(counted, bags), bags, mode)


def _reduce(rows: Tensor, counted: Tensor, mode: str) -> Tensor:
    """Reduce ``[..., positions, features]`` to ``[..., features]`` over counted positions; an empty reduction is 0."""
    counted = counted.unsqueeze(-1)
    if mode == "max":
        # The first of equal positions gets the gradient, as in PyTorch; ``amax`` would divide it among them.
        largest = rows.masked_fill(~counted, float("-inf")).max(-2).values
        return largest.masked_fill(~counted.any(-2), 0)
    # Rows are masked, not multiplied by zero, because a row that does not count may hold an inf.
    total = rows.masked_fill(~counted, 0).sum(-2)
    return total / counted.sum(-2).clamp(min=1) if mode == "mean" else total


def _check_offsets(offsets: Tensor, length: int) -> None:
    """Refuse offsets into one long input that holds the ids of several samples.

    This check, like PyTorch's, runs on CPU only: elsewhere reading the offsets would synchronise the device.
    """
    values = expose_batch_axis(offsets, current_level())
    with below_vmap():
        values = offsets if values is None else values
        if values.device.type != "cpu":
            return
        if bool((values[..., 0] != 0).any()) or bool((values[..., -1] > length).any()):
            raise NotPerSampleError(
                f"embedding_bag: offsets={values.tolist()} must start at 0 and lie within the "
                f"{length} ids of one sample; these look like bags of several samples laid end to "
                "end. Pass the ids as a 2-D input [samples, ids per bag], short bags filled up "
                "with padding_idx, instead of one long input with offsets."
            )


def _reduce_by_bag(rows: Tensor, bag: Tensor, bags: int, mode: str) -> Tensor:
    """Reduce rows with equal ``bag`` to ``[bags, features]``; rows with bag number ``bags`` do not count."""
    if mode == "max":
        members = bag[None, :] == torch.arange(bags, device=bag.device)[:, None]
        return _reduce(rows.expand(bags, *rows.shape), members, mode)
    total = rows.new_zeros(bags + 1, rows.shape[1]).index_add(0, bag, rows)[:bags]
    if mode == "sum":
        return total
    count = rows.new_zeros(bags + 1).index_add(0, bag, torch.ones_like(rows[:, 0]))[:bags]
    return total / count.clamp(min=1).unsqueeze(-1)
