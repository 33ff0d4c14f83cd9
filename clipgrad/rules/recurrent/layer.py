"""This module runs one recurrent layer in one direction, and makes the recipes of its weights.

The recipes of all weights are recorded on the projected input, whose gradient is the gates' gradient at every step. A
trace, filled before, holds the other tensors that recipes need (states, a GRU's second gradient, an LSTM's projection).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clipgrad.errors import EscapedParameterError
from clipgrad.rules.canonical import Outer, Use
from clipgrad.rules.linear import sum_over_positions
from clipgrad.rules.recurrent import cudnn, recurrence
from clipgrad.rules.recurrent.recurrence import GRU, Cell, Trace, Weights
from clipgrad.rules.registry import Call, Extent, Recipe


@dataclass(frozen=True)
class State:
    """This class holds a state ``[N, P]`` and, for an LSTM, a cell state ``[N, H]``, or several states stacked."""

    h: Tensor
    c: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (self.h,) if self.c is None else (self.h, self.c)


@dataclass
class Factors:
    """This class makes the factors ``[B, positions, features]`` of a layer's weight gradients in one direction."""

    samples: int  # Number of samples in the microbatch
    steps: int  # Number of steps of the sequence
    # List that holds one trace before recipes run
    traces: list[Trace] = field(default_factory=list)
    _input_side: Tensor | None = None

    def positions(self, tensor: Tensor) -> Tensor:
        """Reshape ``[T, N, features]`` to ``[B, positions, features]``."""
        by_sample = tensor.unflatten(-2, (self.samples, tensor.shape[-2] // self.samples))
        positions: Tensor = by_sample.permute(1, 2, 0, 3).flatten(1, 2)
        return positions

    def input_side(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the input's share of the gates; cached, because several weights need it."""
        if self._input_side is None:
            self._input_side = self.positions(gradient.view(self.steps, -1, gradient.shape[-1]))
        return self._input_side

    def hidden_side(self, gradient: Tensor) -> Tensor:
        trace, left = self.traces[0], self.input_side(gradient)
        if trace.hidden is not None:
            return self.positions(trace.hidden)
        if trace.reset is not None:
            reset, update, new = left.chunk(3, dim=-1)
            return torch.cat([reset, update, new * self.positions(trace.reset)], dim=-1)
        return left

    def recurrent(self, gradient: Tensor, shape: torch.Size) -> Outer:
        return Outer(self.hidden_side(gradient), self.positions(self.traces[0].previous), shape)

    def projection(self, gradient: Tensor, shape: torch.Size) -> Outer:
        projected, unprojected = self.traces[0].projected, self.traces[0].unprojected
        assert projected is not None
        assert unprojected is not None
        return Outer(self.positions(projected), self.positions(unprojected), shape)


def run_layer(
    call: Call, cell: Cell, x: Tensor, state: State, weights: Mapping[str, Tensor], reverse: bool
) -> tuple[Tensor, State]:
    """Run one layer in one direction, and return the state after each step, ``[T, N, P]``, and the last state.

    The input ``x`` is ``[T, N, I]`` and ``state`` ``[N, P]``. All samples share the weights, as user code passed them:
    ``w_ih`` ``[G, I]``, ``w_hh`` ``[G, P]``, and if present ``b_ih``, ``b_hh`` ``[G]`` and ``w_hr`` ``[P, H]``.
    """
    constants = {name: _constant(call, name, w).to(x.dtype) for name, w in weights.items()}
    bias, hidden_bias = constants.get("b_ih"), constants.get("b_hh")
    if not isinstance(cell, GRU):  # a GRU applies its reset gate between the two biases
        bias, hidden_bias = _sum(bias, hidden_bias), None
    rows, input_operand = x.flatten(0, 1), constants["w_ih"].t()
    z = torch.mm(rows, input_operand) if bias is None else torch.addmm(bias, rows, input_operand)
    factors = Factors(call.batch_size, len(x))
    z = call.record(z, *_recipes(weights, x, factors), saved=(x,)).view(*x.shape[:2], -1)
    shared = Weights(constants["w_hh"], hidden_bias, constants.get("w_hr"), reverse)
    run = cudnn.run if cudnn.can_run(cell, z, shared) else recurrence.run
    states, h, c = run(cell, z, state.h, state.c, shared, factors.traces)
    return states, State(h, c)


def _constant(call: Call, name: str, weight: Tensor) -> Tensor:
    shared = call.shared(weight)
    if shared.requires_grad and torch.is_grad_enabled():
        raise EscapedParameterError(
            f"a recurrent layer received a weight ({name}, shape {tuple(weight.shape)}) that requires grad and is not "
            "among the parameters, so its gradient would escape clipping. Pass it with the parameters, register "
            "it in the model, or freeze it with requires_grad_(False)."
        )
    return shared


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _recipes(weights: Mapping[str, Tensor], x: Tensor, factors: Factors) -> list[Recipe]:
    positions = x.shape[0] * x.shape[1] // factors.samples
    makers: dict[str, Callable[[Tensor, torch.Size], Use]] = {
        "w_ih": lambda g, shape: Outer(factors.input_side(g), factors.positions(x), shape),
        "w_hh": factors.recurrent,
        "b_ih": lambda g, shape: sum_over_positions(factors.input_side(g)),
        "b_hh": lambda g, shape: sum_over_positions(factors.hidden_side(g)),
        "w_hr": factors.projection,
    }

    def recipe(name: str, weight: Tensor) -> Recipe:
        make, shape = makers[name], weight.shape
        extent = Extent(positions, *shape) if len(shape) == 2 else None
        return Recipe(weight, lambda g: make(g, shape), extent)

    return [recipe(name, weight) for name, weight in weights.items()]
