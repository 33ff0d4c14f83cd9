"""Matrix products that stand for a convolution, in the precision that convolutions are allowed.

cuDNN's convolutions use the tensor cores' TF32 unless ``torch.backends.cudnn.allow_tf32`` says no, matrix products only
if they are told to. A per-sample weight gradient is a convolution's arithmetic, whichever way it is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def convolution_product(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm(a, b)`` of two operands of a convolution."""
    if a.device.type == "cuda" and a.dtype is torch.float32 and _only_convolutions_may():
        product: Tensor = tf32_bmm(a, b)
        return product
    return torch.bmm(a, b)


def _only_convolutions_may() -> bool:
    return bool(torch.backends.cudnn.allow_tf32) and not torch.backends.cuda.matmul.allow_tf32


# An operation of its own: a traced graph holds it whole, with the setting inside.
@torch.library.custom_op("clipgrad::tf32_bmm", mutates_args=())
def tf32_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm(a, b)`` in TF32; the setting is the process', and is put back at once."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        return torch.bmm(a, b)
    finally:
        matmul.allow_tf32 = before


@tf32_bmm.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
