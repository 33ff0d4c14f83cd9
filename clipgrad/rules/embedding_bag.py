"""Rows of a table picked by ids and reduced per bag: an embedding lookup, then a sum, mean or maximum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad._functorch import Decline, below_vmap, current_level, physical
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
    """Calls that PyTorch refuses are declined, so that its own message is what the user reads.

    ``sparse`` is ignored: clipped sums are dense.
    """
    refuse_max_norm(max_norm)
    if scale_grad_by_freq:
        raise Decline  # what PyTorch divides by depends on the device; its own function decides
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
    bag = _bag_of_position(offsets, input)
    bags = offsets.shape[0] - include_last_offset
    return _reduce_by_bag(rows, bag.where(counted, bags), bags, mode)


def _reduce(rows: Tensor, counted: Tensor, mode: str) -> Tensor:
    """``[..., positions, features]`` to ``[..., features]`` over the counted positions; 0 if none."""
    counted = counted.unsqueeze(-1)
    if mode == "max":
        # One position wins a tie, the first, as in PyTorch; amax would share the gradient.
        largest = rows.masked_fill(~counted, float("-inf")).max(-2).values
        return largest.masked_fill(~counted.any(-2), 0)
    # Selected, not multiplied by zero: a row that doesn't count may hold an inf.
    total = rows.masked_fill(~counted, 0).sum(-2)
    return total / counted.sum(-2).clamp(min=1) if mode == "mean" else total


def _bag_of_position(offsets: Tensor, input: Tensor) -> Tensor:
    """The bag of each position of the input, by the offsets at which bags start."""
    _check_offsets(offsets, input.shape[0])
    positions = torch.arange(input.shape[0], device=input.device)
    return (positions[:, None] >= offsets[None, :]).sum(1) - 1


def _check_offsets(offsets: Tensor, length: int) -> None:
    """Refuse a batch laid end to end: its offsets lie in one long input, not in a sample's own.

    On CPU only, where PyTorch checks them too: elsewhere reading values would stall the device.
    """
    values = physical(offsets, current_level())
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
    """Rows with equal bag reduced to ``[bags, features]``; those of bag number ``bags`` don't count."""
    if mode == "max":
        members = bag[None, :] == torch.arange(bags, device=bag.device)[:, None]
        return _reduce(rows.expand(bags, *rows.shape), members, mode)
    total = rows.new_zeros(bags + 1, rows.shape[1]).index_add(0, bag, rows)[:bags]
    if mode == "sum":
        return total
    count = rows.new_zeros(bags + 1).index_add(0, bag, torch.ones_like(rows[:, 0]))[:bags]
    return total / count.clamp(min=1).unsqueeze(-1)
