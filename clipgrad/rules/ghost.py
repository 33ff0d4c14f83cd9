"""This module finds ghost norms: per-sample norms from the factors of a gradient, without building the gradient.

References: Goodfellow 2015 (arXiv:1510.01799) for one position; Li et al. 2022 (arXiv:2110.05679) for many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad._functorch import expected
from clipgrad.kernels.float32_precision import full_product, full_vecdot, product_rounding
from clipgrad.kernels.half_products import terms_of_scaled_factors
from clipgrad.rules.canonical import Outer
from clipgrad.rules.gram import Lengths, equal_id_sums, gram_sums
from clipgrad.rules.one_hot import OneHot
from clipgrad.rules.operands import sum_of, widen
from clipgrad.rules.row_norms import row_norms_squared

# Rounding errors of a ghost norm stay below ``8 + sqrt(rows) + sqrt(columns)`` units in the last place of the norm
# without cancellation, for the worst inputs found (constant ones). This is the safety factor on that bound.
_ROUNDING_MARGIN = 8.0
# Squared norms lost to underflow are ignored below this many smallest normal numbers, so that zero stays zero. The
# smallest clipping norm (``clipping/_underflow.py``) allows for this.
_NEGLIGIBLE = 2.0**26
# One-hot factors use Gram matrices up to this many positions and this many elements over all samples.
_FEW_POSITIONS, _FEW_ELEMENTS = 256, 1 << 24
# Relative error of a float32 number that is rounded to bfloat16; of a split in terms this is the error of the last one.
_BFLOAT16_TERM = 2.0**-8


def ghost_norms_squared(uses: Sequence[Outer]) -> Tensor:
    """Return the squared norm per sample of the summed gradient of several uses of one parameter, ``[B]``.

    Uses are summed before the norm, so the cross terms ``2 <g_u, g_v>`` count. Uses of one kind are joined along their
    positions; one-hot and dense uses (an embedding tied to the output layer) have an explicit cross term. The result
    may be too large where terms cancel almost entirely, but a sample is never clipped too little.
    """
    dense = _join([use for use in uses if not isinstance(use.left, OneHot)])
    hot = _join([use for use in uses if isinstance(use.left, OneHot)])
    parts: list[Tensor] = []
    lengths: list[Lengths] = []
    if dense is not None:
        assert isinstance(dense.left, Tensor)
        if hot is None and dense.left.shape[1] == 1:
            norms = _one_position(widen(dense.left), widen(dense.right))
            return norms.view(dense.samples, dense.groups).sum(1)
        norms, found = gram_sums(dense.left, dense.right)
        parts.append(norms.view(dense.samples, dense.groups).sum(1))
        lengths.append(found)
    by_gram = dense is not None
    if hot is not None:
        norms, found, few = _one_hot_norms(hot)
        by_gram = by_gram or few
        parts.append(norms)
        lengths.append(found)
        if dense is not None:
            parts.append(2 * _cross(hot, dense))
    assert parts, "a ghost norm of no uses"
    total = Lengths.total(lengths)
    return raised_to_rounding_bound(sum_of(parts), total, uses, materialised=not by_gram)


def norms_squared_with_rows(kept: Tensor, uses: Sequence[Outer]) -> Tensor:
    """Return squared norms ``[B]`` of kept per-sample gradients plus one-hot uses, which add to a few of their rows.

    The kept gradients ``[B, *shape]`` are read once for their norm. Their rows at the ids give the cross term.
    """
    hot = _join(uses)
    assert hot is not None
    assert isinstance(hot.left, OneHot)
    own = row_norms_squared(kept)
    rows = kept.reshape(kept.shape[0], hot.left.width, hot.columns)
    samples = torch.arange(kept.shape[0], device=kept.device)[:, None]
    right = widen(hot.right)
    picked = widen(rows[samples, hot.left.ids])
    cross = full_vecdot(picked.flatten(1), right.flatten(1))
    added_norms, lengths, _ = _one_hot_norms(hot)
    total = replace(lengths, products=lengths.products + own.sqrt())
    norms = own + 2 * cross + added_norms
    return raised_to_rounding_bound(norms, total, [hot], materialised=False)


def _one_hot_norms(hot: Outer) -> tuple[Tensor, Lengths, bool]:
    """Return squared norms and lengths of a one-hot use, and whether a Gram matrix gave them."""
    assert isinstance(hot.left, OneHot)
    right = widen(hot.right)
    if _few_positions(right):
        return *equal_id_sums(hot.left.ids, right), True
    return row_norms_squared(_segment_sums(hot.left, right)), lengths_of([hot]), False


def raised_to_rounding_bound(
    norms: Tensor, lengths: Lengths, uses: Sequence[Outer], *, materialised: bool
) -> Tensor:
    """Raise squared norms ``[B]`` to the largest error with which they can be computed from the factors.

    Without cancellation the gradient would have the norm ``m = sum_s |left_s| |right_s|``, and rounding errors are
    multiples of ``m``. Where terms cancel almost entirely (nearly equal positions with opposite output gradients) the
    error exceeds the norm, and a norm that is too small would let a sample contribute many times the clipping norm.
    The clipped sum is a product of the same factors. On CUDA it may run in TF32 or bfloat16, and its error counts too.

    The error of a norm of a ``materialised`` gradient is relative to ``m``; that of a squared norm from Gram matrices
    is relative to ``m^2``. The lengths are ``[B * groups]``.
    """
    shape, groups, columns = uses[0].shape, uses[0].groups, uses[0].columns
    rows = shape.numel() // max(1, columns * groups)
    margin = _ROUNDING_MARGIN * (8 + math.sqrt(rows) + math.sqrt(columns))
    margin *= torch.finfo(norms.dtype).eps
    share = margin**2 if materialised else margin
    share = max(share, (_ROUNDING_MARGIN * _rounding_of_sum(norms, uses)) ** 2)
    floor = lengths.products.square() * share
    norms = torch.maximum(norms, floor.view(-1, groups).sum(1))
    if materialised:
        return norms
    hidden = _underflow(lengths.left.square(), rows, lengths.right.square(), columns)
    return norms + hidden.view(-1, groups).sum(1)


def lengths_of(uses: Sequence[Outer]) -> Lengths:
    """Return the lengths of all positions of several uses; at each position a one-hot factor has length 1."""
    found = []
    for use in uses:
        right = _lengths(widen(use.right))
        left = _lengths(widen(use.left)) if isinstance(use.left, Tensor) else torch.ones_like(right)
        found.append(Lengths.of(left, right))
    return Lengths.total(found)


def _rounding_of_sum(norms: Tensor, uses: Sequence[Outer]) -> float:
    """Return how much a weighted sum may round each scaled element, relative to the element, beyond float32."""
    # Rows of one-hot uses are added, and not multiplied.
    dense = [use for use in uses if isinstance(use.left, Tensor)]
    found = [0.0]
    if any(use.sums_in_bfloat16 for use in dense):
        found.append(_BFLOAT16_TERM ** terms_of_scaled_factors())
    in_float32 = norms.dtype is torch.float32 and not all(use.sums_in_bfloat16 for use in dense)
    if in_float32 and norms.is_cuda:
        # The weighted sum is a matrix product or a convolution. The CPU computes it in full float32.
        found.append(product_rounding("cuda"))
    return max(found)


def _lengths(vectors: Tensor) -> Tensor:
    """Return norms over the last axis; ``vector_norm`` is slow on CPU if this axis is not dense."""
    if vectors.stride(-1) == 1:
        lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
        return lengths
    return full_vecdot(vectors, vectors).sqrt()


def _underflow(left: Tensor, rows: int, right: Tensor, columns: int) -> Tensor:
    """Bound the squared norm lost when squares of one factor's elements underflow while the other factor is large.

    ``left`` and ``right`` are squared lengths of vectors with ``rows`` and ``columns`` elements, whose squares may each
    lose up to ``tiny``.
    """
    tiny = torch.finfo(left.dtype).tiny
    hidden = tiny * rows * right + tiny * columns * left
    return F.threshold(hidden, _NEGLIGIBLE * tiny, 0.0)


def _join(uses: Sequence[Outer]) -> Outer | None:
    if len(uses) <= 1:
        return uses[0] if uses else None
    if len({use.zeros for use in uses}) > 1:
        uses = [use.trimmed() for use in uses]
    right = torch.cat([use.right for use in uses], dim=1)
    first = uses[0].left
    if isinstance(first, OneHot):
        ids = torch.cat([use.left.ids for use in uses if isinstance(use.left, OneHot)], dim=1)
        return replace(uses[0], left=OneHot(ids, first.width), right=right)
    left = torch.cat([use.left for use in uses if isinstance(use.left, Tensor)], dim=1)
    return replace(uses[0], left=left, right=right)


def _one_position(left: Tensor, right: Tensor) -> Tensor:
    """Return squared norms for one position, products of two squared norms in which nothing cancels."""
    heights, widths = row_norms_squared(left), row_norms_squared(right)
    hidden = _underflow(heights, left.shape[-1], widths, right.shape[-1])
    return heights * widths + hidden


def _few_positions(right: Tensor) -> bool:
    """Return whether a Gram matrix costs less than sorting ids and adding rows, which a CPU does sequentially."""
    samples, positions = map(expected, right.shape[:2])
    few = 1 < positions <= _FEW_POSITIONS and samples * positions**2 <= _FEW_ELEMENTS
    return few and right.device.type == "cpu"


def _cross(hot: Outer, dense: Outer) -> Tensor:
    """Return ``<g_hot, g_dense>`` per sample: ``sum_st dense.left[s, id_t] (dense.right_s . hot.right_t)``."""
    assert isinstance(dense.left, Tensor)
    assert isinstance(hot.left, OneHot)
    ids = hot.left.ids[:, None, :].expand(-1, dense.left.shape[1], -1)
    picked = widen(dense.left.gather(2, ids))
    products = full_product(
        widen(dense.right[..., : dense.columns]), widen(hot.right).transpose(1, 2)
    )
    return full_vecdot(picked.flatten(1), products.flatten(1))


def _segment_sums(left: OneHot, right: Tensor) -> Tensor:
    """Sum rows of ``right`` over equal ids of a sample, ``[B, S, columns]``; unused rows are zero.

    Sorting gives segments a static shape, so no tensor of size ``[B, width, columns]`` is needed.
    """
    samples, positions = left.ids.shape
    ids, order = left.ids.sort(dim=1, stable=True)
    fresh = torch.ones_like(ids)
    fresh[:, 1:] = (ids[:, 1:] != ids[:, :-1]).to(ids.dtype)
    segment = fresh.cumsum(1) - 1 + positions * torch.arange(samples, device=ids.device)[:, None]
    rows = right.gather(1, order[..., None].expand_as(right)).flatten(0, 1)
    return torch.zeros_like(rows).index_add_(0, segment.flatten(), rows).view_as(right)
