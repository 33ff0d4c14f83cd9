"""Convolutions as a GPU computes them, on the CPU: patches in parts, and products in an operation of their own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import clipgrad
from clipgrad.compiled import _backend
from clipgrad.rules import _convolution_use, _tap_products, _tensor_cores
from clipgrad.rules._convolution_use import ConvolutionUse
from clipgrad.rules._geometry import Geometry
from clipgrad.testing import RuleCase, assert_rule_matches_reference
from tests.oracle import clipped_sum, per_sample_gradients
from tests.rule_cases.convolution import CASES


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each product that was taken."""
    taken: list[int] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        taken.append(a.shape[0])
        result: Tensor = _tensor_cores.bmm(a, b, True)
        return result

    monkeypatch.setattr(_convolution_use, "convolution_product", product)
    monkeypatch.setattr(ConvolutionUse, "_unfolds", lambda self: True)
    return taken


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", [c for c in CASES if not c.declines], ids=lambda case: case.name)
def test_case(case: RuleCase, products: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_convolution_use, "_PATCHES_AT_ONCE", 1)  # a sample at a time
    assert_rule_matches_reference(
        case, batch_sizes=(3,), strategies=("kept",), microbatch_sizes=(None,)
    )


@pytest.fixture
def by_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are found by a product for each tap, wherever that is possible."""
    monkeypatch.setattr(_convolution_use, "_TAPS_ON", {"cpu", "cuda"})
    monkeypatch.setattr(_tap_products, "_FEWEST_CHANNELS", 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", [c for c in CASES if not c.declines], ids=lambda case: case.name)
@pytest.mark.usefixtures("by_taps")
def test_case_by_taps(case: RuleCase) -> None:
    assert_rule_matches_reference(
        case, batch_sizes=(3,), strategies=("kept",), microbatch_sizes=(None,)
    )


@pytest.mark.parametrize(
    ("taps", "padding", "dilation", "size"),
    [
        ((3, 3), (1, 1), (1, 1), (9, 7)),
        ((1, 1), (0, 0), (1, 1), (5, 6)),
        ((3, 2), (0, 2), (2, 3), (11, 12)),
        ((5, 5), (2, 2), (1, 1), (6, 6)),
        ((3, 3), (3, 4), (1, 2), (5, 5)),
        ((4, 1), (0, 0), (1, 1), (4, 3)),
        ((1, 4), (0, 0), (1, 1), (3, 4)),
    ],
)
def test_taps(
    taps: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """Also where the last tap reads past the image, and where a neighbour has NaN."""
    torch.manual_seed(0)
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    weight = torch.randn(4, 2, *taps, dtype=torch.float64)
    gradient = torch.randn_like(F.conv2d(x, weight, padding=padding, dilation=dilation))
    geometry = Geometry((1, 1), padding, dilation, 1)
    exact = ConvolutionUse(x, gradient, weight, geometry)._grouped()
    found = _tap_products.tap_gradient(gradient, x, weight.shape, geometry)
    torch.testing.assert_close(found, exact)
    x[1] = torch.nan
    beside = _tap_products.tap_gradient(gradient, x, weight.shape, geometry)
    torch.testing.assert_close(beside[[0, 2]], exact[[0, 2]])
    assert beside[1].isnan().all()


@pytest.mark.usefixtures("by_taps")
def test_taps_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def uncompiled(module: GraphModule, mode: str) -> GraphModule:
        graphs.append(str(module.graph))
        return module

    monkeypatch.setattr(_backend, "compile_graph", uncompiled)
    check_taps(torch.float64, "cpu", True, 1e-10)
    assert all(graph.count("clipgrad.tap_products") == 2 for graph in graphs)
    assert graphs


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.usefixtures("by_taps")
def test_taps_on_a_gpu(
    compile: bool | str, dtype: torch.dtype, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    double = dtype is torch.float64
    check_taps(dtype, "cuda", compile, 1e-10 if double else 5e-3 if allowed else 1e-4)


def check_taps(dtype: torch.dtype, device: str, compile: bool | str, tolerance: float) -> None:
    """Two convolutions with pooling between them, beside the loop in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, bias=False)
    ).double()  # fmt: skip
    x = torch.randn(5, 2, 12, 12, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        total: Tensor = model(x).square().mean()
        return total

    exact, norms = clipped_sum(per_sample_gradients(model, loss, (x,)), 0.5)
    model = model.to(device, dtype)
    gradient = clipgrad.clipped_grad(
        lambda p, x: torch.func.functional_call(model, p, (x,)).square().mean(),
        max_grad_norm=0.5,
        strategy="kept",
        compile=compile,
    )
    for _ in range(3):
        found = gradient(dict(model.named_parameters()), x.to(device, dtype))
        assert isinstance(found.grad_norms, Tensor)
        torch.testing.assert_close(found.grad_norms.double().cpu(), norms, rtol=tolerance, atol=0)
        for name, total in found.grads.items():
            torch.testing.assert_close(
                total.double().cpu(), exact[name], rtol=0, atol=0.5 * tolerance
            )


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", [c for c in CASES if not c.declines], ids=lambda case: case.name)
def test_groups_in_a_graph(case: RuleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's grouped convolution as one operation of a graph, for every kind of convolution."""
    monkeypatch.setattr(_backend, "compile_graph", lambda module, mode: module)
    monkeypatch.setattr(ConvolutionUse, "_unfolds", lambda self: False)
    monkeypatch.setattr(ConvolutionUse, "_depthwise", ConvolutionUse._grouped)
    torch.manual_seed(0)
    params, batch = case.params(), case.batch(3)
    expected = clipgrad.clipped_grad(case.loss, max_grad_norm=1.0, strategy="ghost")(params, *batch)
    gradient = clipgrad.clipped_grad(case.loss, max_grad_norm=1.0, strategy="kept", compile=True)
    found = gradient(params, *batch)
    torch.testing.assert_close(found.grads, expected.grads)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms)


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.conv2d(x, params["w"], padding=1).square().sum()


def test_parts_are_as_large_as_they_may_be(
    products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = (
        torch.randn(7, 2, 5, 5, dtype=torch.float64),
        torch.randn(3, 2, 3, 3, dtype=torch.float64),
    )
    gradient = clipgrad.clipped_grad(loss, max_grad_norm=1.0, strategy="kept")
    whole = gradient({"w": w}, x)
    assert products == [7]
    products.clear()
    monkeypatch.setattr(_convolution_use, "_PATCHES_AT_ONCE", 3 * 2 * 9 * 25)
    parts = gradient({"w": w}, x)
    assert products == [3, 3, 1]
    torch.testing.assert_close(parts.grads, whole.grads)
    torch.testing.assert_close(parts.grad_norms, whole.grad_norms)


def test_a_graph_holds_the_product_whole(
    products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the setting would be looked at when the graph is made, and a compiler would take plain products."""
    product = partial(_tensor_cores.bmm, allowed=True)
    monkeypatch.setattr(_convolution_use, "convolution_product", product)
    modules: list[GraphModule] = []

    def compile_graph(module: GraphModule, mode: str) -> GraphModule:
        modules.append(module)
        return module

    monkeypatch.setattr(_backend, "compile_graph", compile_graph)
    x, w = (
        torch.randn(4, 2, 5, 5, dtype=torch.float64),
        torch.randn(3, 2, 3, 3, dtype=torch.float64),
    )
    expected = clipgrad.clipped_grad(loss, max_grad_norm=1.0, strategy="kept")({"w": w}, x)
    compiled = clipgrad.clipped_grad(loss, max_grad_norm=1.0, strategy="kept", compile=True)
    torch.testing.assert_close(compiled({"w": w}, x).grads, expected.grads)
    assert any(node.target is torch.ops.clipgrad.bmm.default for node in modules[0].graph.nodes)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_setting_is_put_back(allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    a = torch.randn(2, 3, 4)
    before = matmul.allow_tf32
    torch.testing.assert_close(_tensor_cores.bmm(a, a.mT, allowed), a @ a.mT)
    with pytest.raises(RuntimeError):
        _tensor_cores.bmm(a, a, allowed)
    assert matmul.allow_tf32 == before
    with _tensor_cores.tf32(allowed):
        assert _tensor_cores.matrices_may() is allowed
    assert matmul.allow_tf32 == before


@pytest.mark.parametrize("convolutions", [True, False])
@pytest.mark.parametrize("matrices", [True, False])
def test_only_where_one_of_them_may(
    convolutions: bool, matrices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", convolutions)
    with _tensor_cores.tf32(matrices):
        assert _tensor_cores.convolutions_may() is (convolutions or matrices)
