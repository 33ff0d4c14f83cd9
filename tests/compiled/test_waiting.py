"""What waits for the gradient in a graph for the CPU: patches of images, slopes of activations."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from clipgrad import Performance, clipped_grad
from clipgrad.compiled.decompositions import DECOMPOSITIONS
from clipgrad.kernels import delayed
from tests.compiled.conftest import Graphs

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "mish": F.mish,
    "silu": F.silu,
    "softplus": partial(F.softplus, beta=2.0, threshold=1.5),
}


def _slope(activation: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.requires_grad_()
        return torch.autograd.grad(activation(x), x, gradient)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_slope_is_pytorchs_and_waits(name: str, dtype: torch.dtype) -> None:
    x, gradient = torch.randn(2, 3, 8).to(dtype)
    slope = partial(_slope, ACTIVATIONS[name])
    graph = make_fx(slope, decomposition_table=DECOMPOSITIONS)(x.clone(), gradient)
    waiting = [node for node in graph.graph.nodes if "zero_after" in str(node.target)]
    assert len(waiting) == 1
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(
        graph(x.clone(), gradient), slope(x.clone(), gradient), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
def test_values_that_are_not_finite_are_as_they_were(value: float) -> None:
    x, gradient = torch.full((3,), value), torch.tensor([1.0, float("inf"), float("nan")])
    slope = partial(_slope, F.silu)
    graph = make_fx(slope, decomposition_table=DECOMPOSITIONS)(x.clone(), gradient)
    torch.testing.assert_close(
        graph(x.clone(), gradient), slope(x.clone(), gradient), equal_nan=True
    )


@pytest.mark.parametrize(
    ("channels", "transposed"),
    [(3, False), (16, False), (16, True)],  # patches; samples as groups
)
def test_a_convolutions_image_waits(channels: int, transposed: bool, graphs: Graphs) -> None:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        convolve = F.conv_transpose2d if transposed else F.conv2d
        return convolve(x, params["w"], padding=1).sin().sum()

    params = {"w": torch.randn(channels, 16, 3, 3, dtype=torch.float64)}
    if not transposed:
        params["w"] = params["w"].transpose(0, 1).contiguous()
    x = torch.randn(4, channels, 8, 8, dtype=torch.float64)
    options = {"max_grad_norm": 1.0, "performance": Performance(strategy="kept")}
    expected = clipped_grad(loss, **options)(params, x)
    found = clipped_grad(loss, **options, compile=True, microbatch_size=4)(params, x)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-9)
    waiting = [n for n in graphs.modules[0].graph.nodes if "zero_after" in str(n.target)]
    assert len(waiting) == 1
    (read,) = waiting[0].users
    assert read.target is torch.ops.aten.add.Tensor


def test_a_module_may_be_loaded_once_more() -> None:
    """As notebooks do that follow an edit; the library of operations outlives the module."""
    importlib.reload(delayed)
