"""Refuse per-sample values that a model keeps from one forward pass and uses in a later one.

A model may keep an activation for inspection. In the next forward pass, row ``i`` of the old batch would silently be
combined with sample ``i`` of the new batch: an old sample would influence gradients whose clipping does not bound that
influence. ``vmap`` does not detect this, since its levels are numbered by depth. So this file remembers, by identity,
the tensors that operations of the loss returned.

No operation returns what a ``torch.func`` transform inside the loss, a scripted function or a constructor
(``nn.Parameter``) makes. The garbage collector knows these tensors too, and is asked after passes 1, 2, 4, 8 and so on.
"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from clipgrad._functorch import current_level, is_wrapped, level_of, unwrap_once
from clipgrad.errors import NotPerSampleError

_OUTSIDE = (
    "after the pass. Return what you want to log as (loss, metrics): backward hands it back per sample (clipped_grad: "
    "has_aux=True). optimizer.diagnostics holds losses and norms. None of it is private."
)
_kept: dict[int, weakref.ref[Tensor]] = {}
_running = 0
"""The number of passes that run now, in all threads."""
_lock = threading.Lock()
# A collection of a generation before this one leaves what survives among the young objects.
_AGES = 0 if sys.version_info >= (3, 14) else 1


class _StaleValue(Tensor):
    """This class replaces the class of a per-sample value after its forward pass, to give a clear error on its use.

    PyTorch's own error does not name the cause. ``nn.UninitializedParameter`` changes its class in the same way.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        except (RuntimeError, TypeError):
            raise NotPerSampleError(
                f"{getattr(func, '__name__', func)} received a value that the loss kept (in a list, an attribute or a "
                f"logger, such as self.log) and that stands for all samples at once, so it cannot be used {_OUTSIDE}"
            ) from None


def remember(made: Iterable[weakref.ref[Tensor]]) -> None:
    """Remember the per-sample tensors of a finished forward pass that are still alive, so that user code kept them."""
    for key, reference in list(_kept.items()):  # a copy, since another thread may add to _kept
        if reference() is None:
            _kept.pop(key, None)
    for reference in made:
        tensor = reference()
        if tensor is not None and is_wrapped(tensor):
            _remember(tensor)


def _remember(tensor: Tensor) -> None:
    _kept[id(tensor)] = weakref.ref(tensor)
    if type(tensor) is Tensor and level_of(tensor) > current_level():
        tensor.__class__ = _StaleValue


@contextmanager
def searched(number: int) -> Iterator[None]:
    """Run pass ``number`` of a loss, from 1, in the body; after some passes remember also what no operation returned.

    A search takes a fifth of a millisecond. It takes longer if the garbage collector moved objects of the pass among
    all old ones. There is none while another thread runs a pass, whose values are in use.
    """
    global _running
    is_due = number & (number - 1) == 0
    with _lock:
        _running += 1
    before = _aged() if is_due else 0
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            is_alone = not _running
        if is_due and is_alone:
            _search(everywhere=_aged() != before)


def _aged() -> int:
    """Return a number that changes if the garbage collector moves objects to its oldest generation."""
    return sum(generation["collections"] for generation in gc.get_stats()[_AGES:])


def _search(*, everywhere: bool) -> None:
    for age in range(3 if everywhere else 2):
        # Not one list of all ages: it would be among the young objects, and so would hold itself.
        objects = gc.get_objects(generation=age)
        kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Tensor)}
        for found in objects:
            if type(found) in kinds and level_of(found) > current_level():
                _remember(found)
        del objects


def contains_stale(tensors: Iterable[Tensor], level: int) -> bool:
    """Return whether a tensor was kept from an earlier pass; inner transforms are unwrapped down to ``level``."""
    return bool(_kept) and any(_is_stale(tensor, level) for tensor in tensors)


def _is_stale(tensor: Tensor, level: int) -> bool:
    while True:
        kept = _kept.get(id(tensor))
        if kept is not None and kept() is tensor:
            return True
        if level_of(tensor) <= level:
            return False
        tensor = unwrap_once(tensor)


def stale_value_error(operation: str) -> NotPerSampleError:
    """Return the error to raise if a kept value is used."""
    return NotPerSampleError(
        f"{operation} received a per-sample value that the loss kept from an earlier batch or microbatch (in an "
        "attribute, a list or a cache), so old samples would influence the gradients of new ones. Compute it anew in "
        "every call, and keep nothing of one call for the next; to log metrics, return (loss, metrics) (clipped_grad: "
        "has_aux=True), or read optimizer.diagnostics."
    )
