"""Small checks of what clipgrad promises, each a function that raises AssertionError where it does not hold.

They are as short as they are because each stands for a family of tests elsewhere in this folder's neighbours; here
they only have to notice a bug that another library once had.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipgrad import (
    DPOptimizer,
    PrivacyPlan,
    SystemNoise,
    poisson_loader,
)
from clipgrad.accounting import Ledger, Poisson
from clipgrad.sampling import PoissonSampler
from tests.dp_tools import assert_same, clipped, data, mlp, private, sgd, squared, values
from tests.noise_checks import check_gaussian, check_independent, draw


class Tied(nn.Module):
    """An embedding that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens).tanh(), self.embedding.weight)


def tied_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())


def equals_the_oracle(
    model: nn.Module, batch: Tensor, loss: Callable[..., Tensor] = squared
) -> None:
    """The clipped sum, at a norm that half of the samples exceed."""
    norms = clipped(model, batch, loss=loss)[1].sort().values
    norm = float(norms[len(norms) // 2 - 1 :][:2].mean())
    wanted, _ = clipped(model, batch, loss=loss, max_grad_norm=norm)
    optimizer = private(model, loss, max_grad_norm=norm)
    optimizer.backward(batch)
    torch.testing.assert_close(optimizer.clipped_sums, wanted, rtol=1e-9, atol=1e-12)


def rows() -> None:
    equals_the_oracle(mlp(), data(6))


def sequences() -> None:
    batch = data(6)[:, None, :] * torch.linspace(-1, 1, 5)[:, None]
    equals_the_oracle(mlp(), batch)


def tied() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(7, (6, 5))
    equals_the_oracle(Tied().double(), tokens, tied_loss)


def a_nan_row_contributes_nothing() -> None:
    model, other = mlp(), mlp()
    batch = data(4)
    poisoned = batch.clone()
    poisoned[2] = math.nan
    sums = []
    for one, rows in ((model, poisoned), (other, batch[[0, 1, 3]])):
        optimizer = private(one)
        optimizer.backward(rows)
        sums.append(optimizer.clipped_sums)
    torch.testing.assert_close(*sums)


def the_sum_is_divided_once_by_the_public_constant() -> None:
    model = mlp()
    before, (sums, _) = values(model), clipped(model, data(5))
    optimizer = private(model, expected_batch_size=8)
    optimizer.backward(data(5))
    optimizer.step()
    for name, after in values(model).items():
        torch.testing.assert_close(after, before[name] - sums[name] / 8)


def several_backward_calls_are_one_batch() -> None:
    one, other = mlp(), mlp()
    whole, parts = private(one), private(other)
    whole.backward(data(6))
    whole.step()
    for part in data(6).split(2):
        parts.backward(part)
    parts.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def _noises(steps: int, calls: int = 1) -> list[list[Tensor]]:
    """The noise of each step, parameter by parameter, found as a difference of parameters."""
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)).double()
    optimizer = private(
        model,
        lambda model, x: model(x).sum() * 0.0,
        max_grad_norm=2.0,
        noise_multiplier=1.5,
        expected_batch_size=4,
        noise=SystemNoise(),
    )
    found = []
    for _ in range(steps):
        before = values(model)
        for _ in range(calls):
            optimizer.backward(torch.ones(3, 60, dtype=torch.float64))
        optimizer.step()
        optimizer.zero_grad()
        found.append([(before[name] - after).flatten() for name, after in values(model).items()])
    return found


def noise_has_its_size() -> None:
    for parts in _noises(steps=2, calls=3):
        check_gaussian(torch.cat(parts), 1.5 * 2.0 / 4)


def noise_is_independent() -> None:
    parts = [noise[:3600] for step in _noises(steps=3) for noise in step if len(noise) >= 3600]
    check_independent(torch.stack(parts))


def an_empty_batch_gets_noise() -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0)
    before = values(model)
    optimizer.backward(data(5)[:0])
    optimizer.step()
    assert all(not torch.equal(before[name], after) for name, after in values(model).items())


def what_is_accounted_is_what_was_done() -> None:
    """Rate and noise in the ledger are those of the loader and of the noise that was added."""
    model = nn.Linear(60, 60).double()
    plan = PrivacyPlan(
        num_samples=640, expected_batch_size=64, steps=3, delta=1e-5, noise_multiplier=1.5
    )
    data = torch.utils.data.TensorDataset(torch.zeros(640, 60, dtype=torch.float64))
    loader = poisson_loader(data, plan=plan)
    optimizer = DPOptimizer(sgd(model), model, lambda m, x: m(x).sum() * 0.0, plan=plan)
    drawn, noises = 0, []
    for (x,) in loader:
        before = values(model)
        optimizer.backward(x)
        optimizer.step()
        optimizer.zero_grad()
        drawn += len(x)
        noises += [(before[name] - after).flatten() for name, after in values(model).items()]
    (entry,) = optimizer.ledger.history
    assert entry.sampling == loader.batch_sampler.sampling
    rate = entry.sampling.sample_rate
    assert abs(drawn - 3 * 640 * rate) < 8 * math.sqrt(3 * 640 * rate)
    check_gaussian(torch.cat(noises), entry.noise_multiplier / 64)


def the_ledger_counts_every_step() -> None:
    ledger = Ledger(accountant="rdp")
    for sigma in (1.0, 1.0, 2.0, 1.0):
        ledger.record(sigma, Poisson(0.1))
    assert ledger.steps == 4
    (first, *_) = ledger.history
    assert first.steps == 2
    apart = Ledger(accountant="rdp")
    apart.record(1.0, Poisson(0.1), 3)
    apart.record(2.0, Poisson(0.1))
    assert math.isclose(ledger.epsilon(1e-5), apart.epsilon(1e-5))


def epsilon_is_never_negative() -> None:
    assert Ledger().epsilon(0.5) == 0.0
    for accountant in ("pld", "rdp"):
        ledger = Ledger(accountant=accountant)  # type: ignore[arg-type]
        ledger.record(50.0, Poisson(0.001))
        assert ledger.epsilon(0.9) >= 0.0


def small_rates_are_exact() -> None:
    """Of 2^40 indices each is drawn with q = 2^-30: far below what 24 bits resolve."""
    sampler = PoissonSampler(2**40, sample_rate=2.0**-30, steps=20)
    sizes = torch.tensor([float(len(batch)) for batch in sampler])
    assert abs(sizes.sum() - 20 * 1024) < 8 * math.sqrt(20 * 1024)


def nothing_repeats_after_a_restart() -> None:
    first, again = SystemNoise(), SystemNoise()
    draw(first, 1)
    state = first.state_dict()
    rows = [draw(first, 1000)]
    again.load_state_dict(state)
    rows.append(draw(again, 1000))
    first.load_state_dict(state)
    rows.append(draw(first, 1000))
    check_independent(torch.stack(rows))


def no_gradient_after_the_noise() -> None:
    model = mlp()
    optimizer: DPOptimizer = private(model, inner=sgd(model, lr=0.1), noise_multiplier=1.0)
    optimizer.backward(data(5))
    before = values(model)

    def closure() -> Tensor:
        model.zero_grad()
        loss = squared(model, data(5))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    try:
        optimizer.step(closure)  # type: ignore[arg-type]
    except ValueError:
        assert_same(values(model), before)
    else:
        raise AssertionError("step took a closure")
