"""This module reads and sets the precision of float32 matrix products and convolutions, on the CPU and on CUDA.

PyTorch may compute them in TF32 or in bfloat16. Two families of settings allow it. The older ones are
``torch.set_float32_matmul_precision`` and ``allow_tf32``, the newer ones are ``fp32_precision``. After the newer ones
were used, reading the older ones raises. After either was used, the newer ones tell what PyTorch does. So this module
reads and writes the newer ones only. Writing them leaves what ``torch.get_float32_matmul_precision`` returns as it is.
On the CPU a variable of the environment lets oneDNN round whatever PyTorch's settings are. oneDNN is then left out.

The settings are those of the process, so threads share them. A thread that has set one holds a lock until it has put
back what was set before. Who reads a setting waits for this lock.

A norm computed from inner products that cancel needs full float32. By default cuDNN's convolutions use TF32 and matrix
products do not. A per-sample weight gradient of a convolution follows the setting for convolutions.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

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
# What is set together. On the CPU some convolutions run as products.
_SET = {"cpu": (_PRODUCTS, _CONVOLUTIONS), "cuda": (_PRODUCTS,)}
# oneDNN reads the second variable if the first is not set. It rounds where PyTorch's settings ask for full float32.
_VARIABLES = "ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"
_BY_VARIABLE = {"BF16": _BFLOAT16, "ANY": _BFLOAT16, "F16": _TF32, "TF32": _TF32}

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter

settings_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # a fork starts when no thread holds the lock
    os.register_at_fork(
        before=settings_lock.acquire,
        after_in_parent=settings_lock.release,
        after_in_child=settings_lock.release,
    )


def precision(device_type: str, operation: str = _PRODUCTS) -> str:
    """Return how the process computes in float32: "ieee" in full, "tf32" or "bf16"."""
    if device_type not in _BACKENDS:
        return FULL
    with settings_lock:
        if device_type == "cpu":
            if not torch._C._get_mkldnn_enabled():
                return FULL
            if (allowed := _allowed_by_environment()) is not None:
                return allowed
        found = _get(_BACKENDS[device_type], operation)
    return found if found in _ROUNDING else FULL


def _allowed_by_environment() -> str | None:
    """Return what oneDNN may round to; float16 has as many digits as TF32."""
    for name in _VARIABLES:
        if (value := os.environ.get(name)) is not None:
            return _BY_VARIABLE.get(value.upper())
    return None


def precisions(device_type: str) -> tuple[str, ...]:
    """Return all settings for a device, on which a graph that was compiled for it depends."""
    operations = _PRODUCTS, _CONVOLUTIONS, _RECURRENCES
    return tuple([precision(device_type, operation) for operation in operations])


def product_rounding(device_type: str) -> float:
    """Return how much a float32 matrix product or convolution may round each product of two numbers.

    Args:
        device_type: Such as "cpu" or "cuda".

    Returns:
        The error relative to the product, beyond float32: 0, or 2^-10 with TF32, or 2^-7 with bfloat16.
    """
    return max(_ROUNDING[precision(device_type, each)] for each in (_PRODUCTS, _CONVOLUTIONS))


def allows_bfloat16() -> bool:
    """Return whether the process allows bfloat16 in float32 matrix products on any device, as "medium" does."""
    with settings_lock:
        try:
            return torch.get_float32_matmul_precision() == "medium"
        except RuntimeError:  # the newer settings are in use
            return bool(_get("generic", "all") == _BFLOAT16)


@contextmanager
def set_precision(device_type: str, wanted: str) -> Iterator[None]:
    """Set the precision of float32 matrix products on a device, and restore the process-wide setting afterwards.

    On the CPU this sets convolutions too.

    Args:
        device_type: Of the operands.
        wanted: "ieee" or "tf32".
    """
    # On the CPU no thread sets less than full float32, so threads that find it set compute at the same time.
    if device_type != "cuda" and _computes_in(device_type, wanted):
        yield
        return
    with settings_lock:
        if _computes_in(device_type, wanted):
            yield
            return
        backend, operations = _BACKENDS[device_type], _SET[device_type]
        before = [_own_setting(backend, each) for each in operations]
        onednn = torch._C._get_mkldnn_enabled()
        try:
            for each in operations:
                _set(backend, each, wanted)
            if not _computes_in(device_type, wanted):  # the environment allows other than this
                torch._C._set_mkldnn_enabled(False)
            yield
        finally:
            torch._C._set_mkldnn_enabled(onednn)
            for each, own in zip(operations, before, strict=True):
                _set(backend, each, own)


def _computes_in(device_type: str, wanted: str) -> bool:
    with settings_lock:
        return all(precision(device_type, each) == wanted for each in _SET.get(device_type, ()))


@contextmanager
def inheritance_kept() -> Iterator[None]:
    """Put CUDA's own setting for products back; PyTorch's capture writes what is inherited in its place."""
    before = _own_setting("cuda", _PRODUCTS)
    try:
        yield  # without the lock, since a capture may wait for other threads
    finally:
        with settings_lock:
            _set("cuda", _PRODUCTS, before)


def _own_setting(backend: str, operation: str) -> str:
    """Return the setting for an operation itself, which may be to inherit.

    A read returns what is inherited. If that were written back, the setting would not follow later changes. Nothing is
    inherited for as long as this function takes.
    """
    with settings_lock:
        everywhere = _get("generic", "all")
        _set("generic", "all", _INHERITED)
        of_backend = _get(backend, "all")
        _set(backend, "all", _INHERITED)
        own: str = _get(backend, operation)
        _set(backend, "all", of_backend)
        _set("generic", "all", everywhere)
    return own


def convolution_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)`` of two operands of a convolution."""
    if a.device.type == "cpu":
        return torch.bmm(a, b)
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
    """Return whether a matrix product with this operand may round float32 numbers; on the CPU a convolution too."""
    return tensor.dtype is torch.float32 and not _computes_in(tensor.device.type, FULL)


def sum_rounds(tensor: Tensor) -> bool:
    """Return whether a clipped sum of factors, in full float32 on the CPU, needs another setting for this."""
    return tensor.device.type == "cpu" and rounds(tensor)


def _precision_for_convolutions(device_type: str) -> str:
    """Return the precision of products that replace a convolution.

    On CUDA they may round if either kind of operation may. On the CPU they are as other products.
    """
    products, convolutions = precision(device_type), precision(device_type, _CONVOLUTIONS)
    return convolutions if device_type == "cuda" and products == FULL else products


def _product(a: Tensor, b: Tensor, wanted: str) -> Tensor:
    if a.dtype is not torch.float32:
        return torch.bmm(a, b)
    if get_proxy_mode() is None:
        with set_precision(a.device.type, wanted):
            return torch.bmm(a, b)
    if _computes_in(a.device.type, wanted):
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
    return rows.new_empty(rows.shape[0], windows, rows.shape[1], columns.shape[1])
