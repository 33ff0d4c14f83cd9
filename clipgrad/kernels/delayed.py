"""Have a compiler wait with work of the backward pass until the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def after(gradient: Tensor, value: Tensor) -> Tensor:
    """The value, in a graph for the CPU not to be used before the gradient is there; elsewhere as it is.

    What is found from values of the forward pass alone, a convolution's patches or an activation's slope, could be
    found as soon as they are there. Where a graph has branches (a U-Net), TorchInductor does that for some, and they
    lie in memory until the backward pass comes by: patches are nine times their image. A zero that seems to come from
    the gradient makes them wait; the sum is part of whatever reads it.
    """
    if value is gradient or not in_graph_for_cpu(value):
        return value
    waiting: Tensor = value + torch.ops.clipgrad.zero_after(gradient)
    return waiting


def in_graph_for_cpu(tensor: Tensor) -> bool:
    """Whether a tensor of the CPU stands for itself in a graph that is being traced."""
    return tensor.device.type == "cpu" and get_proxy_mode() is not None


def _zero(gradient: Tensor) -> Tensor:
    return gradient.new_zeros(())


# A plain registration: a call takes 4 microseconds, and one of ``custom_op`` 20. Any layout will do, else the compiler
# would copy the gradient for it. A module that is loaded once more finds the operation there.
if not hasattr(torch.ops.clipgrad, "zero_after"):
    torch.library.define(
        "clipgrad::zero_after", "(Tensor gradient) -> Tensor", tags=(torch.Tag.flexible_layout,)
    )
    torch.library.impl("clipgrad::zero_after", "CPU")(_zero)
    torch.library.register_fake("clipgrad::zero_after")(_zero)
