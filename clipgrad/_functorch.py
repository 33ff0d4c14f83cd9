"""The bridge between what user code holds under ``vmap`` and the physical, batched tensors below it.

Inside ``vmap`` a per-sample tensor hides one axis, the *lane* axis. A rule needs the tensor with that axis
visible, so that it can run one ordinary batched operation. The public way down is an ``autograd.Function``
with a ``vmap`` static method; it costs about 130 microseconds a call, this one about 5. Likewise the level of a
``vmap`` is opened here: ``torch.func.vmap`` takes its arguments and results apart at each call, which costs another
200. Every use of functorch's private interface in the package is in this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.autograd_function import custom_function_call, has_overridden_vmap_rule
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_current_functorch_interpreter,
    temporarily_pop_interpreter_stack,
)
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]

FUNCTION_CALL: Any = custom_function_call
"""What a ``TorchFunctionMode`` sees of ``autograd.Function.apply`` under a transform, the class as first argument."""


class Decline(Exception):
    """Raised inside a rule that does not cover this call; the exact fallback runs instead."""


def current_level() -> int:
    """The innermost active functorch transform; 0 outside all of them."""
    level: int | None = _functorch.maybe_current_level()
    return 0 if level is None else level


def current_randomness() -> str:
    """What the innermost ``vmap`` was told about random operations: different, same or error."""
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        return "different"
    randomness: str = interpreter.randomness()
    return randomness


@contextmanager
def vmap_level(size: int, randomness: str) -> Iterator[int]:
    """Run the body under a ``vmap`` over ``size`` samples; yields its level.

    Tensors enter it by ``per_sample`` and leave it by ``all_samples``.

    Args:
        size: Samples.
        randomness: As ``torch.func.vmap`` takes it.
    """
    lazy_load_decompositions()
    level: int = _functorch._vmap_increment_nesting(size, randomness)
    try:
        yield level
    finally:
        _functorch._vmap_decrement_nesting()


def below_vmap() -> AbstractContextManager[Any]:
    """Run the body as if no functorch transform were active; it may be so already."""
    return temporarily_pop_interpreter_stack() if current_level() else nullcontext()


@contextmanager
def untraced() -> Iterator[None]:
    """Run the body unseen by a trace that is being made, if one is."""
    if not torch._C._len_torch_dispatch_stack():
        yield
        return
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing  # slow to import

    with disable_proxy_modes_tracing():
        yield


def has_vmap_method(function: type[torch.autograd.Function]) -> bool:
    """Whether the author of a custom function wrote a ``vmap`` rule for it."""
    return bool(has_overridden_vmap_rule(function))


def level_of(tensor: Tensor) -> int:
    """The level of the functorch transform that made the tensor; negative if none did."""
    level: int = _functorch.maybe_get_level(tensor)
    return level


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a functorch transform made the tensor, so that it means something only inside of it."""
    return level_of(tensor) >= 0


def unwrapped(tensor: Tensor) -> Tensor:
    """What the outermost functorch transform wrapped."""
    inner: Tensor = _functorch.get_unwrapped(tensor)
    return inner


def innermost(tensor: Tensor) -> Tensor:
    """What is underneath every functorch wrapper of a tensor."""
    while is_wrapped(tensor):
        tensor = unwrapped(tensor)
    return tensor


def address(tensor: Tensor) -> int:
    """Where the values of a tensor lie, underneath every functorch wrapper."""
    return innermost(tensor).data_ptr()


def is_broadcast(tensor: Tensor) -> bool:
    """Whether all samples share the tensor's memory, although each has a value of its own."""
    while is_wrapped(tensor):
        if not _functorch.is_batchedtensor(tensor):
            tensor = unwrapped(tensor)
            continue
        level = level_of(tensor)
        tensor, lane_axis = _functorch._unwrap_batched(tensor, level)
        shared = lane_axis is not None and tensor.stride(lane_axis) == 0
        if shared and tensor.shape[lane_axis or 0] > 1:
            return True
    return False


def physical(tensor: Tensor, level: int) -> Tensor | None:
    """The tensor with its lane axis moved to the front, or None when it has no lane axis.

    Raises:
        Decline: If the tensor belongs to another transform (a gradient inside the loss, say), where
            folding its lane axis away would be wrong.
    """
    owner = level_of(tensor)
    if owner < 0:
        return None
    if owner != level or not _functorch.is_batchedtensor(tensor):
        raise Decline
    value: Tensor
    value, lane_axis = _functorch._unwrap_batched(tensor, level)
    if is_wrapped(value):
        raise Decline  # our vmap runs inside somebody else's transform
    return value.movedim(lane_axis, 0) if lane_axis else value


def per_sample(value: Tensor, level: int) -> Tensor:
    """Hide the leading axis of a physical tensor as the lane axis."""
    wrapped: Tensor = _functorch._add_batch_dim(value, 0, level)
    return wrapped


def all_samples(tensor: Tensor, level: int, size: int) -> Tensor:
    """The tensor with its lane axis in front; what is the same for all samples is broadcast."""
    whole: Tensor = _functorch._remove_batch_dim(tensor, level, size, 0)
    return whole


__all__ = [
    "FUNCTION_CALL",
    "Decline",
    "address",
    "all_samples",
    "below_vmap",
    "current_level",
    "current_randomness",
    "has_vmap_method",
    "innermost",
    "is_broadcast",
    "is_wrapped",
    "level_of",
    "per_sample",
    "physical",
    "untraced",
    "unwrapped",
    "vmap_level",
]
