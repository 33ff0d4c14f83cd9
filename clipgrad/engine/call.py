"""This file holds ``BoundCall``, the object through which a rule reads operands and returns its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from clipgrad._functorch import Decline, expose_batch_axis, hide_batch_axis
from clipgrad.engine.foreign_code import refuse_kind
from clipgrad.engine.tape import Tape, hook_output
from clipgrad.engine.tracked import ExpectedUse, Tracked
from clipgrad.kernels.half_products import multiplies
from clipgrad.rules.registry import Recipe


class ForwardPass(Protocol):
    """This protocol says what a call needs from its forward pass; ``Capture`` implements it.

    Attributes:
        tape: The microbatch's tape.
        level: The level of the ``vmap`` over samples.
        randomness: Whether samples get ``"different"`` or the ``"same"`` random numbers, or none: ``"error"``.
        table: The tracked entry of each wrapper that the loss holds, by the wrapper's id.
        positions: The index of each parameter tensor that the caller passed, by the tensor's id.
    """

    tape: Tape
    level: int
    randomness: str
    table: dict[int, Tracked]
    positions: dict[int, int]

    def refuse_whole(self, tensor: Tensor, operation: str) -> None:
        """Raise if an operand that all samples share is a tensor of the whole batch."""
        ...

    def refuse_original(self, tensor: Tensor, operation: str) -> None:
        """Raise if an operand is a parameter tensor that the caller passed: its gradient would escape clipping."""
        ...


class BoundCall:
    """This class is the ``Call`` that a rule receives; it resolves the operands of one operation with the tape."""

    def __init__(self, capture: ForwardPass, rule: str) -> None:
        self._capture = capture
        self._rule = rule
        self._without_recipe: dict[int, Tracked] = {}

    @property
    def batch_size(self) -> int:
        return self._capture.tape.batch_size

    @property
    def randomness(self) -> str:
        return self._capture.randomness

    def has_batch_axis(self, tensor: Tensor | None) -> bool:
        if tensor is None or id(tensor) in self._capture.table:
            return False
        return expose_batch_axis(tensor, self._capture.level) is not None

    def batched(self, tensor: Tensor) -> Tensor:
        tracked = self._capture.table.get(id(tensor))
        if tracked is not None:
            # The operation uses the parameter as data, so the per-sample copies collect the gradient.
            tracked.fallback.append(self._rule)
            return tracked.leaf
        value = expose_batch_axis(tensor, self._capture.level)
        if value is not None:
            return value
        self._capture.refuse_whole(tensor, self._rule)
        refuse_kind(type(tensor), f"an operand of {self._rule}")
        return tensor.expand(self.batch_size, *tensor.shape)

    def shared(self, tensor: Tensor) -> Tensor:
        self._capture.refuse_original(tensor, self._rule)
        tracked = self._capture.table.get(id(tensor))
        if tracked is not None:
            if torch.is_grad_enabled():
                self._without_recipe[id(tensor)] = tracked
            return tracked.value
        if expose_batch_axis(tensor, self._capture.level) is not None:
            raise Decline
        self._capture.refuse_whole(tensor, self._rule)
        refuse_kind(type(tensor), f"an operand of {self._rule}")
        return tensor

    def adopt(self, tensor: Tensor) -> Tensor:
        index = self._capture.positions.get(id(tensor))
        return tensor if index is None else self._capture.tape.tracked[index].wrapper

    def finish(
        self,
        output: Tensor,
        *recipes: Recipe,
        saved: tuple[Tensor, ...] = (),
        view: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        output = self.record(output, *recipes, saved=saved)
        return hide_batch_axis(output if view is None else view(output), self._capture.level)

    def record(self, output: Tensor, *recipes: Recipe, saved: tuple[Tensor, ...] = ()) -> Tensor:
        entries: list[tuple[Tracked, Recipe]] = []
        if torch.is_grad_enabled():
            for recipe in recipes:
                if recipe.parameter is None:
                    continue
                tracked = self._capture.table.get(id(recipe.parameter))
                if tracked is not None:
                    self._without_recipe.pop(id(recipe.parameter), None)
                    entries.append((tracked, recipe))
        if entries:
            half = output.dtype if multiplies(output, output) else None
            for tracked, recipe in entries:
                tracked.expected.append(ExpectedUse(self._rule, recipe.extent, half))
            tape = self._capture.tape
            output = hook_output(
                output, tape.anchor, tape.gradient_hook(entries, saved, self._rule)
            )
        return output

    def check(self) -> None:
        """Raise ``RuntimeError`` if the rule read a parameter detached and gave no recipe for it.

        Without a recipe the gradient of that parameter is lost. Call this method after the rule has run.
        """
        for tracked in self._without_recipe.values():
            raise RuntimeError(
                f"rule {self._rule!r} used parameter {tracked.name!r} through call.shared() but passed no Recipe "
                "for it to call.finish(), so its gradient would be lost. Add the recipe, or raise Decline."
            )
