"""How a step is made: the ordinary one, clipgrad's, and plain ``vmap(grad)``. Optimizer and noise included."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.workloads import Workload
from clipgrad import DPOptimizer

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
NOISE_MULTIPLIER = 1.0

Step = Callable[[], None]


def _prepare(
    workload: Workload, batch_size: int, device: str, fused: bool | None
) -> tuple[nn.Module, tuple[Tensor, ...], torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = workload.model().to(device)
    batch = tuple(tensor.to(device) for tensor in workload.batch(batch_size))
    return model, batch, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=fused)


def standard(
    workload: Workload, batch_size: int, device: str = "cpu", fused: bool | None = None
) -> Step:
    model, batch, optimizer = _prepare(workload, batch_size, device, fused)

    def step() -> None:
        optimizer.zero_grad()
        workload.loss(model, *batch).backward()
        optimizer.step()

    return step


def clipped(
    workload: Workload,
    batch_size: int,
    device: str = "cpu",
    fused: bool | None = None,
    microbatch_size: int | None = None,
    strategy: str = "auto",
) -> Step:
    model, batch, inner = _prepare(workload, batch_size, device, fused)
    optimizer = DPOptimizer(
        inner,
        model,
        workload.loss,
        max_grad_norm=MAX_GRAD_NORM,
        noise_multiplier=NOISE_MULTIPLIER,
        expected_batch_size=batch_size,
        microbatch_size=microbatch_size,
        strategy=strategy,
    )

    def step() -> None:
        optimizer.zero_grad()
        optimizer.backward(*batch)
        optimizer.step()

    return step


class _Loss(nn.Module):
    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.workload, self.model = workload, model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.workload.loss(self.model, *batch)


def vmap_grad(
    workload: Workload, batch_size: int, device: str = "cpu", fused: bool | None = None
) -> Step:
    """Per-sample gradients as PyTorch's own tutorial computes them, then clip, sum, noise."""
    model, batch, optimizer = _prepare(workload, batch_size, device, fused)
    module = _Loss(workload, model)
    parameters = dict(module.named_parameters())

    def one_sample(values: dict[str, Tensor], *sample: Tensor) -> Tensor:
        result: Tensor = functional_call(module, values, tuple(leaf[None] for leaf in sample))
        return result

    per_sample = vmap(grad(one_sample), in_dims=(None, *[0] * len(batch)), randomness="different")

    def step() -> None:
        optimizer.zero_grad()
        gradients = per_sample({name: p.detach() for name, p in parameters.items()}, *batch)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = (MAX_GRAD_NORM / norms).clamp(max=1.0)
        for name, parameter in parameters.items():
            total = torch.tensordot(factors, gradients[name], 1)
            noise = torch.randn_like(total) * (NOISE_MULTIPLIER * MAX_GRAD_NORM)
            parameter.grad = (total + noise) / batch_size
        optimizer.step()

    return step


MODES = {"standard": standard, "clipped": clipped, "vmap(grad)": vmap_grad}
