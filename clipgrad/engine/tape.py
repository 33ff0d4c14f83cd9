"""The tape holds all parameters of one microbatch, and makes the hooks that receive output gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from clipgrad._functorch import hide_batch_axis
from clipgrad._phases import phase
from clipgrad.engine.tracked import Tracked
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.registry import Recipe


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
        # Ranges of autograd's sequence numbers: first, and last plus one.
        self.corrected: list[tuple[int, int]] = []
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
