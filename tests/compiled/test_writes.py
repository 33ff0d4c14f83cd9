"""What is refused before a step is traced and compiled, in words of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipgrad import clipped_grad
from clipgrad.errors import CompileError
from tests.compiled.conftest import Graphs
from tests.dp_tools import data, mlp, private, squared

WRITES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "whole": lambda m, x: squared(m, x.mul_(2.0)),
    "view": lambda m, x: (x.view(-1)[:2].sub_(1.0), squared(m, x))[1],
    "to the same value each time": lambda m, x: squared(m, x.fill_(1.0)),
}


@pytest.mark.parametrize("microbatch_size", [5, 8])
@pytest.mark.parametrize("case", WRITES)
def test_a_write_to_the_batch_is_named(case: str, microbatch_size: int, graphs: Graphs) -> None:
    batch = data()
    optimizer = private(mlp(), WRITES[case], compile=True, microbatch_size=microbatch_size)
    message = rf"writes in place to a tensor that it was given .*{Path(__file__).name}:\d+"
    with pytest.raises(CompileError, match=message):
        optimizer.backward(batch)
    assert len(graphs) == 0
    assert torch.equal(batch, data())


def test_the_argument_that_is_written_to_is_named(graphs: Graphs) -> None:
    def loss(p: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (p * batch["x"] * batch["mask"].mul_(2)).sum()

    batch = {"x": data(), "mask": torch.ones(5)}
    with pytest.raises(
        CompileError, match=rf"writes in place to a tensor.*{Path(__file__).name}:\d+"
    ):
        clipped_grad(loss, max_grad_norm=1.0, compile=True)(torch.ones(4), batch)
