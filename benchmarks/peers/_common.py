"""What the peers that run on PyTorch share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.step import LEARNING_RATE, NOISE_MULTIPLIER, Setting, Unavailable
from benchmarks.workloads import Workload


def require(module: str, package: str) -> ModuleType:
    """Import ``module`` of the distribution ``package``.

    Raises:
        Unavailable: If the distribution is missing.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise  # the library is there, something that it needs is not
        how = f"python -m pip install -c constraints.txt {package}"
        if package == "backpack-for-pytorch":
            how += " --no-deps, then einops and unfoldNd"
        raise Unavailable(f"{package} is not installed: {how}") from error


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(parameters), lr=LEARNING_RATE, fused=True)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; adapters leave all others as they are."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def functional_loss(workload: Workload, model: nn.Module) -> Callable[..., Tensor]:
    """``loss(parameters, *batch)``, the parameters by the names that ``model`` gives them."""
    module = _Loss(workload, model)

    def loss(parameters: dict[str, Tensor], *batch: Tensor) -> Tensor:
        renamed = {f"model.{name}": value for name, value in parameters.items()}
        result: Tensor = functional_call(module, renamed, batch)
        return result

    return loss


def clip_factors(parts: Iterable[Tensor], max_grad_norm: float) -> Tensor:
    """``min(1, C / ||g_i||)`` from every parameter's ``[B, ...]``."""
    norms = torch.stack([_norms(part) for part in parts]).norm(dim=0)
    return (max_grad_norm / norms).clamp(max=1.0)


def _norms(part: Tensor) -> Tensor:
    """Norms of norms: as fast as one norm, which on a CPU is off by up to 1e-3 over millions of float32."""
    return (part.flatten(2).norm(dim=2) if part.dim() > 2 else part).flatten(1).norm(dim=1)


def publish_noisy(
    sums: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], setting: Setting
) -> None:
    """Noise by hand: ``.grad`` becomes the clipped sum and its noise, divided by the batch size."""
    sigma = NOISE_MULTIPLIER * setting.max_grad_norm
    for name, total in sums.items():
        noise = torch.randn_like(total) * sigma
        parameters[name].grad = (total + noise) / setting.batch_size


class _Loss(nn.Module):
    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.workload, self.model = workload, model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.workload.loss(self.model, *batch)
