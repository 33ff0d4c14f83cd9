"""Choose for each parameter how its per-sample norms are computed. The choice changes costs, never results.

With ``u = 2 B S I O`` FLOPs for one weight gradient (``S`` positions, ``I`` columns, ``O`` rows):

========  ===========================================  ===================================
strategy  extra work                                   extra memory
========  ===========================================  ===================================
kept      writing and reading ``B I O`` three times     ``B I O``, minus the freed factors
ghost     ``B S^2 (I + O)`` FLOPs (symmetry halves it)  the factors ``B S (I + O)``
========  ===========================================  ===================================

Kept factors and kept gradients take the same memory at ``S = I O / (I + O)``. For larger ``S``, keeping the gradients
takes less memory *and* less time. For smaller ``S``, the ghost norm costs less than ``u``, so building gradients twice
is never the best choice. Whether it costs less than keeping depends on the ratio of arithmetic to memory bandwidth.

An embedding that is tied to the output layer has one-hot uses beside dense ones. They add little to either strategy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clipgrad._functorch import expected
from clipgrad.engine.tracked import Strategy, Tracked
from clipgrad.kernels.half_products import terms_of_scaled_factors
from clipgrad.rules.registry import Extent

# FLOPs that a machine computes in the time of moving one byte. CPUs and GPUs in float32 lie between 5 and 15. Near the
# crossing both strategies cost about the same, so one number serves both kinds of device.
_FLOPS_PER_BYTE = 10.0
# Multiplications of half precision in the time of moving one byte, where a device does not widen factors. These are
# measured on an H200, for Gram matrices by clipgrad's kernel and for one large product.
_HALF_GRAM_PER_BYTE, _HALF_PRODUCT_PER_BYTE = 37.0, 80.0
_BYTES, _HALF_BYTES = 4, 2


@dataclass(frozen=True)
class Choice:
    """This class holds the strategy for one parameter, with the reason and the memory of both forms for ``explain``."""

    strategy: Strategy
    reason: str
    kept_bytes: int
    factor_bytes: int


def choose(
    entries: Sequence[Tracked],
    batch_size: int,
    *,
    strategy: Strategy | None,
    memory_budget: float | None,
) -> list[Choice]:
    """Return one choice per tracked entry, in order.

    Args:
        entries: Parameters and shared expressions with the uses that the forward pass recorded.
        batch_size: Number of samples in the microbatch.
        strategy: A strategy to force where it applies; None decides by cost.
        memory_budget: Bytes that kept per-sample gradients may take beyond the factors that they replace; None allows
            a quarter of the memory that parameters (each counted four times) and factors take anyway.
    """
    choices = [_preference(entry, batch_size, strategy) for entry in entries]
    if strategy is not None:
        return choices
    if memory_budget is None:
        anyway = sum(choice.factor_bytes for choice in choices)
        anyway += sum(4 * entry.shared.numel() * _BYTES for entry in entries if not entry.derived)
        memory_budget = anyway / 4
    for index, (entry, choice) in enumerate(zip(entries, choices, strict=True)):
        extra = choice.kept_bytes - choice.factor_bytes
        if choice.strategy is not Strategy.KEPT or not has_choice(entry) or extra <= 0:
            continue
        if extra <= memory_budget:
            memory_budget -= extra
        else:
            choices[index] = Choice(
                Strategy.GHOST,
                f"keeping {_mebibytes(choice.kept_bytes)} would exceed the memory budget",
                choice.kept_bytes,
                choice.factor_bytes,
            )
    return choices


def has_choice(entry: Tracked) -> bool:
    """Return whether norms can be computed from factors.

    Every use must be factored, and the gradient must reach the parameter unchanged.
    """
    layouts = {
        None if extent is None else (extent.rows, extent.columns, extent.groups)
        for extent in entry.extents
    }
    # Factors of several uses are joined, so all uses must have the same rows, columns and groups.
    factored = len(layouts) == 1 and None not in layouts
    # If a parameter has no elements, its gradient is empty, but its factors may be NaN.
    return factored and not entry.fallback and entry.injective and entry.shared.numel() > 0


def _preference(entry: Tracked, batch_size: int, forced: Strategy | None) -> Choice:
    extents = [_expected(extent) for extent in entry.extents if extent is not None]
    half = _half_precision(entry)
    size = _BYTES if half is None else _HALF_BYTES
    kept_size = _HALF_BYTES if half is torch.bfloat16 else _BYTES
    kept_bytes = batch_size * entry.shared.numel() * kept_size
    factor_bytes = sum(_factor_bytes(extent, batch_size, size) for extent in extents)
    if not has_choice(entry):
        return Choice(Strategy.KEPT, _why_kept(entry), kept_bytes, factor_bytes)
    if forced is not None:
        return Choice(forced, "forced by strategy=", kept_bytes, factor_bytes)
    dense = [extent for extent in extents if not extent.one_hot]
    if not dense:
        return Choice(Strategy.GHOST, "ids pick few rows", kept_bytes, factor_bytes)
    positions = sum(extent.positions for extent in dense)
    rows, columns, groups = dense[0].rows, dense[0].columns, dense[0].groups
    if positions == 1 and dense == extents:
        return Choice(
            Strategy.GHOST, "one position: |input|^2 |output gradient|^2", kept_bytes, factor_bytes
        )
    crossing = f"{positions} positions against {rows}x{columns}"
    if kept_bytes <= factor_bytes:
        return Choice(
            Strategy.KEPT, f"{crossing}: smaller than its factors", kept_bytes, factor_bytes
        )
    elements = float(groups * rows * columns)
    kept = 3 * elements * kept_size
    if half is not None:
        # The clipped sum is one product for each term, and that of kept gradients is none beyond the first.
        ghost = groups * positions**2 * (rows + columns) / _HALF_GRAM_PER_BYTE
        ghost += (terms_of_scaled_factors() - 1) * positions * elements / _HALF_PRODUCT_PER_BYTE
    else:
        ghost = groups * positions**2 * (rows + columns) / _FLOPS_PER_BYTE
    if ghost < kept:
        return Choice(
            Strategy.GHOST, f"{crossing}: Gram matrices are cheap", kept_bytes, factor_bytes
        )
    return Choice(Strategy.KEPT, f"{crossing}: Gram matrices cost more", kept_bytes, factor_bytes)


def _half_precision(entry: Tracked) -> torch.dtype | None:
    """Return the half-precision dtype that products of the entry's dense uses read as it is, or None."""
    dense = {use.half for use in entry.expected if use.extent and not use.extent.one_hot}
    return dense.pop() if len(dense) == 1 else None


def _expected(extent: Extent) -> Extent:
    """Return an extent whose sizes are numbers: a graph of many lengths keeps the choice of the longest one seen."""
    return Extent(
        expected(extent.positions),
        expected(extent.rows),
        expected(extent.columns),
        expected(extent.groups),
        extent.one_hot,
    )


def _why_kept(entry: Tracked) -> str:
    if entry.fallback:
        return f"no rule covers this call of {entry.fallback[0]}"
    if not entry.shared.numel():
        return "no elements"
    if not entry.injective:
        return "an expression of parameters: pulled back per sample"
    return "one sum over positions" if entry.expected else "not used"


def _factor_bytes(extent: Extent, batch_size: int, size: int) -> int:
    width = extent.columns + (2 if extent.one_hot else extent.rows)
    return batch_size * extent.groups * extent.positions * width * size


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
