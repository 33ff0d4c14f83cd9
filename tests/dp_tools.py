"""What the tests of DPOptimizer share: short constructors, a reference step, a picture of a model."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, PrivacyPlan
from tests.oracle import clipped_sum, per_sample_gradients

Loss = Callable[..., Tensor]


def squared(model: nn.Module, x: Tensor) -> Tensor:
    """Mean square of the output."""
    return model(x).square().mean()


def mlp(*, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """Two layers with six and two outputs on four inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def data(size: int = 5, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Samples of four numbers whose gradients differ in size."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, size + 1)[:, None]
    return (torch.randn(size, 4, generator=generator, dtype=torch.float64) * scale).to(dtype)


def sgd(model: nn.Module, lr: float = 1.0, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def private(
    model: nn.Module,
    loss: Loss = squared,
    *,
    inner: torch.optim.Optimizer | None = None,
    **options: Any,
) -> DPOptimizer:
    """A DPOptimizer, by default without noise, around SGD with a learning rate of one."""
    defaults = {"max_grad_norm": 1.0, "noise_multiplier": 0.0, "expected_batch_size": 1}
    if "relation" in options:
        names = (*defaults, "relation")
        said = {name: options.pop(name, defaults.get(name)) for name in names}
        options["plan"] = PrivacyPlan(
            num_samples=1000, steps=100, delta=1e-5, declared_sampling="by the test", **said
        )
        defaults = {}
    return DPOptimizer(inner or sgd(model), model, loss, **{**defaults, **options})


def plan_of(steps: int = 4, **options: Any) -> PrivacyPlan:
    """All of the 12 samples in each batch, without noise: what follows has no chance in it."""
    defaults = {
        "num_samples": 12,
        "expected_batch_size": 12,
        "steps": steps,
        "delta": 1e-3,
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
        "accountant": "rdp",
    }
    return PrivacyPlan(**{**defaults, **options})


def clipped(
    model: nn.Module, *batch: Any, loss: Loss = squared, max_grad_norm: float = 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    """The oracle's clipped sums by parameter name, and the norms."""
    return clipped_sum(per_sample_gradients(model, loss, batch), max_grad_norm)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def through_a_file(state: Any) -> Any:
    """What comes back of a checkpoint that is saved and loaded as data, unable to run code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the last bit."""
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a backward must leave as it was: which objects the model holds, and buffers' values."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        found[f"{path}.training"] = module.training
        found[f"{path}.flat"] = [id(w) for w in getattr(module, "_flat_weights", ())]
        found[f"{path}.names"] = (tuple(module._parameters), tuple(module._buffers))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{path}.{name}"] = (id(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[f"{path}.{name}"] = (id(buffer), buffer.tolist())
    return found
