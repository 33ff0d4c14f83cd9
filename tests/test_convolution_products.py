"""Every way to find per-sample gradients of convolutions, also those that only a GPU or another processor takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule

import clipgrad
from clipgrad import Performance
from clipgrad.compiled import backend
from clipgrad.kernels import float32_precision
from clipgrad.rules.canonical import Outer, PerSample
from clipgrad.rules.convolution import gradient as gradient_module
from clipgrad.rules.convolution import methods, unfolding
from clipgrad.rules.convolution.geometry import Geometry
from clipgrad.rules.convolution.methods import Method
from clipgrad.rules.row_norms import row_norms_squared
from clipgrad.testing import RuleCase, assert_rule_matches_reference
from tests.nightly import every, pairs, some
from tests.rule_cases.convolution import CASES

USES = [case for case in CASES if not case.declines]


def always(way: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_module, "fastest_method", lambda *_: way)


def joined(outers: Iterable[Outer], samples: int) -> Tensor:
    """As on a GPU."""
    found = methods._concatenate_products(outers)
    assert len(found) == samples
    return found


Gather = Callable[[Iterable[Outer], int], Tensor]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Samples of each product that was taken."""
    taken: list[int] = []

    def product(a: Tensor, b: Tensor) -> Tensor:
        taken.append(a.shape[0])
        result: Tensor = float32_precision.bmm(a, b, "tf32")
        return result

    monkeypatch.setattr(methods, "convolution_product", product)
    always(methods.by_patches, monkeypatch)
    return taken


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("gather", "case"), some(2, [joined, methods._multiply_into_result], USES))
def test_case(
    case: RuleCase, gather: Gather, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample at a time."""
    monkeypatch.setattr(methods, "_multiply_into_result", gather)
    monkeypatch.setattr(unfolding, "_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr(unfolding, "_FEWEST_AT_ONCE", 1)
    assert_rule_matches_reference(
        case, batch_sizes=(3,), strategies=("kept",), microbatch_sizes=(None,)
    )


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights whose gradients were found by slices, which are taken wherever they can be."""
    shapes: list[torch.Size] = []
    fastest_method, by_slices = gradient_module.fastest_method, methods.by_slices

    def counted(gradient: Tensor, input: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
        shapes.append(shape)
        return by_slices(gradient, input, shape, geometry)

    def choose(device: torch.device, shape: torch.Size, geometry: Geometry) -> Method:
        sliceable = gradient_module._can_slice(shape, geometry)
        return counted if sliceable else fastest_method(device, shape, geometry)

    monkeypatch.setattr(gradient_module, "_FEWEST_COLUMNS", 1)
    monkeypatch.setattr(gradient_module, "fastest_method", choose)
    return shapes


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("in_parts", "case"), some(2, [False, True], USES))
def test_slices(
    case: RuleCase, in_parts: bool, sliced: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    if in_parts:
        monkeypatch.setattr(unfolding, "_AT_ONCE", {"cpu": 1})
        monkeypatch.setattr(unfolding, "_FEWEST_AT_ONCE", 1)
    assert_rule_matches_reference(
        case, batch_sizes=(3,), strategies=("kept",), microbatch_sizes=(None,)
    )


@pytest.mark.parametrize(
    ("stride", "dilation", "padding", "transposed", "channels_last"),
    pairs(
        [(1, 1), (1, 2)],
        [(1, 1), (2, 1), (3, 2)],
        [(0, 0), (2, 1)],
        [False, True],
        [False, True],
    ),
)
def test_slices_of_every_geometry(
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    transposed: bool,
    channels_last: bool,
    sliced: list[torch.Size],
) -> None:
    """Compared with patches, norms and sums of the result included."""
    geometry = Geometry(
        stride, padding, dilation, 1, transposed, (0, 1) if transposed and stride[1] > 1 else (0, 0)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64).contiguous(memory_format=layout)
    w = torch.randn(*((3, 4) if transposed else (4, 3)), 3, 2, dtype=torch.float64)
    gradient = torch.randn_like(geometry.convolve(x, w, None)).contiguous(memory_format=layout)
    expected = methods.by_patches(gradient, x, w.shape, geometry)
    found = gradient_module.per_sample_gradient(gradient, x, w.shape, geometry)
    assert sliced == [w.shape]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(row_norms_squared(found), row_norms_squared(expected))
    factors = torch.tensor([0.3, 0.7], dtype=torch.float64)
    total = PerSample(found).weighted_sum(factors)
    torch.testing.assert_close(total, PerSample(expected).weighted_sum(factors))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", every(16, USES, lambda case: case.name))
def test_groups_in_a_graph(case: RuleCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's grouped convolution as one operation of a graph, for every kind of convolution."""
    monkeypatch.setattr(backend, "compile_graph", lambda module, *_: module)
    always(methods.by_groups, monkeypatch)
    torch.manual_seed(0)
    params, batch = case.params(), case.batch(3)
    expected = clipgrad.clipped_grad(
        case.loss, max_grad_norm=1.0, performance=Performance(strategy="ghost")
    )(params, *batch)
    gradient = clipgrad.clipped_grad(
        case.loss, max_grad_norm=1.0, performance=Performance(strategy="kept"), compile=True
    )
    found = gradient(params, *batch)
    torch.testing.assert_close(found.grads, expected.grads)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms)


@pytest.mark.parametrize("way", [methods.by_slices, methods.by_groups, methods.by_patches])
def test_a_graph_serves_every_number_of_rows(way: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, how a way cuts the samples also depends on their number."""
    graphs: list[GraphModule] = []

    def compile_graph(module: GraphModule, *_: object) -> GraphModule:
        graphs.append(module)
        return module

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    monkeypatch.setattr(methods, "in_graph_for_cpu", lambda _: False)
    always(way, monkeypatch)
    monkeypatch.setattr(unfolding, "_AT_ONCE", {"cpu": 200})
    torch.manual_seed(0)
    w = {"w": torch.randn(3, 2, 3, 3, dtype=torch.float64)}
    eager, compiled = (
        clipgrad.clipped_grad(
            loss, max_grad_norm=1.0, performance=Performance(strategy="kept"), compile=compile
        )
        for compile in (False, True)
    )
    for size in (7, 3, 6, 2):
        x = torch.randn(size, 2, 5, 5, dtype=torch.float64)
        expected, found = eager(w, x), compiled(w, x)
        torch.testing.assert_close(found.grads, expected.grads)
        torch.testing.assert_close(found.grad_norms, expected.grad_norms)
    assert len(graphs) == 1
    placeholders = graphs[0].graph.find_nodes(op="placeholder")
    sizes = [size for node in placeholders for size in node.meta["val"].shape]
    assert any(isinstance(size, torch.SymInt) for size in sizes)


def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.conv2d(x, params["w"], padding=1).square().sum()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", every(2, USES, lambda case: case.name))
def test_positions_in_parts(
    case: RuleCase, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: each product cut into as many as there are positions."""
    cut: list[int] = []

    def parts(outer: Outer, device: torch.device) -> int:
        cut.append(outer.right.shape[1])
        return cut[-1]

    monkeypatch.setattr(methods, "_parts", parts)
    monkeypatch.setitem(unfolding._AT_ONCE, "cpu", 1 << 40)
    assert_rule_matches_reference(case)
    assert cut or case.name in {"1x1", "one pixel, strided", "frozen weight"}


@pytest.mark.parametrize(
    ("products_of", "parts"),
    [
        ((32, 64, 4096, 27), 8),  # 64 blocks
        ((256, 64, 4096, 27), 1),
        ((32, 32, 1024, 27), 8),  # a ninth would leave fewer than 128 positions
        ((64, 32, 1024, 27), 8),
        ((32, 32, 1000, 27), 4),
        ((32, 32, 1001, 27), 1),
        ((32, 256, 256, 1152), 1),
    ],
)
def test_a_gpu_is_kept_busy(products_of: tuple[int, int, int, int], parts: int) -> None:
    count, rows, positions, columns = products_of
    left = torch.empty(count, positions, rows, device="meta")
    right = torch.empty(count, positions, columns, device="meta")
    outer = Outer(left, right, torch.Size((rows, columns)))
    assert methods._parts(outer, torch.device("cuda", 0)) == parts
    assert methods._parts(outer, torch.device("cpu")) == 1


@pytest.mark.parametrize(("most", "taken"), [(5, [4, 3]), (1, [4, 3]), (7, [7])])
def test_parts_are_as_large_as_they_may_be(
    most: int, taken: list[int], products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, w = (
        torch.randn(7, 2, 5, 5, dtype=torch.float64),
        torch.randn(3, 2, 3, 3, dtype=torch.float64),
    )
    gradient = clipgrad.clipped_grad(
        loss, max_grad_norm=1.0, performance=Performance(strategy="kept")
    )
    whole = gradient({"w": w}, x)
    assert products == [7]
    products.clear()
    monkeypatch.setattr(methods, "_multiply_into_result", joined)
    monkeypatch.setattr(unfolding, "_AT_ONCE", {"cpu": most * 2 * 9 * 25})
    parts = gradient({"w": w}, x)
    assert products == taken
    torch.testing.assert_close(parts.grads, whole.grads)
    torch.testing.assert_close(parts.grad_norms, whole.grad_norms)


def test_a_graph_holds_the_product_whole(
    products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the setting would be looked at when the graph is made, and a compiler would take plain products.

    ``microbatch_size`` fixes the number of rows, as a GPU does.
    """
    product = partial(float32_precision.bmm, precision="tf32")
    monkeypatch.setattr(methods, "convolution_product", product)
    modules: list[GraphModule] = []

    def compile_graph(module: GraphModule, mode: str, arguments: object) -> GraphModule:
        modules.append(module)
        return module

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    x, w = (
        torch.randn(4, 2, 5, 5, dtype=torch.float64),
        torch.randn(3, 2, 3, 3, dtype=torch.float64),
    )
    expected = clipgrad.clipped_grad(
        loss, max_grad_norm=1.0, performance=Performance(strategy="kept")
    )({"w": w}, x)
    compiled = clipgrad.clipped_grad(
        loss, max_grad_norm=1.0, performance=Performance(strategy="kept"), compile=True, microbatch_size=4,
    )  # fmt: skip
    torch.testing.assert_close(compiled({"w": w}, x).grads, expected.grads)
    assert any(node.target is torch.ops.clipgrad.bmm.default for node in modules[0].graph.nodes)


@pytest.mark.parametrize("at_once", [1 << 20, 1])
@pytest.mark.parametrize(
    ("taps", "padding", "dilation"),
    [
        ((3,), (1,), (1,)),
        ((4,), (0,), (2,)),
        ((3, 3), (1, 1), (1, 1)),
        ((3, 2), (2, 1), (1, 1)),
        ((3, 5), (0, 8), (3, 2)),
        ((2, 3, 2), (1, 0, 1), (1, 2, 1)),
    ],
)
def test_the_output_gradient_unfolded(
    taps: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(unfolding._AT_ONCE, "cpu", at_once)
    axes, shape = len(taps), torch.Size((2, 5, *taps))
    geometry = Geometry((1,) * axes, padding, dilation, 1)
    assert (
        gradient_module.fastest_method(torch.device("cpu"), shape, geometry).__name__ == "by_rows"
    )
    x = torch.randn(7, 5, *(9, 10, 8)[:axes], dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = geometry.convolve(x, weight, None)
    gradient = torch.randn_like(y)
    found = methods.by_rows(gradient, x, shape, geometry)
    for sample in range(7):
        (expected,) = torch.autograd.grad(y[sample], weight, gradient[sample], retain_graph=True)
        torch.testing.assert_close(found[sample], expected)


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        ((3, 32, 3, 3), Geometry((2, 1), (1, 1), (1, 1), 1)),
        ((3, 32, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1, transposed=True)),
        ((4, 16, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 2)),
        ((3, 32, 3, 3), Geometry((1, 1), (1, 3), (1, 1), 1)),  # outputs that saw padding alone
        ((8, 32, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
        ((3, 2, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)),
    ],
)
def test_where_the_output_gradient_is_not_unfolded(
    shape: tuple[int, ...], geometry: Geometry
) -> None:
    chosen = gradient_module.fastest_method(torch.device("cpu"), shape, geometry)
    assert chosen.__name__ != "by_rows"


@pytest.mark.parametrize(
    ("capability", "way"),
    [("AVX512", "by_groups"), ("AVX2", "by_patches"), ("SVE256", "by_groups")],
)
def test_a_processor_without_avx512_unfolds_more(
    capability: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    cpu = torch.device("cpu")
    assert gradient_module.fastest_method(cpu, (128, 64, 3, 3), geometry).__name__ == way
    assert gradient_module.fastest_method(cpu, (64, 128, 3, 3), geometry).__name__ == "by_groups"
