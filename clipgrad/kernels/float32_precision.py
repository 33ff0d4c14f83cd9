"""This module reads and sets the precision of float32 matrix products and convolutions, on the CPU and on CUDA.

PyTorch may compute them in TF32 or in bfloat16. Two families of settings allow it. The older ones are
``torch.set_float32_matmul_precision`` and ``allow_tf32``, the newer ones are ``fp32_precision``. After the newer ones
were used, reading the older ones raises. After either was used, the newer ones tell what PyTorch does. So this module
reads and writes the newer ones only. Writing them leaves what ``torch.get_float32_matmul_precision`` returns as it is.

A norm computed from inner products that cancel needs full float32. By default cuDNN's convolutions use TF32 and matrix
products do not. A per-sample weight gradient of a convolution follows the setting for convolutions.

The settings are those of the process. While a thread of clipgrad computes in one precision, no other one sets another,
and what the process allows is what it was before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

FULL = "ieee"
_TF32, _BFLOAT16 = "tf32", "bf16"
# From the backend's setting for all operations, or else from that for all backends.
_INHERITED = "none"
# Relative error of a product of two float32 numbers, each of which is first rounded to 11 or 8 binary digits.
_ROUNDING = {FULL: 0.0, _TF32: 2.0**-10, _BFLOAT16: 2.0**-7}
_BACKENDS = {"cpu": "mkldnn", "cuda": "cuda"}
_PRODUCTS, _CONVOLUTIONS, _RECURRENCES = "matmul", "conv", "rnn"

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


@dataclass(eq=False)
class _Held:
    """This class holds a precision that threads have set for a device's products, and what the process allows."""

    wanted: str
    allowed: str
    # What the process has set, or None if that was as wanted.
    allows_bfloat16: bool | None = None
    own: str | None = None
    threads: list[int] = field(default_factory=list)


# For each device the innermost is the last. A nested block of one thread may set another precision.
_held: dict[str, list[_Held]] = {kind: [] for kind in _BACKENDS}
_changed = threading.Condition(threading.RLock())


def precision(device_type: str, operation: str = _PRODUCTS) -> str:
    """Return how the process computes in float32 now: "ieee" in full, "tf32" or "bf16"."""
    if device_type not in _BACKENDS:
        return FULL
    with _changed:
        found = _get(_BACKENDS[device_type], operation)
    return found if found in _ROUNDING else FULL


def _allowed(device_type: str, operation: str = _PRODUCTS) -> str:
    """Return the precision that the process has set, whatever another thread holds for its own products."""
    with _changed:
        held = _held.get(device_type)
        if held and operation == _PRODUCTS:
            return held[0].allowed
        return precision(device_type, operation)


def precisions(device_type: str) -> tuple[str, ...]:
    """Return all settings for a device, on which a graph that was compiled for it depends."""
    operations = _PRODUCTS, _CONVOLUTIONS, _RECURRENCES
    return tuple([_allowed(device_type, operation) for operation in operations])


def product_rounding(device_type: str) -> float:
    """Return how much a float32 matrix product or convolution may round each product of two numbers.

    Args:
        device_type: Such as "cpu" or "cuda".

    Returns:
        The error relative to the product, beyond float32: 0, or 2^-10 with TF32, or 2^-7 with bfloat16.
    """
    return max(_ROUNDING[_allowed(device_type, each)] for each in (_PRODUCTS, _CONVOLUTIONS))


def allows_bfloat16() -> bool:
    """Return whether the process allows bfloat16 in float32 matrix products on any device, as "medium" does."""
    with _changed:
        for held in (each for stack in _held.values() for each in stack):
            if held.allows_bfloat16 is not None:
                return held.allows_bfloat16
        try:
            return torch.get_float32_matmul_precision() == "medium"
        except RuntimeError:  # the newer settings are in use
            return bool(_get("generic", "all") == _BFLOAT16)


@contextmanager
def set_precision(device_type: str, wanted: str) -> Iterator[None]:
    """Set the precision of float32 matrix products on a device, and restore the process-wide setting afterwards.

    Threads that want the same precision compute at the same time; others wait.

    Args:
        device_type: Of the operands.
        wanted: "ieee" or "tf32".
    """
    if device_type not in _BACKENDS:
        yield
        return
    held = _hold(device_type, wanted)
    try:
        yield
    finally:
        _release(device_type, held)


def _hold(device_type: str, wanted: str) -> _Held:
    backend, stack, thread = _BACKENDS[device_type], _held[device_type], threading.get_ident()
    with _changed:
        while stack and stack[-1].wanted != wanted and set(stack[-1].threads) != {thread}:
            _changed.wait()
        if not stack or stack[-1].wanted != wanted:
            held = _Held(wanted, stack[0].allowed if stack else precision(device_type))
            if precision(device_type) != wanted:
                held.allows_bfloat16 = allows_bfloat16()
                held.own = _own_setting(backend)
                _set(backend, _PRODUCTS, wanted)
            stack.append(held)
        stack[-1].threads.append(thread)
        return stack[-1]


def _release(device_type: str, held: _Held) -> None:
    with _changed:
        held.threads.remove(threading.get_ident())
        if held.threads:
            return
        _held[device_type].remove(held)
        if held.own is not None:
            _set(_BACKENDS[device_type], _PRODUCTS, held.own)
        _changed.notify_all()


