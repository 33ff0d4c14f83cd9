"""One canonical layout for the gradient of a parameter use, and its three operations, written once.

A weight that meets an activation has, for sample ``b``, the gradient

    g_b = sum_s  left[b, s] (outer product) right[b, s]            [rows, columns]

where ``s`` runs over the positions at which the sample uses the weight (time steps, pixels), ``left`` indexes
the rows of the parameter and ``right`` its columns. A linear layer has ``left`` = output gradient and
``right`` = input; an embedding has ``left`` = one-hot of the ids. From the two factors follow

* the per-sample gradient itself           ``left^T right``
* its squared norm without building it     ``sum_st (left_s . left_t) (right_s . right_t)``   ("ghost norm")
* the weighted sum over samples            one GEMM over samples and positions together

References: Goodfellow 2015 (arXiv:1510.01799) for one position; Li et al. 2022 (arXiv:2110.05679) for many;
Bu et al. 2023 (arXiv:2210.00038) for keeping the factors of one backward pass ("book-keeping").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

# Gram matrices of one block stay below this many elements, so that a ghost norm needs no more scratch
# than about 256 MiB whatever the sequence length.
_GRAM_ELEMENTS = 1 << 25
# Below this many positions a half-size block is too small for the saved half of a symmetric Gram matrix to pay.
_SYMMETRY_POSITIONS = 256
# Rounding errors of a ghost norm, in units of the last place of what its terms sum to without cancellation, stay
# below ``8 + sqrt(rows) + sqrt(columns)`` for the worst inputs found (constant ones); this is the safety on top.
_ROUNDING_MARGIN = 8.0
# Squared norms that underflow hides are let go below this: no clipping norm is anywhere near 1e-12.
_NEGLIGIBLE = 1e-24


BatchedProduct = Callable[[Tensor, Tensor], Tensor]


def widen(tensor: Tensor) -> Tensor:
    """At least float32: norms and sums of half-precision factors cancel, so they are taken wider."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def scale_rows(tensor: Tensor, factors: Tensor) -> Tensor:
    """``tensor[b, ...] * factors[b]``."""
    return tensor * factors.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - 1))


def select_rows(tensor: Tensor, keep: Tensor) -> Tensor:
    """Zero the samples that are not kept, by selection: ``0 * inf`` would be NaN."""
    return torch.where(keep.view(-1, *[1] * (tensor.dim() - 1)), tensor, tensor.new_zeros(()))


