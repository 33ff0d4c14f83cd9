"""Bugs that differential-privacy code of others had, planted into clipgrad, and the check that notices each.

``docs/published-bugs.md`` is the same list for people; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import DPOptimizer, SeededNoise, SystemNoise, arithmetic
from clipgrad.clipping import Clipping
from clipgrad.engine.gradients import Gradients
from clipgrad.optimizer.pending import Pending
from tests.published_bugs import checks

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Bug:
    """What went wrong elsewhere, how it is planted here, and what has to notice it."""

    name: str
    where: str
    plant: Plant
    check: Callable[[], None]


BUGS: list[Bug] = []


def bug(name: str, where: str, check: Callable[[], None]) -> Callable[[Plant], Plant]:
    def add(plant: Plant) -> Plant:
        BUGS.append(Bug(name, where, plant, check))
        return plant

    return add


# ------------------------------------------------------------------------------------- norms and clipping


@bug("ghost norm of a bias over positions is wrong", "Opacus #751 (2025)", checks.sequences)
def _(patch: pytest.MonkeyPatch) -> None:
    right = Gradients.squared_norms

    def wrong(self: Gradients, members: Sequence[int]) -> Tensor | None:
        biases = [index for index in members if self._tape.tracked[index].shared.dim() == 1]
        others = right(self, [index for index in members if index not in biases])
        norms = right(self, biases)
        if norms is None or others is None:
            return others if norms is None else norms.square()
        return others + norms.square()

    patch.setattr(Gradients, "squared_norms", wrong)


@bug("max_grad_norm is ignored", "Opacus #664 (2024)", checks.rows)
def _(patch: pytest.MonkeyPatch) -> None:
    right = arithmetic.make_clipping
    patch.setattr(
        arithmetic, "make_clipping", lambda norm, *rest, **named: right(1.0, *rest, **named)
    )


@bug("each parameter is clipped on its own", "fedbiomed #1443 (2025)", checks.rows)
def _(patch: pytest.MonkeyPatch) -> None:
    right = arithmetic.make_clipping

    def wrong(norm: Any, names: Any = None, *rest: Any, **named: Any) -> Clipping:
        return right(dict.fromkeys(names, norm) if names else norm, names, *rest, **named)

    patch.setattr(arithmetic, "make_clipping", wrong)


@bug("the squared norm is taken for the norm", "entrenar #311 (2026)", checks.rows)
def _(patch: pytest.MonkeyPatch) -> None:
    right = Clipping.factors
    patch.setattr(
        Clipping, "factors", lambda self, norms, *rest: right(self, norms.square(), *rest)
    )


@bug("the batch's gradient is clipped, not each sample's", "AiDotNet #1318 (2026)", checks.rows)
def _(patch: pytest.MonkeyPatch) -> None:
    right = Clipping.factors

    def wrong(self: Clipping, norms: Tensor, *rest: Any) -> Tensor:
        return right(self, norms.sum().expand_as(norms), *rest)

    patch.setattr(Clipping, "factors", wrong)


@bug("uses of a tied weight are clipped apart", "Opacus #413 (2022)", checks.tied)
def _(patch: pytest.MonkeyPatch) -> None:
    from clipgrad.engine.tracked import Tracked

    right = Tracked.squared_norms

    def wrong(self: Tracked) -> Tensor:
        uses, kept = list(self.uses), self.kept
        apart = [(None, [use]) for use in uses] + ([] if kept is None else [(kept, [])])
        norms = []
        for self.kept, self.uses[:] in apart:
            norms.append(right(self))
        self.kept, self.uses[:] = kept, uses
        return torch.stack(norms).sum(0)

    patch.setattr(Tracked, "squared_norms", wrong)


@bug(
    "a sample that is not finite poisons the sum",
    "any sum that multiplies by zero",
    checks.a_nan_row_contributes_nothing,
)
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gradients, "select", lambda self, keep: None)


# ------------------------------------------------------------------------------------- accumulation and scale


@bug(
    "accumulated sums share memory with .grad",
    "Opacus #707 (2025)",
    checks.several_backward_calls_are_one_batch,
)
def _(patch: pytest.MonkeyPatch) -> None:
    def wrong(
        self: Pending, parameters: Any, sums: Any, others: Any = (), *, aliases_graph: bool = False
    ) -> None:
        for parameter, total in zip(parameters, sums, strict=True):
            if parameter.grad is None:
                parameter.grad = total
            else:
                parameter.grad.copy_(total)  # as a fresh backward would, and with it the sum so far
        if self._sums is None:
            self._sums = [parameter.grad for parameter in parameters]
        else:
            torch._foreach_add_(self._sums, [parameter.grad for parameter in parameters])

    # With the sums in .grad, nothing can be said about who wrote there.
    patch.setattr(Pending, "_clear_gradients", lambda self, names, parameters: None)

    patch.setattr(Pending, "add", wrong)


@bug(
    "the sum is normalised twice",
    "Opacus #683 (2024), the other way round",
    checks.the_sum_is_divided_once_by_the_public_constant,
)
def _(patch: pytest.MonkeyPatch) -> None:
    right = Pending.publish

    def wrong(self: Pending, parameters: Any, gradients: Any) -> None:
        right(self, parameters, [gradient / 8 for gradient in gradients])

    patch.setattr(Pending, "publish", wrong)


@bug(
    "the sum is divided by the size of the batch at hand, which is private",
    "common in hand-written loops",
    checks.the_sum_is_divided_once_by_the_public_constant,
)
def _(patch: pytest.MonkeyPatch) -> None:
    right = DPOptimizer.step

    def wrong(self: DPOptimizer, closure: None = None) -> None:
        size = float(self.diagnostics.batch_size)
        self._mechanism = self._mechanism._replace(expected_batch_size=size)
        right(self, closure)

    patch.setattr(DPOptimizer, "step", wrong)


# ------------------------------------------------------------------------------------- noise


@bug(
    "noise for the sum is added to the mean, or the reverse",
    "jax_privacy #383 (2026)",
    checks.noise_has_its_size,
)
def _(patch: pytest.MonkeyPatch) -> None:
    right = SystemNoise.add_gaussian_
    patch.setattr(
        SystemNoise, "add_gaussian_", lambda self, sums, sigma: right(self, sums, sigma * 4)
    )


@bug("noise is added at every backward", "fedbiomed #1443 (2025)", checks.noise_has_its_size)
def _(patch: pytest.MonkeyPatch) -> None:
    right = Pending.add

    def wrong(
        self: Pending, parameters: Any, sums: Any, others: Any = (), *, aliases_graph: bool = False
    ) -> None:
        SystemNoise().add_gaussian_(sums, 3.0)
        right(self, parameters, sums)

    patch.setattr(Pending, "add", wrong)


@bug("sigma is squared", "SmartNoise #316 (2020)", checks.noise_has_its_size)
def _(patch: pytest.MonkeyPatch) -> None:
    right = arithmetic.gaussian_sigma
    patch.setattr(arithmetic, "gaussian_sigma", lambda **named: right(**named) ** 2)


@bug("parameters share their noise", "JAX #3646 (2020)", checks.noise_is_independent)
def _(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: SystemNoise, tensors: list[Tensor], sigma: float) -> None:
        seed = int(torch.randint(2**40, ()))
        for tensor in tensors:
            SeededNoise(torch.Generator().manual_seed(seed)).add_gaussian_([tensor], sigma)

    patch.setattr(SystemNoise, "add_gaussian_", wrong)


@bug("steps share their noise", "a seed set anew in the loop", checks.noise_is_independent)
def _(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: SystemNoise, tensors: list[Tensor], sigma: float) -> None:
        SeededNoise(torch.Generator().manual_seed(0)).add_gaussian_(tensors, sigma)

    patch.setattr(SystemNoise, "add_gaussian_", wrong)


@bug(
    "a closure computes gradients after the noise",
    "Opacus #330 (2022)",
    checks.no_gradient_after_the_noise,
)
def _(patch: pytest.MonkeyPatch) -> None:
    right = DPOptimizer.step

    def wrong(self: DPOptimizer, closure: Any = None) -> None:
        right(self)
        if closure is not None:
            self.inner.step(closure)

    patch.setattr(DPOptimizer, "step", wrong)


@bug("an empty batch crashes or is skipped", "Opacus #161 (2021)", checks.an_empty_batch_gets_noise)
def _(patch: pytest.MonkeyPatch) -> None:
    right = DPOptimizer.step

    def wrong(self: DPOptimizer, closure: None = None) -> None:
        if self.diagnostics.batch_size:
            right(self, closure)

    patch.setattr(DPOptimizer, "step", wrong)
