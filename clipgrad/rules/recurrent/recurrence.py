"""This module runs recurrent cells over time, with a backward pass that returns the factors of the weights' gradients.

A step is ``z_t = x_t + h_{t-1} W^T``, followed by the gates. The caller projects the input for all steps at once, so
each step needs one small GEMM and a few elementwise operations. The backward pass computes all factors that do not
depend on the recursion (a gate's derivative times its multiplier) for all steps at once; the loop only multiplies them
by the incoming gradient. The gradient of ``z`` is the left factor of the weights' gradients, and the states before each
step are the right factor. Tensors are ``[T, N, features]`` with ``N`` rows a step, so that a step is one memory block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_sigmoid_backward = torch.ops.aten.sigmoid_backward
_tanh_backward = torch.ops.aten.tanh_backward

# From this many steps on, one copy of the transposed weight makes each step's GEMM about 1.3 times as fast.
_MANY_STEPS = 8

Forward = tuple[Tensor, Tensor | None, tuple[Tensor, ...]]
Backward = tuple["Trace", Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class Weights:
    """This class holds the weights of one sequence, as constants that all samples share."""

    recurrent: Tensor  # Weight from the state to the gates, ``[G, P]``
    # Bias of the state's share of the gates, ``[G]``; only a GRU has it apart from the input's bias
    hidden_bias: Tensor | None = None
    projection: Tensor | None = None  # Weight from an LSTM's cell output to its state, ``[P, H]``
    reverse: bool = False  # Whether time runs backwards

    def order(self, steps: int) -> Sequence[int]:
        return range(steps - 1, -1, -1) if self.reverse else range(steps)

    def recurrent_operand(self, steps: int) -> Tensor:
        """Return the recurrent weight as right operand of a step, copied to be contiguous if there are many steps."""
        transposed = self.recurrent.t()
        return transposed if steps < _MANY_STEPS else transposed.contiguous()

    def states_before_steps(self, states: Tensor, first: Tensor) -> Tensor:
        """Return the state before each step, from the states after each step and the initial state."""
        parts = (states[1:], first[None]) if self.reverse else (first[None], states[:-1])
        return torch.cat(parts)


@dataclass
class Trace:
    """This class holds tensors for the weights' recipes, filled before the hook of the projected input runs."""

    previous: Tensor  # The state before each step, ``[T, N, P]``
    # Gradient of the state's share of the gates, ``[T, N, G]``; None if the input's share gives it
    hidden: Tensor | None = None
    # A GRU's reset gate at all steps, ``[T, N, H]``, if cuDNN ran the sequence
    reset: Tensor | None = None
    unprojected: Tensor | None = None  # Input of an LSTM's projection, ``[T, N, H]``
    projected: Tensor | None = None  # Gradient of the projection's output, ``[T, N, P]``


@dataclass(frozen=True)
class OutputGradients:
    """This class holds the gradients of the outputs of a sequence."""

    states: Sequence[Tensor]  # Gradient of each step's state, ``T`` tensors ``[N, P]``
    last: Tensor  # Gradient of the last state, ``[N, P]``
    cell: Tensor | None  # Gradient of an LSTM's last cell state, ``[N, H]``, or None

    def walk(self, order: Sequence[int]) -> list[tuple[int, Tensor]]:
        """Return the steps, last step first, each with the incoming gradient of the state before the step."""
        nothing = self.last.new_zeros(()).expand_as(self.last)
        outside = [self.states[t] for t in order[:-1]]
        return list(zip(order, [nothing, *outside], strict=True))[::-1]

    def start(self, order: Sequence[int]) -> Tensor:
        """Return the gradient of the last step's state."""
        return self.last + self.states[order[-1]]


