"""Runs the Gram kernel in Triton's interpreter: ``TRITON_INTERPRET=1 python -m tests.gram_kernels``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from clipgrad.kernels import gram_launch as launcher
from clipgrad.rules.gram import _by_products

CPU = torch.device("cpu")


def launched(*lefts: Tensor, right: Tensor) -> Tensor:
    """Return squared norms and lengths, ``[len(lefts), 4, B]``."""
    parts = launcher.launch(lefts, right)
    assert parts.shape == (len(lefts), 4, len(right), launcher.number_of_parts(right.shape[1]))
    return parts.sum(3)


def check(*factors: Tensor) -> None:
    *lefts, right = factors
    expected = [torch.stack(_by_products(left.double(), right.double())) for left in lefts]
    found = launched(*lefts, right=right).double()
    torch.testing.assert_close(found, torch.stack(expected), rtol=2e-6, atol=0)


def shapes() -> None:
    for positions in (1, 16, 63, 64, 65, 129, 300):
        check(torch.randn(2, positions, 5), torch.randn(2, positions, 33))
    check(torch.randn(3, 70, 64), torch.randn(3, 70, 32))
    assert launched(torch.randn(0, 70, 4), right=torch.randn(0, 70, 3)).shape == (1, 4, 0)


def layouts() -> None:
    left, right = torch.randn(3, 7, 70).mT, torch.randn(70, 3, 40).transpose(0, 1)
    check(left, right)
    check(left[1:, ::2], right[1:, 35:, ::3])
    check(left, right[:1].expand_as(right))


def several() -> None:
    """Left factors of several widths and layouts share the right one."""
    right = torch.randn(70, 3, 40).transpose(0, 1)
    wide, narrow = torch.randn(3, 70, 90), torch.randn(3, 7, 70).mT
    check(wide, narrow, right)
    check(narrow, wide[:, :, ::2], right, right)


def values() -> None:
    left, right = torch.ones(2, 64, 3), torch.ones(2, 64, 3)
    left[0, 3, 1] = math.nan
    found = launched(left, right=right)[0]
    assert not found[:2, 0].isfinite().any()
    assert found[:, 1].isfinite().all()
    left[0, 3, 1] = math.inf
    assert not launched(left, right=right)[0][0, 0].isfinite()
    assert not launched(0 * right, right=right)[0, 0].any()


def choice() -> None:
    """Small work is left to others, and so is what 32 bits cannot address."""
    enough = torch.randn(32, 20, 3)
    expected = launcher.launch([enough], enough)
    found = launcher.gram_sums([enough], enough)
    assert found is not None
    assert torch.equal(found, expected)
    assert launcher.gram_sums([enough[:, :15]], enough[:, :15]) is None
    assert launcher.gram_sums([enough[:31]], enough[:31]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "_LARGEST_OFFSET", 20 * 3)
        assert launcher.gram_sums([enough], enough) is None


def proof() -> None:
    assert launcher.passes_self_test(CPU)
    as_it_is = launcher.launch

    def off(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
        return as_it_is(lefts, right) * (1 + 2e-5)

    def one_row_less(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
        return as_it_is([left[:, :-1] for left in lefts], right[:, :-1])

    def first_left_for_all(lefts: Sequence[Tensor], right: Tensor) -> Tensor:
        return as_it_is([lefts[0]] * len(lefts), right)

    for wrong in (off, one_row_less, first_left_for_all):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "launch", wrong)
            assert not launcher.passes_self_test(CPU)


def main() -> None:
    torch.manual_seed(0)
    for part in (shapes, layouts, several, values, choice, proof):
        part()
        print(part.__name__)


if __name__ == "__main__":
    main()
