"""Rows of a table: repeated, ignored, shared by all samples, tied to the output layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
WORDS, WIDTH = 6, 3
POSITIONS = torch.arange(4)


def case(
    name: str,
    forward: Callable[..., Tensor],
    *shape: int,
    words: int = WORDS,
    width: int = WIDTH,
    **more: Any,
) -> RuleCase:
    """A loss in which every output counts differently and the norms of samples vary."""

    def loss(p: Params, ids: Tensor, scale: Tensor) -> Tensor:
        y = forward(p, ids)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
        return (y.sin() * weights * scale).sum()

    return RuleCase(
        "embedding",
        name,
        loss,
        lambda: {
            "w": torch.randn(words, width, dtype=torch.float64),
            **{name: torch.randn(*size, dtype=torch.float64) for name, size in more.items()},
        },
        # ids come from few words, so that some repeat within a sample
        lambda size: (
            torch.randint(words, (size, *shape)),
            torch.rand(size, dtype=torch.float64) + 0.5,
        ),
    )  # fmt: skip


def tied(p: Params, ids: Tensor) -> Tensor:
    return F.linear(F.embedding(ids, p["w"]).tanh(), p["w"])


def tied_twice(p: Params, ids: Tensor) -> Tensor:
    """Two lookups and two output layers: joins of both kinds, and a cross term."""
    first, second = F.embedding(ids, p["w"]), F.embedding(ids.flip(-1), p["w"])
    return F.linear(first * second, p["w"]) + F.linear(second.tanh(), p["w"])


def tied_by_matmul(p: Params, ids: Tensor) -> Tensor:
    return F.embedding(ids, p["w"]).tanh() @ p["w"].t()


def with_positions(p: Params, ids: Tensor) -> Tensor:
    return F.embedding(ids, p["w"]) + F.embedding(POSITIONS, p["p"])


def batch_of_positions(p: Params, ids: Tensor) -> Tensor:
    return F.embedding(ids, p["w"]) * F.embedding(POSITIONS[None], p["p"])


def shared_and_own(p: Params, ids: Tensor) -> Tensor:
    return F.embedding(ids, p["w"]) * F.embedding(POSITIONS, p["w"])


def first_is_shared(p: Params, ids: Tensor) -> Tensor:
    """Nothing below the lookup needs a gradient, and its output is one broadcast tensor."""
    return F.embedding(POSITIONS, p["w"]) * ids.unsqueeze(-1)


def in_place(p: Params, ids: Tensor) -> Tensor:
    rows = F.embedding(ids, p["w"])
    rows[:, 0] = 0
    return rows.mul_(2)


def looked_up(**options: Any) -> Callable[[Params, Tensor], Tensor]:
    return lambda p, ids: F.embedding(ids, p["w"], **options)


CASES = [
    case("plain", looked_up(), 4),
    case("one id", lambda p, ids: F.embedding(ids, p["w"])),
    case("ids in two axes", looked_up(), 3, 4),
    case("always the same id", lambda p, ids: F.embedding(ids * 0 + 2, p["w"]), 4),
    case("int32 ids", lambda p, ids: F.embedding(ids.int(), p["w"]), 4),
    case("keywords", lambda p, ids: F.embedding(input=ids, weight=p["w"]), 4),
    case("positional options", lambda p, ids: F.embedding(ids, p["w"], 1, None, 2.0, False, True), 4),
    case("padding", looked_up(padding_idx=1), 6),
    case("negative padding", looked_up(padding_idx=-1), 6),
    case("frequency", looked_up(scale_grad_by_freq=True), 6),
    case("frequency and padding", looked_up(scale_grad_by_freq=True, padding_idx=0), 8),
    case("no repeats possible", looked_up(), 4, words=50),
    case("wide", looked_up(), 2, width=300),
    case("many words", looked_up(), 5, words=1000, width=1),
    case("positions", with_positions, 4, p=(4, WIDTH)),
    case("batch of positions", batch_of_positions, 4, p=(4, WIDTH)),
    case("shared and own ids", shared_and_own, 4),
    case("only shared ids", first_is_shared, 4),
    case("output in place", in_place, 4),
    case("tied", tied, 4),
    case("tied by matmul", tied_by_matmul, 4),
    case("tied twice", tied_twice, 4),
    case("tied with padding", lambda p, ids: F.embedding(ids, p["w"], 1) @ p["w"].t(), 6),
    case("below a linear layer", lambda p, ids: F.linear(F.embedding(ids, p["w"]), p["v"]), 4, v=(2, 3)),
    case("of a computed table", lambda p, ids: F.embedding(ids, p["w"] @ p["v"]), 4, v=(3, 2)),
    case("of a slice", lambda p, ids: F.embedding(ids % 3, p["w"][1:4]), 4),
]  # fmt: skip
