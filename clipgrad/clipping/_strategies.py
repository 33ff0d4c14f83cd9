"""This module defines the values of ``max_grad_norm``: a norm, optionally in a rule, optionally in a grouping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from clipgrad import _validate
from clipgrad.clipping._adaptive import AdaptiveQuantile

Schedule: TypeAlias = Callable[[int], float]
"""A function of the step number (0, 1, ...) only; it is public and must not depend on the data."""
Norm: TypeAlias = float | Schedule | AdaptiveQuantile

WEIGHTS = ("uniform", "size")
# A smaller norm in float32 may be rounding error alone, and the division would amplify that error.
LEAST_GAMMA = 1e-6


@dataclass(frozen=True)
class Automatic:
    """Normalise instead of clip: multiply each sample's gradient by ``C / (norm + gamma)`` (AUTO-S).

    Bu, Wang, Zha and Karypis, "Automatic Clipping: Differentially Private Deep Learning Made Easier and Stronger",
    2022, arXiv:2206.07136, algorithm 1. There is no threshold to tune: C only scales the update, noise included, so it
    can stay 1 and only the learning rate matters. A sample contributes ``C * norm / (norm + gamma) < C``, so the
    sensitivity is C; a zero gradient contributes zero.

    Args:
        max_grad_norm: C: a number, a function of the step, or an ``AdaptiveQuantile``.
        gamma: A constant in the unit of the norms, at least 1e-6. Gradients much smaller than ``gamma`` keep their
            relative sizes. AUTO-V (``gamma=0``) is refused: it would give rounding errors the weight of gradients.

    Raises:
        ValueError: If ``gamma`` is out of range, or ``max_grad_norm`` is a grouping.

    Examples:
        >>> import torch, clipgrad
        >>> gradient = clipgrad.clipped_grad(
        ...     lambda w, x: (w * x).sum(), max_grad_norm=Automatic(2.0, gamma=1.0)
        ... )
        >>> gradient(torch.zeros(1), torch.tensor([[1.0], [3.0]])).grads  # 2 * 1/2 + 2 * 3/4
        tensor([2.5000])
        >>> gradient.sensitivity()
        2.0
    """

    max_grad_norm: Norm = 1.0
    gamma: float = 0.01

    def __post_init__(self) -> None:
        gamma = _validate.number("gamma", self.gamma)
        if not (math.isfinite(gamma) and gamma >= LEAST_GAMMA):
            raise ValueError(
                f"gamma must be finite and at least {LEAST_GAMMA}, got {gamma}: without it (AUTO-V) a gradient that is "
                "rounding error would weigh as much as any other. The paper's 0.01 is a good start."
            )
        if isinstance(self.max_grad_norm, Mapping | PerLayer | Automatic):
            raise ValueError(
                f"Automatic needs a norm, got {type(self.max_grad_norm).__name__}; grouping comes first: "
                "PerLayer(Automatic(1.0)), or {'': Automatic(1.0)}."
            )


@dataclass(frozen=True)
class PerLayer:
    """Clip each module that owns parameters on its own, and all modules together to C.

    A group is a parameter's name without its last component: ``encoder.0.weight`` and ``encoder.0.bias`` belong to
    ``encoder.0``. The squares of the groups' norms add up to C squared, so the sensitivity is C for every model.
    McMahan, Ramage, Talwar and Zhang, "Learning Differentially Private Recurrent Language Models", 2018,
    arXiv:1710.06963, section 2 ("per-layer clipping").

    Args:
        max_grad_norm: C: a number, a function of the step, or ``Automatic(...)`` to normalise each group.
        weights: ``"uniform"`` gives each of L groups ``C / sqrt(L)``. ``"size"`` gives a group of n elements
            ``C * sqrt(n / N)``, where N is the number of all elements.

    Raises:
        ValueError: If ``weights`` is unknown, or ``max_grad_norm`` is a grouping itself.

    Examples:
        >>> import torch, clipgrad
        >>> def loss(p, x):
        ...     return (p["a.w"] * x).sum() + (p["b.w"] * x).sum() * 10
        >>> gradient = clipgrad.clipped_grad(loss, max_grad_norm=PerLayer(2**0.5))
        >>> gradient({"a.w": torch.zeros(1), "b.w": torch.zeros(1)}, torch.ones(1, 1)).grads
        {'a.w': tensor([1.]), 'b.w': tensor([1.])}
        >>> round(gradient.sensitivity(), 4)
        1.4142
    """

    max_grad_norm: Norm | Automatic
    weights: str = "uniform"

    def __post_init__(self) -> None:
        _validate.one_of("weights", self.weights, WEIGHTS)
        if isinstance(self.max_grad_norm, Mapping | PerLayer):
            raise ValueError(
                f"PerLayer needs the norm of all groups together, got {type(self.max_grad_norm).__name__}; give a "
                "number or Automatic(...), or else a mapping from prefix to norm in PerLayer's place."
            )

    def shares(self, sizes: Mapping[str, int]) -> dict[str, float]:
        """Return each group's share of C from the groups' numbers of elements; the squares of shares add up to one."""
        if self.weights == "uniform":
            return dict.fromkeys(sizes, 1 / math.sqrt(len(sizes)))
        total = max(sum(sizes.values()), 1)
        return {group: math.sqrt(size / total) for group, size in sizes.items()}


ClippingStrategy: TypeAlias = Norm | Automatic | PerLayer | Mapping[str, Norm | Automatic]


def copy_strategy(strategy: ClippingStrategy) -> ClippingStrategy:
    """Return a copy of a mapping, which its owner may write to later; other strategies are constant."""
    return dict(strategy) if isinstance(strategy, Mapping) else strategy


def is_grouped(strategy: ClippingStrategy) -> bool:
    """Return whether the strategy has a norm per group, even if there is a single group."""
    return isinstance(strategy, Mapping | PerLayer)


def with_norms(strategy: ClippingStrategy, number: Callable[[Norm], float]) -> ClippingStrategy:
    """Return the same strategy with every norm, schedule or ``AdaptiveQuantile`` in it replaced by ``number`` of it."""
    if isinstance(strategy, Mapping):
        return {prefix: _with_norm(inner, number) for prefix, inner in strategy.items()}
    if isinstance(strategy, PerLayer):
        return replace(strategy, max_grad_norm=_with_norm(strategy.max_grad_norm, number))
    return _with_norm(strategy, number)


def _with_norm(rule: Norm | Automatic, number: Callable[[Norm], float]) -> float | Automatic:
    if isinstance(rule, Automatic):
        return replace(rule, max_grad_norm=number(rule.max_grad_norm))
    return number(rule)
