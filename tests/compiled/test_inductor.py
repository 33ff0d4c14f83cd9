"""The real compiler: slow to compile, so only a handful."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from clipgrad import DPOptimizer
from tests.oracle import clipped_sum, per_sample_gradients

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated")]


class Net(nn.Module):
    """A convolution, dropout, attention, a tied weight: what the rules serve, and what they do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.tied = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x).relu().flatten(2).mT)
        q, k = self.tied(tokens), self.tied(tokens * self.gain)
        mixed = F.scaled_dot_product_attention(q, k, tokens)
        out: Tensor = self.head(self.drop(mixed).mean(1))
        return out


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def test_exact_then_nothing_is_compiled_again(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = Net().double()
    x, y = torch.randn(10, 2, 5, 5, dtype=torch.float64), torch.randint(3, (10,))
    gradients = per_sample_gradients(model, loss_fn, (x, y))
    bound = float(clipped_sum(gradients, 1.0)[1].median())
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=bound,
        noise_multiplier=0.0, expected_batch_size=1, microbatch_size=6, compile=True,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "clipgrad"):
        optimizer.backward(x[:5], y[:5])
    told = [record.getMessage() for record in caplog.records if record.name == "clipgrad"]
    assert "compiling the step for 6 samples" in told[0]
    assert "compiled in" in told[1]
    optimizer.zero_grad()
    compiled = dict(counters["stats"])
    for step in range(100):
        rows = slice(0, step % 11)  # of every size, the empty one among them
        optimizer.backward(x[rows], y[rows])
        of_rows = {n: g[rows] for n, g in gradients.items()}
        sums, _ = clipped_sum(of_rows, bound) if rows.stop else (zeros, zeros)
        torch.testing.assert_close(optimizer.clipped_sums, dict(sums), rtol=0, atol=1e-9)
        optimizer.zero_grad()
    assert dict(counters["stats"]) == compiled


@pytest.mark.nightly
def test_dropout_draws_fresh_masks_like_the_eager_step() -> None:
    found = []
    x, y = torch.randn(6, 2, 5, 5), torch.randint(3, (6,))
    for compile in (False, True):
        torch.manual_seed(0)
        model = Net()
        model.drop.p = 0.5
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.0), model, loss_fn, max_grad_norm=1.0,
            noise_multiplier=0.0, expected_batch_size=1, microbatch_size=6, compile=compile,
        )  # fmt: skip
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            optimizer.backward(x, y)
            found.append(list(optimizer.clipped_sums.values()))
            optimizer.zero_grad()
    torch.testing.assert_close(found[3:], found[:3], rtol=1e-4, atol=1e-6)
    assert not torch.equal(found[3][0], found[4][0])


def test_a_hook_on_all_modules_runs_where_the_loss_calls_them() -> None:
    """And not on the compiled graph, which is a module too."""
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out * 2)
    try:
        found = []
        for compile in (False, True):
            optimizer = DPOptimizer(
                torch.optim.SGD(model.parameters(), lr=0.0), model, lambda m, x: m(x).square().mean(),
                max_grad_norm=1.0, noise_multiplier=0.0, expected_batch_size=4, compile=compile,
                microbatch_size=4,
            )  # fmt: skip
            optimizer.backward(x)
            found.append(list(optimizer.clipped_sums.values()))
            optimizer.zero_grad()
    finally:
        handle.remove()
    torch.testing.assert_close(found[0], found[1])
