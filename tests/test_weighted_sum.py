"""Sums of per-sample gradients by an operation that is one kernel on a GPU; a CPU runs it without the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.kernels import weighted_sum as module
from clipgrad.kernels.weighted_sum import weighted_sum, weighted_sum_of_rows
from clipgrad.rules.canonical import PerSample
from tests.compiled.conftest import Graphs, graphs  # noqa: F401 - a fixture
from tests.kernels import interpreted, needs_cuda, needs_triton

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(0, 5), (1, 1), (3, 7), (16, 1024), (33, 70_001), (64, 0)]


@pytest.fixture
def every_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the operation for small gradients too, on the CPU too."""
    monkeypatch.setattr(module, "_DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(module, "_FEWEST_ELEMENTS", 1)


def in_float64(rows: Tensor, factors: Tensor) -> Tensor:
    kept = factors != 0
    return factors[kept].double() @ rows[kept].double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sums(size: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    rows, factors = torch.randn(size, device=device).to(dtype), torch.rand(size[0], device=device)
    factors[::3] = 0.0
    rows[::3] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)[:1]
    for sums in (weighted_sum, weighted_sum_of_rows):
        found = sums(rows, factors)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), in_float64(rows, factors), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_factor_that_is_not_zero_hides_nothing(device: str) -> None:
    rows, factors = torch.ones(3, 9, device=device), torch.tensor([1e-45, torch.nan, 1.0])
    rows[0, 2], rows[2, 4] = torch.inf, torch.nan
    found = weighted_sum(rows, factors.to(device))
    assert found.isnan().all()
    factors[1] = 0.0
    found = weighted_sum(rows, factors.to(device))
    assert found[2] == torch.inf
    assert found[4].isnan()
    assert found.isfinite().sum() == 7


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "in order": lambda: torch.randn(5, 6, 13),
    "transposed": lambda: torch.randn(5, 13, 6).mT,
    "samples inside": lambda: torch.randn(6, 13, 5).permute(2, 0, 1),
    "part of a row": lambda: torch.randn(5, 6, 30)[:, :, 4:17],
    "every other sample": lambda: torch.randn(10, 6, 13)[::2],
    "channels last": lambda: torch.randn(5, 6, 13, 2).contiguous(memory_format=torch.channels_last),
    "the same for all samples": lambda: torch.randn(1, 6, 13).expand(5, 6, 13),
    "vector": lambda: torch.randn(5, 13),
}


@pytest.mark.usefixtures("every_sum")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    torch.manual_seed(0)
    made = LAYOUTS[layout]()
    base = (made if made._base is None else made._base).to(device)
    gradient = base.as_strided(made.shape, made.stride(), made.storage_offset())
    factors = torch.rand(5, device=device)
    factors[2] = 0.0
    expected = torch.einsum("b,b...->...", factors.double(), gradient.double())
    use = PerSample(gradient).select(factors != 0)
    found = use.weighted_sum(factors)
    assert found.shape == gradient.shape[1:]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_which_gradients_are_summed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEVICES", {"cpu"})
    large = torch.zeros(2, 256, 256)
    assert module.sums_rows(large)
    assert not module.sums_rows(large[:, 1:])
    assert not module.sums_rows(large.double())
    monkeypatch.setattr(module, "_DEVICES", {"cuda"})
    assert not module.sums_rows(large)


@pytest.mark.usefixtures("every_sum")
@pytest.mark.parametrize("compile", [False, True])
def test_a_dropped_sample_adds_nothing(compile: bool, graphs: Graphs) -> None:  # noqa: F811
    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return ((x @ weights["in"]).tanh() @ weights["out"]).square().sum()

    torch.manual_seed(0)
    weights = {"in": torch.randn(9, 8), "out": torch.randn(8, 2)}
    x = torch.randn(5, 30, 9)
    settings: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "keep_batch_dim": False,
        "performance": Performance(strategy="kept"),
        "compile": compile,
    }
    gradient = clipped_grad(loss, **settings)
    gradient(weights, x)
    if compile:
        assert "weighted_sum_of_rows" in graphs.modules[-1].code
    others = clipped_grad(loss, **{**settings, "compile": False})(weights, x[1:]).grads
    for value in (torch.nan, torch.inf):
        x[0, 0, 0] = value
        result = gradient(weights, x)
        assert result.num_nonfinite == 1
        torch.testing.assert_close(result.grads, others)


@needs_triton
def test_the_kernel_as_triton_interprets_it() -> None:
    parts = ["sums", "values", "choice", "proof"]
    assert interpreted("tests.weighted_sum_kernels") == parts


@pytest.mark.cuda
@needs_cuda
@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_runs(dtype: torch.dtype) -> None:
    from clipgrad.kernels import weighted_sum_launch as launcher

    rows = torch.ones(3, 9, device="cuda", dtype=dtype)
    found = launcher.weighted_sum(rows, torch.arange(3, device="cuda"))
    assert found is not None
    assert found.tolist() == [3.0] * 9
