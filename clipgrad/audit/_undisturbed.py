"""Run a model on canaries without side effects on the surrounding training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def rng_restored(model: nn.Module) -> Iterator[None]:
    """Restore the state of the random number generators on exit, since dropout changes it."""
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda, key=str), device_type="cuda"):
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to ``model.eval()`` and restore each module's own flag on exit."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