class Cell(Protocol):
    """This protocol represents one kind of recurrent cell."""

    def forward(self, z: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> Forward:
        """Run all steps from the input's share ``z`` of the gates, ``[T, N, G]``, which is overwritten.

        Return the state after each step ``[T, N, P]``, an LSTM's last cell state, and tensors for ``backward``.
        """
        ...

    def backward(
        self, incoming: OutputGradients, previous: Tensor, saved: Sequence[Tensor], weights: Weights
    ) -> Backward:
        """Run backwards through time and return the trace and the gradients of ``z``, ``h`` and ``c``."""
        ...


class LSTM:
    """This cell computes ``i, f, o = sigmoid; g = tanh; c = f c + i g; h = o tanh(c)``, and may project ``h``."""

    def forward(self, z: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> Forward:
        assert c is not None
        first, hidden, recurrent_operand = c, c.shape[-1], weights.recurrent_operand(len(z))
        down = None if weights.projection is None else weights.projection.t()
        states = z.new_empty(*z.shape[:2], h.shape[-1])
        cells, tanhs = z.new_empty(2, *z.shape[:2], hidden).unbind(0)
        i, f, g, o = (gate.unbind(0) for gate in z.chunk(4, dim=-1))
        i_and_f = z[..., : 2 * hidden].unbind(0)
        gates, to_h, to_c, to_tanh = (tensor.unbind(0) for tensor in (z, states, cells, tanhs))
        for t in weights.order(len(z)):
            gates[t].addmm_(h, recurrent_operand)
            i_and_f[t].sigmoid_()
            g[t].tanh_()
            o[t].sigmoid_()
            c = torch.mul(f[t], c, out=to_c[t]).addcmul_(i[t], g[t])
            tanh = torch.tanh(c, out=to_tanh[t])
            if down is None:
                h = torch.mul(o[t], tanh, out=to_h[t])
            else:
                h = torch.mm(o[t] * tanh, down, out=to_h[t])
        return states, c.clone(), (z, first, cells, tanhs)

    def backward(
        self, incoming: OutputGradients, previous: Tensor, saved: Sequence[Tensor], weights: Weights
    ) -> Backward:
        z, first, cells, tanhs = saved
        i, f, g, o = z.chunk(4, dim=-1)
        dz = torch.empty_like(z)
        di, df, dg, do = dz.chunk(4, dim=-1)
        _sigmoid_backward(g, i, grad_input=di)
        _sigmoid_backward(weights.states_before_steps(cells, first), f, grad_input=df)
        _tanh_backward(i, g, grad_input=dg)
        _sigmoid_backward(tanhs, o, grad_input=do)
        through_tanh = _tanh_backward(o, tanhs).unbind(0)
        gates, keep, output = dz.unbind(0), f.unbind(0), do.unbind(0)
        i_f_g = dz.unflatten(-1, (4, -1))[:, :, :3].unbind(0)
        order, projected = weights.order(len(z)), []
        dh = incoming.start(order)
        dc = torch.zeros_like(first) if incoming.cell is None else incoming.cell.clone()
        for t, outside in incoming.walk(order):
            if weights.projection is not None:
                projected.append(dh)
                dh = dh @ weights.projection
            dc.addcmul_(dh, through_tanh[t])
            i_f_g[t].mul_(dc.unsqueeze(1))
            output[t].mul_(dh)
            dc.mul_(keep[t])
            dh = torch.addmm(outside, gates[t], weights.recurrent)
        trace = Trace(previous)
        if weights.projection is not None:
            trace.unprojected = o * tanhs
            trace.projected = torch.stack(projected if weights.reverse else projected[::-1])
        return trace, dz, dh, dc


class GRU:
    """This cell computes ``r, z = sigmoid; n = tanh(x_n + r (h W_n^T + b_n)); h = n + z (h - n)``."""

    def forward(self, z: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> Forward:
        first, width, recurrent_operand = h, h.shape[-1], weights.recurrent_operand(len(z))
        bias = weights.hidden_bias
        states, shares = z.new_empty(*z.shape[:2], width), torch.empty_like(z)
        reset, update, new = (gate.unbind(0) for gate in z.chunk(3, dim=-1))
        reset_and_update = z[..., : 2 * width].unbind(0)
        share, share_of_new = shares.unbind(0), shares[..., 2 * width :].unbind(0)
        share_of_others, to_h = shares[..., : 2 * width].unbind(0), states.unbind(0)
        for t in weights.order(len(z)):
            if bias is None:
                torch.mm(h, recurrent_operand, out=share[t])
            else:
                torch.addmm(bias, h, recurrent_operand, out=share[t])
            reset_and_update[t].add_(share_of_others[t]).sigmoid_()
            new[t].addcmul_(reset[t], share_of_new[t]).tanh_()
            h = torch.lerp(new[t], h, update[t], out=to_h[t])
        return states, None, (z, first, shares)

    def backward(
        self, incoming: OutputGradients, previous: Tensor, saved: Sequence[Tensor], weights: Weights
    ) -> Backward:
        z, _, shares = saved
        reset, update, new = z.chunk(3, dim=-1)
        through_new = _tanh_backward(1 - update, new)
        hidden = torch.empty_like(z)  # gradient of h W^T + b
        d_reset, d_update, d_share = hidden.chunk(3, dim=-1)
        _sigmoid_backward(through_new * shares.chunk(3, dim=-1)[2], reset, grad_input=d_reset)
        _sigmoid_backward(previous - new, update, grad_input=d_update)
        torch.mul(through_new, reset, out=d_share)
        gates, keep, through = hidden.unbind(0), update.unbind(0), through_new.unbind(0)
        each = hidden.unflatten(-1, (3, -1)).unbind(0)
        order = weights.order(len(z))
        dh = incoming.start(order)
        for t, outside in incoming.walk(order):
            each[t].mul_(dh.unsqueeze(1))
            through[t].mul_(dh)
            dh = torch.addmm(outside, gates[t], weights.recurrent).addcmul_(dh, keep[t])
        dz = torch.cat([d_reset, d_update, through_new], dim=-1)
        return Trace(previous, hidden), dz, dh, None


@dataclass(frozen=True)
class RNN:
    """This cell computes ``h = tanh(z)`` or ``h = relu(z)``."""

    relu: bool

    def forward(self, z: Tensor, h: Tensor, c: Tensor | None, weights: Weights) -> Forward:
        recurrent_operand, states = weights.recurrent_operand(len(z)), torch.empty_like(z)
        share, to_h = z.unbind(0), states.unbind(0)
        for t in weights.order(len(z)):
            h = torch.addmm(share[t], h, recurrent_operand, out=to_h[t])
            h = h.relu_() if self.relu else h.tanh_()
        return states, None, (states,)

    def backward(
        self, incoming: OutputGradients, previous: Tensor, saved: Sequence[Tensor], weights: Weights
    ) -> Backward:
        (states,) = saved
        dz = (states > 0).to(states.dtype) if self.relu else 1 - states * states
        gates, order = dz.unbind(0), weights.order(len(dz))
        dh = incoming.start(order)
        for t, outside in incoming.walk(order):
            dh = torch.addmm(outside, gates[t].mul_(dh), weights.recurrent)
        return Trace(previous), dz, dh, None


class _Sequence(torch.autograd.Function):
    """This function runs a cell over all steps and differentiates its input and initial states, not its weights."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        h: Tensor,
        c: Tensor | None,
        cell: Cell,
        weights: Weights,
        traces: list[Trace],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        # The gates overwrite the projected input, which no other code holds and its own backward does not read.
        states, last_cell, saved = cell.forward(z.detach(), h, c, weights)
        ctx.save_for_backward(states, h, *saved)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.weights, ctx.traces = cell, weights, traces
        return states, states[weights.order(len(z))[-1]].clone(), last_cell

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_states: Tensor | None, d_last: Tensor | None, d_cell: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        states, first, *saved = ctx.saved_tensors
        nothing = states.new_zeros(()).expand_as(states)
        incoming = OutputGradients(
            (nothing if d_states is None else d_states).unbind(0),
            nothing[0] if d_last is None else d_last,
            d_cell,
        )
        previous = ctx.weights.states_before_steps(states, first)
        trace, dz, dh, dc = ctx.cell.backward(incoming, previous, saved, ctx.weights)
        ctx.traces.append(trace)
        return dz, dh, dc, None, None, None


def run(
    cell: Cell, z: Tensor, h: Tensor, c: Tensor | None, weights: Weights, traces: list[Trace]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Run a cell over the projected input ``z``, which it overwrites.

    Return the state after each step ``[T, N, P]``, the last state and the last cell state. The backward pass appends
    its trace to ``traces`` before it returns the gradient of ``z``.
    """
    states, last, last_cell = _Sequence.apply(z, h, c, cell, weights, traces)
    return states, last, last_cell
