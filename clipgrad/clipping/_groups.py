"""Compute clipping factors from per-sample norms, and the sensitivity from the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clipgrad import _validate
from clipgrad.clipping._adaptive import AdaptiveQuantile
from clipgrad.clipping._relation import Relation, most_contributions
from clipgrad.clipping._strategies import Automatic, ClippingStrategy, PerLayer

# Larger factors, which a zero gradient gets, would overflow in float32.
_LARGEST_FACTOR = 1e30


@dataclass(frozen=True)
class Clipping:
    """This class specifies which parameters are scaled together, to which norm and how.

    Attributes:
        groups: Name of each group; a single empty name if all parameters are scaled together.
        norms: The clipping norm of each group, ``0 <= C <= inf``.
        assignment: Per parameter, the index of its group.
        gammas: Per group, ``gamma`` of ``Automatic``; None to clip.
        bounds: ``norms`` as a tensor ``[groups]``, which a graph reads instead of ``norms`` to serve other norms too.
    """

    groups: tuple[str, ...]
    norms: tuple[float, ...]
    assignment: tuple[int, ...]
    gammas: tuple[float | None, ...]
    bounds: Tensor | None = field(default=None, compare=False, repr=False)

    @cached_property
    def members(self) -> list[list[int]]:
        """Return for each group the indices of the parameters that it clips together."""
        members: list[list[int]] = [[] for _ in self.groups]
        for index, owner in enumerate(self.assignment):
            members[owner].append(index)
        return members

    def factors(self, norms: Tensor, group: int) -> Tensor:
        """Return the factor of each sample's gradient in one group, ``[B]``; NaN for a NaN norm.

        To clip is ``min(1, C / norm)``: ``C = 0`` gives 0, ``C = inf`` gives 1, a zero norm gives 1. ``Automatic`` is
        ``C / (norm + gamma)``, at most ``C / gamma`` times the factor that clips to ``gamma``. So rounding errors are
        at most ``C / gamma`` times those of a sum clipped to ``gamma``. Without ``gamma`` there would be no such bound.

        Args:
            norms: Per-sample L2 norms ``[B]``.
            group: Index of the group.
        """
        bound: float | Tensor = self.norms[group]
        if math.isinf(bound):
            return torch.where(norms.isnan(), norms, 1.0)
        if bound == 0:
            return torch.where(norms.isfinite(), 0.0, norms)
        if self.bounds is not None:
            bound = self.bounds[group]
        gamma = self.gammas[group]
        return (bound / norms).clamp(max=1.0) if gamma is None else bound / (norms + gamma)

    def with_bounds(self, bounds: Tensor) -> Clipping:
        """Return a copy that reads ``bounds`` instead of ``norms``; valid for all norms with the same ``structure``."""
        return replace(self, bounds=bounds)

    @cached_property
    def structure(self) -> tuple[Any, ...]:
        """Return everything that a graph reading ``bounds`` depends on: all but the values of positive finite norms."""
        ends = tuple(norm if norm == 0 or math.isinf(norm) else None for norm in self.norms)
        return self.groups, self.assignment, self.gammas, ends

    def bound(self) -> float:
        """Return the largest L2 norm of one sample's contribution, over all groups together."""
        return math.hypot(*self.norms)


def make_clipping(
    max_grad_norm: ClippingStrategy,
    names: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
) -> Clipping:
    """Resolve ``max_grad_norm`` against the parameter names.

    Args:
        max_grad_norm: One norm for all parameters, or a mapping from prefixes of parameter names to norms. A prefix
            matches whole components (``"conv"`` matches ``"conv.weight"``, not ``"conv1.weight"``), the longest match
            wins, and ``""`` matches everything. ``Automatic`` may replace a norm, and ``PerLayer`` the whole. Every
            norm must be a number.
        names: Parameter names in order; None gives the bound alone, before any parameter is known.
        sizes: Number of elements of each parameter, for ``PerLayer``.

    Raises:
        ValueError: If a norm is negative, NaN, or changes from step to step, a parameter matches no prefix, or a prefix
            matches no parameter.
    """
    if isinstance(max_grad_norm, Mapping):
        return _by_prefix(max_grad_norm, names)
    if isinstance(max_grad_norm, PerLayer):
        return _per_layer(max_grad_norm, names, sizes)
    gamma, norm = _rule("max_grad_norm", max_grad_norm)
    return Clipping(("",), (norm,), (0,) * len(names or ()), (gamma,))


