"""A convolution's input gradient in a graph: a convolution, which does not ask for the image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import clipped_grad
from tests.compiled.conftest import Graphs
from tests.nightly import rows

Case = tuple[Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]
CASES: list[Case] = [
    (F.conv1d, (9,), (4, 4, 3), {"padding": 1}),
    (F.conv2d, (9, 8), (4, 4, 3, 2), {"stride": (2, 3), "padding": (1, 0)}),
    (F.conv2d, (10, 8), (4, 4, 3, 2), {"stride": (4, 3), "dilation": (2, 1)}),
    (F.conv2d, (9, 8), (4, 2, 3, 3), {"groups": 2, "stride": 2}),
    (F.conv2d, (9, 8), (4, 4, 1, 1), {"stride": 2}),
    (F.conv3d, (5, 4, 6), (4, 4, 2, 3, 2), {"stride": (1, 2, 3), "padding": 1}),
    (F.conv_transpose1d, (5,), (4, 4, 3), {"stride": 2, "output_padding": 1}),
    (F.conv_transpose1d, (5,), (4, 4, 2), {"dilation": 2, "output_padding": 1}),
    (F.conv_transpose1d, (1,), (4, 4, 2), {"dilation": 3, "output_padding": 2}),
    (
        F.conv_transpose2d,
        (5, 4),
        (4, 4, 3, 2),
        {"stride": (1, 2), "dilation": 3, "output_padding": 2},
    ),
    (F.conv_transpose2d, (5, 4), (4, 2, 3, 3), {"stride": (2, 3), "padding": 1, "groups": 2}),
]


@pytest.mark.parametrize(("convolve", "size", "shape", "options"), rows(4, CASES))
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_equals_the_eager_step(
    convolve: Any,
    size: tuple[int, ...],
    shape: tuple[int, ...],
    options: dict[str, Any],
    channels_last: bool,
    graphs: Graphs,
) -> None:
    if channels_last and len(size) != 2:
        pytest.skip("two axes only")

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = (x * params["scale"].view(-1, *[1] * len(size))).sin()
        return (convolve(hidden, params["w"], **options).cos()).sum()

    params = {
        "w": torch.randn(shape, dtype=torch.float64),
        "scale": torch.randn(4, dtype=torch.float64),
    }
    x = torch.randn(3, 4, *size, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = clipped_grad(loss, max_grad_norm=1.0)(params, x)
    found = clipped_grad(loss, max_grad_norm=1.0, compile=True)(params, x)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms, rtol=1e-9, atol=1e-9)
    calls = [n for n in graphs.modules[0].graph.nodes if n.op == "call_function"]
    backward = [n for n in calls if n.target is torch.ops.aten.convolution_backward.default]
    assert not any(list(node.args[-1]) == [True, False, False] for node in backward)
    convolutions = [n for n in calls if n.target is torch.ops.aten.convolution.default]
    assert {bool(node.args[6]) for node in convolutions} == {False, True}
