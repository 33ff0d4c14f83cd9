"""Recurrent cells, in a loop over time and on their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipgrad.testing import RuleCase

from .recurrent import (
    DOUBLE,
    GATES,
    HIDDEN,
    INPUT,
    STEPS,
    Params,
    draw,
    flat_weights,
    flatten,
    score,
)

CELLS: dict[str, Callable[..., Any]] = {name: getattr(torch, f"{name}_cell") for name in GATES}


def _cell_case(
    kind: str, name: str, *, bias: bool = True, learned: bool = False, own: bool = False
) -> RuleCase:
    """A cell in a loop over time: ``T`` uses of each weight."""

    def params() -> Params:
        start = {"h": draw(1, HIDDEN), "c": draw(1, HIDDEN)} if learned else {}
        if kind != "lstm":
            start.pop("c", None)
        return {**flat_weights(kind, bias=bias), **start}

    def loss(p: Params, x: Tensor) -> Tensor:
        w_ih, w_hh, *biases = (p[weight] for weight in p if weight not in ("h", "c"))
        nothing = torch.zeros(len(x), HIDDEN, dtype=DOUBLE)
        h, c = p.get("h", nothing), p.get("c", nothing)
        outputs = []
        for number, step in enumerate(x.unbind(1)):
            if own and number == 1:
                w_hh = w_hh * x.mean().cos()
            if kind == "lstm":
                h, c = CELLS[kind](step, (h, c), w_ih, w_hh, *biases)
            else:
                h = CELLS[kind](step, h, w_ih, w_hh, *biases)
            outputs.append(h)
        return score(*outputs, c)

    return RuleCase(f"{kind}_cell", name, loss, params, lambda size: (draw(size, STEPS, INPUT),))


def _one_bias(kind: str) -> RuleCase:
    """Only one of a cell's two biases, and vectors in place of a batch of one."""

    def loss(p: Params, x: Tensor) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = p.values()
        h = x @ torch.ones(INPUT, HIDDEN, dtype=DOUBLE)
        hx = (h, h.sin()) if kind == "lstm" else h
        first = CELLS[kind](x, hx, w_ih, w_hh, b_ih)
        return score(*flatten(first), *flatten(CELLS[kind](x, hx, w_ih, w_hh, b_hh=b_hh)))

    return RuleCase(
        f"{kind}_cell",
        "one_bias",
        loss,
        lambda: flat_weights(kind),
        lambda size: (draw(size, INPUT),),
    )


CASES: list[RuleCase] = [
    *(
        case
        for kind in GATES
        for case in (
            _cell_case(kind, "loop"),
            _cell_case(kind, "no_bias", bias=False),
            _cell_case(kind, "learned_state", learned=True),
            _cell_case(kind, "per_sample_weight", own=True),
        )
    ),
    *(_one_bias(kind) for kind in GATES if kind != "rnn_relu"),
]
