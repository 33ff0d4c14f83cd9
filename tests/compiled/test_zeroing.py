"""Zeros for dropped samples where a factor lies, by the real compiler: it decides where that may be."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch
import torch._inductor.config as inductor
from torch import Tensor
from torch.fx import Graph

from clipgrad import Performance, clipped_grad
from clipgrad.compiled import trace as graph_module
from clipgrad.kernels import selection

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated")]


@pytest.fixture(autouse=True)
def zeroed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_module, "checks_finite_on_host", lambda device: False)
    monkeypatch.setattr(selection, "_ZEROED_IN_GRAPHS_ON", {"cpu"})


@pytest.mark.nightly
def test_what_others_read_is_not_written_to() -> None:
    """The batch, and an activation that the loss returns: factors of two weights, with a sample that is dropped."""

    def loss(weights: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x @ weights["in"]
        return (hidden @ weights["out"]).square().sum(), hidden

    weights = {"in": torch.randn(9, 8).double(), "out": torch.randn(8, 2).double()}
    x = torch.randn(5, 3, 9, dtype=torch.float64)
    settings: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "has_aux": True,
        "performance": Performance(strategy="ghost"),
        "keep_batch_dim": False,
    }
    gradient = clipped_grad(loss, **settings, compile=True)
    gradient(weights, x)
    x[1, 0, 0] = torch.inf
    before = x.clone()
    for _ in range(2):
        result, expected = gradient(weights, x), clipped_grad(loss, **settings)(weights, x)
        assert result.num_nonfinite == 1
        torch.testing.assert_close(result.grads, expected.grads)
        torch.testing.assert_close(result.aux, before @ weights["in"], equal_nan=True)
        assert torch.equal(x, before)


@pytest.mark.nightly
def test_a_gradient_that_all_samples_share() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).sum()

    w, x = torch.randn(3, 20, dtype=torch.float64), torch.randn(5, 6, 3, dtype=torch.float64)
    settings: dict[str, Any] = {
        "max_grad_norm": 1.0,
        "performance": Performance(strategy="ghost"),
        "keep_batch_dim": False,
    }
    gradient = clipped_grad(loss, **settings, compile=True)
    gradient(w, x)
    expected = clipped_grad(loss, **settings)(w, x[:4]).grads
    found = gradient(w, x, is_padding=torch.arange(5) == 4).grads
    torch.testing.assert_close(found, expected)


@pytest.mark.nightly
def test_a_factor_that_nobody_reads_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the compiler's own account."""
    copied: list[list[Any]] = []
    passes = importlib.import_module("torch._inductor.fx_passes.post_grad")
    choose = passes.reinplace_inplaceable_ops

    def watched(updater: Any, graph: Graph) -> None:
        choose(updater, graph)
        choices = (node.meta.get("only_clone_these_tensors") for node in graph.nodes)
        copied.extend(choice for choice in choices if choice is not None)

    monkeypatch.setattr(passes, "reinplace_inplaceable_ops", watched)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return ((x @ weights["in"]).tanh() @ weights["out"]).square().sum()

    weights = {"in": torch.randn(4, 20), "out": torch.randn(20, 2)}
    gradient = clipped_grad(
        loss, max_grad_norm=1.0, compile=True, performance=Performance(strategy="ghost")
    )
    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        gradient(weights, torch.randn(5, 3, 4))
    # The output gradient of the first weight, and the input of the second.
    assert copied == [[], []]
