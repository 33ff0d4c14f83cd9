"""From per-sample norms to clipping factors, and from the configuration to its sensitivity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from clipgrad import _validate


class Relation(Enum):
    """Which datasets count as neighbours.

    ==================  ======================================  =================
    relation            one dataset becomes the other by        sensitivity (C=1)
    ==================  ======================================  =================
    ADD_OR_REMOVE_ONE   adding or removing one sample           1
    REPLACE_ONE         replacing one sample by any other       2
    REPLACE_SPECIAL     replacing one sample by a null sample   1
    ==================  ======================================  =================

    The names follow Google's ``dp_accounting.NeighboringRelation``. A null sample contributes nothing; padding
    is one.
    """

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"
    REPLACE_SPECIAL = "replace_special"


def relation_of(relation: Relation | str) -> Relation:
    """A relation by member or by name.

    Raises:
        ValueError: If there is none of that name.
    """
    name = relation.value if isinstance(relation, Relation) else str(relation).lower()
    return Relation(_validate.one_of("relation", name, [member.value for member in Relation]))


@dataclass(frozen=True)
class Clipping:
    """Which parameters are clipped together, and to which norm.

    Attributes:
        groups: Name of each group; one empty name for flat clipping.
        norms: The clipping norm of each group, ``0 <= C <= inf``.
        assignment: Per parameter, the index of its group.
        rescale: Whether clipped gradients are divided by their group's norm, so that the bound is 1.
    """

    groups: tuple[str, ...]
    norms: tuple[float, ...]
    assignment: tuple[int, ...]
    rescale: bool = False

    def members(self, group: int) -> list[int]:
        """Indices of the parameters that a group clips together."""
        return [index for index, owner in enumerate(self.assignment) if owner == group]

    def factors(self, norms: Tensor, group: int) -> Tensor:
        """``min(1, C / norm)`` for one group, divided by C if rescaled; NaN for a NaN norm.

        ``C = 0`` gives 0, ``C = inf`` gives 1, a zero norm gives 1.

        Args:
            norms: Per-sample L2 norms ``[B]``.
            group: Index of the group.
        """
        bound = self.norms[group]
        if math.isinf(bound):
            return torch.where(norms.isnan(), norms, 1.0)
        if self.rescale:
            # C = 0 is refused together with rescaling: there is no unit vector to rescale to.
            return torch.minimum(torch.full_like(norms, 1.0 / bound), norms.reciprocal())
        if bound == 0:
            return torch.where(norms.isfinite(), 0.0, norms)
        return (bound / norms).clamp(max=1.0)

    def bound(self) -> float:
        """The L2 norm that one sample's contribution, all groups together, cannot exceed."""
        return math.hypot(*(1.0 if self.rescale else norm for norm in self.norms))


def make_clipping(
    max_grad_norm: float | Mapping[str, float],
    names: Sequence[str] | None = None,
    *,
    rescale: bool,
) -> Clipping:
    """Resolve ``max_grad_norm`` against the parameter names.

    Args:
        max_grad_norm: One norm for all parameters, or a mapping from prefixes of parameter names to norms. A
            prefix matches whole components (``"conv"`` matches ``"conv.weight"``, not ``"conv1.weight"``), the
            longest match wins, and ``""`` matches everything.
        names: Parameter names in order; None for the norms alone, before any parameter is known.
        rescale: Whether clipped gradients are rescaled to norm one.

    Raises:
        ValueError: If a norm is negative or NaN, a parameter matches no prefix, or a prefix no parameter.
    """
    if isinstance(max_grad_norm, Mapping):
        if not max_grad_norm:
            raise ValueError("max_grad_norm is an empty mapping; give a norm, or one per prefix.")
        groups = tuple(max_grad_norm)
        norms = tuple(
            _validate.number(f"max_grad_norm[{group!r}]", norm)
            for group, norm in max_grad_norm.items()
        )
        for group, norm in zip(groups, norms, strict=True):
            _check_norm(f"max_grad_norm[{group!r}]", norm, rescale)
        if names is None:
            names = groups
        assignment = tuple(_longest_match(name, groups) for name in names)
        for index, group in enumerate(groups):
            if index not in assignment:
                raise ValueError(
                    f"max_grad_norm: no trainable parameter starts with {group!r}; its names start with "
                    f"{sorted({name.split('.')[0] for name in names})}. Remove or correct the entry."
                )
        return Clipping(groups, norms, assignment, rescale)
    norm = _validate.number("max_grad_norm", max_grad_norm)
    _check_norm("max_grad_norm", norm, rescale)
    return Clipping(("",), (norm,), (0,) * len(names or ()), rescale)


def _check_norm(what: str, norm: float, rescale: bool) -> None:
    if math.isnan(norm) or norm < 0:
        raise ValueError(f"{what} must be a non-negative number (inf for no clipping), got {norm}.")
    if rescale and (norm == 0 or math.isinf(norm)):
        raise ValueError(
            f"{what}={norm} cannot be rescaled to unit norm; use a positive finite norm."
        )


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
    """How far one neighbour can move the clipped sum, in L2 norm.

    ``inf`` without clipping, and without ``nan_safe``, where a single NaN may turn everything into NaN.
    """
    if not nan_safe:
        return math.inf
    bound = clipping.bound() / normalize_by
    return 2 * bound if relation is Relation.REPLACE_ONE else bound
