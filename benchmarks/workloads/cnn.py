"""Convolutional networks: the rows of the reference tables, and a larger one."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads._workload import Workload


def cnn(size: int, channels: tuple[int, ...], hidden: int) -> nn.Module:
    """3x3 convolutions with ReLU and 2x2 max-pool, one hidden layer, 10 classes."""
    layers: list[nn.Module] = []
    before = 3
    for width in channels:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    features = before * (size // 2 ** len(channels)) ** 2
    layers += [nn.Flatten(), nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers)


def images(size: int, batch_size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch_size, 3, size, size), torch.randint(0, 10, (batch_size,))


def classification(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def _workload(
    name: str,
    size: int,
    channels: tuple[int, ...],
    hidden: int,
    cpu: tuple[int, ...],
    cuda: tuple[int, ...],
    sweep: dict[str, tuple[int, ...]] | None = None,
) -> Workload:
    return Workload(
        name=name,
        description=f"{size}x{size}x3 images, {len(channels)} convolutions {channels}, hidden layer {hidden}",
        model=partial(cnn, size, channels, hidden),
        batch=partial(images, size),
        loss=classification,
        batch_sizes={"cpu": cpu, "cuda": cuda},
        sweep=sweep or {},
    )


CNN = (
    _workload(
        "cnn-small",
        32,
        (32, 64),
        256,
        cpu=(32, 64),
        cuda=(32, 64, 256),
        sweep={"cpu": (8, 128), "cuda": (16, 128, 512, 1024)},
    ),
    _workload("cnn-medium", 64, (64, 128, 256), 1024, cpu=(32,), cuda=(32, 256)),
    _workload("cnn-large", 128, (64, 128, 256, 512, 512), 4096, cpu=(4,), cuda=(32,)),
)
