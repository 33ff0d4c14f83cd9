"""This module runs batched products with or without TF32, independently of the process's setting for matrix products.

By default, cuDNN's convolutions use TF32 (``torch.backends.cudnn.allow_tf32``) and matrix products do not. A per-sample
weight gradient follows the setting for convolutions, in whatever way it is computed. A norm computed from inner
products that cancel needs full float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def convolution_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)`` of two operands of a convolution."""
    return _product(a, b, convolutions_allow_tf32())


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``torch.bmm(a, b)`` in full float32."""
    return _product(a, b, False)


def convolutions_allow_tf32() -> bool:
    """Return whether the process allows TF32 in float32 convolutions, or in matrix products that replace them."""
    return bool(torch.backends.cudnn.allow_tf32) or matmuls_allow_tf32()


def matmuls_allow_tf32() -> bool:
    """Return whether the process allows TF32 in float32 matrix products."""
    return bool(torch.backends.cuda.matmul.allow_tf32)


@contextmanager
def set_tf32(allowed: bool) -> Iterator[None]:
    """Set whether matrix products may use TF32, and restore the process-wide setting afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _product(a: Tensor, b: Tensor, allowed: bool) -> Tensor:
    if a.device.type == "cuda" and a.dtype is torch.float32 and allowed != matmuls_allow_tf32():
        product: Tensor = bmm(a, b, allowed)
        return product
    return torch.bmm(a, b)


# A custom operation keeps the TF32 setting inside one node of a traced graph.
@torch.library.custom_op("clipgrad::bmm", mutates_args=())
def bmm(a: Tensor, b: Tensor, allowed: bool) -> Tensor:
    with set_tf32(allowed):
        return torch.bmm(a, b)


@bmm.register_fake
def _(a: Tensor, b: Tensor, allowed: bool) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def window_products(rows: Tensor, columns: Tensor, window_stride: int, windows: int) -> Tensor:
    """Return products ``[B, windows, R, C]`` of rows ``[B, R, S]`` and windows of columns ``[B, C, L]``.

    Window ``w`` holds ``rows @ columns[:, :, start : start + S].mT``, where ``start`` is ``w * window_stride``. Both
    operands belong to a convolution.
    """
    found: Tensor = _window_products(
        rows, columns, window_stride, windows, convolutions_allow_tf32()
    )
    return found


# A custom operation with operands of any layout keeps the result's windows and the TF32 setting inside one graph node.
@torch.library.custom_op(
    "clipgrad::window_products", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _window_products(
    rows: Tensor, columns: Tensor, window_stride: int, windows: int, allowed: bool
) -> Tensor:
    found = rows.new_empty(len(rows), windows, rows.shape[1], columns.shape[1])
    with set_tf32(allowed):
        for index in range(windows):
            window = columns.narrow(2, index * window_stride, rows.shape[2])
            torch.bmm(rows, window.transpose(1, 2), out=found[:, index])
    return found


@_window_products.register_fake
def _(rows: Tensor, columns: Tensor, window_stride: int, windows: int, allowed: bool) -> Tensor:
    return rows.new_empty(len(rows), windows, rows.shape[1], columns.shape[1])
