"""Half-precision factors: products, norms and clipped sums, and what one sample may contribute.

A GPU multiplies half-precision factors as they are. On the CPU a fixture takes the same way, with widened products at
its end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.engine.reference import clipped_sum, per_sample_gradients_by_loop
from clipgrad.kernels import float32_precision, half_products
from clipgrad.kernels.half_products import HALF, in_terms, product
from clipgrad.kernels.half_products import half_products as half_products_node
from clipgrad.rules import ghost
from clipgrad.rules import linear as linear_module
from clipgrad.rules.canonical import Outer, PerSample
from clipgrad.rules.ghost import ghost_norms_squared
from tests.compiled.conftest import Graphs, graphs  # noqa: F401 - a fixture
from tests.float32_settings import SETTINGS, setting
from tests.nightly import some
from tests.test_sensitivity import KINDS

STRATEGIES = ("auto", "kept", "ghost")
Params = dict[str, Tensor]


@pytest.fixture(params=["widened", "as on a GPU"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply half-precision factors."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    return str(request.param)


@pytest.mark.parametrize("dtype", HALF)
def test_products_lose_nothing(dtype: torch.dtype, way: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 70).to(dtype), torch.randn(3, 70, 4).to(dtype)
    for found in (product(a, b), half_products_node([a], [b])):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_products_of_other_pairs() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(product(a, b), torch.bmm(a, b))
    assert product(a.double(), b.double()).dtype is torch.float64


@pytest.mark.parametrize("count", [1, 2, 3])
def test_terms_hold_eight_digits_each(count: int) -> None:
    torch.manual_seed(0)
    wide = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    terms = in_terms(wide, count)
    assert {term.dtype for term in terms} == {torch.bfloat16}
    error = (sum(term.double() for term in terms) - wide.double()).abs()
    assert bool((error <= 2.0 ** (-8 * count) * wide.double().abs()).all())


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 5)])
def test_a_weighted_sum_of_bfloat16_gradients(shape: tuple[int, ...], way: str) -> None:
    torch.manual_seed(0)
    gradient, factors = torch.randn(shape).bfloat16(), torch.rand(4)
    expected = (gradient.double() * factors.double().view(-1, *[1] * (len(shape) - 1))).sum(0)
    for layout in (gradient, gradient.mT.contiguous().mT if len(shape) > 2 else gradient):
        found = PerSample(layout).weighted_sum(factors)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (3, 7, 4, 5), (1, 2, 1, 1), (0, 3, 4, 5)])
@pytest.mark.parametrize("dtype", HALF)
def test_uses_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype, way: str) -> None:
    """Per-sample gradients, weighted sum and norms of one pair of factors, in float64 by hand."""
    torch.manual_seed(0)
    samples, positions, rows, columns = shape
    left = torch.randn(samples, positions, rows).to(dtype)
    right = torch.randn(samples, positions, columns).to(dtype)
    factors = torch.rand(samples)
    use = Outer(left, right, torch.Size([rows, columns]))
    each = left.double().mT @ right.double()
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(use.per_sample().double(), each, **close)
    total = (each * factors.double()[:, None, None]).sum(0)
    split = {"rtol": 1e-4, "atol": 1e-4} if use.sums_in_bfloat16 else close
    torch.testing.assert_close(use.weighted_sum(factors).double(), total, **split)
    kept = use.stored()
    if use.sums_in_bfloat16 and positions > 1:
        assert kept.dtype is torch.bfloat16
        torch.testing.assert_close(kept.double(), each, rtol=2.0**-8, atol=1e-5)
    else:
        torch.testing.assert_close(kept.double(), each, **close)
    norms = each.square().sum((1, 2))
    torch.testing.assert_close(ghost_norms_squared([use]).double(), norms, **close)


def network(p: Params, x: Tensor) -> Tensor:
    """Two layers with a norm between, a bias, and a weight that is used twice."""
    h = F.layer_norm(F.linear(x, p["in"], p["bias"]), (4,), p["gain"])
    return (F.linear(h, p["out"]).float().square() + F.linear(h.flip(1), p["out"]).float()).sum()


SHAPES = {"in": (4, 6), "bias": (4,), "gain": (4,), "out": (3, 4)}


def make(dtype: torch.dtype, samples: int) -> tuple[Params, Tensor]:
    torch.manual_seed(0)
    params = {name: torch.randn(*shape).to(dtype) for name, shape in SHAPES.items()}
    return params, torch.randn(samples, 5, 6).to(dtype)


@pytest.mark.parametrize(
    ("strategy", "compiled", "poison"),
    some(3, ["kept", "ghost"], [False, True], [torch.nan, torch.inf, 6e4]),
)
def test_a_dropped_sample_leaves_no_trace(
    strategy: str,
    compiled: bool,
    poison: float,
    way: str,
    graphs: Graphs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A NaN, an inf or a float16 overflow; the graph does as on a GPU and asks nobody whether there is one."""
    if way == "as on a GPU":
        monkeypatch.setattr("clipgrad.compiled.trace.checks_finite_on_host", lambda device: False)
    params, x = make(torch.float16, 4)
    x[2] = poison
    gradient = clipped_grad(
        network, max_grad_norm=1.0, compile=compiled, performance=Performance(strategy=strategy)
    )
    found = gradient(params, x)
    assert found.num_nonfinite == 1
    others = gradient(params, x, is_padding=torch.arange(4) == 2)
    for name, total in found.grads.items():
        assert total.isfinite().all()
        assert torch.equal(total, others.grads[name])
        assert total.any()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_one_sample_contributes_at_most_the_norm(
    kind: str, dtype: torch.dtype, autocast: bool, way: str
) -> None:
    """To one part in 1e5: factors are exact, and norms and sums are float32's."""
    params, x = make(torch.float32 if autocast else dtype, 1)
    x = KINDS[kind](x[0].float()).to(x.dtype)[None]
    for norm in (1e-3, 1.0, 100.0):
        for strategy in STRATEGIES:
            gradient = clipped_grad(
                network, max_grad_norm=norm, performance=Performance(strategy=strategy)
            )
            with torch.autocast("cpu", dtype, enabled=autocast):
                sums = gradient(params, x).grads
            total = torch.cat([each.double().flatten() for each in sums.values()]).norm()
            assert total <= norm * (1 + 1e-5), strategy


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_cancelling_positions(
    size: float, gap: int, strategy: str, dtype: torch.dtype, way: str
) -> None:
    """Two positions differ in the last digits of a few elements, and their gradients all but cancel."""
    generator = torch.Generator().manual_seed(0)
    first = (size * torch.randn(10, 64, generator=generator)).to(dtype)
    last = first.clone()
    step = torch.finfo(dtype).eps * last[:, :gap].abs()
    last[:, :gap] = last[:, :gap] + step
    x = torch.stack([first, last], 1)
    params = {"w": torch.randn(64, 64, generator=generator).to(dtype)}

    def loss(p: Params, x: Tensor) -> Tensor:
        return F.linear(x, p["w"]).float().diff(dim=1).sum()

    gradient = clipped_grad(loss, max_grad_norm=1e-2, performance=Performance(strategy=strategy))
    for i in range(len(x)):
        found = gradient(params, x[i : i + 1])
        exact = 8 * (last[i].double() - first[i].double()).norm()  # 64 rows of the same difference
        assert found.grad_norms[0].double() >= exact * (1 - 1e-5)
        assert found.grads["w"].double().norm() <= 1e-2 * (1 + 1e-2)  # as in float32