def _forget_other_threads() -> None:
    """Put the settings back that threads of a parent process held, which do not run in a fork of it."""
    global _changed
    _changed = threading.Condition(threading.RLock())
    for device_type, stack in _held.items():
        for held in reversed(stack):
            if held.own is not None:
                _set(_BACKENDS[device_type], _PRODUCTS, held.own)
        stack.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def inheritance_kept() -> Iterator[None]:
    """Put CUDA's own setting for products back; PyTorch's capture writes what is inherited in its place.

    Other threads wait meanwhile, since the capture would write over what they set.
    """
    with _changed:
        thread = threading.get_ident()
        _changed.wait_for(lambda: all(set(held.threads) <= {thread} for held in _held["cuda"]))
        before = _own_setting("cuda")
        try:
            yield
        finally:
            _set("cuda", _PRODUCTS, before)


def _own_setting(backend: str) -> str:
    """Return the setting for matrix products itself, which may be to inherit.

    A read returns what is inherited. If that were written back, the setting would not follow later changes. Nothing is
    inherited for as long as this function takes.
    """
    everywhere = _get("generic", "all")
    _set("generic", "all", _INHERITED)
    of_backend = _get(backend, "all")
    _set(backend, "all", _INHERITED)
    own: str = _get(backend, _PRODUCTS)
    _set(backend, "all", of_backend)
    _set("generic", "all", everywhere)
    return own


def convolution_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)`` of two operands of a convolution."""
    return _product(a, b, _precision_for_convolutions(a.device.type))


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)`` in full float32."""
    return _product(a, b, FULL)


def full_vecdot(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.linalg.vecdot(a, b)``, which may be a matrix product, in full float32."""
    if get_proxy_mode() is not None and rounds(a):
        traced: Tensor = vecdot(a, b)
        return traced
    with set_precision(a.device.type, FULL):
        found: Tensor = torch.linalg.vecdot(a, b)
    return found


def full_combination(factors: Tensor, rows: Tensor) -> Tensor:
    """Return ``factors [B] @ rows [B, N]`` in full float32; not for graphs, which do not keep the setting."""
    with set_precision(rows.device.type, FULL):
        return factors @ rows


def rounds(tensor: Tensor) -> bool:
    """Return whether a matrix product with this operand may round float32 numbers."""
    return tensor.dtype is torch.float32 and _allowed(tensor.device.type) != FULL


def _precision_for_convolutions(device_type: str) -> str:
    """Return the precision of products that replace a convolution.

    On CUDA they may round if either kind of operation may. On the CPU they are as other products.
    """
    products, convolutions = _allowed(device_type), _allowed(device_type, _CONVOLUTIONS)
    return convolutions if device_type == "cuda" and products == FULL else products


def _product(a: Tensor, b: Tensor, wanted: str) -> Tensor:
    if a.dtype is not torch.float32:
        return torch.bmm(a, b)
    if get_proxy_mode() is None:
        with set_precision(a.device.type, wanted):
            return torch.bmm(a, b)
    if _allowed(a.device.type) == wanted:
        return torch.bmm(a, b)
    product: Tensor = bmm(a, b, wanted)
    return product


# Custom operations keep the setting inside one node of a traced graph.
@torch.library.custom_op("clipgrad::bmm", mutates_args=())
def bmm(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """Run ``torch.bmm`` in "ieee" or "tf32"."""
    with set_precision(a.device.type, precision):
        return torch.bmm(a, b)


@bmm.register_fake
def _(a: Tensor, b: Tensor, precision: str) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


@torch.library.custom_op("clipgrad::full_vecdot", mutates_args=())
def vecdot(a: Tensor, b: Tensor) -> Tensor:
    """Run ``torch.linalg.vecdot`` in full float32."""
    with set_precision(a.device.type, FULL):
        found: Tensor = torch.linalg.vecdot(a, b)
    return found


@vecdot.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[:-1])


def window_products(rows: Tensor, columns: Tensor, window_stride: int, windows: int) -> Tensor:
    """Return products ``[B, windows, R, C]`` of rows ``[B, R, S]`` and windows of columns ``[B, C, L]``.

    Window ``w`` holds ``rows @ columns[:, :, start : start + S].mT``, where ``start`` is ``w * window_stride``. Both
    operands belong to a convolution.
    """
    precision = _precision_for_convolutions(rows.device.type)
    found: Tensor = _window_products(rows, columns, window_stride, windows, precision)
    return found


# A custom operation with operands of any layout keeps the result's windows and the setting inside one graph node.
@torch.library.custom_op(
    "clipgrad::window_products", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _window_products(
    rows: Tensor, columns: Tensor, window_stride: int, windows: int, precision: str
) -> Tensor:
    found = rows.new_empty(len(rows), windows, rows.shape[1], columns.shape[1])
    with set_precision(rows.device.type, precision):
        for index in range(windows):
            window = columns.narrow(2, index * window_stride, rows.shape[2])
            torch.bmm(rows, window.transpose(1, 2), out=found[:, index])
    return found


@_window_products.register_fake
def _(rows: Tensor, columns: Tensor, window_stride: int, windows: int, precision: str) -> Tensor:
    return rows.new_empty(len(rows), windows, rows.shape[1], columns.shape[1])
