"""Define steps whose published gradients consist of noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipgrad import AdaptiveQuantile, DPOptimizer, SeededNoise, SystemNoise

SIDE = 120
EXPECTED = 4.0
MULTIPLIER = 3.0


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


class OnlyFirstRank(SystemNoise):
    """In this planted fault only one rank adds noise to its part."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        if dist.get_rank() == 0:
            super().add_gaussian_(tensors, sigma)


class SameOnAll(SystemNoise):
    """In this planted fault all ranks add the same noise to their parts."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        generator = torch.Generator().manual_seed(0)
        SeededNoise(generator).add_gaussian_(tensors, sigma)


class Twice(SystemNoise):
    """In this planted fault the noise is drawn once more for each rank."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        for _ in range(dist.get_world_size()):
            super().add_gaussian_(tensors, sigma)


FAULTS = {"one rank": OnlyFirstRank, "same": SameOnAll, "twice": Twice, "none": SystemNoise}


def gradients(rank: int, size: int, fault: str, steps: int = 2, wrap: Any = None) -> list[Tensor]:
    """Return ``.grad`` after each of some steps, in units of sigma."""
    model = nn.Linear(SIDE, SIDE, bias=False)
    if wrap is not None:
        wrap(model)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss,
        max_grad_norm=2.0,
        noise_multiplier=MULTIPLIER,
        expected_batch_size=EXPECTED,
        noise=FAULTS[fault](),
    )
    found = []
    for _ in range(steps):
        optimizer.backward(torch.zeros(0, SIDE))
        sigma = optimizer.sigma
        optimizer.step()
        gradient: Any = model.weight.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found.append(whole.detach().clone() * EXPECTED / sigma)
        optimizer.zero_grad()
    return found


def adaptive(rank: int, size: int, noise_multiplier: float) -> list[float]:
    """Return the clipping norm after some steps in which the ranks have different numbers of samples."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        lambda model, x: model(x).square().sum(),
        max_grad_norm=AdaptiveQuantile(0.1),
        noise_multiplier=noise_multiplier,
        expected_batch_size=20.0,
    )
    generator = torch.Generator().manual_seed(1)
    norms = []
    for _ in range(5):
        x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
        own = x if size == 1 else (x[:4], x[4:])[rank]
        optimizer.backward(own)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(optimizer.max_grad_norm))  # type: ignore[arg-type]
    return norms


def seeded(rank: int, size: int, seeds: Sequence[int], change: str = "") -> None:
    """Train with a generator of its own on each rank, which may be replaced or restored later."""
    generator = torch.Generator().manual_seed(seeds[rank])
    model = nn.Linear(3, 2)
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=1.0,
        noise=SeededNoise(generator),
    )
    if change == "replaced":
        optimizer.noise = SeededNoise(torch.Generator().manual_seed(7))
    if change == "restored":
        states: list[Any] = [optimizer.state_dict()]
        dist.broadcast_object_list(states, src=0)
        optimizer.load_state_dict(states[0])
    optimizer.backward(torch.zeros(1, 3))
    optimizer.step()