@pytest.fixture
def one_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does in a process that sets the precision of float32 products to "medium"."""
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    monkeypatch.setattr(float32_precision, "allows_bfloat16", lambda: True)


@pytest.mark.parametrize("name", SETTINGS)
def test_pytorchs_setting_chooses_the_terms(name: str) -> None:
    one = {"medium", "backends bf16", "explicit and inherited"}
    with setting(name):
        assert half_products.terms_of_scaled_factors() == (1 if name in one else 2)


@pytest.mark.usefixtures("one_term")
@pytest.mark.parametrize("kind", KINDS)
def test_with_one_term_a_sample_exceeds_the_norm_by_one_rounding(kind: str) -> None:
    params, x = make(torch.bfloat16, 1)
    x = KINDS[kind](x[0].float()).to(x.dtype)[None]
    exact = clipped_grad(network, max_grad_norm=1.0, performance=Performance(strategy="kept"))
    for norm in (1e-3, 1.0, 100.0):
        gradient = clipped_grad(
            network, max_grad_norm=norm, performance=Performance(strategy="ghost")
        )
        found = gradient(params, x)
        total = torch.cat([each.double().flatten() for each in found.grads.values()]).norm()
        assert total <= norm * (1 + 2.0**-8 + 1e-5)
        least = exact(params, x).grad_norms[0].nan_to_num(0.0, 0.0).clamp(max=norm) / 2
        assert total >= least, "clipped far more than the rounding explains"


@pytest.mark.usefixtures("one_term")
@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_with_one_term_cancelling_positions_exceed_it_by_an_eighth(size: float, gap: int) -> None:
    generator = torch.Generator().manual_seed(0)
    first = (size * torch.randn(10, 64, generator=generator)).bfloat16()
    last = first.clone()
    last[:, :gap] = last[:, :gap] + 2.0**-7 * last[:, :gap].abs()
    params = {"w": torch.randn(64, 64, generator=generator).bfloat16()}
    weights = torch.rand(64, generator=generator)  # scaled, these are rounded in each position

    def loss(p: Params, x: Tensor) -> Tensor:
        return (F.linear(x, p["w"]).float().diff(dim=1) * weights).sum()

    for norm in (1e-2, 0.7e-2, 1.0):
        gradient = clipped_grad(loss, max_grad_norm=norm, performance=Performance(strategy="ghost"))
        for i in range(len(first)):
            found = gradient(params, torch.stack([first[i], last[i]])[None])
            assert found.grads["w"].double().norm() <= norm * 1.125


def tied(p: Params, ids: Tensor) -> Tensor:
    """A head that is tied to the embedding, used twice, and a head of its own behind it."""
    h = F.embedding(ids, p["table"])
    logits = F.linear(h, p["table"]) * 0.1
    return (logits.float().sin() + (h @ p["w"]).float() ** 2).sum() + F.linear(
        h.tanh(), p["table"]
    ).float().sum()


def make_tied(first: int, second: int, dtype: torch.dtype) -> Params:
    torch.manual_seed(0)
    return {
        "table": torch.randn(first, second).to(dtype),
        "w": torch.randn(second, first).to(dtype),
    }


@pytest.mark.parametrize("first", [8, 13])
@pytest.mark.parametrize("second", [8, 5])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("strategy", ["kept", "ghost"])
@pytest.mark.parametrize("wide", [1, 4096])
def test_zeros_behind_odd_axes(
    first: int,
    second: int,
    dtype: torch.dtype,
    strategy: str,
    wide: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An odd vocabulary or width: products read aligned memory, and nobody sees the zeros."""
    monkeypatch.setattr(linear_module, "_WIDE_OUTPUT", wide)
    params = make_tied(first, second, dtype)
    ids = torch.randint(first, (3, 6))
    gradient = clipped_grad(tied, max_grad_norm=1.0, performance=Performance(strategy=strategy))
    expected = gradient(params, ids)
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    found = gradient(params, ids)
    slack = 1e-2 if strategy == "kept" and dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.grads, expected.grads, rtol=slack, atol=slack / 10)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms, rtol=slack, atol=0)


