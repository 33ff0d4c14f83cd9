"""A captured loss and a compiled step multiply what autocast rounds, as the eager step does."""

from __future__ import annotations

import pytest
import torch

from tests.compiled.conftest import Graphs
from tests.nightly import some
from tests.test_autocast import HALVES, Trial

KINDS = (
    "linear",
    "matmul of a view",
    "addmm",
    "conv2d",
    "einsum",
    "attention",
    "low rank",
    "embedding",
    "no rule",
)


@pytest.mark.parametrize(("name", "dtype", "inside"), some(8, KINDS, HALVES, [False, True]))
def test_a_compiled_step_records_what_was_multiplied(
    name: str, dtype: torch.dtype, inside: bool, graphs: Graphs
) -> None:
    trial = Trial(name, dtype, inside=inside)
    strategy = "ghost" if inside else "kept"
    trial.compare(1, trial.run(1, strategy, compile=True))
    assert len(graphs) == 1
