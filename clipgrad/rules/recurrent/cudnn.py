"""This module runs a recurrent sequence by cuDNN, whose fused loop is ten times faster than a loop of small kernels.

cuDNN's backward pass returns the gradient of its input, not the gradient of the gates. Both are equal with the identity
as input weight and the projected input as input. The cost is a product with the identity, ``N G^2`` a step, whose
precision ``torch.backends.cudnn.allow_tf32`` sets, as for all products of ``nn.LSTM`` on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipgrad._functorch import expected
from clipgrad.rules.recurrent.recurrence import GRU, LSTM, RNN, Cell, Trace, Weights

# Up to this ``N G^2`` the product with the identity costs less than the kernel launches that it saves. On an H200 cuDNN
# is 1.7 times as fast as the loop at 2^30 (H = 512, N = 256), and more than twice as fast at H = 1024, N = 32.
_LARGEST_PRODUCT = 1 << 31
# Shorter sequences save too few kernel launches.
_FEWEST_STEPS = 8


def can_run(cell: Cell, z: Tensor, weights: Weights) -> bool:
    """Return whether cuDNN can run this sequence, and is faster than the loop."""
    if not z.is_cuda or weights.projection is not None or len(z) < _FEWEST_STEPS:
        return False
    if expected(z.shape[1]) * z.shape[2] ** 2 > _LARGEST_PRODUCT:
        return False
    return torch.version.hip is None and torch.backends.cudnn.is_acceptable(z)


def run(
    cell: Cell, z: Tensor, h: Tensor, c: Tensor | None, weights: Weights, traces: list[Trace]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a cell as ``recurrence.run`` does, but append its trace to ``traces`` in the forward pass."""
    mode, gates, hidden = _mode(cell), z.shape[-1], h.shape[-1]
    flat = _weights_with_identity(z, weights)
    block = torch._cudnn_rnn_flatten_weight(flat, 4, gates, mode, hidden, 0, 1, False, False)
    steps = z.flip(0) if weights.reverse else z
    states, last, last_cell, _, _ = torch._cudnn_rnn(
        steps.contiguous(), flat, 4, block, h[None].contiguous(),
        None if c is None else c[None].contiguous(),
        mode, hidden, 0, 1, False, 0.0, True, False, [], None,
    )  # fmt: skip
    states = states.flip(0) if weights.reverse else states
    previous = weights.states_before_steps(states.detach(), h.detach())
    trace = Trace(previous)
    if isinstance(cell, GRU):
        trace.reset = _reset_gate(z.detach(), previous, weights)
    traces.append(trace)
    return states, last[0], None if c is None else last_cell[0]


def _weights_with_identity(z: Tensor, weights: Weights) -> list[Tensor]:
    """Return copies of the weights in cuDNN's order; copies, because flattening moves them into one block."""
    gates = z.shape[-1]
    identity = torch.eye(gates, dtype=z.dtype, device=z.device)
    nothing = z.new_zeros(gates)
    bias = torch.zeros_like(nothing) if weights.hidden_bias is None else weights.hidden_bias.clone()
    return [identity, weights.recurrent.clone(), nothing, bias]


def _reset_gate(z: Tensor, previous: Tensor, weights: Weights) -> Tensor:
    """Return a GRU's reset gate at all steps, ``[T, N, H]``."""
    hidden = previous.shape[-1]
    share = previous @ weights.recurrent[:hidden].t()
    if weights.hidden_bias is not None:
        share += weights.hidden_bias[:hidden]
    return (z[..., :hidden] + share).sigmoid_()


def _mode(cell: Cell) -> int:
    if isinstance(cell, LSTM):
        return 2
    if isinstance(cell, RNN):
        return 0 if cell.relu else 1
    return 3
