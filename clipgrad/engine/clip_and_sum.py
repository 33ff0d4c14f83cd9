"""This module computes norms, factors and clipped sums of one microbatch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad._phases import phase
from clipgrad.arithmetic import SumRows
from clipgrad.clipping import Clipping
from clipgrad.engine.copies import add_in_place, copies
from clipgrad.engine.gradients import Gradients
from clipgrad.engine.pre_clipping import PreClipping
from clipgrad.engine.tracked import Strategy
from clipgrad.options import Options
from clipgrad.ranks import Ranks


@dataclass(frozen=True)
class Settings:
    """This class holds the user's options, resolved for the present parameters.

    Attributes:
        options: The user's options.
        clipping: Groups of parameters and their norms.
        dtypes: The dtype of each parameter's sum.
        ranks: The processes that hold the parameters.
        pre_clipping: The user's transform of per-sample gradients, on leaves.
        sum_rows: Function that clips and sums per-sample gradients; None if the rules do it.
        defers_finite_check: Leave it to the caller to check that every norm is finite; a traced graph cannot do so.
        always_selects: Take dropped samples out of the factors without a check whether there are any.
    """

    options: Options
    clipping: Clipping
    dtypes: tuple[torch.dtype, ...]
    ranks: Ranks
    pre_clipping: PreClipping | None = None
    sum_rows: SumRows | None = None
    defers_finite_check: bool = False
    always_selects: bool = False

    @property
    def strategy(self) -> Strategy | None:
        """Return the strategy that is forced on every parameter; None if each has its own."""
        if self.pre_clipping is not None or self.sum_rows is not None:
            return Strategy.KEPT
        requested = self.options.performance.strategy
        return None if requested == "auto" else Strategy(requested)


@dataclass(frozen=True)
class MicrobatchResult:
    """This class holds the result of one microbatch.

    Attributes:
        sums: Clipped sum per parameter, in the accumulation dtype.
        values: Per-sample losses ``[B]``.
        norms: Per-sample norms, ``[B]`` per clipping group.
        aux: Per-sample auxiliary output, or None.
        nonfinite: Boolean ``[B]``: samples dropped because their gradient was not finite.
        all_finite: Boolean scalar, or None if the check was not left to the caller. If it is False and dropped samples
            were not taken out of the factors, ``sums`` are invalid, and the microbatch must run again with the check.
        aliases_graph: Whether ``sums`` alias the memory of a CUDA graph, which the next microbatch overwrites.
    """

    sums: list[Tensor]
    values: Tensor
    norms: list[Tensor]
    aux: Any
    nonfinite: Tensor
    all_finite: Tensor | None = None
    aliases_graph: bool = False


def clip(
    gradients: Gradients,
    values: Tensor,
    aux: Any,
    is_padding: Tensor | None,
    settings: Settings,
) -> MicrobatchResult:
    """Compute norms, factors and clipped sums of one microbatch after its backward pass."""
    clipping, nan_safe = settings.clipping, settings.options.nan_safe
    if settings.pre_clipping is not None or settings.sum_rows is not None:
        rows = [gradients.per_sample(index) for index in range(len(settings.dtypes))]
        if settings.pre_clipping is not None:
            rows = settings.pre_clipping(rows)
        if settings.sum_rows is not None:
            exact, before, dropped = settings.sum_rows(rows, is_padding)
            return MicrobatchResult(exact, values, before, aux, dropped)
        gradients.replace(rows)
    norms = [
        settings.ranks.squared_norms(gradients.squared_norms(members)).sqrt()
        for members in clipping.members
    ]
    finite = torch.stack(norms).isfinite().all(0)
    keep = finite if is_padding is None else finite & ~is_padding
    factors = [clipping.factors(norm, group) for group, norm in enumerate(norms)]
    dropping = nan_safe or is_padding is not None
    if dropping:
        keep = keep if nan_safe else ~is_padding  # type: ignore[operator]
        factors = [torch.where(keep, factor, 0.0) for factor in factors]
        if settings.always_selects:
            gradients.select(keep)
    asks = dropping and not settings.defers_finite_check
    if asks and settings.ranks.sums_leave:
        if not bool(finite.all()):
            gradients.select(keep)
        asks = False
    with phase("contraction"):
        sums = _weighted_sums(gradients, factors, settings)
    # The check comes last, because on a GPU it waits for all queued work, and the sums are queued by now.
    if asks and not bool(finite.all()):
        # ``0 * inf`` is NaN, so such samples must be zeroed in the factors.
        gradients.select(keep)
        with phase("contraction"):
            sums = _weighted_sums(gradients, factors, settings)
    nonfinite = ~finite if is_padding is None else ~finite & ~is_padding
    all_finite = finite.all() if settings.defers_finite_check else None
    return MicrobatchResult(sums, values, norms, aux, nonfinite, all_finite)


def _weighted_sums(
    gradients: Gradients, factors: Sequence[Tensor], settings: Settings
) -> list[Tensor]:
    totals = (
        gradients.weighted_sum(index, factors[settings.clipping.assignment[index]]).to(dtype)
        for index, dtype in enumerate(settings.dtypes)
    )
    return settings.ranks.summed(totals, gradients.parameters)


def accumulate(sums: list[Tensor] | None, piece: MicrobatchResult) -> list[Tensor]:
    """Add the sums of one more microbatch in place; None starts with them."""
    if sums is None:
        # No other code reads the tensors that these sums may alias, so they can be overwritten.
        more = copies(piece.sums) if piece.aliases_graph else piece.sums
        return [total.contiguous() for total in more]
    if sums:
        add_in_place(sums, piece.sums)
    return sums


def joined(pieces: Iterable[MicrobatchResult]) -> MicrobatchResult:
    """Return the result of all samples of several pieces; only one piece's sums are in memory beside the total."""
    sums: list[Tensor] | None = None
    rest = []
    for piece in pieces:
        sums = accumulate(sums, piece)
        rest.append(replace(piece, sums=[]))
        del piece
    assert sums is not None, "a result of no pieces"
    return MicrobatchResult(
        sums,
        torch.cat([piece.values for piece in rest]),
        [torch.cat(norms) for norms in zip(*(piece.norms for piece in rest), strict=True)],
        tree_map(lambda *leaves: torch.cat(leaves), *(piece.aux for piece in rest)),
        torch.cat([piece.nonfinite for piece in rest]),
    )
