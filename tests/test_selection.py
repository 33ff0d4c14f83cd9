"""Samples taken out of a tensor: by selection, and by zeros where it lies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipgrad.kernels.selection import may_overlap, select_rows, zero_rows_
from tests.kernels import needs_cuda, needs_triton

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]
LAYOUTS = {
    "vector": lambda: torch.randn(5),
    "matrix": lambda: torch.randn(5, 7),
    "large": lambda: torch.randn(5, 3, 70_001),
    "many": lambda: torch.randn(5000, 3),
    "transposed": lambda: torch.randn(5, 6, 130).mT,
    "channels last": lambda: torch.randn(5, 8, 6, 6).contiguous(memory_format=torch.channels_last),
    "part of a row": lambda: torch.randn(5, 4, 30)[:, :, 7:19],
    "part of a tensor": lambda: torch.randn(9, 4, 30)[2:7],
    "every other sample": lambda: torch.randn(10, 4, 30)[::2],
    "samples inside": lambda: torch.randn(4, 30, 5).permute(2, 0, 1),
    "one position": lambda: torch.randn(5, 1, 30),
    "one sample": lambda: torch.randn(1, 4, 30),
    "no elements": lambda: torch.randn(5, 0),
    "no samples": lambda: torch.randn(0, 5),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zeros_where_the_tensor_lies(layout: str, dtype: torch.dtype, device: str) -> None:
    """And nowhere else: not in the samples that are kept, and not in what lies between."""
    made: Tensor = LAYOUTS[layout]()
    base = made if made._base is None else made._base
    whole = base.to(device, dtype)
    tensor = whole.as_strided(made.shape, made.stride(), made.storage_offset())
    torch.manual_seed(1)
    keep = torch.rand(len(tensor), device=device) < 0.5
    if tensor.numel():
        tensor[~keep] = torch.nan
    expected = whole.clone()
    view = expected.as_strided(made.shape, made.stride(), made.storage_offset())
    view.copy_(select_rows(view.clone(), keep))
    zero_rows_(tensor, keep)
    torch.testing.assert_close(whole, expected, rtol=0, atol=0, equal_nan=True)
    assert not tensor.isnan().any()


OVERLAPPING = {
    "the same for all samples": lambda: torch.randn(1, 7).expand(5, 7),
    "the same everywhere": lambda: torch.randn(()).expand(5, 7),
    "the same within samples": lambda: torch.randn(5, 1, 7).expand(5, 3, 7),
    "windows": lambda: torch.randn(11).unfold(0, 3, 2),
    "windows of samples": lambda: torch.randn(9, 4).unfold(0, 3, 1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", OVERLAPPING)
def test_where_samples_share_memory_nothing_is_written(layout: str, device: str) -> None:
    tensor = OVERLAPPING[layout]()
    base = (tensor if tensor._base is None else tensor._base).to(device)
    tensor = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    before = base.clone()
    assert may_overlap(tensor)
    with pytest.raises(RuntimeError, match=r"overwrite other samples \(shape \("):
        zero_rows_(tensor, torch.arange(len(tensor), device=device) > 0)
    assert torch.equal(base, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_other_layout_may_be_written_to(layout: str) -> None:
    assert not may_overlap(LAYOUTS[layout]())


@pytest.mark.cuda
@needs_cuda
@needs_triton
@pytest.mark.parametrize("layout", ["matrix", "large", "many", "transposed", "channels last"])
def test_the_kernel_runs_where_samples_are_blocks(layout: str) -> None:
    from clipgrad.kernels import selection_launch as launcher

    tensor = LAYOUTS[layout]().cuda()
    assert launcher.zero_rows_(tensor, torch.zeros(len(tensor), dtype=torch.bool, device="cuda"))
    assert not tensor.any()


@pytest.mark.cuda
@needs_cuda
@needs_triton
@pytest.mark.parametrize("layout", ["part of a row", "samples inside"])
def test_the_kernel_declines_gaps(layout: str) -> None:
    from clipgrad.kernels import selection_launch as launcher

    made = LAYOUTS[layout]()
    assert made._base is not None
    tensor = made._base.cuda().as_strided(made.shape, made.stride(), made.storage_offset())
    before = tensor.clone()
    assert not launcher.zero_rows_(tensor, torch.zeros(5, dtype=torch.bool, device="cuda"))
    assert torch.equal(tensor, before)
