"""Test that several ranks with the whole model train as one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from clipgrad import DPOptimizer, Performance
from tests.distributed import cases
from tests.distributed.conftest import Pool
from tests.nightly import rows


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).detach().abs().max()) for n in expected)


RUNS = [
    *((name, cases.sgd) for name in cases.CASES),
    ("mlp", cases.adam),
    ("mlp", cases.zero),
    ("tied", cases.zero),
]


@pytest.mark.parametrize(("name", "inner"), rows(3, RUNS))
def test_two_ranks_train_as_one_process(
    pool: Pool, name: str, inner: Callable[..., torch.optim.Optimizer]
) -> None:
    alone = cases.adam if inner is cases.zero else inner
    expected = cases.train(0, 1, name, alone)
    assert largest_difference(expected, dict(cases.CASES[name].model().named_parameters())) > 1e-2
    for found in pool(2).run(cases.train, name, inner):
        assert largest_difference(found, expected) < 1e-9


@pytest.mark.nightly
@pytest.mark.parametrize("inner", [cases.sgd, cases.zero])
def test_four_ranks_train_as_one_process(
    pool: Pool, inner: Callable[..., torch.optim.Optimizer]
) -> None:
    alone = cases.adam if inner is cases.zero else inner
    for name in cases.CASES:
        expected = cases.train(0, 1, name, alone)
        for found in pool(4).run(cases.train, name, inner):
            assert largest_difference(found, expected) < 1e-9


def test_a_model_on_several_devices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"lie on several devices .*device_map"):
        DPOptimizer(
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            model,
            cases.squares,
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            expected_batch_size=1.0,
        )


def test_what_is_no_process_group_is_refused() -> None:
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="process_group must be a torch"):
        DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            cases.squares,
            max_grad_norm=1.0,
            noise_multiplier=0.0,
            expected_batch_size=1.0,
            performance=Performance(process_group="all"),
        )
