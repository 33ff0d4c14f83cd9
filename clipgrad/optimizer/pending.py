"""The clipped sums of a logical batch between ``backward`` and ``step``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipgrad.engine.copies import copies
from clipgrad.errors import UnclippedGradientError


class Taken(NamedTuple):
    """The sums of a finished logical batch.

    Attributes:
        sums: The parameters'.
        others: Those that belong to no parameter.
        aliases_graph: Whether ``sums`` alias the memory of a CUDA graph, which the next ``backward`` overwrites.
    """

    sums: list[Tensor]
    others: list[Tensor]
    aliases_graph: bool


class Pending:
    """The clipped sums of the logical batch so far; ``.grad`` is None while they wait for their noise.

    Nothing but ``publish`` writes to ``.grad``, so what stands there and was not published here came from somebody
    else (``loss.backward()``), was not clipped, and is refused.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] | None = None
        self._others: list[Tensor] = []
        self._aliases_graph = False
        # id(parameter) -> its gradient, if that holds noise or zeros. A loop may clear .grad without telling us.
        self._harmless: dict[int, Tensor] = {}

    @property
    def unfinished(self) -> bool:
        """Whether a ``backward`` waits for its ``step``."""
        return self._sums is not None

    def sums(self) -> list[Tensor]:
        """Copies of the sums so far.

        Raises:
            UnclippedGradientError: If no ``backward`` waits for its ``step``.
        """
        if self._sums is None:
            raise UnclippedGradientError(
                "clipped_sums: no backward(*batch) waits for its step, so there are no clipped sums to show. Ask "
                "between backward and step; after step, .grad holds the noised mean."
            )
        return copies(self._sums)

    def clear(self, parameters: Iterable[Tensor]) -> None:
        """Forget the sums; what ``zero_grad`` left in ``.grad``, zeros or nothing, is harmless.

        Args:
            parameters: Those that may have a ``.grad`` now.
        """
        self._sums = None
        self._harmless = {id(p): p.grad for p in parameters if p.grad is not None}

    def before_backward(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Clear ``.grad``, and make sure that the sums outlive what follows.

        Raises:
            UnclippedGradientError: If a ``.grad`` holds something that was not published here.
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
            parameters: Those that are trained.
            sums: Their clipped sums.
            others: Sums over the same samples that belong to no parameter; each ``backward`` brings as many.
            aliases_graph: Whether the next batch overwrites ``sums``.
        """
        if self._sums is None:
            self._sums = [_laid_out_like(p, s) for p, s in zip(parameters, sums, strict=True)]
            self._others, self._aliases_graph = list(others), aliases_graph
        else:
            torch._foreach_add_([*self._sums, *self._others], [*sums, *others])

    def take(
        self, names: Sequence[str], parameters: Sequence[Tensor], others: Iterable[Tensor]
    ) -> Taken:
        """The sums of the finished logical batch, which nobody else sees.

        Args:
            names: Names of the parameters.
            parameters: Those that are trained.
            others: Those that the wrapped optimizer would also step if they had a gradient.

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
            if parameter.grad is not None and not self._is_harmless(parameter, parameter.grad):
                raise UnclippedGradientError(
                    f"a parameter of shape {tuple(parameter.shape)} was not trained by backward (it is frozen, or was "
                    "until then), but holds a .grad that was not clipped here, and the wrapped optimizer would step "
                    "on it. Clear it with optimizer.zero_grad() before backward."
                )
        taken = Taken(self._sums, self._others, self._aliases_graph)
        self._sums, self._others = None, []
        return taken

    def publish(self, parameters: Sequence[Tensor], means: Sequence[Tensor]) -> None:
        """Show noised means, which nobody else holds, in ``.grad``."""
        for parameter, mean in zip(parameters, means, strict=True):
            gradient = mean if mean.dtype is parameter.dtype else mean.to(parameter.dtype)
            parameter.grad = gradient
            self._harmless[id(parameter)] = gradient

    def _clear_gradients(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        found = [(n, p, p.grad) for n, p in zip(names, parameters, strict=True)]
        for name, parameter, gradient in found:
            if gradient is not None and not self._is_harmless(parameter, gradient):
                raise UnclippedGradientError(
                    f"parameter {name!r}: its .grad was written by somebody else (loss.backward(), an assignment), and "
                    "was not clipped. Let only DPOptimizer write gradients: .grad is None from backward to step, which "
                    "shows the noised mean. Clear it with optimizer.zero_grad()."
                )
        for _, parameter, gradient in found:
            self._harmless.pop(id(parameter), None)
            if gradient is not None:
                parameter.grad = None

    def _is_harmless(self, parameter: Tensor, gradient: Tensor) -> bool:
        return self._harmless.get(id(parameter)) is gradient


def refuse_unnoised(pending: weakref.ref[Pending]) -> Callable[..., None]:
    """A hook of the wrapped optimizer: stepping it while sums wait is a mistake, and would do nothing."""

    def refuse(*_: object) -> None:
        waiting = pending()
        if waiting is not None and waiting.unfinished:
            raise UnclippedGradientError(
                "the wrapped optimizer's own step() was called while clipped sums wait for their noise; call "
                "DPOptimizer.step(), which adds it, divides and steps the wrapped one."
            )

    return refuse


def _laid_out_like(parameter: Tensor, total: Tensor) -> Tensor:
    """``total`` with the parameter's strides: fused optimizers walk both as flat memory."""
    if total.stride() == parameter.stride():
        return total
    return torch.empty_like(parameter, dtype=total.dtype, requires_grad=False).copy_(total)
