"""The result of one microbatch, and how norms and clipped sums become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipgrad._phases import phase
from clipgrad.arithmetic import SumRows
from clipgrad.clipping import Clipping
from clipgrad.engine.copies import copies
from clipgrad.engine.gradients import Gradients
from clipgrad.engine.tape import Strategy
from clipgrad.options import Options
from clipgrad.ranks import Ranks

PreClipping = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Settings:
    """What a microbatch needs to know: the user's options, resolved against the parameters at hand.

    Attributes:
        options: Of the user.
        clipping: Groups of parameters and their norms.
        dtypes: Of each parameter's sum.
        ranks: The processes that hold the parameters.
        pre_clipping: The user's transform of per-sample gradients, on leaves.
        sum_rows: Clips and sums per-sample gradients in the place of the rules; None if the rules do it.
        deferred: Leave the question whether every norm is finite to the caller: a traced graph cannot ask it.
        selects: Take dropped samples out of the activations whether there is one or not: then nobody has to ask.
    """

    options: Options
    clipping: Clipping
    dtypes: tuple[torch.dtype, ...]
    ranks: Ranks
    pre_clipping: PreClipping | None = None
    sum_rows: SumRows | None = None
    deferred: bool = False
    selects: bool = False

    @property
    def strategy(self) -> Strategy | None:
        """The way to find norms that is forced on every parameter; None if each has its own."""
        if self.pre_clipping is not None or self.sum_rows is not None:
            return Strategy.KEPT
        asked = self.options.performance.strategy
        return None if asked == "auto" else Strategy(asked)


@dataclass(frozen=True)
class MicrobatchResult:
    """The result of one microbatch.

    Attributes:
        sums: Clipped sum per parameter, in the accumulation dtype.
        values: Per-sample losses ``[B]``.
        norms: Per-sample norms, ``[B]`` per clipping group.
        aux: Per-sample auxiliary output, or None.
        nonfinite: Boolean ``[B]``: samples dropped because their gradient was not finite.
        all_finite: Boolean scalar, if the question was left to the caller. Where it is False and samples were not
            taken out in any case, ``sums`` are worthless, and the microbatch has to be run again by somebody who asks.
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
    params: Sequence[Tensor],
    values: Tensor,
    aux: Any,
    is_padding: Tensor | None,
    settings: Settings,
) -> MicrobatchResult:
    """Norms, factors and clipped sums of one microbatch whose backward pass has run."""
    clipping, nan_safe = settings.clipping, settings.options.nan_safe
    if settings.pre_clipping is not None or settings.sum_rows is not None:
        rows = [gradients.per_sample(index) for index in range(len(params))]
        if settings.pre_clipping is not None:
            rows = settings.pre_clipping(rows)
        if settings.sum_rows is not None:
            exact, before, dropped = settings.sum_rows(rows, is_padding)
            return MicrobatchResult(exact, values, before, aux, dropped)
        gradients.replace(rows)
    norms = [
        settings.ranks.squared_norms(
            _or_zero(gradients.squared_norms(clipping.members(group)), values)
        ).sqrt()
        for group in range(len(clipping.groups))
    ]
    finite = torch.stack(norms).isfinite().all(0)
    keep = finite if is_padding is None else finite & ~is_padding
    factors = [clipping.factors(norm, group) for group, norm in enumerate(norms)]
    dropping = nan_safe or is_padding is not None
    if dropping:
        keep = keep if nan_safe else ~is_padding  # type: ignore[operator]
        factors = [torch.where(keep, factor, 0.0) for factor in factors]
        if settings.selects:
            gradients.select(keep)
    asks = dropping and not settings.deferred
    if asks and settings.ranks.is_sharded:
        # Sums leave this process as they are formed, so none may be formed twice.
        if not bool(finite.all()):
            gradients.select(keep)
        asks = False
    with phase("contraction"):
        sums = _weighted_sums(gradients, params, factors, settings)
    # Asked only now: on a GPU the answer takes as long as all that is queued, and the sums are queued already.
    if asks and not bool(finite.all()):
        # A zero factor does not silence an inf; such samples are taken out of the factors themselves.
        gradients.select(keep)
        with phase("contraction"):
            sums = _weighted_sums(gradients, params, factors, settings)
    nonfinite = ~finite if is_padding is None else ~finite & ~is_padding
    all_finite = finite.all() if settings.deferred else None
    return MicrobatchResult(sums, values, norms, aux, nonfinite, all_finite)


def _weighted_sums(
    gradients: Gradients,
    params: Sequence[Tensor],
    factors: Sequence[Tensor],
    settings: Settings,
) -> list[Tensor]:
    def totals() -> Iterator[Tensor]:
        for index, (param, dtype) in enumerate(zip(params, settings.dtypes, strict=True)):
            total = gradients.weighted_sum(index, factors[settings.clipping.assignment[index]])
            yield torch.zeros_like(param, dtype=dtype) if total is None else total.to(dtype)

    return settings.ranks.summed(totals(), params)


def _or_zero(squared: Tensor | None, values: Tensor) -> Tensor:
    if squared is not None:
        return squared
    return torch.zeros_like(values, dtype=torch.promote_types(values.dtype, torch.float32))


def accumulate(sums: list[Tensor] | None, piece: MicrobatchResult) -> list[Tensor]:
    """Add the sums of a further piece in place; None starts with them."""
    if sums is None:
        # A sum may alias a tensor that the microbatch owns; nothing else holds one, so it is ours to write to.
        more = copies(piece.sums) if piece.aliases_graph else piece.sums
        return [total.contiguous() for total in more]
    torch._foreach_add_(sums, piece.sums)
    return sums
