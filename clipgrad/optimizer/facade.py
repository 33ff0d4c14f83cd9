"""The face of another optimizer: what schedulers, checkpoints and loops read and write is the wrapped one's."""

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
    """A ``torch.optim.Optimizer`` to ``isinstance``, with all its state in ``inner``.

    A subclass because schedulers insist on one. ``Optimizer.__init__`` is never called.
    """

    inner: Optimizer

    param_groups: Any = _of_inner("param_groups")
    state: Any = _of_inner("state")
    defaults: Any = _of_inner("defaults")

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
