"""What the tests of clipgrad.audit share: trainings whose canaries are as exposed as they can be.

Each canary owns a row of a table; its gradient has length ``PULL`` along that row and no other, so
that it is clipped to exactly the clipping norm and no canary gets in another's way. The table's way
is then the sum of all noisy sums, which is the best that an adversary can know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clipgrad import DPOptimizer, SeededNoise, accounting
from clipgrad.audit import Canaries
from clipgrad.sampling import PoissonSampler

PULL = 5.0
ORDINARY = 50  # samples that are no canaries
FEATURES = 4


class Planted(nn.Module):
    """A row per canary, and a layer that everybody else trains."""

    def __init__(self, m: int) -> None:
        super().__init__()
        self.table = nn.Embedding(m + 1, 1, padding_idx=m)
        self.layer = nn.Linear(FEATURES, 1, bias=False)
        with torch.no_grad():
            self.table.weight.zero_()
            self.layer.weight.fill_(0.1)


def loss_fn(model: nn.Module, row: Tensor, x: Tensor) -> Tensor:
    return PULL * model.table(row).sum() + model.layer(x).square().mean()  # type: ignore[operator, union-attr]


@dataclass(frozen=True)
class Setting:
    """A training, and what it claims."""

    m: int
    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1
    delta: float = 1e-5
    seed: int = 0

    @property
    def claim(self) -> float:
        return accounting.epsilon(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            delta=self.delta,
        )

    def canaries(self) -> Canaries:
        """The same in every run of a test; a real audit flips real coins."""
        coins = np.random.default_rng(self.seed).random(self.m) < 0.5
        return Canaries(np.arange(self.m), coins)

    def samples(self) -> tuple[Tensor, Tensor]:
        """All samples, canaries first: row and features."""
        rows = torch.cat([torch.arange(self.m), torch.full((ORDINARY,), self.m)])
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(len(rows), FEATURES, generator=generator)
        x[: self.m] = 0.0
        return rows, x

    def batches(self, size: int) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return iter(
            PoissonSampler(
                size, sample_rate=self.sample_rate, steps=self.steps, generator=generator
            )
        )

    def noise(self) -> SeededNoise:
        return SeededNoise(torch.Generator().manual_seed(self.seed + 2))


def train(
    setting: Setting,
    *,
    noise: Any = None,
    batches: Iterable[list[int]] | None = None,
    watch: Callable[[DPOptimizer], Any] | None = None,
) -> tuple[NDArray[Any], NDArray[np.bool_], Any]:
    """Train; returns the best scores ``[m]``, the coins, and what ``watch`` made."""
    canaries = setting.canaries()
    rows, x = setting.samples()
    kept = torch.tensor(canaries.training_indices(len(rows)))
    rows, x = rows[kept], x[kept]
    model = Planted(setting.m)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model,
        loss_fn,
        max_grad_norm=1.0,
        noise_multiplier=setting.noise_multiplier,
        expected_batch_size=1.0,
        noise=noise or setting.noise(),
    )
    watcher = watch(optimizer) if watch else None
    for batch in batches or setting.batches(len(rows)):
        optimizer.backward(rows[batch], x[batch])
        if watcher is None:
            optimizer.step()
        else:
            with watcher:
                optimizer.step()
        optimizer.zero_grad()
    scores = -model.table.weight.detach()[: setting.m, 0].numpy()
    return scores, canaries.included, watcher


class Faulty:
    """A noise source with a bug."""

    def __init__(self, inner: SeededNoise) -> None:
        self.inner = inner

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state)


class HalfNoise(Faulty):
    """Half the standard deviation."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        self.inner.add_gaussian_(tensors, sigma / 2)


class ReusedNoise(Faulty):
    """The first step's noise in every step."""

    drawn: list[Tensor] | None = None

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        if self.drawn is None:
            self.drawn = [torch.zeros_like(tensor) for tensor in tensors]
            self.inner.add_gaussian_(self.drawn, sigma)
        torch._foreach_add_(list(tensors), self.drawn)


def repeated(batches: Iterable[list[int]], times: int) -> Iterator[list[int]]:
    """Each ``times``-th batch, ``times`` times over."""
    for number, batch in enumerate(batches):
        if number % times == 0:
            yield from [batch] * times


def gaussian_scores(
    coins: NDArray[np.bool_], mu: float, generator: np.random.Generator
) -> NDArray[Any]:
    """What a mu-GDP run shows of each canary if none is in another's way."""
    return mu * coins + generator.standard_normal(len(coins))


def violations_allowed(trials: int, probability: float) -> float:
    """The most violations that chance explains, five standard deviations out."""
    return trials * probability + 5 * math.sqrt(trials * probability * (1 - probability))
