"""Batched products in TF32 or without it, whatever the process allows to matrix products.

cuDNN's convolutions use the tensor cores' TF32 unless ``torch.backends.cudnn.allow_tf32`` says no, matrix products only
if they are told to. A per-sample weight gradient is a convolution's arithmetic, whichever way it is computed; a norm
made of inner products that cancel needs all its digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def convolution_product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm(a, b)`` of two operands of a convolution."""
    return _product(a, b, convolutions_may())


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm(a, b)`` in full float32."""
    return _product(a, b, False)


def convolutions_may() -> bool:
    """Whether the process allows TF32 to float32 convolutions, or to what stands for them."""
    return bool(torch.backends.cudnn.allow_tf32) or matrices_may()


def matrices_may() -> bool:
    """Whether the process allows TF32 to float32 matrix products."""
    return bool(torch.backends.cuda.matmul.allow_tf32)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 to matrix products or do not; the setting is the process', and is put back."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def _product(a: Tensor, b: Tensor, allowed: bool) -> Tensor:
    if a.device.type == "cuda" and a.dtype is torch.float32 and allowed != matrices_may():
        product: Tensor = bmm(a, b, allowed)
        return product
    return torch.bmm(a, b)


# An operation of its own: a traced graph holds it whole, with the setting inside.
@torch.library.custom_op("clipgrad::bmm", mutates_args=())
def bmm(a: Tensor, b: Tensor, allowed: bool) -> Tensor:
    """``torch.bmm(a, b)``, with TF32 if allowed."""
    with tf32(allowed):
        return torch.bmm(a, b)


@bmm.register_fake
def _(a: Tensor, b: Tensor, allowed: bool) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def window_products(rows: Tensor, columns: Tensor, apart: int, windows: int) -> Tensor:
    """Products of rows and windows of columns, two operands of a convolution.

    Args:
        rows: ``[B, R, S]``.
        columns: ``[B, C, L]``.
        apart: Positions between the starts of two windows.
        windows: How many there are.

    Returns:
        ``[B, windows, R, C]``; window ``w`` holds ``rows @ columns[:, :, w * apart : w * apart + S].mT``.
    """
    found: Tensor = _window_products(rows, columns, apart, windows, convolutions_may())
    return found


# Whole in a graph: products written where they belong, with the setting inside. Operands may lie as they like.
@torch.library.custom_op(
    "clipgrad::window_products", mutates_args=(), tags=(torch.Tag.flexible_layout,)
)
def _window_products(
    rows: Tensor, columns: Tensor, apart: int, windows: int, allowed: bool
) -> Tensor:
    found = rows.new_empty(len(rows), windows, rows.shape[1], columns.shape[1])
    with tf32(allowed):
        for index in range(windows):
            window = columns.narrow(2, index * apart, rows.shape[2])
            torch.bmm(rows, window.transpose(1, 2), out=found[:, index])
    return found


@_window_products.register_fake
def _(rows: Tensor, columns: Tensor, apart: int, windows: int, allowed: bool) -> Tensor:
    return rows.new_empty(len(rows), windows, rows.shape[1], columns.shape[1])