def head_and_bias(p: Params, x: Tensor) -> Tensor:
    """A loss over flat logits, which it may write to, under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(x.tanh(), p["w"], p["b"])
    flat = logits.view(-1)
    return flat.mul_(0.5).float().sin().sum() + logits.float().logsumexp(-1).sum()


@pytest.mark.parametrize("axes", [(), (6,), (2, 3)])
@pytest.mark.parametrize("compile", [False, True])
def test_a_wide_layer_of_odd_width(
    axes: tuple[int, ...],
    compile: bool,
    graphs: Graphs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its products read and write aligned rows, and one tensor with zeros is the gradient for all of them."""
    monkeypatch.setattr(linear_module, "_WIDE_OUTPUT", 13)
    torch.manual_seed(0)
    params = {"w": torch.randn(13, 8), "b": torch.randn(13)}
    batch = torch.randn(3, *axes, 8)
    options: dict[str, Any] = {"max_grad_norm": 1.0, "compile": compile, "microbatch_size": 3}
    expected = clipped_grad(head_and_bias, **options)(params, batch)
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    found = clipped_grad(head_and_bias, **options)(params, batch)  # compiled anew
    torch.testing.assert_close(found.grads, expected.grads, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms, rtol=1e-2, atol=0)
    if compile:
        nodes = graphs.modules[-1].graph.nodes
        products = [
            node for node in nodes if "mm" in str(node.target) or "product" in str(node.target)
        ]
        read = {factor.meta["val"].shape for node in products for factor in node.all_input_nodes}
        assert products
        assert not any(13 in shape for shape in read), read
        pads = [node for node in nodes if "pad" in str(node.target)]
        assert {node.args[0].meta["val"].shape for node in pads} == {(13, 8), (13,)}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_wide_layer_with_a_frozen_sparse_weight(
    layout: torch.layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch multiplies by a sparse weight, and pads none."""
    monkeypatch.setattr(linear_module, "_WIDE_OUTPUT", 13)
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    frozen = torch.randn(13, 5).relu()
    sparse = frozen.to_sparse(layout=layout)

    def loss(w: Tensor, x: Tensor, head: Tensor) -> Tensor:
        return F.linear((x @ w).tanh(), head).sin().sum()

    w, x = torch.randn(4, 5), torch.randn(3, 6, 4)
    found = clipped_grad(lambda w, x: loss(w, x, sparse), max_grad_norm=1.0)(w, x)
    expected = clipped_grad(lambda w, x: loss(w, x, frozen), max_grad_norm=1.0)(w, x)
    torch.testing.assert_close(found.grads, expected.grads)
    torch.testing.assert_close(found.grad_norms, expected.grad_norms)


@pytest.mark.parametrize("strategy", ["auto", "kept", "ghost"])
@pytest.mark.parametrize("positions", [1, 6, 300])
def test_a_tied_embedding_beside_kept_gradients(positions: int, strategy: str) -> None:
    """The embedding adds to a few rows of the head's gradient, also where both all but cancel, in float64."""
    params = make_tied(7, 5, torch.float64)
    ids = torch.randint(7, (4, positions))
    _, each = per_sample_gradients_by_loop(tied, params, ids)
    expected, norms = clipped_sum(each, 1.0)
    gradient = clipped_grad(tied, max_grad_norm=1.0, performance=Performance(strategy=strategy))
    found = gradient(params, ids)
    torch.testing.assert_close(found.grad_norms, norms, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.grads, expected, rtol=1e-9, atol=1e-9)


def test_a_tied_embedding_that_cancels_is_clipped_enough() -> None:
    """The head's gradient is the negative of the embedding's, up to float32's rounding."""
    torch.manual_seed(0)
    table = torch.randn(9, 16)

    def loss(p: Params, ids: Tensor, x: Tensor) -> Tensor:
        head = F.linear(x[0], p["table"])[torch.arange(2), ids[0]].sum()
        return head - (F.embedding(ids, p["table"]) * (x * (1 + 1e-7))).sum()

    for seed in range(20):
        torch.manual_seed(seed)
        batch = torch.randint(9, (1, 2)), 1e4 * torch.randn(1, 2, 16)
        for strategy in STRATEGIES:
            gradient = clipped_grad(
                loss, max_grad_norm=1e-3, performance=Performance(strategy=strategy)
            )
            total = gradient({"table": table}, *batch).grads["table"]
            assert total.norm() <= 1e-3 * 1.01


# How much products of float32 factors round on CUDA: in TF32 as "medium" allows, or not with fp32_precision = "bf16".
@pytest.mark.parametrize("rounding", [2.0**-10, 0.0])
def test_a_norm_allows_for_one_term_where_one_use_of_two_is_in_bfloat16(
    rounding: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other use, in float32, all but cancels it."""
    monkeypatch.setattr(half_products, "_ON_EVERY_DEVICE", True)
    monkeypatch.setattr(float32_precision, "allows_bfloat16", lambda: True)
    monkeypatch.setattr(ghost, "product_rounding", lambda _: rounding)
    largest = 0.0
    for distance in (-1e-2, -(2.0**-6), -5e-3, 5e-3, 2.0**-6, 1e-2):
        ones = torch.ones(1, 64, 1)
        lowered = Outer(ones.bfloat16(), ones.bfloat16(), torch.Size((1, 1)))
        other = Outer(-(1 + distance) * ones, ones, torch.Size((1, 1)))
        norm = ghost_norms_squared([lowered, other]).sqrt()
        for step in range(32):
            factor = 2.0 ** (step / 32) / norm
            added = lowered.weighted_sum(factor) + other.weighted_sum(factor)
            largest = max(largest, abs(float(added)) / 2.0 ** (step / 32))
    assert largest <= 1.125
