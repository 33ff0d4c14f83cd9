"""The face of another optimizer: what schedulers, checkpoints and loops read and write is the wrapped one's."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from clipgrad.errors import UnclippedGradientError


class OptimizerFacade(Optimizer):
    """A ``torch.optim.Optimizer`` to ``isinstance``, with all its state in ``inner``.

    A subclass because schedulers insist on one. ``Optimizer.__init__`` is never called.
    """

    inner: Optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's ``param_groups``."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's ``state``."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's ``defaults``."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks this first. It would unscale sums that were never scaled, and leave no trace of it.
        raise UnclippedGradientError(
            "GradScaler cannot scale per-sample gradients: backward does not go through it, so it would only spoil the "
            "clipped sums. Leave it out: use bfloat16 autocast, or GradScaler(enabled=False)."
        )

    def __getattr__(self, name: str) -> Any:
        # Step hooks and the like live in the wrapped optimizer.
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)
