"""Gradient hooks: they would see, or change, gradients that are never made one batch at a time here."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from clipgrad.errors import NotPerSampleError


def refuse_hooks(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse hooks on gradients of parameters and modules; in silence they would not run.

    Raises:
        NotPerSampleError: If there is one.
    """
    for name, parameter in parameters:
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise NotPerSampleError(
                f"parameter {name!r} has a gradient hook, which cannot run: its gradient exists only per sample, and "
                "clipped and noised in .grad. Remove the hook; change .grad in a step hook "
                "(register_step_pre_hook), which runs after the noise."
            )
    for module in model.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            name = next(name for name, other in model.named_modules() if other is module)
            raise NotPerSampleError(
                f"module {name or type(module).__name__!r} has a backward hook, which would see the gradients of all "
                "samples at once instead of one sample's. Remove it; change values in the forward pass instead."
            )
