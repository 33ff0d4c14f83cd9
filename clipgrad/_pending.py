"""The clipped sums of a logical batch between ``backward`` and ``step``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clipgrad.errors import UnclippedGradientError


class Pending:
    """The clipped sums of the logical batch so far, and proof that ``.grad`` still holds just them."""

    def __init__(self) -> None:
        self._sums: list[Tensor] | None = None
        self._written: dict[
            int, tuple[Tensor, int]
        ] = {}  # id(parameter) -> its .grad and version, as we left them

    def clear(self) -> None:
        self._sums = None

    def before_backward(self, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
        if self._sums is not None and all(parameter.grad is None for parameter in parameters):
            self.clear()  # model.zero_grad() between two backward calls starts the logical batch anew
        self._refuse_foreign(names, parameters, missing_ok=self._sums is None)

    def add(self, parameters: Sequence[Tensor], sums: list[Tensor]) -> None:
        if self._sums is None:
            self._sums = sums
        else:
            torch._foreach_add_(self._sums, sums)
        self._show(parameters, self._sums)

    def take(self, names: Sequence[str], parameters: Sequence[Tensor]) -> list[Tensor]:
        """The sums of the finished logical batch, to be noised in place."""
        if self._sums is None:
            raise UnclippedGradientError(
                "step: no backward(*batch) since the last step (or zero_grad came in between), so there is no clipped "
                "gradient to step on. Call backward first; an empty batch is legal."
            )
        self._refuse_foreign(names, parameters, missing_ok=False)
        sums, self._sums = self._sums, None
        return sums

    def publish(self, parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        self._show(parameters, sums)

    def _show(self, parameters: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
        self._written = {}
        for parameter, total in zip(parameters, sums, strict=True):
            parameter.grad = total if total.dtype == parameter.dtype else total.to(parameter.dtype)
            self._written[id(parameter)] = (parameter.grad, parameter.grad._version)

    def _refuse_foreign(
        self, names: Sequence[str], parameters: Sequence[Tensor], *, missing_ok: bool
    ) -> None:
        for name, parameter in zip(names, parameters, strict=True):
            gradient = parameter.grad
            if gradient is None and missing_ok:
                continue
            ours, version = self._written.get(id(parameter), (None, -1))
            if (
                gradient is None
                or gradient is not ours
                or (gradient._version != version and not missing_ok)
            ):
                raise UnclippedGradientError(
                    f"parameter {name!r}: its .grad was {'cleared' if gradient is None else 'written'} by "
                    "somebody else (loss.backward(), clip_grad_norm_, a GradScaler, model.zero_grad()), so it is no "
                    "longer the clipped sum. Let only DPOptimizer.backward write gradients, and clear them with "
                    "optimizer.zero_grad()."
                )
