"""This module makes an optimizer whose state is the state of another optimizer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from clipgrad.errors import UnclippedGradientError


class OptimizerFacade(Optimizer):
    """This class is a ``torch.optim.Optimizer`` that keeps all its state in the wrapped optimizer, ``inner``.

    It is a subclass because schedulers require one. ``Optimizer.__init__`` is never called.
    """

    inner: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the wrapped optimizer's ``param_groups``."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """Return the wrapped optimizer's ``state``."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the wrapped optimizer's ``defaults``."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

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
