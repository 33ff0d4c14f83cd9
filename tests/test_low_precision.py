"""Whatever a process allows to float32 products, a sample contributes no more than docs/guarantees.md says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode

from clipgrad import Performance, clipped_grad
from clipgrad.compiled import backend
from clipgrad.rules import OneHot, Outer, PerSample
from clipgrad.rules.ghost import ghost_norms_squared, norms_squared_with_rows
from clipgrad.rules.gram import gram_sums
from tests.cancelling_losses import MANY, MODELS, PLANTED, RANDOM, SAMPLES, Model, Params, tied
from tests.float32_settings import SETTINGS, all_reads, computes_in_bfloat16, own_settings, setting
from tests.kernels import needs_cuda
from tests.nightly import pairs, some

needs_bfloat16 = pytest.mark.skipif(
    not computes_in_bfloat16(), reason="needs a CPU that takes bfloat16 for float32 products"
)
LOWERED = ["medium", "high", "mkldnn bf16", "backends bf16", "convolutions bf16"]
# What the guide allows ordinarily, and what was found where random positions all but cancel.
ORDINARY, CANCELLING = 1e-5, 1e-4


def _draw(model: Model, distance: float) -> tuple[Params, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return {"w": torch.randn(model.weight, generator=generator)}, model.batch(distance, generator)


def one(norms: Tensor | Mapping[str, Tensor]) -> Tensor:
    """The norms of the only clipping group."""
    assert isinstance(norms, Tensor)
    return norms


def contributions(
    model: str | Model, distance: float, strategy: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """What each sample alone adds, and the norms that were found; other samples of the batch are padding."""
    model = MODELS[model] if isinstance(model, str) else model
    params, batch = _draw(model, distance)
    gradient = clipped_grad(
        model.loss,
        max_grad_norm=1e-3,
        performance=Performance(strategy=strategy),
        **options,
    )
    found, norms = [], torch.empty(0)
    for sample in range(SAMPLES):
        result = gradient(params, *batch, is_padding=torch.arange(SAMPLES) != sample)
        found.append(result.grads["w"].double().norm() / 1e-3)
        norms = one(result.grad_norms)
    return torch.stack(found), norms


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that were made, which run as they are: a compiler takes seconds."""
    made: list[GraphModule] = []

    def compile_graph(module: GraphModule, mode: str, arguments: object) -> GraphModule:
        made.append(module)
        return module

    monkeypatch.setattr(backend, "compile_graph", compile_graph)
    return made


@needs_bfloat16
@pytest.mark.parametrize(
    ("model", "lowered", "strategy"), pairs(list(MODELS), LOWERED, ["ghost", "kept"])
)
def test_what_cancels_is_clipped_enough(model: str, lowered: str, strategy: str) -> None:
    for distance in (1.0, 0.1, 0.01) if model in RANDOM else (0.0,):
        with setting(lowered):
            found, _ = contributions(model, distance, strategy)
        assert found.max() <= 1 + (CANCELLING if model in RANDOM else ORDINARY), distance


@needs_bfloat16
@pytest.mark.parametrize(("model", "lowered"), some(2, PLANTED, LOWERED))
def test_what_cancels_is_clipped_enough_in_a_graph(
    model: str, lowered: str, graphs: list[GraphModule]
) -> None:
    with setting(lowered):
        found, _ = contributions(model, 0.0, "ghost", compile=True)
    assert found.max() <= 1 + ORDINARY
    assert graphs


@needs_bfloat16
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("model", "lowered"), pairs(list(MANY), LOWERED))
def test_norms_of_many_positions_are_not_raised(
    model: str, lowered: str, compile: bool, graphs: list[GraphModule]
) -> None:
    """Their gradients are independent, so a bound by the sum of their norms would be far too large."""
    with setting("highest"):
        expected, norms = contributions(MANY[model], 0.0, "ghost")
    with setting(lowered):
        found, lowered_norms = contributions(MANY[model], 0.0, "ghost", compile=compile)
    torch.testing.assert_close(lowered_norms, norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@needs_bfloat16
@pytest.mark.parametrize("model", RANDOM)
@pytest.mark.parametrize("lowered", ["default", *LOWERED])
def test_what_does_not_cancel(model: str, lowered: str) -> None:
    """Norms are those of float64, and contributions are of the clipping norm."""
    params, batch = _draw(MODELS[model], 3.0)
    wide = [each.double() if each.is_floating_point() else each for each in batch]
    exact = clipped_grad(MODELS[model].loss, max_grad_norm=1.0)
    expected = exact({"w": params["w"].double()}, *wide).grad_norms
    with setting(lowered):
        found, norms = contributions(model, 3.0, "ghost")
    torch.testing.assert_close(norms.double(), one(expected), rtol=1e-5, atol=0)
    assert found.max() <= 1 + ORDINARY


@needs_bfloat16
@pytest.mark.parametrize("lowered", LOWERED)
@pytest.mark.parametrize("shape", [(4, 16, 64, 64), (2, 300, 96, 80), (40, 64, 256, 768)])
def test_gram_matrices_are_those_of_float64(lowered: str, shape: tuple[int, int, int, int]) -> None:
    samples, positions, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(samples, positions, rows, generator=generator)
    right = torch.randn(samples, positions, columns, generator=generator)
    with setting(lowered):
        norms, lengths = gram_sums(left, right)
    expected = (left.double().mT @ right.double()).square().sum((1, 2))
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        lengths.left.double(), left.double().norm(dim=2).sum(1), rtol=1e-5, atol=0
    )


