"""The clipped sums of a logical batch between ``backward`` and ``step``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipgrad._copies import copies, copies_once_written
from clipgrad.errors import UnclippedGradientError


class Taken(NamedTuple):
    """The sums of a finished logical batch.

    Attributes:
        sums: The parameters'.
        others: Those that belong to no parameter.
        lent: Whether the parameters' are only lent until the next ``backward``.
    """

    sums: list[Tensor]
    others: list[Tensor]
    lent: bool


class Pending:
    """The clipped sums of the logical batch so far, and proof that ``.grad`` still shows just them.

    The sums are private to this object and ``.grad`` holds a copy, on the CPU made when somebody writes. Some writes to
    a tensor leave no trace (``p.grad.data``, ``GradScaler.unscale_``), and none of them may reach what the noise is
    added to.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] | None = None
        self._others: list[Tensor] = []
        self._lent = False
        self._written: dict[
            int, tuple[Tensor, int]
        ] = {}  # id(parameter) -> its .grad and version, as we left them

    @property
    def unfinished(self) -> bool:
        """Whether a ``backward`` waits for its ``step``."""
        return self._sums is not None

    def clear(self, parameters: Iterable[Tensor]) -> None:
        """Forget the sums; what ``zero_grad`` left in ``.grad``, zeros or nothing, is known to be harmless.

        Args:
            parameters: Those that may have a ``.grad`` now.
        """
        self._sums = None
        left = [(p, grad) for p in parameters if (grad := p.grad) is not None]
        self._written = _written(*zip(*left, strict=True)) if left else {}

    def before_backward(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        """Make sure that ``.grad`` is as we left it, and that the sums outlive what follows."""
        grads = [parameter.grad for parameter in parameters]
        if self._sums is not None and all(grad is None for grad in grads):
            self._sums = (
                None  # model.zero_grad() between two backward calls starts the logical batch anew
            )
        if self._sums is not None:
            self._refuse_unless_intact(names, parameters)
            if self._lent:
                self._sums, self._lent = copies(self._sums), False
            return
        for name, parameter, grad in zip(names, parameters, grads, strict=True):
            if grad is None:
                self._written.pop(id(parameter), None)  # frees the gradient that zero_grad dropped
            elif self._written.get(id(parameter), (None, -1))[0] is not grad:
                raise UnclippedGradientError(_foreign(name, parameter))

    def add(
        self,
        parameters: Sequence[Tensor],
        sums: Sequence[Tensor],
        others: Sequence[Tensor] = (),
        *,
        lent: bool = False,
    ) -> None:
        """Add the sums of one ``backward``.

        Args:
            parameters: Those that are trained.
            sums: Their clipped sums.
            others: Sums over the same samples that belong to no parameter; each ``backward`` brings as many.
            lent: Whether ``sums`` are overwritten by what follows the next ``before_backward``.
        """
        if self._sums is None:
            self._sums = [_laid_out_like(p, s) for p, s in zip(parameters, sums, strict=True)]
            self._others, self._lent = list(others), lent
        else:
            torch._foreach_add_([*self._sums, *self._others], [*sums, *others])
        self.publish(parameters, (copies if self._lent else copies_once_written)(self._sums))

    def take(
        self, names: Sequence[str], parameters: Sequence[Tensor], others: Iterable[Tensor]
    ) -> Taken:
        """The sums of the finished logical batch, which nobody else sees.

        Args:
            names: Names of the parameters.
            parameters: Those that are trained.
            others: Those that the wrapped optimizer would also step if they had a gradient.
        """
        if self._sums is None:
            raise UnclippedGradientError(
                "step: no backward(*batch) since the last step (or zero_grad came in between), so there is no clipped "
                "gradient to step on. Call backward first; an empty batch is legal."
            )
        self._refuse_unless_intact(names, parameters)
        for parameter in others:
            if parameter.grad is not None and self._touched([parameter]) is not None:
                raise UnclippedGradientError(
                    f"a parameter of shape {tuple(parameter.shape)} was not trained by backward (it is frozen, or was "
                    "until then), but holds a .grad that was not clipped here, and the wrapped optimizer would step "
                    "on it. Clear it with optimizer.zero_grad() before backward."
                )
        taken = Taken(self._sums, self._others, self._lent)
        self._sums, self._others = None, []
        # What .grad shows shares the sums' memory until somebody writes. The noise is to be written without a copy.
        for parameter in parameters:
            del self._written[id(parameter)]
            parameter.grad = None
        return taken

    def publish(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Show gradients that nobody else holds, and remember them: the sums so far, or those that are finished."""
        shown = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient.dtype is not parameter.dtype:
                gradient = gradient.to(parameter.dtype)
            parameter.grad = gradient
            shown.append(gradient)
        self._written.update(_written(parameters, shown))

    def _touched(self, parameters: Sequence[Tensor]) -> int | None:
        """The first parameter whose ``.grad`` is not as we left it, by index."""
        written = self._written
        for index, parameter in enumerate(parameters):
            ours, version = written.get(id(parameter), (None, -1))
            if ours is None or parameter.grad is not ours or _version(ours) != version:
                return index
        return None

    def _refuse_unless_intact(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        touched = self._touched(parameters)
        if touched is not None:
            raise UnclippedGradientError(_foreign(names[touched], parameters[touched]))


def refuse_unnoised(pending: weakref.ref[Pending]) -> Callable[..., None]:
    """A hook of the wrapped optimizer: it must not step on sums that have no noise yet."""

    def refuse(*_: object) -> None:
        waiting = pending()
        if waiting is not None and waiting.unfinished:
            raise UnclippedGradientError(
                "the wrapped optimizer's own step() was called while clipped sums wait for their noise; call "
                "DPOptimizer.step(), which adds it, divides and steps the wrapped one."
            )

    return refuse


def _written(
    parameters: Iterable[Tensor], gradients: Sequence[Tensor]
) -> dict[int, tuple[Tensor, int]]:
    """Gradients and their versions, by their parameters' ids."""
    versions = map(_version, gradients)
    return dict(zip(map(id, parameters), zip(gradients, versions, strict=True), strict=True))


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _laid_out_like(parameter: Tensor, total: Tensor) -> Tensor:
    """``total`` with the parameter's strides: fused optimizers walk both as flat memory."""
    if total.stride() == parameter.stride():
        return total
    return torch.empty_like(parameter, dtype=total.dtype, requires_grad=False).copy_(total)


def _foreign(name: str, parameter: Tensor) -> str:
    return (
        f"parameter {name!r}: its .grad was {'cleared' if parameter.grad is None else 'written'} by somebody else "
        "(loss.backward(), clip_grad_norm_, a GradScaler, model.zero_grad()), so it is no longer the clipped sum. "
        "Let only DPOptimizer.backward write gradients, and clear them with optimizer.zero_grad()."
    )