def added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of one or more tensors; a single one is not copied."""
    return sum(tensors[1:], start=tensors[0])


_LONG_ROW = 1 << 12


def row_norms_squared(tensor: Tensor) -> Tensor:
    """Squared L2 norm of every sample, ``[B]``."""
    flat = tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None]
    dtype = widen(flat[:0]).dtype
    if flat.device.type == "cpu" and flat.shape[1] > _LONG_ROW:
        # On the CPU one float32 sum over millions of values comes out too small by up to 1e-3; a sum of sums does not.
        whole = flat.shape[1] - flat.shape[1] % _LONG_ROW
        pieces = flat[:, :whole].unflatten(1, (-1, _LONG_ROW))
        parts = torch.linalg.vector_norm(pieces, dim=2, dtype=dtype)
        rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True, dtype=dtype)
        flat = torch.cat((parts, rest), 1)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norms.square()


@runtime_checkable
class Use(Protocol):
    """The gradient of one use of one parameter, for every sample of the microbatch."""

    def per_sample(self) -> Tensor:
        """The per-sample gradients, ``[B, *parameter.shape]``."""
        ...

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """``sum_b factors[b] * g_b``, shape ``parameter.shape``; ``factors`` is ``[B]``."""
        ...

    def outer(self) -> Outer | None:
        """The canonical factors, or None if this use has none (then its gradient is always kept)."""
        ...

    def select(self, keep: Tensor) -> Use:
        """The same use with the gradient of every sample outside the boolean mask ``keep`` exactly zero."""
        ...


@dataclass(frozen=True)
class PerSample:
    """A use whose per-sample gradient is already there (biases, norm layers).

    Attributes:
        gradient: ``[B, *parameter.shape]``.
    """

    gradient: Tensor

    def per_sample(self) -> Tensor:
        return self.gradient

    def weighted_sum(self, factors: Tensor) -> Tensor:
        wide = widen(self.gradient)
        if get_proxy_mode() is not None:
            # A compiler makes one pass of this and of what comes before, in any layout; a product it leaves alone.
            return scale_rows(wide, factors).sum(0)
        return (
            factors.to(wide.dtype) @ wide.flatten(1)
            if wide.dim() > 1
            else factors.to(wide.dtype) @ wide
        ).view(self.gradient.shape[1:])

    def outer(self) -> Outer | None:
        return None

    def select(self, keep: Tensor) -> PerSample:
        return PerSample(select_rows(self.gradient, keep))


@dataclass(frozen=True)
class OneHot:
    """A factor ``[B, S, width]`` of one-hot rows, stored as their positions.

    Attributes:
        ids: ``[B, S]``, integers in ``[0, width)``.
        width: Number of columns.
    """

    ids: Tensor
    width: int


@dataclass(frozen=True)
class Outer:
    """A sum over positions of outer products, for every sample; see the module's docstring.

    Attributes:
        left: ``[B * groups, S, rows / groups]``, or a ``OneHot`` of that shape (then ``groups`` is 1).
        right: ``[B * groups, S, columns]``.
        shape: The parameter's shape; it has ``rows * columns`` elements, rows first.
        groups: Blocks of rows that each have factors of their own (grouped convolutions).
    """

    left: Tensor | OneHot
    right: Tensor
    shape: torch.Size
    groups: int = 1

    @property
    def samples(self) -> int:
        return self.right.shape[0] // self.groups

    def outer(self) -> Outer:
        return self

    def per_sample(self, batched_product: BatchedProduct = torch.bmm) -> Tensor:
        right = widen(self.right)
        if isinstance(self.left, OneHot):
            return _scatter_rows(self.left, right).view(self.samples, *self.shape)
        left = widen(self.left)
        if left.shape[1] == 1:  # an outer product is a broadcast; bmm with one position is slower
            product = left.transpose(1, 2) * right
        else:
            product = batched_product(left.transpose(1, 2), right)
        return product.view(self.samples, *self.shape)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        if self.groups > 1:
            return PerSample(self.per_sample()).weighted_sum(factors)
        right = widen(self.right)
        if isinstance(self.left, OneHot):
            rows = scale_rows(right, factors).flatten(0, 1)
            total = right.new_zeros(self.left.width, right.shape[-1])
            return total.index_add_(0, self.left.ids.flatten(), rows).view(self.shape)
        left = widen(self.left)
        if left.shape[-1] <= right.shape[-1]:  # scale the narrower factor
            left = scale_rows(left, factors)
        else:
            right = scale_rows(right, factors)
        return (left.flatten(0, 1).t() @ right.flatten(0, 1)).view(self.shape)

    def rows_of(self, samples: slice) -> Outer:
        """The same use of a range of samples."""
        rows = slice(samples.start * self.groups, samples.stop * self.groups)
        if isinstance(self.left, OneHot):
            left: Tensor | OneHot = OneHot(self.left.ids[rows], self.left.width)
        else:
            left = self.left[rows]
        return replace(self, left=left, right=self.right[rows])

    def select(self, keep: Tensor) -> Outer:
        if self.groups > 1:
            keep = keep.repeat_interleave(self.groups)
        left = self.left if isinstance(self.left, OneHot) else select_rows(self.left, keep)
        return replace(self, left=left, right=select_rows(self.right, keep))


def ghost_norms_squared(uses: Sequence[Outer]) -> Tensor:
    """Squared norm per sample of the summed gradient of several uses of one parameter, ``[B]``.

    Uses are summed before the norm: the cross terms ``2 <g_u, g_v>`` count. Uses of one kind are joined along
    their positions; one-hot and dense uses (an embedding tied to the output layer) meet in a cross term.
    The result may overestimate where terms cancel almost entirely, but a sample is never clipped too little.
    """
    dense = _join([use for use in uses if not isinstance(use.left, OneHot)])
    hot = _join([use for use in uses if isinstance(use.left, OneHot)])
    total: Tensor | None = None
    if dense is not None:
        assert isinstance(dense.left, Tensor)
        total = _dense_norms(widen(dense.left), widen(dense.right))
        total = total.view(dense.samples, dense.groups).sum(1)
    if hot is not None:
        assert isinstance(hot.left, OneHot)
        norms = row_norms_squared(_segment_sums(hot.left, widen(hot.right)))
        total = norms if total is None else total + norms + 2 * _cross(hot, dense)
    assert total is not None, "a ghost norm of no uses"
    if len(uses) == 1 and uses[0].right.shape[1] == 1:
        return total  # a product of two norms: nothing cancels
    return never_underestimated(total, uses, materialised=dense is None)


def never_underestimated(norms: Tensor, uses: Sequence[Outer], *, materialised: bool) -> Tensor:
    """Raise squared norms ``[B]`` to the error that finding them from the factors may carry.

    Without cancellation the gradient would have the norm ``m = sum_s |left_s| |right_s|``, and rounding errors are
    multiples of it. Where terms cancel almost entirely (nearly equal positions with opposite output gradients) the
    error exceeds the norm; clipping to a norm that came out too small would let a sample contribute any number of
    times the clipping norm. Norms far above the error are returned as they are.

    Args:
        norms: Squared norms as computed.
        uses: The factors they were computed from.
        materialised: Whether they come from the gradient itself, so that the norm carries the error, and not from
            Gram matrices, where its square does.
    """
    shape, groups = uses[0].shape, uses[0].groups
    columns = uses[0].right.shape[-1]
    rows = shape.numel() // max(1, columns * groups)
    lefts, rights, products = (norms.new_zeros(len(norms) * groups) for _ in range(3))
    for use in uses:
        right = _lengths(widen(use.right))
        left = torch.ones_like(right)
        if isinstance(use.left, Tensor):
            left = _lengths(widen(use.left))
        lefts, rights = lefts + left.sum(1), rights + right.sum(1)
        products = products + (left * right).sum(1)
    margin = _ROUNDING_MARGIN * (8 + math.sqrt(rows) + math.sqrt(columns))
    margin *= torch.finfo(norms.dtype).eps
    floor = products.square() * (margin**2 if materialised else margin)
    norms = torch.maximum(norms, floor.view(-1, groups).sum(1))
    if materialised:
        return norms
    hidden = _underflow(lefts.square(), rows, rights.square(), columns)
    return norms + hidden.view(-1, groups).sum(1)


def _lengths(vectors: Tensor) -> Tensor:
    """Norms over the last axis; on CPU ``vector_norm`` is slow where that axis is not the dense one."""
    lengths: Tensor
    if vectors.stride(-1) == 1:
        lengths = torch.linalg.vector_norm(vectors, dim=-1)
    else:
        lengths = torch.linalg.vecdot(vectors, vectors).sqrt()
    return lengths


def _underflow(left: Tensor, rows: int, right: Tensor, columns: int) -> Tensor:
    """What vanishes when tiny numbers are squared, although the other factor may be huge."""
    tiny = torch.finfo(left.dtype).tiny
    return F.threshold(tiny * columns * right + tiny * rows * left, _NEGLIGIBLE, 0.0)


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


def _dense_norms(left: Tensor, right: Tensor) -> Tensor:
    positions = left.shape[1]
    if positions == 1:
        heights, widths = row_norms_squared(left), row_norms_squared(right)
        hidden = _underflow(heights, left.shape[-1], widths, right.shape[-1])
        return heights * widths + hidden
    if positions < _SYMMETRY_POSITIONS:
        return _gram_product(left, right, left, right)
    # Gram matrices are symmetric: two half-size norms and one off-diagonal block, counted twice.
    half = positions // 2
    heads, tails = (left[:, :half], right[:, :half]), (left[:, half:], right[:, half:])
    return _dense_norms(*heads) + _dense_norms(*tails) + 2 * _gram_product(*heads, *tails)


def _gram_product(left: Tensor, right: Tensor, other_left: Tensor, other_right: Tensor) -> Tensor:
    """``sum_st (left_s . other_left_t) (right_s . other_right_t)`` per sample."""
    elements = left.shape[1] * other_left.shape[1]
    step = max(1, _GRAM_ELEMENTS // max(1, elements))
    pieces = []
    for start in range(0, left.shape[0], step):
        rows = slice(start, start + step)
        first = torch.bmm(left[rows], other_left[rows].transpose(1, 2))
        second = torch.bmm(right[rows], other_right[rows].transpose(1, 2))
        pieces.append(torch.linalg.vecdot(first.flatten(1), second.flatten(1)))
    return torch.cat(pieces) if len(pieces) != 1 else pieces[0]


def _cross(hot: Outer, dense: Outer | None) -> Tensor:
    """``<g_hot, g_dense>`` per sample: ``sum_st dense.left[s, id_t] (dense.right_s . hot.right_t)``."""
    if dense is None or not isinstance(dense.left, Tensor) or not isinstance(hot.left, OneHot):
        return hot.right.new_zeros(hot.samples)
    ids = hot.left.ids[:, None, :].expand(-1, dense.left.shape[1], -1)
    picked = widen(dense.left).gather(2, ids)
    products = torch.bmm(widen(dense.right), widen(hot.right).transpose(1, 2))
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


def _scatter_rows(left: OneHot, right: Tensor) -> Tensor:
    samples = left.ids.shape[0]
    flat = left.ids + left.width * torch.arange(samples, device=left.ids.device)[:, None]
    total = right.new_zeros(samples * left.width, right.shape[-1])
    return total.index_add_(0, flat.flatten(), right.flatten(0, 1))
