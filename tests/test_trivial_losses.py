"""A loss to which no sample of the first batch contributes is trained by noise alone; a warning says so, once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import PerLayer
from tests.dp_tools import data, mlp, private, squared


def _contrastive(m: nn.Module, x: Tensor) -> Tensor:
    z = F.normalize(m(x))
    return F.cross_entropy(z @ z.T, torch.arange(len(z)))


def _standardised(m: nn.Module, x: Tensor) -> Tensor:
    z = m(x)
    return ((z - z.mean(0)) / z.std(0)).square().mean()


TRIVIAL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in-batch negatives": _contrastive,
    "deviations from the batch's mean": lambda m, x: (m(x) - m(x).mean(0)).square().mean(),
    "a standard deviation over one sample": _standardised,
    "all labels ignored": lambda m, x: F.cross_entropy(m(x), torch.full((1,), -100), reduction="sum"),
}  # fmt: skip


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [found.getMessage() for found in caplog.records if found.levelno == logging.WARNING]


@pytest.mark.filterwarnings(r"ignore:std\(\). degrees of freedom")
@pytest.mark.parametrize("max_grad_norm", [1.0, PerLayer(1.0)])
@pytest.mark.parametrize("name", TRIVIAL)
def test_the_first_batch_warns_once(
    name: str, max_grad_norm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = private(mlp(), TRIVIAL[name], max_grad_norm=max_grad_norm)
    for size in (0, 1, 5, 5):  # one sample of its own says too little
        optimizer.backward(data(5)[:size])
        optimizer.step()
    (text,) = warnings_of(caplog)
    assert "all 5 samples of the first batch" in text
    assert "put the partners of a sample into the sample" in text


def test_a_sample_that_contributes_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    x = data(5)
    x[:4] = 0.0
    private(mlp(), lambda m, x: m(x).sum() * x.sum()).backward(x)
    private(mlp(), squared).backward(data(5))
    assert not warnings_of(caplog)


def test_padding_is_no_sample(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = private(mlp(), _contrastive)
    optimizer.backward(data(5), is_padding=torch.tensor([False, True, True, True, True]))
    assert not warnings_of(caplog)
    optimizer.backward(data(5), is_padding=torch.tensor([False, False, True, True, True]))
    assert "all 2 samples" in warnings_of(caplog)[0]
