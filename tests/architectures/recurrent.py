"""Recurrent modules in all their modes, cells in python loops, learned initial states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ._base import add, architecture, floats, freeze, normal, several

SEQUENCE = floats(5, 3)
SHORT_SEQUENCE = floats(3, 3)  # one step without a state, and two with one


class Recurrent(nn.Module):
    """A recurrent module between two linear layers; outputs and final states all count."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        settings = {"batch_first": True, **options}
        self.before, self.inner = nn.Linear(3, 3), kind(3, 4, **settings)
        self.head = nn.Linear(
            (settings.get("proj_size") or 4) * (2 if self.inner.bidirectional else 1), 2
        )

    def forward(self, x: Tensor, *states: Tensor) -> Tensor:
        x = self.before(x).tanh()
        if not self.inner.batch_first:
            x = x.transpose(0, 1)
        # States travel batch first, but the module wants (layers, batch, features).
        start = tuple(state.transpose(0, 1).contiguous() for state in states)
        given = () if not start else (start,) if len(start) == 2 else (start[0],)
        out, final = self.inner(x, *given)
        out = self.head(out if self.inner.batch_first else out.transpose(0, 1))
        finals = final if isinstance(final, tuple) else (final,)
        return torch.cat([out.flatten(1)] + [s.transpose(0, 1).flatten(1) for s in finals], dim=1)


for _kind in (nn.RNN, nn.LSTM, nn.GRU):
    _name = _kind.__name__.lower()
    add(_name, lambda kind=_kind: Recurrent(kind), SEQUENCE, "one layer, batch first")
    add(
        f"{_name}_deep_bidirectional",
        lambda kind=_kind: Recurrent(kind, num_layers=2, bidirectional=True),
        SEQUENCE,
        "two layers, both directions",
    )
    add(
        f"{_name}_time_first",
        lambda kind=_kind: Recurrent(kind, batch_first=False, bias=False),
        SEQUENCE,
        "the batch axis is second; no biases",
    )
add("rnn_relu", lambda: Recurrent(nn.RNN, nonlinearity="relu"), SEQUENCE, "the other nonlinearity")
add(
    "lstm_projected",
    lambda: Recurrent(nn.LSTM, proj_size=2, num_layers=2),
    SEQUENCE,
    "projected state",
)
add(
    "lstm_projected_bidirectional",
    lambda: Recurrent(nn.LSTM, proj_size=2, bidirectional=True),
    SEQUENCE,
    "projected state, both directions",
)
add(
    "lstm_initial_state",
    lambda: Recurrent(nn.LSTM),
    several(SEQUENCE, floats(1, 4), floats(1, 4)),
    "initial states come with the sample",
)
add(
    "gru_initial_state",
    lambda: Recurrent(nn.GRU, num_layers=2),
    several(SEQUENCE, floats(2, 4)),
    "initial states come with the sample",
)
add(
    "lstm_frozen_recurrence",
    lambda: Recurrent(nn.LSTM),
    SEQUENCE,
    "part of the module is frozen",
    trainable=freeze("inner.weight_hh", "inner.bias_ih"),
)
add(
    "gru_frozen",
    lambda: Recurrent(nn.GRU),
    SEQUENCE,
    "all of the module is frozen",
    trainable=freeze("inner"),
)
add(
    "lstm_dropout_between_layers",
    lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.4),
    SEQUENCE,
    "dropout between the layers",
    random=True,
)
add("lstm_one_step", lambda: Recurrent(nn.LSTM), floats(1, 3), "a sequence of length one")


class LearnedStart(nn.Module):
    """The initial state is a parameter, expanded over the batch."""

    def __init__(self, kind: type[nn.RNNBase], states: int) -> None:
        super().__init__()
        self.inner = kind(3, 4, num_layers=2, batch_first=True)
        self.start = nn.ParameterList([normal(2, 1, 4) for _ in range(states)])

    def forward(self, x: Tensor) -> Tensor:
        start = tuple(state.expand(-1, len(x), -1).contiguous() for state in self.start)
        return self.inner(x, start if len(start) == 2 else start[0])[0]


add("rnn_learned_start", lambda: LearnedStart(nn.RNN, 1), SEQUENCE, "learned initial state")
add("lstm_learned_start", lambda: LearnedStart(nn.LSTM, 2), SEQUENCE, "learned initial states")


@architecture("lstm_used_twice", several(floats(5, 3), floats(3, 3)))
class UsedTwice(nn.Module):
    """One LSTM reads two sequences; the second starts where the first ended."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(3, 4, batch_first=True)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        _, state = self.inner(first)
        return self.inner(second, state)[0]


@architecture("gru_weight_also_penalised", SEQUENCE)
class WeightElsewhere(nn.Module):
    """A recurrent weight is used by name outside the module as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0] * self.inner.weight_hh_l0.sum().tanh()


@architecture("encoder_decoder", several(floats(5, 3), floats(4, 3)))
class EncoderDecoder(nn.Module):
    """A GRU encodes, its last state starts an LSTM that decodes with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.GRU(3, 4, batch_first=True), nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, last = self.encode(source)
        out, _ = self.decode(target, (last, torch.zeros_like(last)))
        context = (out @ memory.mT).softmax(-1) @ memory
        return self.head(torch.cat([out, context], dim=-1))


class CellLoop(nn.Module):
    """A recurrent cell in a python loop over time."""

    def __init__(self, kind: type[nn.RNNCellBase], **options: Any) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, outputs = None, []
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(outputs, dim=1))


add("rnn_cell_loop", lambda: CellLoop(nn.RNNCell, nonlinearity="relu"), SHORT_SEQUENCE, "RNNCell")
add("lstm_cell_loop", lambda: CellLoop(nn.LSTMCell), SHORT_SEQUENCE, "LSTMCell")
add(
    "gru_cell_loop",
    lambda: CellLoop(nn.GRUCell, bias=False),
    SHORT_SEQUENCE,
    "GRUCell without bias",
)


@architecture("autoregressive_cell", SEQUENCE)
class Autoregressive(nn.Module):
    """The cell reads its own prediction; head and cell take turns."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        state, now = x.new_zeros(len(x), 4), x[:, 0]
        for step in range(1, 4):
            state = self.cell(now, state)
            now = self.head(state) + 0.1 * x[:, step]
        return now


@architecture("conv_lstm", floats(3, 2, 4, 4))
class ConvolutionalLSTM(nn.Module):
    """An LSTM whose gates are convolutions, looped over video frames."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = cell = frames.new_zeros(len(frames), 2, 4, 4)
        for frame in frames.unbind(1):
            enter, forget, leave, new = self.gates(torch.cat([frame, hidden], 1)).chunk(4, dim=1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
        return hidden


@architecture("implicit_fixed_point", floats(4))
class FixedPoint(nn.Module):
    """Twelve rounds of the same layers towards a fixed point, then one normalised output."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.update = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        state, inject = torch.zeros_like(x), self.inject(x)
        for _ in range(12):
            state = self.norm(0.5 * self.update(state).tanh() + inject)
        return state


@architecture(
    "gru_packed_lengths",
    several(SEQUENCE, lambda size: (torch.randint(1, 6, (size,)),)),
    may_refuse=r"pack|control flow|data.dependent",
)
class PackedLengths(nn.Module):
    """Sequences of different length, packed: lengths are data that shapes depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.inner(packed)[0], batch_first=True, total_length=5)
        return out
