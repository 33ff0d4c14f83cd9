"""Convert between the per-sample tensors of user code under ``vmap`` and the physical, batched tensors below it.

Inside ``vmap`` a per-sample tensor hides its batch axis. A rule needs the tensor with that axis visible, so that it can
run one ordinary batched operation. The public interface for this is an ``autograd.Function`` with a ``vmap`` static
method; it costs about 130 microseconds a call, and the private interface about 5. This file also opens a ``vmap`` level
directly, because ``torch.func.vmap`` flattens its arguments and results at each call, which costs another 200. Every
use of functorch's private interface in the package is in this file.
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
"""The function that a ``TorchFunctionMode`` sees for ``autograd.Function.apply`` under a transform.

Its first argument is the ``autograd.Function`` class.
"""


class Decline(Exception):
    """A rule raises this exception if it does not cover a call; the exact fallback then runs instead."""


def current_level() -> int:
    """Return the level of the innermost active functorch transform; 0 outside all transforms."""
    level: int | None = _functorch.maybe_current_level()
    return 0 if level is None else level


def current_randomness() -> str:
    """Return the ``randomness`` option of the innermost ``vmap``: different, same or error."""
    interpreter = retrieve_current_functorch_interpreter()
    if not isinstance(interpreter, VmapInterpreter):
        return "different"
    randomness: str = interpreter.randomness()
    return randomness


@contextmanager
def vmap_level(size: int, randomness: str) -> Iterator[int]:
    """Run the body under a ``vmap`` over ``size`` samples, and yield its level.

    ``hide_batch_axis`` brings tensors into the level, and ``expose_or_broadcast`` brings them out.
    """
    lazy_load_decompositions()
    level: int = _functorch._vmap_increment_nesting(size, randomness)
    try:
        yield level
    finally:
        _functorch._vmap_decrement_nesting()


def below_vmap() -> AbstractContextManager[Any]:
    """Run the body as if no functorch transform were active, whether or not one is."""
    return temporarily_pop_interpreter_stack() if current_level() else nullcontext()


@contextmanager
def without_tracing() -> Iterator[None]:
    """Run the body without recording it in an active trace."""
    if not torch._C._len_torch_dispatch_stack():
        yield
        return
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing  # slow to import

    with disable_proxy_modes_tracing():
        yield


def expected(size: int | torch.SymInt) -> int:
    """Return a size as a number, also where a graph is traced for sizes that differ from batch to batch.

    It may decide what a result costs, never what it is: the graph then serves batches of other sizes as well.
    """
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def is_symbol(size: int | torch.SymInt) -> bool:
    """Return whether a graph is traced for every value of a size."""
    return isinstance(size, torch.SymInt)


def has_vmap_method(function: type[torch.autograd.Function]) -> bool:
    """Return whether a custom function defines a ``vmap`` rule of its own."""
    return bool(has_overridden_vmap_rule(function))


def level_of(tensor: Tensor) -> int:
    """Return the level of the functorch transform that made the tensor; negative if no transform did."""
    level: int = _functorch.maybe_get_level(tensor)
    return level


def is_wrapped(tensor: Tensor) -> bool:
    """Return whether a functorch transform made the tensor, so that it is valid only inside that transform."""
    return level_of(tensor) >= 0


def unwrap_once(tensor: Tensor) -> Tensor:
    """Return the tensor under the outermost functorch wrapper."""
    inner: Tensor = _functorch.get_unwrapped(tensor)
    return inner


def unwrap_all(tensor: Tensor) -> Tensor:
    """Return the tensor under all functorch wrappers."""
    while is_wrapped(tensor):
        tensor = unwrap_once(tensor)
    return tensor


def memory_address(tensor: Tensor) -> int:
    """Return the memory address of a tensor's values, under all functorch wrappers."""
    return unwrap_all(tensor).data_ptr()


def is_broadcast(tensor: Tensor) -> bool:
    """Return whether a tensor has a batch axis, but all samples share its memory (stride 0)."""
    while is_wrapped(tensor):
        if not _functorch.is_batchedtensor(tensor):
            tensor = unwrap_once(tensor)
            continue
        level = level_of(tensor)
        tensor, batch_axis = _functorch._unwrap_batched(tensor, level)
        shared = batch_axis is not None and tensor.stride(batch_axis) == 0
        if shared and tensor.shape[batch_axis or 0] > 1:
            return True
    return False


def expose_batch_axis(tensor: Tensor, level: int) -> Tensor | None:
    """Return the tensor with its batch axis moved to the front, or None if it has no batch axis.

    Raises:
        Decline: If the tensor belongs to another transform (a gradient inside the loss, say), where treating that axis
            as the batch axis would be wrong.
    """
    owner = level_of(tensor)
    if owner < 0:
        return None
    if owner != level or not _functorch.is_batchedtensor(tensor):
        raise Decline
    value: Tensor
    value, batch_axis = _functorch._unwrap_batched(tensor, level)
    if is_wrapped(value):
        raise Decline  # the vmap over samples runs inside another transform
    return value.movedim(batch_axis, 0) if batch_axis else value


def hide_batch_axis(value: Tensor, level: int) -> Tensor:
    """Hide the leading axis of a physical tensor as the batch axis of a ``vmap`` level."""
    wrapped: Tensor = _functorch._add_batch_dim(value, 0, level)
    return wrapped


def expose_or_broadcast(tensor: Tensor, level: int, size: int) -> Tensor:
    """Return the tensor with its batch axis in front; a tensor that all samples share is broadcast."""
    whole: Tensor = _functorch._remove_batch_dim(tensor, level, size, 0)
    return whole