class Products(TorchDispatchMode):
    """Reads the setting of the CPU at each matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name in ("aten::bmm", "aten::mm", "aten::addmv", "aten::dot"):
            self.settings.append(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


def _uses() -> tuple[Outer, Outer]:
    ids = torch.randint(8, (3, 6))
    hot = Outer(OneHot(ids, 8), torch.randn(3, 6, 5), torch.Size([8, 5]))
    dense = Outer(torch.randn(3, 6, 8), torch.randn(3, 5, 6).mT, torch.Size([8, 5]))
    return hot, dense


NORMS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: ghost_norms_squared([_uses()[1]]),
    "one-hot": lambda: ghost_norms_squared([_uses()[0]]),
    "both": lambda: ghost_norms_squared(_uses()),
    "kept and one-hot": lambda: norms_squared_with_rows(torch.randn(3, 8, 5), [_uses()[0]]),
}


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("lowered", LOWERED[:4])
def test_products_of_norms_are_full(norms: str, lowered: str) -> None:
    """Also where this CPU computes in float32 anyway."""
    with setting(lowered), Products() as seen:
        NORMS[norms]()
    assert seen.settings
    assert set(seen.settings) == {"ieee"}


@pytest.mark.parametrize("model", RANDOM)
def test_a_graph_holds_such_products_whole(model: str, graphs: list[GraphModule]) -> None:
    """But only where a product may round: by default a compiler sees the products."""
    for name in ("default", "medium"):
        with setting(name):
            contributions(model, 1.0, "ghost", compile=True)
    targets = [{str(node.target) for node in graph.graph.nodes} for graph in graphs]
    by_default, lowered = (
        {each for each in found if each.startswith("clipgrad.")} for found in targets
    )
    ours = {
        "clipgrad.gram_sums.default", "clipgrad.bmm.default", "clipgrad.full_vecdot.default",
        "clipgrad.full_weight_gradient.default",
    }  # fmt: skip
    assert not by_default & ours
    assert lowered & ours
    of_sum = "full_weight_gradient" if model == "convolution" else "bmm"
    assert f"clipgrad.{of_sum}.default" in lowered
    assert "aten.bmm.default" not in targets[1]


def test_such_a_graph_serves_batches_of_every_size(graphs: list[GraphModule]) -> None:
    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(F.linear(F.gelu(F.linear(x, p["w"])), p["u"]).sum(1), y)

    params = {"w": torch.randn(48, 32), "u": torch.randn(5, 48)}
    clipped = clipped_grad(
        loss, max_grad_norm=0.5, compile=True, performance=Performance(strategy="ghost")
    )
    with setting("medium"):
        for size in (8, 5, 11):
            clipped(params, torch.randn(size, 4, 32), torch.randn(size, 5))
    (graph,) = graphs
    found = graph.graph.find_nodes(op="call_function", target=torch.ops.clipgrad.gram_sums.default)
    assert found
    assert all(isinstance(node.meta["val"].shape[1], torch.SymInt) for node in found)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(
    ("compile", "device"),
    [
        (False, "cpu"),
        (True, "cpu"),
        pytest.param(False, "cuda", marks=[pytest.mark.cuda, needs_cuda]),
    ],
)
def test_settings_stay_as_they_are(
    name: str, compile: bool, device: str, graphs: list[GraphModule]
) -> None:
    """No step raises, whichever family of settings was used, or changes what it found."""
    params, batch = _draw(MODELS["tied"], 3.0)
    params, batch = {"w": params["w"].to(device)}, tuple(each.to(device) for each in batch)
    wide = [each.double() if each.is_floating_point() else each for each in batch]
    gradient = clipped_grad(tied, max_grad_norm=1.0, compile=compile)
    expected = clipped_grad(tied, max_grad_norm=1.0)({"w": params["w"].double()}, *wide)
    with setting(name):
        before, own = all_reads(), own_settings()
        result = gradient(params, *batch)
        assert all_reads() == before
        assert own_settings() == own
    torch.testing.assert_close(
        one(result.grad_norms).double(), one(expected.grad_norms), rtol=1e-2, atol=1e-6
    )
    torch.testing.assert_close(
        result.grads["w"].double(), expected.grads["w"], rtol=3e-2, atol=1e-2
    )


@needs_bfloat16
@pytest.mark.slow
@pytest.mark.parametrize("lowered", ["medium", "backends bf16"])
def test_compiled(lowered: str) -> None:
    with setting(lowered):
        found, _ = contributions("planted linear", 0.0, "ghost", compile=True)
    assert found.max() <= 1 + ORDINARY


@needs_bfloat16
@pytest.mark.parametrize("lowered", LOWERED)
def test_kept_gradients_are_summed_in_full(lowered: str) -> None:
    """Else what the sum rounds could exceed a norm, which rows of a tied embedding make small."""
    gradients, factors = torch.randn(40, 30, 20), torch.rand(40)
    with setting(lowered):
        found = PerSample(gradients).weighted_sum(factors)
    expected = torch.einsum("b,bij->ij", factors.double(), gradients.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("lowered", ["default", "medium", "convolutions bf16"])
def test_norms_are_of_what_is_summed_where_factors_do_not_join(
    lowered: str, compile: bool, graphs: list[GraphModule]
) -> None:
    """One weight in convolutions of one group and of two, whose gradients are forced to be factors."""
    x, w = torch.randn(4, 8, 12), torch.randn(8, 4, 3)

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return F.conv1d(x[:, :4], w).sum() + F.conv1d(x, w, groups=2).square().sum()

    gradient = clipped_grad(
        loss, max_grad_norm=1e-2, performance=Performance(strategy="ghost"), compile=compile
    )
    with setting(lowered):
        for sample in range(4):
            found = gradient(w, x, is_padding=torch.arange(4) != sample)
            assert abs(float(found.grads.double().norm()) - 1e-2) < 1e-6
