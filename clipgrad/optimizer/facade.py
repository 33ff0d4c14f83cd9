"""This module makes an optimizer whose state is the state of another optimizer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from clipgrad.errors import UnclippedGradientError


def _of_inner(name: str) -> Any:
    """An attribute that the wrapped optimizer holds."""
    return property(
        lambda self: getattr(self.inner, name),
        lambda self, value: setattr(self.inner, name, value),
        doc=f"The wrapped optimizer's ``{name}``.",
    )


class OptimizerFacade(Optimizer):
    """This class is a ``torch.optim.Optimizer`` that keeps all its state in the wrapped optimizer, ``inner``.

    It is a subclass because schedulers require one. ``Optimizer.__init__`` is never called.
    """

    inner: Optimizer

    param_groups: Any = _of_inner("param_groups")
    state: Any = _of_inner("state")
    defaults: Any = _of_inner("defaults")

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step reads this first. It would unscale sums that were never scaled.
        raise UnclippedGradientError(
            "GradScaler cannot scale per-sample gradients: backward does not use it, so it would unscale clipped sums "
            "that were never scaled. Leave it out: use bfloat16 autocast, or GradScaler(enabled=False)."
        )

    def __getattr__(self, name: str) -> Any:
        # The wrapped optimizer holds everything else, such as step hooks.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
