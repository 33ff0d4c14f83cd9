"""Linear layers in a graph of the CPU: the bias is a sum of its own, which the compiler makes part of what follows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from clipgrad import clipped_grad
from clipgrad.compiled.decompositions import DECOMPOSITIONS
from tests.compiled.conftest import Graphs


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, params["w"], params["b"]))
    return F.linear(hidden, params["v"], params["c"]).sin().sum()


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
def test_equals_the_eager_step(shape: tuple[int, ...], graphs: Graphs) -> None:
    params = {
        name: torch.randn(size, dtype=torch.float64)
        for name, size in {"w": (6, 4), "b": (6,), "v": (2, 6), "c": (2,)}.items()
    }
    x = torch.randn(shape, dtype=torch.float64)
    expected = clipped_grad(loss, max_grad_norm=1.0)(params, x)
    found = clipped_grad(loss, max_grad_norm=1.0, compile=True)(params, x)
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms, rtol=1e-9, atol=1e-9)
    called = [node.target for node in graphs.modules[0].graph.nodes]
    assert torch.ops.aten.mm.default in called
    assert torch.ops.aten.addmm.default not in called


@pytest.mark.parametrize(
    ("bias", "beta", "alpha", "stays"),
    [
        ((2,), 1.0, 1.0, False),
        ((3, 2), 1.0, 1.0, True),
        ((2,), 0.5, 1.0, True),
        ((2,), 1.0, 2.0, True),
    ],
)
def test_other_sums_with_products_stay(
    bias: tuple[int, ...], beta: float, alpha: float, stays: bool
) -> None:
    def step(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(bias, a, b, beta=beta, alpha=alpha)

    arguments = torch.randn(bias), torch.randn(3, 4), torch.randn(4, 2)
    module = make_fx(step, decomposition_table=DECOMPOSITIONS)(*arguments)
    called = [node.target for node in module.graph.nodes]
    assert (torch.ops.aten.addmm.default in called) is stays
    torch.testing.assert_close(module(*arguments), step(*arguments))
