"""Layers with the same input share its Gram matrix in a compiled step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipgrad import Performance, clipped_grad
from clipgrad.compiled import shared_grams
from clipgrad.engine.reference import Params
from clipgrad.rules import gram
from tests.compiled.conftest import Graphs, norms_of_equal_sums

ONE, SEVERAL = torch.ops.clipgrad.gram_sums.default, torch.ops.clipgrad.gram_sums_of_several.default
BATCH, POSITIONS, WIDTH = 4, 5, 3


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_KERNEL_DEVICES", {"cpu"})
    monkeypatch.setattr(gram, "_BY_KERNEL", {torch.float64, torch.bfloat16})
    monkeypatch.setattr(shared_grams, "_DEVICES", {"cpu"})
    monkeypatch.setattr(shared_grams, "HALF", {torch.float64, torch.bfloat16})


def attention(p: Params, x: Tensor) -> Tensor:
    query, key, value = (F.linear(x, p[name]) for name in ("query", "key", "value"))
    mixed = F.scaled_dot_product_attention(query, key, value)
    return F.linear(mixed, p["out"]).square().sum()


def gated(p: Params, x: Tensor) -> Tensor:
    hidden = F.silu(F.linear(x, p["query"])) * F.linear(x, p["key"])
    return F.linear(hidden, p["out"]).square().sum() + F.linear(x.sin(), p["value"]).sum()


def one_after_another(p: Params, x: Tensor) -> Tensor:
    """The second layer's input is the first one's output."""
    hidden = F.linear(F.linear(x, p["query"]).sin(), p["key"])
    return F.linear(hidden, p["out"]).square().sum() + (p["value"] ** 2).sum()


def loss_of_one_weight_twice(p: Params, x: Tensor) -> Tensor:
    return (F.linear(x, p["query"]) * F.linear(x, p["key"]) * F.linear(x, p["query"]).exp()).sum()


def params() -> Params:
    names = ("query", "key", "value", "out")
    return {name: torch.randn(WIDTH, WIDTH, dtype=torch.float64) for name in names}


@pytest.mark.parametrize(
    ("loss", "groups", "alone"),
    [(attention, [3], 1), (gated, [2], 2), (one_after_another, [], 3)],
)
def test_norms_and_sums(
    loss: Callable[..., Tensor], groups: list[int], alone: int, graphs: Graphs
) -> None:
    p, x = params(), torch.randn(BATCH, POSITIONS, WIDTH, dtype=torch.float64)
    step = clipped_grad(
        loss, max_grad_norm=0.5, compile=True, microbatch_size=BATCH,
        performance=Performance(strategy="ghost"),
    )  # fmt: skip
    found = step(p, x)
    norms = norms_of_equal_sums(found, loss, 0.5, p, x)
    torch.testing.assert_close(found.grad_norms, norms)
    (module,) = graphs.modules
    shared = module.graph.find_nodes(op="call_function", target=SEVERAL)
    assert [len(node.args[0]) for node in shared] == groups
    assert len(module.graph.find_nodes(op="call_function", target=ONE)) == alone


def test_a_weight_that_is_used_twice(graphs: Graphs) -> None:
    p, x = params(), torch.randn(BATCH, POSITIONS, WIDTH, dtype=torch.float64)
    p = {name: p[name] for name in ("query", "key")}
    step = clipped_grad(
        loss_of_one_weight_twice, max_grad_norm=0.5, compile=True, microbatch_size=BATCH,
        performance=Performance(strategy="ghost"),
    )  # fmt: skip
    norms_of_equal_sums(step(p, x), loss_of_one_weight_twice, 0.5, p, x)
    assert len(graphs) == 1


def test_layers_under_autocast(graphs: Graphs) -> None:
    def loss(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attention(p, x).float()

    p = {name: value.float() for name, value in params().items()}
    x = torch.randn(BATCH, POSITIONS, WIDTH)
    step = clipped_grad(
        loss, max_grad_norm=0.5, compile=True, microbatch_size=BATCH,
        performance=Performance(strategy="ghost"),
    )  # fmt: skip
    step(p, x)  # is compared with the eager step
    (shared,) = graphs.modules[0].graph.find_nodes(op="call_function", target=SEVERAL)
    assert len(shared.args[0]) == 3
    assert {node.meta["val"].dtype for node in shared.all_input_nodes} == {torch.bfloat16}


def test_factors_that_are_not_known_yet_stay_apart() -> None:
    def function(a: Tensor, right: Tensor) -> Tensor:
        first = torch.ops.clipgrad.gram_sums(a, right).sum(2)
        later = torch.ops.clipgrad.gram_sums(a * first.sum(), right).sum(2)
        return first + later + torch.ops.clipgrad.gram_sums(a, a).sum(2)

    a, right = torch.randn(2, BATCH, POSITIONS, WIDTH, dtype=torch.float64)
    module = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(a, right)
    expected = function(a, right)
    shared_grams.share_grams(module)
    module.graph.lint()
    assert not module.graph.find_nodes(op="call_function", target=SEVERAL)
    torch.testing.assert_close(module(a, right), expected)
