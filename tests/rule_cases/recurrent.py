"""Every way to call the recurrent operations: layers, directions, layouts, states, weights of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
DOUBLE = torch.float64
STEPS, INPUT, HIDDEN = 3, 2, 4
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
OPERATIONS: dict[str, Callable[..., Any]] = {name: getattr(torch, name) for name in GATES}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE)


def score(*outputs: Tensor) -> Tensor:
    """A scalar whose gradient differs from element to element and depends on the outputs."""
    flat = torch.cat([output.flatten() for output in outputs])
    return (flat * torch.linspace(0.5, 1.5, len(flat), dtype=DOUBLE)).sin().sum()


def spread(shape: torch.Size) -> Tensor:
    """A constant weight."""
    return torch.linspace(-0.5, 0.5, shape.numel(), dtype=DOUBLE).view(shape)


def flat_weights(
    kind: str, *, layers: int = 1, directions: int = 1, bias: bool = True, proj: int = 0
) -> Params:
    """Weights in the order in which the operation takes them."""
    rows, width = GATES[kind] * HIDDEN, proj or HIDDEN
    weights: Params = {}
    for layer in range(layers):
        for direction in range(directions):
            name = f"{layer}{'<' if direction else '>'}"
            columns = directions * width if layer else INPUT
            weights[f"w_ih{name}"] = 0.6 * draw(rows, columns)
            weights[f"w_hh{name}"] = 0.6 * draw(rows, width)
            if bias:
                weights[f"b_ih{name}"], weights[f"b_hh{name}"] = draw(rows), draw(rows)
            if proj:
                weights[f"w_hr{name}"] = draw(proj, HIDDEN)
    return weights


def zeros(kind: str, rows: int, layers: int, proj: int = 0) -> Any:
    h = torch.zeros(layers, rows, proj or HIDDEN, dtype=DOUBLE)
    return (h, torch.zeros(layers, rows, HIDDEN, dtype=DOUBLE)) if kind == "lstm" else h


def flatten(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flatten(part)]


def _case(
    kind: str,
    name: str,
    *,
    steps: int = STEPS,
    batch_first: bool = True,
    inner: int = 1,
    params: Callable[[], Params] = dict,
    weights: Callable[[Params], list[Tensor]] | None = None,
    frozen: tuple[str, ...] = (),
    state: Callable[[Params, Tensor], Any] | None = None,
    select: Callable[[list[Tensor]], list[Tensor]] = lambda outputs: outputs,
    **options: Any,
) -> RuleCase:
    """One sequence operation. ``options`` are those of ``flat_weights``."""
    layers, directions = options.get("layers", 1), options.get("directions", 1)
    names = list(flat_weights(kind, **options))
    shapes = {weight: value.shape for weight, value in flat_weights(kind, **options).items()}
    constants = {weight: spread(shapes[weight]) for weight in frozen}

    def make_params() -> Params:
        drawn = {**flat_weights(kind, **options), **params()}
        return {weight: drawn[weight] for weight in drawn if weight not in frozen}

    def loss(p: Params, x: Tensor) -> Tensor:
        x = x.reshape(inner, -1, INPUT)
        x = x if batch_first else x.transpose(0, 1)
        rows = zeros(kind, inner, layers * directions, options.get("proj", 0))
        hx = rows if state is None else state(p, x)
        operands = {**p, **constants}
        flat = [operands[weight] for weight in names] if weights is None else weights(p)
        return score(
            *select(
                flatten(
                    OPERATIONS[kind](
                        x, hx, flat, options.get("bias", True), layers, 0.0, True,
                        directions == 2, batch_first,
                    )
                )
            )
        )  # fmt: skip

    return RuleCase(kind, name, loss, make_params, lambda size: (draw(size, inner * steps, INPUT),))


# ---------------------------------------------------------------- sequences: layout and weights


def _every_kind(kind: str) -> list[RuleCase]:
    """What all kinds have in common."""
    learned = "h" if kind != "lstm" else "hc"

    def states(layers: int) -> Callable[[], Params]:
        return lambda: {letter: draw(layers, 1, HIDDEN) for letter in learned}

    def hx(p: Params, x: Tensor) -> Any:
        parts = tuple(p[letter] for letter in learned)
        return parts if kind == "lstm" else parts[0]

    def expanded(p: Params, x: Tensor) -> Any:
        parts = tuple(p[letter].expand(-1, 2, -1) for letter in learned)
        return parts if kind == "lstm" else parts[0]

    def from_data(p: Params, x: Tensor) -> Any:
        seen = x.mean(1, keepdim=True) @ torch.ones(INPUT, HIDDEN, dtype=DOUBLE)
        h = seen.transpose(0, 1).contiguous()
        return (h, 2 * h) if kind == "lstm" else h

    return [
        _case(kind, "plain"),
        _case(kind, "time_first", batch_first=False),
        _case(kind, "no_bias", bias=False),
        _case(kind, "one_step", steps=1, state=from_data),
        _case(kind, "deep", layers=3),
        _case(kind, "bidirectional", directions=2),
        _case(kind, "deep_bidirectional_time_first", layers=2, directions=2, batch_first=False),
        _case(kind, "deep_bidirectional_no_bias", layers=2, directions=2, bias=False),
        _case(kind, "outputs_only", select=lambda outputs: outputs[:1]),
        _case(kind, "last_states_only", layers=2, select=lambda outputs: outputs[1:]),
        _case(kind, "learned_state", params=states(1), state=hx),
        _case(
            kind, "learned_states", layers=2, directions=2, inner=2, params=states(4), state=expanded
        ),
        _case(kind, "state_from_data", state=from_data, frozen=("b_ih0>",)),
        _case(kind, "two_sequences_a_sample", inner=2, layers=2),
        _case(kind, "two_sequences_time_first", inner=2, batch_first=False, directions=2),
        _case(kind, "frozen_input_weight", frozen=("w_ih0>", "b_ih0>")),
        _case(kind, "frozen_recurrent_weight", frozen=("w_hh0>", "b_hh0>")),
        _case(kind, "frozen_second_layer", layers=2, frozen=("w_ih1>", "w_hh1>", "b_ih1>", "b_hh1>")),
        _case(kind, "frozen_first_layer", layers=2, frozen=("w_ih0>", "w_hh0>", "b_ih0>", "b_hh0>")),
    ]  # fmt: skip


# ---------------------------------------------------------------- sequences: where the weights come from


def _weights(kind: str, name: str, loss: Callable[[str, Params, Tensor], Tensor]) -> RuleCase:
    """A loss that arranges the weights of one layer by itself."""
    return RuleCase(
        kind,
        name,
        lambda p, x: loss(kind, p, x),
        lambda: {**flat_weights(kind), "extra": draw(GATES[kind] * HIDDEN, HIDDEN)},
        lambda size: (draw(size, STEPS, INPUT),),
    )


def _one_layer(kind: str, x: Tensor, flat: list[Tensor], hx: Any = None) -> list[Tensor]:
    hx = zeros(kind, len(x), 1) if hx is None else hx
    return flatten(OPERATIONS[kind](x, hx, flat, True, 1, 0.0, True, False, True))


def _used_twice(kind: str, p: Params, x: Tensor) -> Tensor:
    """The second sequence starts where the first one ended; one weight is used elsewhere as well."""
    *flat, extra = p.values()
    first, *last = _one_layer(kind, x, flat)
    second = _one_layer(kind, x.flip(1), flat, tuple(last) if kind == "lstm" else last[0])
    return score(first, *second, p["w_hh0>"].sin(), first @ extra.t())


def _tied_layers(kind: str, p: Params, x: Tensor) -> Tensor:
    """Two layers with the same recurrent weight and biases."""
    w_ih, w_hh, b_ih, b_hh, extra = p.values()
    first, *_ = _one_layer(kind, x, [w_ih, w_hh, b_ih, b_hh])
    return score(*_one_layer(kind, first, [extra, w_hh, b_ih, b_ih]), first)


def _derived(kind: str, p: Params, x: Tensor) -> Tensor:
    """Weights computed from parameters alone: normalised, tied by a product, a slice."""
    w_ih, w_hh, b_ih, b_hh, extra = p.values()
    return score(
        *_one_layer(kind, x, [torch.nn.functional.normalize(w_ih, dim=1), extra * w_hh, b_ih, extra[:, 0]]),
        b_hh.sin(),
    )  # fmt: skip


def _per_sample(kind: str, p: Params, x: Tensor) -> Tensor:
    """A recurrent weight that depends on the sample, as a hypernetwork or a dropped-out weight does."""
    w_ih, w_hh, b_ih, b_hh, extra = p.values()
    own = w_hh + extra * x.mean().tanh()
    shared = _one_layer(kind, x.flip(1), [w_ih, w_hh, b_ih, b_hh])
    return score(*_one_layer(kind, x, [w_ih, own, b_ih, b_hh]), *shared)


def _per_sample_bias(kind: str, p: Params, x: Tensor) -> Tensor:
    """A conditioned bias, both directions, two layers."""
    w_ih, w_hh, b_ih, b_hh, extra = p.values()
    own = b_hh + extra[:, 0] * x.mean()
    deeper = torch.cat([extra, extra], dim=1)
    flat = [w_ih, w_hh, b_ih, own] * 2 + [deeper, w_hh, b_ih, b_hh] * 2
    shared = _one_layer(kind, x, [w_ih, extra, b_ih, b_hh])
    x = torch.cat([x, x.flip(1).sin()])
    deep = OPERATIONS[kind](x, zeros(kind, 2, 4), flat, True, 2, 0.0, False, True, True)
    return score(*flatten(deep), *shared)


def _input_without_lanes(kind: str, p: Params, x: Tensor) -> Tensor:
    """A learned and a constant input, the same for all samples."""
    *flat, extra = p.values()
    learned = extra[:HIDDEN, :INPUT][None]
    out = _one_layer(kind, learned, flat)
    constant = _one_layer(kind, torch.ones(1, 2, INPUT, dtype=DOUBLE), flat)
    return score(*(part * x.mean() for part in (*out, *constant)), extra.sin())


_ARRANGEMENTS = {
    "used_twice": _used_twice,
    "tied_layers": _tied_layers,
    "derived_weights": _derived,
    "per_sample_weight": _per_sample,
    "per_sample_bias_deep_bidirectional": _per_sample_bias,
    "input_without_lanes": _input_without_lanes,
}

# ---------------------------------------------------------------- projections


def _projections() -> list[RuleCase]:
    def state(p: Params, x: Tensor) -> Any:
        return p["h"], p["c"]

    return [
        _case("lstm", "projected", proj=2),
        _case("lstm", "projected_deep_bidirectional", proj=2, layers=2, directions=2),
        _case("lstm", "projected_no_bias", proj=2, bias=False, batch_first=False),
        _case("lstm", "projection_frozen", proj=2, frozen=("w_hr0>",)),
        _case("lstm", "projection_alone", proj=2, frozen=("w_ih0>", "w_hh0>", "b_ih0>", "b_hh0>")),
        _case(
            "lstm",
            "projected_learned_state",
            proj=2,
            params=lambda: {"h": draw(1, 1, 2), "c": draw(1, 1, HIDDEN)},
            state=state,
        ),
    ]


# rnn_relu shares all but its nonlinearity with rnn_tanh.
_FULL = tuple(kind for kind in GATES if kind != "rnn_relu")

CASES: list[RuleCase] = [
    *(case for kind in _FULL for case in _every_kind(kind)),
    _case("rnn_relu", "deep_bidirectional", layers=2, directions=2),
    _case("rnn_relu", "no_bias_time_first", bias=False, batch_first=False),
    *(_weights(kind, name, loss) for kind in _FULL for name, loss in _ARRANGEMENTS.items()),
    *_projections(),
]
