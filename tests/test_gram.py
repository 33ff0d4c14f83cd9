"""Squared norms and lengths from Gram matrices, by products and by the kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clipgrad.rules import Outer, gram
from clipgrad.rules.ghost import ghost_norms_squared
from clipgrad.rules.gram import gram_sums
from tests.float32_settings import all_reads, setting
from tests.kernels import interpreted, needs_cuda, needs_triton


def expected(left: Tensor, right: Tensor) -> Tensor:
    """By the definition, in float64: norms, left and right lengths, products of lengths."""
    left, right = left.double(), right.double()
    norms = (left.mT @ right).square().sum((1, 2))
    lefts, rights = left.norm(dim=2), right.norm(dim=2)
    return torch.stack([norms, lefts.sum(1), rights.sum(1), (lefts * rights).sum(1)])


def found(left: Tensor, right: Tensor) -> Tensor:
    norms, lengths = gram_sums(left, right)
    return torch.stack([norms, lengths.left, lengths.right, lengths.products])


@pytest.mark.parametrize("positions", [0, 1, 2, 5, 16])
@pytest.mark.parametrize("threshold", [2, 4, 256])
@pytest.mark.parametrize("elements", [1, 60, 1 << 25])
def test_by_products(
    positions: int, threshold: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "_SYMMETRY_POSITIONS", threshold)
    monkeypatch.setattr(gram, "_ELEMENTS", elements)
    left = torch.randn(3, positions, 4, dtype=torch.float64)
    right = torch.randn(3, 6, positions, dtype=torch.float64).mT
    torch.testing.assert_close(found(left, right), expected(left, right))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("longest", [1, 4, 5, 6])
def test_long_half_precision_in_pieces(
    longest: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "_LONGEST_HALF_PRODUCT", longest)
    left, right = torch.randn(3, 7, 5).to(dtype), torch.randn(3, 7, 13).to(dtype)
    norms, lefts, rights, products = gram._by_products(left, right)
    torch.testing.assert_close(
        torch.stack([norms, lefts, rights, products]).double(),
        expected(left, right),
        rtol=1e-5,
        atol=1e-6,
    )


def test_of_no_samples() -> None:
    assert found(torch.randn(0, 3, 4), torch.randn(0, 3, 5)).shape == (4, 0)


@pytest.mark.slow
@needs_triton
def test_kernel_in_the_interpreter() -> None:
    """Shapes, layouts, values that are not finite, what is left to others, and the proof."""
    assert interpreted("tests.gram_kernels") == [
        "shapes", "layouts", "several", "values", "choice", "proof",
    ]  # fmt: skip


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", ["default", "high", "cuda tf32", "backends tf32"])
@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 5, 3), (40, 16, 5, 3), (32, 64, 256, 768), (8, 1000, 9, 64), (1, 3, 2, 2),
        (2, 512, 50_257, 8), (2, 8, 50_257, 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_on_cuda_in_full_precision(
    shape: tuple[int, int, int, int], name: str, draw: Callable[..., Tensor]
) -> None:
    """Whatever is allowed to matrix products, and whether the kernel is worth its launch or not."""
    samples, positions, rows, columns = shape
    left = draw(samples, positions, rows, device="cuda")
    right = draw(samples, columns, positions, device="cuda").mT
    with setting(name):
        before = all_reads()
        result = found(left, right)
        assert all_reads() == before
    torch.testing.assert_close(result.double(), expected(left, right), rtol=1e-5, atol=0)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 5, 3), (32, 64, 256, 768), (8, 100, 9, 64), (2, 300, 50_257, 8), (1, 2, 512, 9),
        (3, 8, 513, 4), (2, 12, 4, 20_000),
    ],
)  # fmt: skip
@pytest.mark.parametrize("triton", [True, False])
def test_half_precision_on_cuda(
    shape: tuple[int, int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    triton: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of one sign, so that digits which tensor cores cut off would add up."""
    if not triton:
        monkeypatch.setattr(gram, "launcher", lambda name: None)
    samples, positions, rows, columns = shape
    left = torch.rand(samples, positions, rows, device="cuda").to(dtypes[0])
    right = torch.rand(samples, positions, columns, device="cuda").to(dtypes[1])
    torch.testing.assert_close(
        found(left, right).double(), expected(left, right), rtol=1e-5, atol=0
    )


@pytest.mark.cuda
@needs_cuda
@needs_triton
def test_kernel_is_used_on_cuda() -> None:
    from clipgrad.kernels import gram_launch

    left, right = torch.randn(2, 40, 64, 20, device="cuda")
    result = gram_launch.gram_sums([left], right)
    assert result is not None
    assert torch.equal(result[0].sum(2), found(left, right))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positions", [2, 64])
def test_what_cancels_is_clipped_enough_in_half_precision(
    positions: int, dtype: torch.dtype
) -> None:
    """Positions differ from their opposites by one last digit, in an odd vocabulary."""
    torch.manual_seed(0)
    half = positions // 2
    left = torch.randn(64, 1, 97, device="cuda").to(dtype).repeat(1, positions, 1)
    left[:, half:] *= -1
    right = torch.randn(64, half, 80, device="cuda").to(dtype).repeat(1, 2, 1)
    right[:, half:, 0] *= 1 + torch.finfo(dtype).eps
    use = Outer(left, right, torch.Size([97, 80])).aligned()
    norms = ghost_norms_squared([use]).sqrt()
    for sample in range(64):
        factors = torch.zeros(64, device="cuda")
        factors[sample] = 1 / norms[sample]  # clipped to 1
        assert float(use.weighted_sum(factors).norm()) < 1.2


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("distance", [0.1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("positions", [2, 64])
@pytest.mark.parametrize("name", ["high", "cuda tf32"])
def test_what_cancels_is_clipped_enough_in_tf32(name: str, positions: int, distance: float) -> None:
    """Norms and the clipped sum, each position nearly the opposite of another."""
    torch.manual_seed(0)
    half = positions // 2
    left = torch.randn(64, 1, 96, device="cuda").repeat(1, positions, 1)
    left[:, half:] *= -1
    right = torch.randn(64, half, 80, device="cuda").repeat(1, 2, 1)
    right[:, half:] += distance * torch.randn(64, half, 80, device="cuda")
    use = Outer(left, right, torch.Size([96, 80]))
    with setting(name):
        norms = ghost_norms_squared([use]).sqrt()
        for sample in range(64):
            factors = torch.zeros(64, device="cuda")
            factors[sample] = 1 / norms[sample]  # clipped to 1
            assert float(use.weighted_sum(factors).norm()) < 1.2
