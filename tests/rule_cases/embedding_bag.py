"""Every way to call embedding_bag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad.testing import RuleCase

Params = dict[str, Tensor]
ROWS, FEATURES, LENGTH = 7, 3, 6


def _table() -> Params:
    return {"table": torch.randn(ROWS, FEATURES, dtype=torch.float64)}


def _zero_table() -> Params:
    return {"table": torch.zeros(ROWS, FEATURES, dtype=torch.float64)}


def _weighted_table() -> Params:
    return {**_table(), "weights": torch.randn(1, LENGTH, dtype=torch.float64)}


def _ids(size: int) -> tuple[Tensor, ...]:
    return (torch.randint(ROWS, (size, LENGTH)),)


def _ids_and_weights(size: int) -> tuple[Tensor, ...]:
    return (*_ids(size), torch.randn(size, LENGTH, dtype=torch.float64))


def _bags_of_ids(size: int) -> tuple[Tensor, ...]:
    return (torch.randint(ROWS, (size, 4, LENGTH)),)


def _ids_and_offsets(size: int) -> tuple[Tensor, ...]:
    """Bags of random length, empty ones among them."""
    offsets = torch.randint(LENGTH + 1, (size, 3)).sort(1).values
    offsets[:, 0] = 0
    return (*_ids(size), offsets)


def _ids_and_last_offsets(size: int) -> tuple[Tensor, ...]:
    ids, offsets = _ids_and_offsets(size)
    return ids, torch.cat([offsets, torch.full((size, 1), LENGTH)], 1)


def _square(bags: Tensor) -> Tensor:
    return (bags.sin() + bags).square().sum()


def _case(
    name: str,
    call: Callable[..., Tensor],
    params: Callable[[], Params] = _table,
    batch: Callable[[int], tuple[Any, ...]] = _ids,
    declines: bool = False,
) -> RuleCase:
    """``call(p, *batch)`` returns the bags."""

    def loss(p: Params, *data: Tensor) -> Tensor:
        return _square(call(p, *data))

    return RuleCase("embedding_bag", name, loss, params, batch, declines)


CASES: list[RuleCase] = [
    _case("weights", lambda p, ids, w: F.embedding_bag(
        ids, p["table"], mode="sum", per_sample_weights=w), batch=_ids_and_weights),
    _case("learned_weights", lambda p, ids: F.embedding_bag(
        ids, p["table"], mode="sum", per_sample_weights=p["weights"]), _weighted_table),
    _case("weights_and_padding", lambda p, ids, w: F.embedding_bag(
        ids, p["table"], mode="sum", per_sample_weights=w * p["weights"], padding_idx=1),
        _weighted_table, _ids_and_weights),
    _case("negative_padding", lambda p, ids: F.embedding_bag(ids, p["table"], padding_idx=-1)),
    _case("frequency", lambda p, ids: F.embedding_bag(ids, p["table"], scale_grad_by_freq=True),
          declines=True),
    _case("sparse", lambda p, ids: F.embedding_bag(ids, p["table"], sparse=True)),
    _case("tied", lambda p, ids: F.linear(F.embedding_bag(ids, p["table"]), p["table"])),
    _case("ties_of_maximum", lambda p, ids: ids.double().mean() * (
        F.embedding_bag(ids, p["table"], mode="max") + 1), _zero_table),
    _case("shared_offsets", lambda p, ids: F.embedding_bag(
        ids[0], p["table"], torch.tensor([0, 2, 2, 5]))),
    _case("weights_and_offsets", lambda p, ids, offsets: F.embedding_bag(
        ids[0], p["table"], offsets[0], mode="sum", per_sample_weights=p["weights"][0]),
        _weighted_table, _ids_and_offsets),
    _case("all_padding", lambda p, ids: F.embedding_bag(
        torch.zeros_like(ids), p["table"], padding_idx=0) + ids.double().mean() * p["table"].sum()),
]  # fmt: skip

for _mode in ("sum", "mean", "max"):
    CASES += [
        _case(_mode, lambda p, ids, mode=_mode: F.embedding_bag(ids, p["table"], mode=mode)),
        _case(f"{_mode}_one_id", lambda p, ids, mode=_mode: F.embedding_bag(
            ids[:, :1], p["table"], mode=mode)),
        _case(f"{_mode}_padding", lambda p, ids, mode=_mode: F.embedding_bag(
            ids, p["table"], mode=mode, padding_idx=2)),
        _case(f"{_mode}_several_bags", lambda p, ids, mode=_mode: F.embedding_bag(
            ids[0], p["table"], mode=mode, padding_idx=2), batch=_bags_of_ids),
        _case(f"{_mode}_offsets", lambda p, ids, offsets, mode=_mode: F.embedding_bag(
            ids[0], p["table"], offsets[0], mode=mode), batch=_ids_and_offsets),
        _case(f"{_mode}_last_offset", lambda p, ids, offsets, mode=_mode: F.embedding_bag(
            ids[0], p["table"], offsets[0], mode=mode, include_last_offset=True, padding_idx=2),
            batch=_ids_and_last_offsets),
    ]  # fmt: skip
