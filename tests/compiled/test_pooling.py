"""Max pooling in a graph: its backward pass is PyTorch's own kernel, as one operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from clipgrad import clipped_grad
from clipgrad.compiled.decompositions import max_pool2d_backward
from tests.compiled.conftest import Graphs
from tests.nightly import some

OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": (2, 3)},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "stride": 1, "dilation": 2},
    {"kernel_size": 3, "stride": 2, "ceil_mode": True},
]


@pytest.mark.parametrize(
    ("options", "layout"), some(4, OPTIONS, [torch.contiguous_format, torch.channels_last])
)
def test_equals_the_eager_step(
    options: dict[str, Any], layout: torch.memory_format, graphs: Graphs
) -> None:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = F.conv2d(x, params["w"], padding=1).relu()  # zeros tie
        return (F.max_pool2d(hidden, **options).sin() * params["v"]).sum()

    params = {
        "w": torch.randn(4, 2, 3, 3, dtype=torch.float64),
        "v": torch.randn(1, dtype=torch.float64),
    }
    x = torch.randn(3, 2, 9, 7, dtype=torch.float64).to(memory_format=layout)
    expected = clipped_grad(loss, max_grad_norm=1.0)(params, x)
    found = clipped_grad(loss, max_grad_norm=1.0, compile=True)(params, x)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms, rtol=1e-9, atol=1e-9)
    operation = torch.ops.clipgrad.max_pool2d_backward.default
    assert any(node.target is operation for node in graphs.modules[0].graph.nodes)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (3, 8, 6), (2, 1, 8, 6), (2, 3, 8, 1)])
def test_the_fake_tells_the_layout(layout: torch.memory_format, shape: tuple[int, ...]) -> None:
    """The compiler believes it, and reads the result by these strides."""
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=layout)
    kernel = [2, min(2, shape[-1])]
    values, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel)
    rest = (*shape[-2:], kernel, [], [0], [1], False)
    for gradient in (torch.randn_like(values), torch.randn_like(values).contiguous()):
        for places in (indices, indices.contiguous()):
            expected = torch.ops.aten.max_pool2d_with_indices_backward(
                gradient.contiguous(), x.contiguous(), *rest[2:], indices.contiguous()
            )
            found = max_pool2d_backward(gradient, places, *rest)
            torch.testing.assert_close(found, expected)
            with FakeTensorMode() as mode:
                fakes = [mode.from_tensor(t) for t in (gradient, places)]
                assert max_pool2d_backward(*fakes, *rest).stride() == found.stride()