def _by_prefix(max_grad_norm: Mapping[str, Any], names: Sequence[str] | None) -> Clipping:
    if not max_grad_norm:
        raise ValueError("max_grad_norm is an empty mapping; give a norm, or one per prefix.")
    groups = tuple(max_grad_norm)
    found = [_rule(f"max_grad_norm[{group!r}]", value) for group, value in max_grad_norm.items()]
    gammas, norms = zip(*found, strict=True)
    if names is None:
        names = groups
    assignment = tuple(_longest_match(name, groups) for name in names)
    for index, group in enumerate(groups):
        if index not in assignment:
            raise ValueError(
                f"max_grad_norm: no trainable parameter starts with {group!r}; its names start with "
                f"{sorted({name.split('.')[0] for name in names})}. Remove or correct the entry."
            )
    return Clipping(groups, norms, assignment, gammas)


def _per_layer(
    strategy: PerLayer, names: Sequence[str] | None, sizes: Sequence[int] | None
) -> Clipping:
    gamma, norm = _rule("max_grad_norm", strategy.max_grad_norm)
    if names is None:
        return Clipping(("",), (norm,), (), (gamma,))
    owners = [name.rpartition(".")[0] for name in names]
    elements = dict.fromkeys(owners, 0)
    for owner, size in zip(owners, sizes or [0] * len(owners), strict=True):
        elements[owner] += size
    groups = tuple(elements)
    norms = tuple(norm * share for share in strategy.shares(elements).values())
    position = {group: index for index, group in enumerate(groups)}
    assignment = tuple(position[owner] for owner in owners)
    return Clipping(groups, norms, assignment, (gamma,) * len(groups))


def _rule(what: str, value: object) -> tuple[float | None, float]:
    gamma: float | None = None
    if isinstance(value, Automatic):
        gamma, value = float(value.gamma), value.max_grad_norm
    if isinstance(value, PerLayer | Mapping):
        raise ValueError(
            f"{what} is a {type(value).__name__}, but groups hold no groups; give a norm or Automatic."
        )
    if isinstance(value, AdaptiveQuantile) or callable(value):
        raise ValueError(
            f"{what} changes from step to step ({value!r}), and only DPOptimizer counts steps. Give a number, and "
            "gradient.with_max_grad_norm(...) for another one."
        )
    norm = _validate.number(what, value)
    if math.isnan(norm) or norm < 0:
        raise ValueError(f"{what} must be a non-negative number (inf for no clipping), got {norm}.")
    if gamma is not None and not norm / gamma <= _LARGEST_FACTOR:
        raise ValueError(
            f"{what}=Automatic({norm}, gamma={gamma}) multiplies small gradients by {norm / gamma:.0e}; "
            f"keep max_grad_norm / gamma below {_LARGEST_FACTOR:.0e}."
        )
    return gamma, norm


def _longest_match(name: str, groups: Sequence[str]) -> int:
    matches = [
        (len(group), index)
        for index, group in enumerate(groups)
        if group in ("", name) or name.startswith(group + ".")
    ]
    if not matches:
        raise ValueError(
            f"max_grad_norm: parameter {name!r} matches no group of {list(groups)}. Every trainable parameter "
            "needs a clipping norm; add an entry for it, or '' for all the others."
        )
    return max(matches)[1]


def sensitivity(
    clipping: Clipping, relation: Relation, *, normalize_by: float, nan_safe: bool
) -> float:
    """Return how far the clipped sums of neighbouring datasets can be apart, in L2 norm.

    The result is ``inf`` without clipping, and without ``nan_safe``: then a single NaN may turn the whole sum into NaN.
    """
    if not nan_safe:
        return math.inf
    return most_contributions(relation) * clipping.bound() / normalize_by
