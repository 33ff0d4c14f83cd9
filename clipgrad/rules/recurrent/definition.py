"""This module runs the recurrent operations step by step, as PyTorch's documentation defines them.

``vmap`` has no rule for these operations. The fallback runs this code for calls that clipgrad's rules decline (weights
that differ from sample to sample, a gradient taken inside the loss).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad._functorch import memory_address
from clipgrad.errors import NotPerSampleError
from clipgrad.rules.names import names_of

States = tuple[Tensor, ...]
# A step maps the input's share of the gates, the state's share and the old states to the new states.
Step = Callable[[Tensor, Tensor, States], States]


def refuse_packed(operation: str) -> None:
    """Refuse packed sequences, which have different lengths."""
    raise NotPerSampleError(
        f"a packed sequence ({operation}) gives every sample a length of its own, so shapes depend on the data, which "
        "is data-dependent control flow. Pad instead: run the layer on the padded tensor, and leave padded steps out "
        "of the loss with torch.where(mask, ...); for a last state, gather the output at length - 1."
    )


def name_weights(weights: Sequence[Tensor], has_biases: bool) -> dict[str, Tensor]:
    """Name the entries of one layer and direction in a flat weight list."""
    names = ["w_ih", "w_hh", *(["b_ih", "b_hh"] if has_biases else []), "w_hr"]
    return dict(zip(names, weights, strict=False))


def _lstm(share: Tensor, from_state: Tensor, states: States) -> States:
    i, f, g, o = (share + from_state).chunk(4, dim=-1)
    c = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(share: Tensor, from_state: Tensor, states: States) -> States:
    reset, update, new = share.chunk(3, dim=-1)
    state_reset, state_update, state_new = from_state.chunk(3, dim=-1)
    n = (new + (reset + state_reset).sigmoid() * state_new).tanh()
    return (n + (update + state_update).sigmoid() * (states[0] - n),)


_STEPS: dict[str, Step] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": lambda share, from_state, _: ((share + from_state).tanh(),),
    "rnn_relu": lambda share, from_state, _: ((share + from_state).relu(),),
}


def _layer(
    step: Step, x: Tensor, states: States, weights: Mapping[str, Tensor], reverse: bool
) -> tuple[Tensor, States]:
    """Run one layer in one direction and return outputs ``[T, N, P]`` and last states."""
    outputs = []
    shares = F.linear(x, weights["w_ih"], weights.get("b_ih")).unbind(0)
    for share in reversed(shares) if reverse else shares:
        from_state = F.linear(states[0], weights["w_hh"], weights.get("b_hh"))
        states = step(share, from_state, states)
        if "w_hr" in weights:
            states = (F.linear(states[0], weights["w_hr"]), *states[1:])
        outputs.append(states[0])
    return torch.stack(outputs[::-1] if reverse else outputs), states


def _sequence(name: str) -> Callable[..., States]:
    step = _STEPS[name]

    def sequence(
        input: Tensor, hx: Any, params: Any, has_biases: Any, num_layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool = False,
    ) -> States:  # fmt: skip
        if isinstance(has_biases, list | tuple):  # arguments: data, batch_sizes, hx, params, ...
            refuse_packed(name)
        x = input.transpose(0, 1) if batch_first else input
        starts = [hx] if isinstance(hx, Tensor) else hx
        runs = num_layers * (2 if bidirectional else 1)
        count, ends = len(params) // runs, []
        outputs: list[Tensor] = []
        for run in range(runs):
            reverse = bidirectional and run % 2 == 1
            if run and not reverse:  # the layer below is complete
                x, outputs = torch.cat(outputs, dim=-1), []
                x = F.dropout(x, dropout, train)
            weights = name_weights(params[run * count : (run + 1) * count], has_biases)
            output, end = _layer(step, x, tuple(part[run] for part in starts), weights, reverse)
            outputs.append(output)
            ends.append(end)
        y = torch.cat(outputs, dim=-1)
        last = (torch.stack(parts) for parts in zip(*ends, strict=True))
        return (y.transpose(0, 1) if batch_first else y, *last)

    return sequence


def _cell(name: str) -> Callable[..., Tensor | States]:
    step = _STEPS[name]

    def cell(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor | States:
        states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        new = step(F.linear(input, w_ih, b_ih), F.linear(states[0], w_hh, b_hh), states)
        return new if len(new) > 1 else new[0]

    return cell


def _refuse_packing(*args: Any, **kwargs: Any) -> None:
    refuse_packed("pack_padded_sequence")


def _skip_flattening(*args: Any, **kwargs: Any) -> None:
    """Do nothing: PyTorch would move the weights of a CUDA layer into one block for cuDNN, which is not used here."""


# On CUDA, nn.LSTM and similar layers read the addresses of new weights, and then flatten the weights.
DEFINITIONS: Mapping[Callable[..., Any], Callable[..., Any]] = MappingProxyType(
    {
        **dict.fromkeys(names_of("_pack_padded_sequence"), _refuse_packing),
        **dict.fromkeys(names_of("_cudnn_rnn_flatten_weight"), _skip_flattening),
        torch.Tensor.data_ptr: memory_address,
        **{alias: _sequence(name) for name in _STEPS for alias in names_of(name)},
        **{alias: _cell(name) for name in _STEPS for alias in names_of(f"{name}_cell")},
    }
)
