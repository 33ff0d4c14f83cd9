"""A tracked tensor records a parameter of one forward pass, its uses, and the gradients of these uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from clipgrad.rules.canonical import Outer, PerSample, Use, adds_rows, weighted_sum_of
from clipgrad.rules.ghost import ghost_norms_squared, norms_squared_with_rows
from clipgrad.rules.operands import sum_of, widen
from clipgrad.rules.registry import Extent
from clipgrad.rules.row_norms import row_norms_squared


class Strategy(Enum):
    """The strategy says how the norm of a per-sample gradient is computed; it changes costs, never results."""

    KEPT = "kept"
    """Build each per-sample gradient during the backward pass and keep it until it is summed."""
    GHOST = "ghost"
    """Keep input and output gradient; compute norms from Gram matrices."""


@dataclass(frozen=True)
class ExpectedUse:
    """This class records a use of the forward pass whose output gradient has not arrived yet.

    It holds no recipe: recipes close over activations, and only the hook that uses a recipe may keep it alive.
    """

    rule: str
    extent: Extent | None
    half: torch.dtype | None = None
    """The half-precision dtype in which products read the factors as they are; None if they are widened first."""


@dataclass(eq=False)
class Tracked:
    """This class holds a parameter, or an expression of parameters alone, and its gradients.

    Attributes:
        name: The parameter's name, or the expression's operation and operands.
        shared: The value that all samples share. The value of an expression carries its autograd graph.
        leaf: ``shared`` expanded to ``[B, ...]`` with stride 0; it collects the gradient of uses without a rule.
        wrapper: The tensor that user code holds: ``leaf`` with its batch axis hidden by ``vmap``.
        parameters: Indices of the parameters in the expression; for a parameter, its own index.
        injective: Whether the expression only moves elements (a view), so that norms carry over.
        wide: The cached value of ``exact``.
    """

    name: str
    shared: Tensor
    leaf: Tensor
    wrapper: Tensor
    parameters: tuple[int, ...]
    derived: bool = False
    injective: bool = True
    wide: Tensor | None = None
    expected: list[ExpectedUse] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)
    strategy: Strategy = Strategy.KEPT
    kept: Tensor | None = None
    uses: list[Use] = field(default_factory=list)

    @property
    def extents(self) -> list[Extent | None]:
        return [expected.extent for expected in self.expected]

    @property
    def value(self) -> Tensor:
        return self.shared.detach()

    @property
    def exact(self) -> Tensor:
        """Return ``shared`` in at least float32; clipped sums of a view are pulled back through it.

        Rounding a sum over samples to half precision could change it by more than the sensitivity.
        """
        if self.wide is None:
            wide = widen(self.shared)
            self.wide = wide if wide is self.shared else wide.detach().requires_grad_()
        return self.wide

    def receive(self, use: Use, extent: Extent | None, rule: str) -> None:
        """Store the gradient of one use as soon as the backward pass has computed it.

        A gradient of another shape is an error: its addition would broadcast, and norms would be wrong.
        """
        if isinstance(use, Outer):
            self._check_shape((use.samples, *use.shape), rule)
            use = use.aligned()
        if extent is not None and (self.strategy is not Strategy.KEPT or self._joins_kept(use)):
            self.uses.append(use)
            return
        gradient = use.stored() if isinstance(use, Outer) else use.per_sample()
        self._check_shape(gradient.shape, rule)
        self._keep(gradient)

    def _joins_kept(self, use: Use) -> bool:
        """Return whether a one-hot use stays beside a kept gradient, to which it would add a few rows."""
        return adds_rows(use) and self.kept is not None and self.injective

    def _keep(self, gradient: Tensor) -> None:
        self.kept = gradient if self.kept is None else widen(self.kept) + widen(gradient)

    def _check_shape(self, shape: Sequence[int], rule: str) -> None:
        if tuple(shape) != self.leaf.shape:
            raise RuntimeError(
                f"rule {rule!r} gave parameter {self.name!r} per-sample gradients of shape {tuple(shape)} where "
                f"{tuple(self.leaf.shape)} is needed, samples first. The rule must raise Decline for operands that the "
                "operation broadcasts; unregister_rule removes it."
            )

    def merge_kept_gradients(self) -> None:
        """Materialise all gradients of the entry if one of them is materialised; call after the backward pass."""
        if self.leaf.grad is not None:
            self._keep(self.leaf.grad)
            self.leaf.grad = None
        if self.kept is not None and not all(map(self._joins_kept, self.uses)):
            for use in self.uses:
                self._keep(use.per_sample())
            self.uses = []

    @property
    def has_gradient(self) -> bool:
        return self.kept is not None or bool(self.uses)

    def select(self, keep: Tensor) -> None:
        if self.kept is not None:
            self.kept = PerSample(self.kept).select(keep).gradient
        self.uses = [use.select(keep) for use in self.uses]

    def per_sample(self) -> Tensor:
        """Return per-sample gradients, ``[B, *shape]``."""
        kept = [] if self.kept is None else [widen(self.kept)]
        return sum_of([*kept, *(use.per_sample() for use in self.uses)])

    def squared_norms(self) -> Tensor:
        """Return squared norms of the per-sample gradients, ``[B]``."""
        if self.kept is not None and not self.uses:
            return row_norms_squared(self.kept)
        factors = [outer for use in self.uses if (outer := use.outer()) is not None]
        if len(factors) < len(self.uses) or len({outer.groups for outer in factors}) > 1:
            # Factors cannot be joined if a use has none, or if a convolution weight is used with two numbers of groups.
            # Gradients are kept then: a sum of the factors would round other digits away than these norms did.
            self.kept, self.uses = self.per_sample(), []
            return row_norms_squared(self.kept)
        if self.kept is not None:
            return norms_squared_with_rows(self.kept, factors)
        return ghost_norms_squared(factors)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return ``sum_b factors[b] g_b``, in at least float32."""
        kept = [] if self.kept is None else [PerSample(self.kept)]
        return weighted_sum_of([*kept, *self.uses], factors)
