"""Values of single samples that outlive the forward pass they were computed in, and their use in a later one.

A model may keep an activation for inspection. Used in the next forward pass, lane ``i`` of the old batch would
silently meet sample ``i`` of the new one: an old sample would influence gradients that its clipping norm was not
charged for. ``vmap`` itself does not notice, since its levels are numbered by depth. What operations of the loss
returned is remembered, by identity. What came out of a ``torch.func`` transform inside of it, a scripted function or a
constructor is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from clipgrad._functorch import current_level, is_wrapped, level_of, unwrapped
from clipgrad.errors import NotPerSampleError

_OUTSIDE = (
    "after the pass. Return what you want to log: clipped_grad(..., has_aux=True) hands it back per sample, and "
    "optimizer.diagnostics holds losses and norms. Neither is private."
)
_kept: dict[int, weakref.ref[Tensor]] = {}


class _StaleValue(Tensor):
    """What a per-sample value becomes when its forward pass is over: PyTorch's words for its use help nobody.

    As ``nn.UninitializedParameter`` does, the object changes its class, so that whoever kept it meets the message.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        except (RuntimeError, TypeError) as error:
            raise NotPerSampleError(
                f"{getattr(func, '__name__', func)} received a value that the loss kept (in a list, an attribute or a "
                f"logger, such as self.log) and that stands for all samples at once, so it is of no use {_OUTSIDE}"
            ) from error


def remember(made: Iterable[weakref.ref[Tensor]]) -> None:
    """After a forward pass: those of its per-sample tensors that are still alive were kept by somebody."""
    for key, reference in list(_kept.items()):  # a copy: another thread may add to it
        if reference() is None:
            _kept.pop(key, None)
    for reference in made:
        tensor = reference()
        if tensor is not None and is_wrapped(tensor):
            _kept[id(tensor)] = reference
            if type(tensor) is Tensor and level_of(tensor) > current_level():
                tensor.__class__ = _StaleValue


def among(tensors: Iterable[Tensor], level: int) -> bool:
    """Whether any of the tensors was kept from an earlier forward pass.

    Args:
        tensors: What an operation is given.
        level: Of the present pass. Tensors of transforms inside of it are looked into.
    """
    return bool(_kept) and any(_is_kept(tensor, level) for tensor in tensors)


def _is_kept(tensor: Tensor, level: int) -> bool:
    while True:
        kept = _kept.get(id(tensor))
        if kept is not None and kept() is tensor:
            return True
        if level_of(tensor) <= level:
            return False
        tensor = unwrapped(tensor)


def refuse(operation: str) -> NotPerSampleError:
    """What to raise where a kept value is used."""
    return NotPerSampleError(
        f"{operation} received a per-sample value that the loss kept from an earlier batch or microbatch (in an "
        "attribute, a list or a cache), so old samples would influence the gradients of new ones. Compute it anew in "
        "every call, and keep nothing of one call for the next; for metrics use has_aux=True or optimizer.diagnostics."
    )


__all__ = ["among", "refuse", "remember"]
