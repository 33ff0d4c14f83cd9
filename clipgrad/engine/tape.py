"""The tape records each parameter of one forward pass, its uses, and the gradients of these uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor
from torch.autograd.graph import Node

from clipgrad._functorch import hide_batch_axis
from clipgrad._phases import phase
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.canonical import (
    OneHot,
    Outer,
    PerSample,
    Use,
    row_norms_squared,
    sum_of,
    widen,
)
from clipgrad.rules.ghost import ghost_norms_squared, norms_squared_with_rows
from clipgrad.rules.registry import Extent, Recipe


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
        one_hot = isinstance(use, Outer) and isinstance(use.left, OneHot)
        return one_hot and self.kept is not None and self.injective

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
            return row_norms_squared(self.per_sample())
        if self.kept is not None:
            return norms_squared_with_rows(self.kept, factors)
        return ghost_norms_squared(factors)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Return ``sum_b factors[b] g_b``, in at least float32."""
        kept = [] if self.kept is None else [PerSample(self.kept).weighted_sum(factors)]
        return sum_of([*kept, *(use.weighted_sum(factors) for use in self.uses)])


class Tape:
    """The tape holds all parameters of one microbatch and the tracked expressions computed from them."""

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        batch_size: int,
        before_recipe: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        self.batch_size = batch_size
        self._before_recipe = before_recipe
        self.corrected: list[
            tuple[int, int]
        ] = []  # ranges of autograd's sequence numbers: first, and last plus one
        self.tracked: list[Tracked] = []
        for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
            shared = parameter.detach().requires_grad_()
            self.tracked.append(self._track(name, shared, (index,)))
        first = parameters[0]
        self.anchor = torch.zeros((), dtype=first.dtype, device=first.device, requires_grad=True)

    def _track(self, name: str, shared: Tensor, parameters: tuple[int, ...]) -> Tracked:
        leaf = self._expanded(shared).requires_grad_()
        return Tracked(name, shared, leaf, leaf, parameters)

    def _expanded(self, shared: Tensor) -> Tensor:
        """Return ``[B, *shape]`` in the memory of a parameter, which may be freed until the parameter is gathered."""
        storage = shared.untyped_storage() if self._before_recipe is not None else None
        is_freed = storage is not None and storage.nbytes() == 0 and shared.numel() > 0
        if storage is not None and is_freed:  # PyTorch makes views of allocated memory only
            storage.resize_(shared.numel() * shared.element_size())
        leaf = shared.detach().expand(self.batch_size, *shared.shape)
        if storage is not None and is_freed:
            storage.resize_(0)
        return leaf

    def derive(
        self,
        name: str,
        shared: Tensor,
        sources: Sequence[Tracked],
        level: int,
        wide: Tensor | None,
    ) -> Tracked:
        """Track an expression of parameters that is computed once for all samples.

        Args:
            name: The name that ``explain`` shows.
            shared: The expression's value, with its graph.
            sources: The operands.
            level: The ``vmap`` level of the wrapper.
            wide: The same expression of its operand's ``exact`` value, if the expression only moves elements.
        """
        parameters = tuple(sorted({index for source in sources for index in source.parameters}))
        tracked = self._track(name, shared, parameters)
        tracked.wrapper = hide_batch_axis(tracked.leaf, level)
        tracked.derived = True
        tracked.injective = wide is not None
        tracked.wide = wide
        self.tracked.append(tracked)
        return tracked

    def graphs_of_expressions(self) -> list[Node | None]:
        """Return the last nodes of the graphs through which gradients of expressions are pulled back."""
        entries = [entry for entry in self.tracked if entry.derived]
        values = [value for entry in entries for value in (entry.shared, entry.wide)]
        return [value.grad_fn for value in values if value is not None]

    def release(self) -> None:
        """Free all factors and gradients after the sums are computed, or after the loss is refused.

        Hooks refer to the tracked entries, and user code may keep the graph with the hooks alive (an exception's
        traceback, a tensor that the loss returned). Entries hold no recipes: if a parameter is used twice, they would
        form a reference cycle through the graph, partly in C++, where Python's garbage collector does not see it.
        """
        for entry in self.tracked:
            entry.expected.clear()
            entry.uses = []
            entry.kept = None
            entry.leaf.grad = None

    def gradient_hook(
        self, entries: Sequence[tuple[Tracked, Recipe]], saved: Sequence[Tensor], rule: str
    ) -> Callable[[Tensor], None]:
        """Return the hook that turns an operation's output gradient into uses.

        The hook frees the recipes, and so the activations that they close over, as soon as it has run. The graph that
        holds the hook lives until the end of the backward pass.
        """
        waiting = list(entries)
        held = [(tensor, tensor._version) for tensor in saved]

        def hook(gradient: Tensor) -> None:
            assert waiting, "an output's gradient arrived twice"
            if any(tensor._version != version for tensor, version in held):
                raise NotPerSampleError(
                    f"an input of {rule} was changed by an in-place operation after it was used, so the "
                    "gradient of its parameter can no longer be computed. Replace the in-place operation "
                    "(relu_, add_, x += ...) that follows it by its out-of-place form."
                )
            with phase("per-sample gradients"):
                for tracked, recipe in waiting:
                    if self._before_recipe is not None:
                        self._before_recipe([self.tracked[i].shared for i in tracked.parameters])
                    tracked.receive(recipe.make(gradient), recipe.extent, rule)
            waiting.clear()
            held.clear()

        return hook


class _OutputNode(torch.autograd.Function):
    """This function puts an output that needs no gradient on the autograd graph, without an input gradient.

    The first layer of a model receives data. Its rule needs the output gradient; an input gradient would cost a whole
    backward operation for nothing.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        anchor: Tensor,
        output: Tensor,
        hook: Callable[[Tensor], None],
    ) -> Tensor:
        ctx.hook = hook  # type: ignore[attr-defined]
        if output._is_view():
            return output.view_as(output)
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[None, None, None]:
        ctx.hook(gradient)  # type: ignore[attr-defined]
        return None, None, None


def hook_output(output: Tensor, anchor: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
    """Register ``hook`` so that it receives the gradient of ``output``, whatever is done to the output afterwards.

    A hook on a view is bypassed if the view is written to in place: autograd then rebuilds the view's history from its
    base. So a view is copied first, except for a broadcast, which cannot be written to.
    """
    broadcast = not output.requires_grad and 0 in output.stride()
    if output._is_view() and not broadcast:
        output = output.clone()
    if output.requires_grad:
        output.register_hook(hook)
        return output
    watched: Tensor = _OutputNode.apply(anchor, output, hook)
    return watched
