"""Define runs that stop and continue with another number of ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import DPOptimizer, PrivacyPlan, RunState
from tests.distributed.cases import squares

STEPS = 8


def plan(noise_multiplier: float) -> PrivacyPlan:
    return PrivacyPlan(
        num_samples=30,
        expected_batch_size=30.0,  # each sample is in each batch, so that runs can be compared
        steps=STEPS,
        delta=1e-3,
        noise_multiplier=noise_multiplier,
        accountant="rdp",
    )


def run(
    rank: int,
    size: int,
    folder: str,
    until: int,
    shard: Callable[[nn.Module], None] | None = None,
    noise_multiplier: float = 1e-9,
    before_saving: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Continue from the folder's checkpoint until a step, and return the rank's state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    if shard is not None:
        shard(model)
    planned = plan(noise_multiplier)
    rows = torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loader = clipgrad.poisson_loader(torch.utils.data.TensorDataset(rows), plan=planned)
    inner = torch.optim.Adam(model.parameters(), lr=0.05)
    optimizer = DPOptimizer(inner, model, squares, plan=planned)
    state = RunState(model, optimizer, loader)
    resumed = state.load(folder)
    taken = 0
    for (x,) in loader:
        optimizer.backward(x)
        optimizer.step()
        optimizer.zero_grad()
        before_saving(optimizer.ledger.steps)
        state.save(folder)
        taken += 1
        if optimizer.ledger.steps == until:
            break
    return {
        "resumed": resumed,
        "taken": taken,
        "ledger": json.dumps(optimizer.ledger.state_dict(), default=str),
        "epsilon": optimizer.epsilon(),
        "parameters": {name: _whole(p) for name, p in model.named_parameters()},
    }


def beyond(rank: int, size: int, folder: str) -> None:
    """Try one more step than planned, after a restart."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    planned = plan(1e-9)
    optimizer = DPOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.05), model, squares, plan=planned
    )
    data = torch.utils.data.TensorDataset(torch.ones(30, 3, dtype=torch.float64))
    loader = clipgrad.poisson_loader(data, plan=planned)
    assert RunState(model, optimizer, loader).load(folder)
    assert not list(loader)
    ((x,), *_) = list(clipgrad.poisson_loader(data, plan=planned))
    optimizer.backward(x)
    optimizer.step()


def _whole(parameter: Any) -> Tensor:
    whole: Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return whole.detach().clone()


def step_with_fault(
    rank: int, size: int, fault: str, at: int, shard: Callable[[nn.Module], None] | None = None
) -> tuple[str, bool, int]:
    """Run until the second rank dies or stalls at a step, and return what the first rank observes.

    Returns:
        The error's text, whether the parameters are unchanged by the step, and the number of steps in the ledger.
    """
    import time

    class Dying(clipgrad.SystemNoise):
        """This source ends its process, or stalls, after the sums are scattered and before the means are gathered."""

        def add_gaussian_(self, tensors: Any, sigma: float) -> None:
            if rank == 1 and fault == "dies within" and optimizer.ledger.steps > at:
                os._exit(1)
            if rank == 1 and fault == "stalls within" and optimizer.ledger.steps > at:
                time.sleep(600)
            super().add_gaussian_(tensors, sigma)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        if rank == 1 and fault == "stalls in the loss" and optimizer.ledger.steps == at:
            time.sleep(600)
        return squares(model, x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    if shard is not None:
        shard(model)
    planned = PrivacyPlan(
        num_samples=10, expected_batch_size=5.0, steps=10, delta=1e-3, noise_multiplier=1.0,
        accountant="rdp", declared_sampling="by the test",
    )  # fmt: skip
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = DPOptimizer(inner, model, loss, plan=planned, noise=Dying())
    for step in range(5):
        if rank == 1 and step == at and fault == "dies":
            os._exit(1)
        if rank == 1 and step == at and fault == "stalls":
            time.sleep(600)
        before = [_local(p) for p in model.parameters()]
        try:
            optimizer.backward(torch.ones(2, 3))
            optimizer.step()
        except clipgrad.errors.RanksError as error:
            after = [_local(p) for p in model.parameters()]
            return str(error), all(map(torch.equal, before, after)), optimizer.ledger.steps
        optimizer.zero_grad()
    raise AssertionError("nobody noticed")


def _local(parameter: Any) -> Tensor:
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local.detach().clone()
