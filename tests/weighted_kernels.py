"""Runs the kernel for weighted products in Triton's interpreter, which multiplies float16 but not bfloat16.

Call it as ``TRITON_INTERPRET=1 python -m tests.weighted_kernels``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipgrad.kernels import weighted_launch as launcher

CPU = torch.device("cpu")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


def check(left: Tensor, right: Tensor, factors: Tensor, parts: int = 1) -> None:
    counts = factors.double()[:, None, None]
    expected = ((left.double() * counts).mT @ right.double()).sum(0)
    found = launcher.launch(left, right, factors, parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def shapes() -> None:
    for positions, rows, columns in ((16, 5, 33), (64, 128, 128), (70, 130, 3), (129, 40, 257)):
        for parts in (1, 2, 3, 5):
            check(draw(5, positions, rows), draw(5, positions, columns), torch.rand(5), parts)
    left = draw(7, 20, 48)[1:6, ::2, :40]
    check(left, draw(5, 10, 16), torch.rand(5), 2)
    check(draw(1, 10, 16).expand(5, -1, -1), draw(5, 10, 16), torch.rand(5))


def values() -> None:
    """A zero factor silences everything, and no other factor does."""
    left, right, factors = draw(4, 20, 8), draw(4, 20, 8), torch.tensor([0.5, 0.0, 1.5, 0.0])
    expected = launcher.launch(left, right, factors)
    left[1], right[3] = math.nan, math.inf
    assert torch.equal(launcher.launch(left, right, factors), expected)
    factors[3] = 1e-30
    assert not launcher.launch(left, right, factors).isfinite().any()


def choice() -> None:
    """Small work is left to others, and so is what 32 bits cannot address."""
    left, right, factors = draw(3, 20, 8), draw(3, 20, 8), torch.rand(3)
    assert launcher.weighted_product(left, right, factors) is not None
    turned = left.mT.contiguous().mT
    found = launcher.weighted_product(turned, right, factors)
    assert found is not None
    assert torch.equal(found, launcher.launch(left, right, factors, launcher.parts(left, right)))
    assert launcher.weighted_product(left[:, :15], right[:, :15], factors) is None
    assert launcher.weighted_product(left[:0], right[:0], factors[:0]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_LARGEST_OFFSET", 20 * 8)
        assert launcher.weighted_product(left, right, factors) is None


def proof() -> None:
    assert launcher.proved(CPU, torch.float16)
    right = launcher.launch

    def off(left: Tensor, other: Tensor, factors: Tensor, count: int) -> Tensor:
        return right(left, other, factors, count) * (1 + 2e-5)

    def unskipped(left: Tensor, other: Tensor, factors: Tensor, count: int) -> Tensor:
        return right(left, other, factors + 1e-30, count)

    for wrong in (off, unskipped):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "launch", wrong)
            assert not launcher.proved(CPU, torch.float16)


def main() -> None:
    torch.manual_seed(0)
    for part in (shapes, values, choice, proof):
        part()
        print(part.__name__)


if __name__ == "__main__":
    main()
