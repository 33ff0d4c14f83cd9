"""Runs the weighted sum in Triton's interpreter: ``TRITON_INTERPRET=1 python -m tests.weighted_sum_kernels``."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipgrad.kernels import weighted_sum_launch as launcher

CPU = torch.device("cpu")


def sums() -> None:
    for samples, size in ((1, 1), (7, 1023), (8, 1024), (9, 1025), (20, 2500)):
        rows, factors = torch.randn(samples, size), torch.rand(samples)
        found, expected = launcher.launch(rows, factors), factors.double() @ rows.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert launcher.launch(torch.randn(0, 3), torch.rand(0)).tolist() == [0.0] * 3
    assert launcher.launch(torch.randn(3, 0), torch.rand(3)).shape == (0,)


def values() -> None:
    rows, factors = torch.ones(3, 5), torch.tensor([0.0, 2.0, 1.0])
    rows[0], rows[1, 1], rows[2, 2] = math.nan, math.inf, math.nan
    found = launcher.launch(rows, factors)
    assert found[[0, 3, 4]].tolist() == [3.0] * 3
    assert found[1] == math.inf
    assert found[2].isnan()
    factors[0] = math.nan
    assert launcher.launch(rows, factors).isnan().all()


def choice() -> None:
    """Rows with gaps between elements are left to others; rows with gaps between samples are not."""
    rows, factors = torch.randn(5, 20), torch.rand(5)
    assert launcher.weighted_sum(rows[:, ::2], factors) is None
    found = launcher.weighted_sum(rows[::2, 4:17], factors[::2])
    assert found is not None
    torch.testing.assert_close(found, factors[::2] @ rows[::2, 4:17])


def proof() -> None:
    assert launcher.passes_self_test(CPU)
    right = launcher.launch

    def off(rows: Tensor, factors: Tensor) -> Tensor:
        return right(rows, factors) * (1 + 1e-4)

    def reads_all(rows: Tensor, factors: Tensor) -> Tensor:
        return factors @ rows

    def without_the_last(rows: Tensor, factors: Tensor) -> Tensor:
        return right(rows[:-1], factors[:-1])

    for wrong in (off, reads_all, without_the_last):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "launch", wrong)
            assert not launcher.passes_self_test(CPU)


def main() -> None:
    torch.manual_seed(0)
    for part in (sums, values, choice, proof):
        part()
        print(part.__name__)


if __name__ == "__main__":
    main()
