"""Running a model on canaries so that the training around it does not notice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give the random number generators back as they were: dropout draws from them."""
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda, key=str), device_type="cuda"):
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a while; each module gets its own flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
