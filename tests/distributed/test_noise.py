"""Test that every coordinate gets one draw of the stated size with any number of ranks."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from clipgrad.errors import RanksError
from tests.distributed import noise_cases
from tests.distributed.conftest import Pool

# A statistic of n values is within so many of its standard deviations, except once in a billion tests.
WIDTH = 6.0


def judged(found: list[Tensor]) -> list[str]:
    """Return the faults of noise that should be independent with variance 1."""
    faults = []
    for step, noise in enumerate(found):
        halves = noise.double().flatten().chunk(2)
        for half in halves:
            n = half.numel()
            if abs(float(half.square().mean()) - 1) > WIDTH * math.sqrt(2 / n):
                faults.append(f"variance {float(half.square().mean()):.3f} at step {step}")
        if abs(float((halves[0] * halves[1]).mean())) > WIDTH / math.sqrt(halves[0].numel()):
            faults.append(f"parts are correlated at step {step}")
    for one, other in combinations(found, 2):
        if abs(float((one.double() * other.double()).mean())) > WIDTH / math.sqrt(one.numel()):
            faults.append("steps are correlated")
    return faults


@pytest.mark.parametrize(
    ("fault", "found"),
    [("none", ""), ("one rank", "variance"), ("same", "correlated"), ("twice", "variance 2")],
)
def test_one_draw_for_each_coordinate(pool: Pool, fault: str, found: str) -> None:
    ranks = pool(2).run(noise_cases.gradients, fault)
    for first, second in zip(*ranks, strict=True):
        assert torch.equal(first, second)
    faults = judged(ranks[0])
    assert bool(faults) == bool(found), faults
    assert any(found in text for text in faults) or not found


def test_adaptive_norm_follows_the_samples_of_all_ranks(pool: Pool) -> None:
    expected = noise_cases.adaptive(0, 1, 0.0)
    assert len(set(expected)) == 5
    for found in pool(2).run(noise_cases.adaptive, 0.0):
        assert found == pytest.approx(expected, abs=1e-12)
    first, second = pool(2).run(noise_cases.adaptive, 0.5)
    assert first == second
    assert first != pytest.approx(expected)


def test_ranks_with_the_same_generator_are_refused(pool: Pool) -> None:
    assert pool(2).run(noise_cases.seeded, (1, 2)) == [None, None]
    for good, error in [
        *pool(2).outcomes(noise_cases.seeded, (1, 1)),
        *pool(2).outcomes(noise_cases.seeded, (1, 2), "replaced"),
        *pool(2).outcomes(noise_cases.seeded, (1, 2), "restored"),
    ]:
        assert not good
        assert error[0] == RanksError.__name__
        assert "ranks 0 and 1 have the same generator state" in error[1]
