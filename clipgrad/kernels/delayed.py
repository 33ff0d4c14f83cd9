"""This module makes a compiler delay work of the backward pass until the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def delay_until(gradient: Tensor, value: Tensor) -> Tensor:
    """Return the value; in a graph for the CPU, make it depend on the gradient.

    In graphs with branches (a U-Net) TorchInductor may compute tensors that depend on the forward pass only (a
    convolution's patches, an activation's slope) too early, and they use memory until the backward pass: patches are
    nine times their image. Adding a zero that depends on the gradient delays them; the compiler fuses the sum.
    """
    if value is gradient or not in_graph_for_cpu(value):
        return value
    waiting: Tensor = value + torch.ops.clipgrad.zero_after(gradient)
    return waiting


def in_graph_for_cpu(tensor: Tensor) -> bool:
    """Return whether a graph is being traced and the tensor is on the CPU."""
    return tensor.device.type == "cpu" and get_proxy_mode() is not None


def _zero(gradient: Tensor) -> Tensor:
    return gradient.new_zeros(())


# A call of an operation from ``torch.library.define`` takes 4 microseconds, and one from ``custom_op`` 20. Without the
# tag for flexible layouts the compiler would copy the gradient. A reloaded module must not define the operation again.
if not hasattr(torch.ops.clipgrad, "zero_after"):
    torch.library.define(
        "clipgrad::zero_after", "(Tensor gradient) -> Tensor", tags=(torch.Tag.flexible_layout,)
    )
    torch.library.impl("clipgrad::zero_after", "CPU")(_zero)
    torch.library.register_fake("clipgrad::zero_after")(_zero)
