"""Half-precision convolutions as a GPU sums them: patches that do not overlap are the input of a linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.kernels import float32_precision, half_products
from clipgrad.rules.canonical import Outer
from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.use import ConvolutionUse, use_of
from clipgrad.rules.ghost import ghost_norms_squared
from tests.compiled.conftest import Graphs, graphs  # noqa: F401 - a fixture
from tests.kernels import needs_cuda

Layout = torch.memory_format


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)


APART = {
    "pixels": ((4, 3, 1, 1), Geometry((1, 1), (0, 0), (1, 1), 1)),
    "every second pixel": ((4, 3, 1, 1), Geometry((2, 2), (0, 0), (1, 1), 1)),
    "patches": ((4, 3, 2, 3), Geometry((2, 3), (0, 0), (1, 1), 1)),
    "patches with gaps": ((4, 3, 2, 2), Geometry((3, 4), (0, 0), (1, 1), 1)),
    "padding": ((4, 3, 2, 2), Geometry((2, 2), (1, 1), (1, 1), 1)),
    "dilation": ((4, 3, 2, 2), Geometry((3, 4), (1, 0), (2, 3), 1)),
    "the whole image": ((4, 3, 9, 10), Geometry((9, 10), (0, 0), (1, 1), 1)),
    "transposed": ((3, 4, 2, 3), Geometry((2, 3), (0, 0), (1, 1), 1, True, (0, 0))),
    "transposed, padding": ((3, 4, 2, 2), Geometry((3, 2), (1, 0), (1, 1), 1, True, (1, 1))),
}
OTHERS = {
    "overlap": ((4, 3, 3, 2), Geometry((2, 2), (0, 0), (1, 1), 1)),
    "overlap by dilation": ((4, 3, 2, 2), Geometry((2, 2), (0, 0), (2, 1), 1)),
    "groups": ((6, 1, 2, 2), Geometry((2, 2), (0, 0), (1, 1), 3)),
}


def drawn(
    shape: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """An image, an output gradient and a weight."""
    torch.manual_seed(0)
    channels = shape[0] if geometry.transposed else shape[1] * geometry.groups
    weight = torch.randn(shape).to(dtype)
    x = torch.randn(5, channels, 9, 10).to(dtype).contiguous(memory_format=layout)
    y = geometry.convolve(x.float(), weight.float(), None)
    return x, torch.randn_like(y).to(dtype).contiguous(memory_format=layout), weight


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", APART)
def test_they_equal_the_definition(name: str, layout: Layout) -> None:
    """Per-sample gradients, weighted sum and norms, by ordinary autograd in float64."""
    shape, geometry = APART[name]
    x, gradient, weight = drawn(shape, geometry, torch.bfloat16, layout)
    use = use_of(x, gradient, weight, geometry)
    assert isinstance(use, Outer)
    assert use.sums_in_bfloat16
    wide = weight.double().requires_grad_()
    y = geometry.convolve(x.double(), wide, None)
    each = torch.stack(
        [
            torch.autograd.grad(y[i], wide, gradient[i].double(), retain_graph=True)[0]
            for i in range(len(x))
        ]
    )
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(use.per_sample().double(), each, **close)
    norms = each.square().sum((1, 2, 3, 4))
    torch.testing.assert_close(ghost_norms_squared([use]).double(), norms, **close)
    factors = torch.rand(5)
    total = (each * factors.double().view(-1, 1, 1, 1, 1)).sum(0)
    found = use.weighted_sum(factors)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*APART, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_where_the_library_sums(name: str, dtype: torch.dtype) -> None:
    """Its operands are float32, which TF32 rounds more than two bfloat16 terms do: the norm has to allow for this."""
    shape, geometry = {**APART, **OTHERS}[name]
    x, gradient, weight = drawn(shape, geometry, dtype, torch.contiguous_format)
    use = use_of(x, gradient, weight, geometry)
    if name in APART and dtype is torch.bfloat16:
        assert isinstance(use, Outer)
        return
    assert isinstance(use, ConvolutionUse)
    assert not use.outer().sums_in_bfloat16


def embedded(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """As a vision transformer begins, with a head that is a convolution of pixels."""
    h = F.conv2d(x, p["patches"], p["bias"], stride=4).tanh()
    return F.conv2d(h, p["pixels"]).float().square().mean()


@pytest.mark.parametrize("strategy", ["ghost", "kept", "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast(
    strategy: str,
    compiled: bool,
    graphs: Graphs,  # noqa: F811
) -> None:
    torch.manual_seed(0)
    params = {
        "patches": torch.randn(16, 3, 4, 4),
        "bias": torch.randn(16),
        "pixels": torch.randn(8, 16, 1, 1),
    }
    x = torch.randn(4, 3, 16, 16)
    x[2, 1, 3] = torch.inf

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return embedded(p, x)

    options: dict[str, Any] = {"performance": Performance(strategy=strategy)}
    exact = clipped_grad(embedded, max_grad_norm=0.1)(params, x)
    found = clipped_grad(loss, max_grad_norm=0.1, compile=compiled, **options)(params, x)
    assert found.num_nonfinite == 1
    kept = torch.arange(4) != 2
    assert isinstance(found.grad_norms, Tensor)
    assert isinstance(exact.grad_norms, Tensor)
    torch.testing.assert_close(found.grad_norms[kept], exact.grad_norms[kept], rtol=3e-2, atol=1e-4)
    for name, total in found.grads.items():
        assert (total - exact.grads[name]).norm() <= 3e-2 * exact.grads[name].norm(), name


@needs_cuda
def test_a_norm_allows_for_the_rounding_of_the_librarys_sum() -> None:
    """Two windows cancel. Before, the bound was that of two bfloat16 terms, which the library does not take."""
    weight = torch.zeros(1, 1, 3, device="cuda", dtype=torch.bfloat16)
    x = torch.ones(1, 1, 4, device="cuda", dtype=torch.bfloat16)
    gradient = torch.tensor([[[1.0, -1.0]]], device="cuda", dtype=torch.bfloat16)
    use = use_of(x, gradient, weight, Geometry((1,), (0,), (1,), 1))
    assert isinstance(use, ConvolutionUse)
    norm = float(ghost_norms_squared([use.outer()]).sqrt())
    assert norm >= 8 * float32_precision.product_rounding("cuda") * 2 * 3**0.5 * (1 - 1e-5)
