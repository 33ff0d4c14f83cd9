"""This module keeps the clipped sums of a logical batch between ``backward`` and ``step``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipgrad.engine.copies import add_in_place, copies
from clipgrad.errors import UnclippedGradientError


class FinishedSums(NamedTuple):
    """This tuple holds the sums of a finished logical batch.

    Attributes:
        sums: The sum of each parameter.
        others: Sums that belong to no parameter.
        aliases_graph: Whether ``sums`` alias the memory of a CUDA graph, which the next ``backward`` overwrites.
    """

    sums: list[Tensor]
    others: list[Tensor]
    aliases_graph: bool


class Pending:
    """This class holds the clipped sums of the logical batch so far; until ``step``, every ``.grad`` is None.

    Only ``publish`` writes to ``.grad``. Any other value there comes from other code (``loss.backward()``), was not
    clipped, and is refused.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] | None = None
        self._others: list[Tensor] = []
        self._aliases_graph = False
        # Gradients that hold noisy means or zeros, by the id of their parameter. A loop may clear .grad itself.
        self._allowed_gradients: dict[int, Tensor] = {}

    @property
    def unfinished(self) -> bool:
        """Return whether there was a ``backward`` since the last ``step``."""
        return self._sums is not None

    def sums(self) -> list[Tensor]:
        """Return copies of the sums so far.

        Raises:
            UnclippedGradientError: If there was no ``backward`` since the last ``step``.
        """
        if self._sums is None:
            raise UnclippedGradientError(
                "clipped_sums: there was no backward(*batch) since the last step, so there are no clipped sums. Read "
                "them between backward and step; after step, .grad holds the noised mean."
            )
        return copies(self._sums)

    def clear(self, parameters: Iterable[Tensor]) -> None:
        """Discard the sums, and allow the zeros that ``zero_grad`` left in ``.grad``.

        Args:
            parameters: The parameters that may have a ``.grad`` now.
        """
        self._sums = None
        self._allowed_gradients = {id(p): p.grad for p in parameters if p.grad is not None}

    def check_same_parameters(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> None:
        """Refuse other parameters than those of the sums so far.

        Raises:
            UnclippedGradientError: If the parameters differ within a logical batch.
        """
        same = before is now or list(map(id, before)) == list(map(id, now))
        if self.unfinished and not same:
            raise UnclippedGradientError(
                "backward: the parameters to train changed within a logical batch (requires_grad, add_param_group), "
                "so the sums so far do not fit. Change them after step() or zero_grad()."
            )

    def before_backward(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Clear ``.grad``, and copy sums that the next batch would overwrite.

        Raises:
            UnclippedGradientError: If a ``.grad`` holds a value that was not published here.
        """
        self._clear_gradients(names, parameters)
        if self._sums is not None and self._aliases_graph:
            self._sums, self._aliases_graph = copies(self._sums), False

    def add(
        self,
        parameters: Sequence[Tensor],
        sums: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        *,
        aliases_graph: bool = False,
    ) -> None:
        """Add the sums of one ``backward``.

        Args:
            parameters: The trained parameters.
            sums: Their clipped sums.
            others: Sums over the same samples that belong to no parameter; their number is the same at each call.
            aliases_graph: Whether the next batch overwrites ``sums``.
        """
        if self._sums is None:
            self._sums = [_with_strides_of(p, s) for p, s in zip(parameters, sums, strict=True)]
            self._others, self._aliases_graph = list(others), aliases_graph
        else:
            add_in_place([*self._sums, *self._others], [*sums, *others])

    def take(
        self, names: Sequence[str], parameters: Sequence[Tensor], others: Iterable[Tensor]
    ) -> FinishedSums:
        """Return the sums of the finished logical batch, to which no other reference exists.

        Args:
            names: Names of the parameters.
            parameters: The trained parameters.
            others: All other parameters that the wrapped optimizer would step if they had a gradient.

        Raises:
            UnclippedGradientError: Without sums, or if a ``.grad`` was not published here.
        """
        if self._sums is None:
            raise UnclippedGradientError(
                "step: no backward(*batch) since the last step (or zero_grad came in between), so there is no clipped "
                "gradient to step on. Call backward first; an empty batch is legal."
            )
        self._clear_gradients(names, parameters)
        for parameter in others:
            if parameter.grad is not None and not self._is_allowed(parameter, parameter.grad):
                raise UnclippedGradientError(
                    f"a parameter of shape {tuple(parameter.shape)} was not trained by backward (it is frozen, or was "
                    "frozen then), but holds a .grad that was not clipped here, and the wrapped optimizer would step "
                    "on it. Clear it with optimizer.zero_grad() before backward."
                )
        taken = FinishedSums(self._sums, self._others, self._aliases_graph)
        self._sums, self._others = None, []
        return taken

    def publish(self, parameters: Sequence[Tensor], means: Sequence[Tensor]) -> None:
        """Write noisy means to ``.grad``; no other reference to these tensors may exist."""
        for parameter, mean in zip(parameters, means, strict=True):
            gradient = mean if mean.dtype is parameter.dtype else mean.to(parameter.dtype)
            parameter.grad = gradient
            self._allowed_gradients[id(parameter)] = gradient

    def _clear_gradients(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        found = [(n, p, p.grad) for n, p in zip(names, parameters, strict=True)]
        for name, parameter, gradient in found:
            if gradient is not None and not self._is_allowed(parameter, gradient):
                raise UnclippedGradientError(
                    f"parameter {name!r}: its .grad was written by other code (loss.backward(), an assignment), and "
                    "was not clipped. Only DPOptimizer may write gradients: .grad is None from backward to step, and "
                    "holds the noised mean after step. Clear it with optimizer.zero_grad()."
                )
        for _, parameter, gradient in found:
            self._allowed_gradients.pop(id(parameter), None)
            if gradient is not None:
                parameter.grad = None

    def _is_allowed(self, parameter: Tensor, gradient: Tensor) -> bool:
        return self._allowed_gradients.get(id(parameter)) is gradient


def unnoised_step_hook(pending: weakref.ref[Pending]) -> Callable[..., None]:
    """Return a hook that refuses a step of the wrapped optimizer while the clipped sums have no noise."""

    def refuse(*_: object) -> None:
        waiting = pending()
        if waiting is not None and waiting.unfinished:
            raise UnclippedGradientError(
                "the wrapped optimizer's own step() was called before noise was added to the clipped sums; call "
                "DPOptimizer.step(), which adds it, divides, and steps the wrapped optimizer."
            )

    return refuse


def _with_strides_of(parameter: Tensor, total: Tensor) -> Tensor:
    """Return ``total`` with the parameter's strides, because fused optimizers read both as flat memory."""
    if total.stride() == parameter.stride():
        return total
    return torch.empty_like(parameter, dtype=total.dtype, requires_grad=False).copy_(total)
