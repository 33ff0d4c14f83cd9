"""Ghost norms: per-sample norms from the factors of a gradient, which is never built.

References: Goodfellow 2015 (arXiv:1510.01799) for one position; Li et al. 2022 (arXiv:2110.05679) for many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.kernels.tensor_cores import convolutions_may, full_product
from clipgrad.rules.canonical import OneHot, Outer, added, row_norms_squared, widen
from clipgrad.rules.gram import Lengths, equal_id_sums, gram_sums

# Rounding errors of a ghost norm, in units of the last place of what its terms sum to without cancellation, stay
# below ``8 + sqrt(rows) + sqrt(columns)`` for the worst inputs found (constant ones); this is the safety on top.
_ROUNDING_MARGIN = 8.0
# Squared norms that underflow hides are let go below so many of the smallest normal numbers, so that zero stays zero.
# The smallest clipping norm (``clipping/_underflow.py``) allows for that.
_NEGLIGIBLE = 2.0**26
# One-hot factors of so few positions meet in a Gram matrix, if those of all samples have no more elements.
_FEW_POSITIONS, _FEW_ELEMENTS = 256, 1 << 24
# Relative error of a product of two float32 numbers that are rounded to TF32 first.
_TF32_PRODUCT = 2.0**-10


def ghost_norms_squared(uses: Sequence[Outer]) -> Tensor:
    """Squared norm per sample of the summed gradient of several uses of one parameter, ``[B]``.

    Uses are summed before the norm: the cross terms ``2 <g_u, g_v>`` count. Uses of one kind are joined along
    their positions; one-hot and dense uses (an embedding tied to the output layer) meet in a cross term.
    The result may overestimate where terms cancel almost entirely, but a sample is never clipped too little.
    """
    dense = _join([use for use in uses if not isinstance(use.left, OneHot)])
    hot = _join([use for use in uses if isinstance(use.left, OneHot)])
    parts: list[Tensor] = []
    lengths: list[Lengths] = []
    if dense is not None:
        assert isinstance(dense.left, Tensor)
        left, right = widen(dense.left), widen(dense.right)
        if hot is None and left.shape[1] == 1:
            norms = _one_position(left, right)
            return norms.view(dense.samples, dense.groups).sum(1)
        norms, found = gram_sums(left, right)
        parts.append(norms.view(dense.samples, dense.groups).sum(1))
        lengths.append(found)
    by_gram = dense is not None
    if hot is not None:
        assert isinstance(hot.left, OneHot)
        right = widen(hot.right)
        if _few_positions(right):
            by_gram = True
            norms, found = equal_id_sums(hot.left.ids, right)
        else:
            norms, found = row_norms_squared(_segment_sums(hot.left, right)), lengths_of([hot])
        parts.append(norms)
        lengths.append(found)
        if dense is not None:
            parts.append(2 * _cross(hot, dense))
    assert parts, "a ghost norm of no uses"
    total = Lengths.total(lengths)
    return never_underestimated(added(parts), total, uses, materialised=not by_gram)


def never_underestimated(
    norms: Tensor, lengths: Lengths, uses: Sequence[Outer], *, materialised: bool
) -> Tensor:
    """Raise squared norms ``[B]`` to the error that finding them from the factors may carry.

    Without cancellation the gradient would have the norm ``m = sum_s |left_s| |right_s|``, and rounding errors are
    multiples of it. Where terms cancel almost entirely (nearly equal positions with opposite output gradients) the
    error exceeds the norm; clipping to a norm that came out too small would let a sample contribute any number of
    times the clipping norm. Norms far above the error are returned as they are.

    The clipped sum is a product of the same factors. Where that may run in TF32, its error counts too.

    Args:
        norms: Squared norms as computed.
        lengths: Of all positions, ``[B * groups]``.
        uses: What they were computed from.
        materialised: Whether they come from the gradient itself, so that the norm carries the error, and not from
            Gram matrices, where its square does.
    """
    shape, groups, columns = uses[0].shape, uses[0].groups, uses[0].right.shape[-1]
    rows = shape.numel() // max(1, columns * groups)
    margin = _ROUNDING_MARGIN * (8 + math.sqrt(rows) + math.sqrt(columns))
    margin *= torch.finfo(norms.dtype).eps
    share = margin**2 if materialised else margin
    # Rows of an embedding are added, not multiplied.
    if any(isinstance(use.left, Tensor) for use in uses) and _may_round_to_tf32(norms):
        share = max(share, (_ROUNDING_MARGIN * _TF32_PRODUCT) ** 2)
    floor = lengths.products.square() * share
    norms = torch.maximum(norms, floor.view(-1, groups).sum(1))
    if materialised:
        return norms
    hidden = _underflow(lengths.left.square(), rows, lengths.right.square(), columns)
    return norms + hidden.view(-1, groups).sum(1)


def lengths_of(uses: Sequence[Outer]) -> Lengths:
    """The lengths of all positions of several uses; at one position a one-hot factor has length 1."""
    found = []
    for use in uses:
        right = _lengths(widen(use.right))
        left = _lengths(widen(use.left)) if isinstance(use.left, Tensor) else torch.ones_like(right)
        found.append(Lengths.of(left, right))
    return Lengths.total(found)


def _may_round_to_tf32(norms: Tensor) -> bool:
    """Whether the weighted sum of the same factors, a matrix product or a convolution, may run in TF32."""
    return norms.device.type == "cuda" and norms.dtype is torch.float32 and convolutions_may()


def _lengths(vectors: Tensor) -> Tensor:
    """Norms over the last axis; on CPU ``vector_norm`` is slow where that axis is not the dense one."""
    lengths: Tensor
    if vectors.stride(-1) == 1:
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
    else:
        lengths = torch.linalg.vecdot(vectors, vectors).sqrt()
    return lengths


def _underflow(left: Tensor, rows: int, right: Tensor, columns: int) -> Tensor:
    """What vanishes when the elements of one factor are squared, although the other factor may be huge.

    Args:
        left: Squared lengths of one factor.
        rows: Its elements, each of which may hide a square of ``tiny``.
        right: Squared lengths of the other.
        columns: Its elements.
    """
    tiny = torch.finfo(left.dtype).tiny
    hidden = tiny * rows * right + tiny * columns * left
    return F.threshold(hidden, _NEGLIGIBLE * tiny, 0.0)


def _join(uses: Sequence[Outer]) -> Outer | None:
    if len(uses) <= 1:
        return uses[0] if uses else None
    right = torch.cat([use.right for use in uses], dim=1)
    first = uses[0].left
    if isinstance(first, OneHot):
        ids = torch.cat([use.left.ids for use in uses if isinstance(use.left, OneHot)], dim=1)
        return replace(uses[0], left=OneHot(ids, first.width), right=right)
    left = torch.cat([use.left for use in uses if isinstance(use.left, Tensor)], dim=1)
    return replace(uses[0], left=left, right=right)


def _one_position(left: Tensor, right: Tensor) -> Tensor:
    """A product of two norms: nothing cancels."""
    heights, widths = row_norms_squared(left), row_norms_squared(right)
    hidden = _underflow(heights, left.shape[-1], widths, right.shape[-1])
    return heights * widths + hidden


def _few_positions(right: Tensor) -> bool:
    """Whether a Gram matrix costs less than sorting ids and adding rows, which a CPU does one by one."""
    samples, positions, _ = right.shape
    few = 1 < positions <= _FEW_POSITIONS and samples * positions**2 <= _FEW_ELEMENTS
    return few and right.device.type == "cpu"


def _cross(hot: Outer, dense: Outer) -> Tensor:
    """``<g_hot, g_dense>`` per sample: ``sum_st dense.left[s, id_t] (dense.right_s . hot.right_t)``."""
    assert isinstance(dense.left, Tensor)
    assert isinstance(hot.left, OneHot)
    ids = hot.left.ids[:, None, :].expand(-1, dense.left.shape[1], -1)
    picked = widen(dense.left).gather(2, ids)
    products = full_product(widen(dense.right), widen(hot.right).transpose(1, 2))
    products_summed: Tensor = torch.linalg.vecdot(picked.flatten(1), products.flatten(1))
    return products_summed


def _segment_sums(left: OneHot, right: Tensor) -> Tensor:
    """Rows of ``right`` summed over equal ids of a sample, ``[B, S, columns]``; unused rows are zero.

    The sort gives segments a static shape, so nothing of the size ``[B, width, columns]`` appears.
    """
    samples, positions = left.ids.shape
    ids, order = left.ids.sort(dim=1, stable=True)
    fresh = torch.ones_like(ids)
    fresh[:, 1:] = (ids[:, 1:] != ids[:, :-1]).to(ids.dtype)
    segment = fresh.cumsum(1) - 1 + positions * torch.arange(samples, device=ids.device)[:, None]
    rows = right.gather(1, order[..., None].expand_as(right)).flatten(0, 1)
    return torch.zeros_like(rows).index_add_(0, segment.flatten(), rows).view_as(right)
