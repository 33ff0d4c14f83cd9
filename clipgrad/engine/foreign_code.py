"""Refuse user code that PyTorch would run below the ``vmap`` over samples, on the tensors of all samples at once.

Autograd and the dispatcher call hooks, modes and tensor subclasses with physical tensors ``[B, ...]``. Such code (a
quantisation by ``t.abs().max()``, say) would let one sample change the gradients of other samples, and clipping does
not bound that influence. Hooks, modes and subclasses of PyTorch itself may run: they observe or trace, and change no
value.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from clipgrad._functorch import unwrap_all
from clipgrad.errors import NotPerSampleError

_ALL_AT_ONCE = "would see the tensors of all samples at once, so that one sample could change the gradients of others"
SAVED_TENSORS_HOOKS = (
    "the loss or backward() runs under saved tensors hooks (saved_tensors_hooks, save_on_cpu, torch.utils.checkpoint), "
    f"which {_ALL_AT_ONCE}. Leave them out: microbatch_size bounds the memory instead. A checkpoint is allowed where "
    "PyTorch can capture the loss."
)
PLAIN: set[type] = {Tensor, nn.Parameter}
"""Classes that are known to have no ``__torch_function__`` or ``__torch_dispatch__`` of their own."""
dispatch_modes = torch._C._len_torch_dispatch_stack
"""Return the number of active ``TorchDispatchMode``s. It is called for each operation, so it has no wrapper."""
_DISABLED = torch._C._disabled_torch_function_impl


def without_saved_tensors_hooks() -> AbstractContextManager[None]:
    """Refuse saved tensors hooks while the body runs, including hooks that are already active."""
    return torch.autograd.graph.disable_saved_tensors_hooks(SAVED_TENSORS_HOOKS)


def refuse_saved_tensors_hooks() -> None:
    """Raise ``NotPerSampleError`` if saved tensors hooks are active around the step."""
    try:
        with without_saved_tensors_hooks():
            pass
    except RuntimeError as error:
        raise NotPerSampleError(SAVED_TENSORS_HOOKS) from error


def refuse_modes() -> None:
    """Raise ``NotPerSampleError`` if a mode of the user is active around the transform."""
    if torch._C._len_torch_function_stack():
        _refuse_modes(_get_current_function_mode_stack(), "__torch_function__")
    refuse_dispatch_modes()


def refuse_dispatch_modes() -> None:
    """Raise ``NotPerSampleError`` if a ``TorchDispatchMode`` of the user is active, inside the loss or around it.

    A ``TorchFunctionMode`` inside the loss is harmless: it does not see operations below ``vmap``.
    """
    if dispatch_modes():
        _refuse_modes(_get_current_dispatch_mode_stack(), "__torch_dispatch__")


def _refuse_modes(modes: Iterable[Any], method: str) -> None:
    for mode in modes:
        if not _is_pytorchs(type(mode), method):
            kind = "TorchDispatchMode" if method == "__torch_dispatch__" else "TorchFunctionMode"
            raise NotPerSampleError(
                f"{type(mode).__name__}, a {kind}, is active in the loss or around backward(), and {_ALL_AT_ONCE}. "
                "Leave the mode before the step, or write what it does into the loss as ordinary operations."
            )


def refuse_subclasses(tensors: Iterable[Any], what: str) -> None:
    """Raise ``NotPerSampleError`` for tensors of a subclass that has code of its own; ignore other objects."""
    kinds = set(map(type, tensors))
    if PLAIN.issuperset(kinds):
        return
    for kind in kinds:
        if kind not in PLAIN and issubclass(kind, Tensor):
            refuse_kind(kind, what)


def refuse_kind(kind: type, what: str) -> None:
    """Raise ``NotPerSampleError`` for a subclass of ``Tensor`` that has code of its own."""
    if kind in PLAIN:
        return
    for method in ("__torch_dispatch__", "__torch_function__"):
        if not _is_pytorchs(kind, method):
            raise NotPerSampleError(
                f"{what} is of class {kind.__name__}, a tensor subclass whose {method} {_ALL_AT_ONCE}. Pass an "
                "ordinary tensor: tensor.as_subclass(torch.Tensor), or what the subclass wraps."
            )
    PLAIN.add(kind)


def _is_pytorchs(kind: type, method: str) -> bool:
    """Return whether a method of a class is absent, or defined in PyTorch or in this package."""
    for base in kind.__mro__:
        # PyTorch itself sets __torch_function__ to _DISABLED in every class that has a __torch_dispatch__.
        if vars(base).get(method, _DISABLED) is not _DISABLED:
            return base.__module__.partition(".")[0] in ("torch", "clipgrad")
    return True


class _Node:
    """This class replaces ``grad_fn`` inside the loss: it can be compared with None, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotPerSampleError(
            f"the loss uses grad_fn.{name}, a node of autograd's graph. A hook there (register_hook, register_prehook, "
            f"register_multi_grad_hook, a module's backward hook) {_ALL_AT_ONCE}. Change the value in the forward "
            "pass, or the gradients with pre_clipping_transform."
        )


_NODE = _Node()


def node_of(tensor: Tensor) -> Any:
    """Return ``tensor.grad_fn``, or ``_NODE`` where ``vmap`` hides a node that holds all samples."""
    node = tensor.grad_fn
    return _NODE if node is None and unwrap_all(tensor).grad_fn is not None else node
