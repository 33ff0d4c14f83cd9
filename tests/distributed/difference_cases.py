"""Define ranks that differ in a setting, a call or a parameter."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import DPOptimizer, PrivacyPlan
from tests.distributed.cases import squares


def make(model: nn.Module | None = None, **options: Any) -> DPOptimizer:
    model = nn.Linear(3, 2) if model is None else model
    if "plan" not in options:
        given = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 4.0}
        options = {**given, **options}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return DPOptimizer(sgd, model, squares, **options)


def take(optimizer: DPOptimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.backward(torch.ones(2, 3))
        optimizer.step()
        optimizer.zero_grad()


def settings(rank: int, size: int, name: str, values: tuple[Any, Any]) -> None:
    make(**{name: values[rank]})


def schedule(rank: int, size: int) -> None:
    """Step with a norm that is a function of the step and differs on the second rank."""
    optimizer = make(max_grad_norm=lambda step: 1.0 + step * rank)
    take(optimizer, 2)


def changed_multiplier(rank: int, size: int) -> None:
    optimizer = make()
    take(optimizer)
    if rank == 1:
        optimizer.noise_multiplier = 0.5
    take(optimizer)


def changed_parameters(rank: int, size: int) -> None:
    optimizer = make()
    take(optimizer, 100)
    if rank == 1:
        with torch.no_grad():
            optimizer.model.weight[0, 0] += 1e-6
    take(optimizer)


def frozen(rank: int, size: int) -> None:
    optimizer = make()
    take(optimizer)
    if rank == 1:
        optimizer.model.bias.requires_grad_(False)
    take(optimizer)


def plan(**options: Any) -> PrivacyPlan:
    given: dict[str, Any] = {
        "num_samples": 40,
        "expected_batch_size": 8.0,
        "steps": 6,
        "delta": 1e-3,
        "noise_multiplier": 1.0,
        "accountant": "rdp",
    }
    return PrivacyPlan(**{**given, **options})


def plans(rank: int, size: int, values: tuple[dict[str, Any], dict[str, Any]]) -> None:
    make(plan=plan(**values[rank]))


def sampled(rank: int, size: int, skipped: bool = False) -> tuple[int, float, str, list[list[int]]]:
    """Run a plan, and return the numbers of the samples that each step used on this rank."""
    planned = plan()
    rows = torch.arange(40.0)[:, None].expand(40, 3).clone()
    data = torch.utils.data.TensorDataset(rows)
    optimizer = make(plan=planned)
    seen = []
    for number, (x,) in enumerate(clipgrad.poisson_loader(data, plan=planned)):
        if skipped and rank == 1 and number == 2:
            continue
        seen.append(x[:, 0].long().tolist())
        optimizer.backward(x)
        optimizer.step()
        optimizer.zero_grad()
    ledger = optimizer.ledger
    return ledger.steps, optimizer.epsilon(), str(ledger.state_dict()), seen


def users(rank: int, size: int) -> list[int]:
    """Return the users from which a rank samples."""
    data = torch.utils.data.TensorDataset(torch.arange(12.0))
    loader = clipgrad.user_loader(
        data, [n // 2 for n in range(12)], sample_rate=1.0, samples_per_user=1, steps=1
    )
    ((x, _),) = list(loader)
    return (x[:, 0] // 2).long().tolist()


def whole_data_on_each_rank(rank: int, size: int) -> None:
    planned = plan()
    data = torch.utils.data.TensorDataset(torch.ones(40, 3))
    optimizer = make(plan=planned)
    for (x,) in clipgrad.poisson_loader(data, plan=planned, rank=0, num_replicas=1):
        optimizer.backward(x)
        optimizer.step()


def refused(rank: int, size: int, what: str) -> None:
    data = torch.utils.data.TensorDataset(torch.ones(40, 3))
    if what == "shuffled":
        planned = plan(shuffled=True, relation="replace_one")
        clipgrad.shuffled_loader(data, plan=planned)
    if what == "truncated":
        clipgrad.poisson_loader(data, plan=plan(max_batch_size=10, accountant="pld"))
    if what == "grid":
        make(noise=clipgrad.DiscreteGaussianNoise(2.0**-10))
    if what == "grid on shards":
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard

        alone = [torch.distributed.new_group([number]) for number in range(size)][rank]
        model = nn.Linear(3, 2)
        fully_shard(model, mesh=DeviceMesh.from_group(alone, "cpu"))
        performance = clipgrad.Performance(process_group=alone)
        make(model, noise=clipgrad.DiscreteGaussianNoise(2.0**-10), performance=performance)
    if what == "pickle":
        import pickle

        pickle.dumps(make())


def start_is_the_first_ranks(rank: int, size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    optimizer = make()
    return optimizer.model.weight.detach().clone(), optimizer.model.bias.detach().clone()


def room(rank: int, size: int) -> int | None:
    return make(compile=True, expected_batch_size=200.0)._clipper.room


def group_of_one(rank: int, size: int) -> Tensor:
    """Train on each rank alone."""
    groups = [torch.distributed.new_group([number]) for number in range(size)]
    alone = clipgrad.Performance(process_group=groups[rank])
    optimizer = make(noise_multiplier=0.0, max_grad_norm=1.0 + rank, performance=alone)
    take(optimizer, 1 + rank)
    return optimizer.model.weight.detach()


def logged(rank: int, size: int) -> list[str]:
    """What the log holds after two steps."""
    log, lines = logging.getLogger("clipgrad"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        take(make(), 2)
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
    return lines
