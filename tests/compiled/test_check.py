"""A graph that does not compute what the eager step computes is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from clipgrad import DPOptimizer, clipped_grad
from clipgrad.clipping import Clipping
from clipgrad.compiled import trace as trace_module
from clipgrad.errors import CompileMismatchError
from tests.compiled.conftest import Graphs
from tests.nightly import chosen
from tests.small_mlp import make_batch, make_params, mlp

Results = list[Tensor]


def spoiled(change: Callable[[Results], Any]) -> Callable[[GraphModule], Callable[..., Results]]:
    """A backend whose results are changed; in ``mlp`` they are four sums, values, norms, flags."""

    def alter(module: GraphModule) -> Callable[..., Results]:
        def run(*flat: Tensor) -> Results:
            results = [result.clone() for result in module(*flat)]
            change(results)
            return results

        return run

    return alter


CHANGES: dict[str, tuple[Callable[[Results], Any], str]] = {
    "a sum scaled": (lambda r: r[0].mul_(1.01), "clipped sum of 'in.w'"),
    "a sum lost": (lambda r: r[3].zero_(), "clipped sum of 'gain'"),
    "a sum NaN": (lambda r: r[1].fill_(torch.nan), "clipped sum of 'in.b'"),
    "a norm too small": (lambda r: r[5][2].mul_(0.9), "norms"),
    "a loss": (lambda r: r[4][0].add_(1), "losses"),
    "a flag": (lambda r: r[6][0].fill_(True), "which samples are finite"),
    "a dtype": (lambda r: r.__setitem__(0, r[0].float()), "clipped sum of 'in.w'"),
}


@pytest.mark.parametrize("case", chosen(CHANGES, {"a sum scaled", "a sum NaN"}))
def test_difference_is_seen(case: str, graphs: Graphs) -> None:
    change, message = CHANGES[case]
    graphs.alter = spoiled(change)
    gradient = clipped_grad(mlp, max_grad_norm=0.5, compile=True)
    for _ in range(2):  # it is no better the second time
        with pytest.raises(CompileMismatchError, match=message):
            gradient(make_params(), *make_batch())


def test_clipping_dropped_by_the_compiler_is_seen(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bug that matters most, planted where it would arise: while the graph is made."""
    trace = trace_module.trace

    def without_clipping(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Clipping, "factors", lambda self, norms, group: torch.ones_like(norms))
            return trace(*args)

    monkeypatch.setattr("clipgrad.compiled.compiler.trace", without_clipping)
    with pytest.raises(CompileMismatchError, match="clipped sum"):
        clipped_grad(mlp, max_grad_norm=0.5, compile=True)(make_params(), *make_batch())


def test_nothing_is_written_on_a_mismatch(graphs: Graphs) -> None:
    graphs.alter = spoiled(lambda r: r[0].add_(1))
    model = nn.Linear(3, 2)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, lambda m, x: m(x).square().mean(),
        max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=4, compile=True,
    )  # fmt: skip
    with pytest.raises(CompileMismatchError):
        optimizer.backward(torch.randn(4, 3))
    assert all(p.grad is None for p in model.parameters())


def test_check_waits_for_a_finite_batch(graphs: Graphs) -> None:
    graphs.alter = spoiled(lambda r: r[0].mul_(2))
    gradient = clipped_grad(mlp, max_grad_norm=0.5, compile=True)
    params, (x, y) = make_params(), make_batch()
    broken = x.clone()
    broken[0] = torch.nan
    gradient(params, broken, y)  # taken from the eager step
    with pytest.raises(CompileMismatchError):
        gradient(params, x, y)


def test_check_draws_no_random_numbers_of_its_own(graphs: Graphs) -> None:
    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mlp(p, nn.functional.dropout(x), y)

    after = []
    for compile in (False, True):
        torch.manual_seed(5)
        clipped_grad(loss, max_grad_norm=0.5, compile=compile)(make_params(), *make_batch())
        torch.manual_seed(7)
        clipped_grad(loss, max_grad_norm=0.5, compile=compile)(make_params(), *make_batch())
        after.append(torch.rand(1))
    assert torch.equal(*after)


def at_a_kink(p: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss whose ReLU and argmax are undecided for the first sample of ``samples_at_a_kink``."""
    hidden = x @ p["first"]
    return (hidden.relu() @ p["last"]).sum() + hidden.sum(), hidden.argmax()


def samples_at_a_kink() -> tuple[dict[str, Tensor], Tensor]:
    first = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.5, 2.0]], dtype=torch.float64)
    last = torch.tensor([[3.0], [4.0]], dtype=torch.float64)
    rows = [[2.0, 2.0, 0.0], [1.0, -1.0, 1.0], [2.0, 0.0, 1.0]]
    return {"first": first, "last": last}, torch.tensor(rows, dtype=torch.float64)


def rounded_otherwise(
    change: Callable[[Results], Any],
) -> Callable[[GraphModule], Callable[..., Results]]:
    """Return a backend that rounds one weight otherwise, so that a unit of the first sample becomes active."""

    def alter(module: GraphModule) -> Callable[..., Results]:
        def run(first: Tensor, *flat: Tensor) -> Results:
            other = first.clone()
            other[0, 1] += 2.0**-52
            results = [result.clone() for result in module(other, *flat)]
            change(results)
            return results

        return run

    return alter


def test_rounding_at_a_kink_is_no_mismatch(graphs: Graphs) -> None:
    params, x = samples_at_a_kink()
    gradients = {
        compile: clipped_grad(at_a_kink, max_grad_norm=0.5, has_aux=True, compile=compile)
        for compile in (False, True)
    }
    graphs.alter = rounded_otherwise(lambda results: None)
    state = torch.get_rng_state()
    found, expected = (gradients[compile](params, x) for compile in (True, False))
    assert torch.equal(torch.get_rng_state(), state)
    difference = (found.grad_norms - expected.grad_norms).abs()
    assert difference[0] > 0.1  # the two are as different as they can be, and both are right
    assert difference[1:].max() < 1e-12
    assert found.aux[0] != expected.aux[0]


AT_A_KINK: dict[str, Callable[[Results], Any]] = {
    "another norm": lambda r: r[3][1].mul_(0.999),
    "this norm by more": lambda r: r[3][0].mul_(3.0),
    "a sum by more": lambda r: r[0].mul_(3.0),
    "another argmax": lambda r: r[6][2].add_(1),
}


@pytest.mark.parametrize("case", chosen(AT_A_KINK, {"another norm"}))
def test_a_kink_hides_no_fault(case: str, graphs: Graphs) -> None:
    params, x = samples_at_a_kink()
    graphs.alter = rounded_otherwise(AT_A_KINK[case])
    with pytest.raises(CompileMismatchError):
        clipped_grad(at_a_kink, max_grad_norm=0.5, has_aux=True, compile=True)(params, x)


def test_a_loss_that_changes_is_no_rounding(graphs: Graphs) -> None:
    """Its eager results differ among themselves as much as from the compiled result."""
    calls: list[int] = []

    def loss(p: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            calls.append(1)
        return mlp(p, x, y) * (1.0 + len(calls))

    with pytest.raises(CompileMismatchError):
        clipped_grad(loss, max_grad_norm=0.5, compile=True)(make_params(), *make_batch())
