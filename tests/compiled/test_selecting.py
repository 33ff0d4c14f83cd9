"""Graphs that take dropped samples out by themselves, as those of a GPU do: nobody asks, and nothing waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgrad import DPOptimizer, Performance, clipped_grad
from clipgrad.compiled import trace
from clipgrad.compiled.compiled_step import CompiledStep
from clipgrad.compiled.eager import EagerStep
from clipgrad.kernels import selection
from tests.architectures import ARCHITECTURES
from tests.compiled.conftest import Graphs
from tests.compiled.test_exact import check
from tests.nightly import chosen, every, some
from tests.oracle import clipped_sum, per_sample_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


WAYS = ["selected", "zeroed"]


def mostly(way: str) -> pytest.MarkDecorator:
    """By day a test runs one of the two ways."""
    return pytest.mark.parametrize("nobody_asks", chosen(WAYS, {way}), indirect=True)


@pytest.fixture(autouse=True, params=WAYS)
def nobody_asks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By passes over the factors, and by zeros where they lie."""
    monkeypatch.setattr(trace, "checks_finite_on_host", lambda device: False)
    if request.param == "zeroed":
        monkeypatch.setattr(selection, "_ZEROED_IN_GRAPHS_ON", {"cpu"})


@pytest.fixture
def eager_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each microbatch that ran eagerly."""
    runs: list[int] = []
    eagerly = EagerStep._of_python

    def counted(self, rows, *rest):  # type: ignore[no-untyped-def]
        runs.append(len(rows.batch[0]))
        return eagerly(self, rows, *rest)

    monkeypatch.setattr(EagerStep, "_of_python", counted)
    # Of the comparisons only the first.
    monkeypatch.setattr(CompiledStep, "is_trusted", lambda self, flat, shapes: self.runs > 0)
    return runs


@mostly("selected")
@pytest.mark.parametrize(
    "name",
    chosen(
        [
            "cnn",
            "conv1d_grouped",
            "lstm",
            "mlp",
            "packed_qkv_chunks",
            "tied_embedding",
            "weight_norm",
            "weight_slices",
        ],
        {"tied_embedding"},
    ),
)
def test_architecture(name: str, graphs: Graphs) -> None:
    check(ARCHITECTURES[name], graphs)


class Net(nn.Module):
    """Kept, ghost and shared uses, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, groups=2)
        self.tied = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT
        out: Tensor = self.head(self.tied(self.tied(tokens).tanh()).mean(1))
        return out


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize(
    ("strategy", "bad"),
    some(6, ["auto", "kept", "ghost"], [float("nan"), float("inf")]),
)
def test_a_sample_that_is_not_finite(
    strategy: str, bad: float, graphs: Graphs, eager_runs: list[int]
) -> None:
    model = Net().double()
    x, y = torch.randn(6, 2, 5, 5, dtype=torch.float64), torch.randint(3, (6,))
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=0.5, noise_multiplier=0.0,
        expected_batch_size=1, microbatch_size=4, compile=True, performance=Performance(strategy=strategy),
    )  # fmt: skip
    optimizer.backward(x, y)
    assert eager_runs == [4]  # the check
    optimizer.zero_grad()
    x[2] = bad
    keep = [0, 1, 3, 4, 5]
    expected, _ = clipped_sum(per_sample_gradients(model, loss_fn, (x[keep], y[keep])), 0.5)
    optimizer.backward(x, y)
    assert eager_runs == [4]
    assert optimizer.diagnostics.num_nonfinite == 1
    torch.testing.assert_close(optimizer.clipped_sums, expected)


@mostly("zeroed")
def test_padding_that_is_not_finite(graphs: Graphs, eager_runs: list[int]) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sum()

    for nan_safe in (True, False):
        eager_runs.clear()
        gradient = clipped_grad(loss, max_grad_norm=1.0, nan_safe=nan_safe, compile=True)
        w, x = torch.ones(3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
        gradient(w, x)
        x[1] = torch.nan
        mask = torch.arange(5) == 1
        result = gradient(w, x, is_padding=mask)
        torch.testing.assert_close(result.grads, gradient(w, x[~mask]).grads)
        assert result.num_nonfinite == 0
        assert eager_runs == [5]


@mostly("selected")
def test_without_nan_safety_a_nan_stays(graphs: Graphs) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sum()

    gradient = clipped_grad(loss, max_grad_norm=1.0, nan_safe=False, compile=True)
    w, x = torch.ones(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    gradient(w, x)
    x[1, 0] = torch.nan
    assert gradient(w, x).grads.isnan().any()


@mostly("selected")
def test_a_first_batch_that_is_not_finite_proves_nothing(
    graphs: Graphs, eager_runs: list[int]
) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sum()

    gradient = clipped_grad(loss, max_grad_norm=1.0, compile=True)
    w, x = torch.ones(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    bad = x.clone()
    bad[0] = torch.nan
    torch.testing.assert_close(gradient(w, bad).grads, gradient(w, x[1:]).grads)
    assert eager_runs == [4, 3]  # the bad batch itself; then the check


@mostly("zeroed")
@pytest.mark.parametrize("convolution", every(2, [True, False]))
def test_a_gradient_that_all_samples_share(
    convolution: bool, graphs: Graphs, eager_runs: list[int]
) -> None:
    """The output gradient of a plain sum is one number, broadcast: zeros for one sample would be zeros for all."""

    def loss(w: Tensor, x: Tensor) -> Tensor:
        out = F.conv1d(x.mT, w.mT[..., None]) if convolution else x @ w
        return out.sum()

    for strategy in ("ghost", "kept"):
        eager_runs.clear()
        w, x = torch.randn(3, 20, dtype=torch.float64), torch.randn(5, 6, 3, dtype=torch.float64)
        settings: dict[str, Any] = {
            "max_grad_norm": 1.0, "performance": Performance(strategy=strategy), "keep_batch_dim": False
        }  # fmt: skip
        gradient = clipped_grad(loss, **settings, compile=True)
        gradient(w, x)
        last = torch.arange(5) == 4
        expected = clipped_grad(loss, **settings)(w, x[:4])
        torch.testing.assert_close(gradient(w, x, is_padding=last).grads, expected.grads)
        x[4] = torch.inf
        result = gradient(w, x)
        assert result.num_nonfinite == 1
        torch.testing.assert_close(result.grads, expected.grads)
        assert eager_runs == [5]
