"""This module has rules for ``lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu`` and their ``_cell`` forms.

``vmap`` has no rule for these operations. Calls that the rules decline (weights that differ from sample to sample,
dropout without different random numbers per sample) run by ``definition``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.rules.recurrent.definition import name_weights, refuse_packed
from clipgrad.rules.recurrent.layer import State, run_layer
from clipgrad.rules.recurrent.recurrence import GRU, LSTM, RNN, Cell
from clipgrad.rules.registry import Call, Decline, register_rule


@dataclass(frozen=True)
class Options:
    """This class holds the non-tensor arguments of a sequence operation; ``dropout`` is zero outside training."""

    has_biases: bool
    num_layers: int
    dropout: float
    bidirectional: bool
    batch_first: bool

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def _sequence(
    call: Call, cell: Cell, input: Tensor, hx: Any, params: Sequence[Tensor], options: Options
) -> tuple[Tensor, ...]:
    if options.dropout > 0 and call.randomness != "different":
        raise Decline
    params = [_adopt(call, weight) for weight in params]
    count = len(params) // (options.num_layers * options.directions)
    for first in range(0, len(params), count):
        _decline_broadcasts(name_weights(params[first : first + count], options.has_biases))
    x, state = call.batched(input), _state(call, hx)
    inner = x.shape[1] if options.batch_first else x.shape[2]
    with _autocast_dtype(x) as dtype:
        x = x.permute((2, 0, 1, 3) if options.batch_first else (1, 0, 2, 3)).flatten(1, 2).to(dtype)
        starts = [part.transpose(0, 1).flatten(1, 2).to(dtype).unbind(0) for part in state.parts]
        _check(x, [part for start in starts for part in start])
        ends = []
        for layer in range(options.num_layers):
            if layer and options.dropout > 0:
                x = F.dropout(x, options.dropout)
            outputs = []
            for direction in range(options.directions):
                index = layer * options.directions + direction
                weights = name_weights(
                    params[index * count : (index + 1) * count], options.has_biases
                )
                start = State(*(part[index] for part in starts))
                output, end = run_layer(call, cell, x, start, weights, reverse=direction == 1)
                outputs.append(output)
                ends.append(end.parts)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return _finish(call, x, ends, inner, options.batch_first)


def _finish(
    call: Call, x: Tensor, ends: Sequence[tuple[Tensor, ...]], inner: int, batch_first: bool
) -> tuple[Tensor, ...]:
    """Return to the user's layout: outputs ``[B, inner, T, features]`` or time first, states ``[B, layers, ...]``."""
    rows = (call.batch_size, inner)
    # The outputs are copied because user code may write to them, and backward passes of layers still read them.
    outputs = x.unflatten(1, rows).permute((1, 2, 0, 3) if batch_first else (1, 0, 2, 3))
    outputs = outputs.clone(memory_format=torch.contiguous_format)
    states = (torch.stack(parts, dim=1) for parts in zip(*ends, strict=True))
    last = (part.unflatten(0, rows).transpose(1, 2) for part in states)
    return (call.finish(outputs), *(call.finish(part) for part in last))


def _state(call: Call, hx: Tensor | Sequence[Tensor]) -> State:
    return State(*map(call.batched, (hx,) if isinstance(hx, Tensor) else hx))


@contextmanager
def _autocast_dtype(x: Tensor) -> Iterator[torch.dtype]:
    """Yield autocast's dtype, or the input's dtype without autocast; the body runs without autocast."""
    device = x.device.type
    lowers = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if lowers else x.dtype
    with torch.autocast(device, enabled=False):
        yield dtype


def _step(
    call: Call, cell: Cell, input: Tensor, hx: Any, weights: dict[str, Tensor]
) -> tuple[Tensor, ...]:
    """Run a sequence of one step in the state's dtype, with or without autocast."""
    weights = {name: _adopt(call, weight) for name, weight in weights.items()}
    _decline_broadcasts(weights)
    x, state = call.batched(input), _state(call, hx)
    rows = State(*(part.flatten(0, -2) for part in state.parts))
    with _autocast_dtype(x):
        steps = x.flatten(0, -2)[None].to(state.h.dtype)
        _check(steps, rows.parts)
        _, last = run_layer(call, cell, steps, rows, weights, reverse=False)
    return tuple(call.finish(part.view(*x.shape[:-1], -1)) for part in last.parts)


def _adopt(call: Call, weight: Tensor) -> Tensor:
    """Return a weight that all samples share, and decline a weight that differs from sample to sample."""
    weight = call.adopt(weight)
    if call.has_batch_axis(weight):
        raise Decline
    return weight


def _decline_broadcasts(weights: dict[str, Tensor]) -> None:
    """Decline a bias that is broadcast over the gates, which PyTorch's cells allow, because its gradient differs."""
    gates = weights["w_ih"].shape[:1]
    biases = (weights[name] for name in ("b_ih", "b_hh") if name in weights)
    if weights["w_hh"].shape[:1] != gates or any(bias.shape != gates for bias in biases):
        raise Decline


def _check(x: Tensor, states: Sequence[Tensor]) -> None:
    """Refuse an initial state with a wrong number of rows, which could be broadcast silently."""
    for state in states:
        if state.shape[-2] != x.shape[1]:
            raise ValueError(
                f"a recurrent layer received an initial state for {state.shape[-2]} sequences and an input of "
                f"{x.shape[1]} (samples times batch axis); give every sequence its own, or pass none."
            )


def _register(name: str, cell: Cell) -> None:
    @register_rule(getattr(torch, name), name=name)
    def sequence(
        call: Call, input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: int,
        dropout: float, train: bool, bidirectional: bool, batch_first: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if isinstance(has_biases, list | tuple):  # arguments: data, batch_sizes, hx, params, ...
            refuse_packed(name)
        dropout = dropout if train and num_layers > 1 else 0.0
        options = Options(has_biases, num_layers, dropout, bidirectional, batch_first)
        return _sequence(call, cell, input, hx, params, options)

    @register_rule(getattr(torch, f"{name}_cell"), name=f"{name}_cell")
    def step(
        call: Call, input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        weights = {"w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh}
        present = {key: weight for key, weight in weights.items() if weight is not None}
        last = _step(call, cell, input, hx, present)
        return last if len(last) > 1 else last[0]


_register("lstm", LSTM())
_register("gru", GRU())
_register("rnn_tanh", RNN(relu=False))
_register("rnn_relu", RNN(relu=True))
