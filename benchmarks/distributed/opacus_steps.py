"""Steps of Opacus on several processes: DDP with hooks, and FSDP2 with ghost clipping."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.distributed.settings import (
    Setting,
    batch,
    built,
    half_policy,
    in_half,
    own,
)
from benchmarks.distributed.steps import MULTIPLIER, Step, adamw


def makers(setting: Setting, device: torch.device) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Yield the name of each step, and what makes it."""
    if setting.is_replicated:
        yield "Opacus, DDP", lambda: by_hooks(setting, device)
    yield "Opacus, ghost_fsdp", lambda: by_ghost_norms(setting, device)


def by_hooks(setting: Setting, device: torch.device) -> Step:
    """A clipped step of a replicated model."""
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel

    model = built(setting, device)
    rows, loss = own(batch(setting, model, device)), in_half(device)
    wrapped = DifferentiallyPrivateDistributedDataParallel(model)
    module, optimizer = _private(wrapped, adamw(model, device), rows, grad_sample_mode="hooks")

    def step() -> None:
        loss(module, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def by_ghost_norms(setting: Setting, device: torch.device) -> Step:
    """A clipped step of a sharded model."""
    from opacus.utils.fsdp_utils import FSDP2Wrapper

    model = built(setting, device)
    rows = own(batch(setting, model, device))
    sharded = FSDP2Wrapper(model, mp_policy=half_policy())
    module, optimizer, criterion = _private(
        sharded, adamw(sharded, device), rows, grad_sample_mode="ghost_fsdp", criterion=nn.CrossEntropyLoss()
    )  # fmt: skip

    def step() -> None:
        logits = module(input_ids=rows).logits[:, :-1].float()
        # With the shape, Opacus takes the mean over tokens itself: a sample is a sequence.
        loss = criterion(logits.flatten(0, 1), rows[:, 1:].flatten(), shape=logits.shape)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _private(
    model: nn.Module, inner: torch.optim.Optimizer, rows: Tensor, **options: Any
) -> list[Any]:
    from opacus import PrivacyEngine

    # One batch is the whole data set: the engine takes the expected batch size from the loader.
    loader = DataLoader(TensorDataset(rows), batch_size=len(rows))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Secure RNG turned off")
        *made, _ = PrivacyEngine().make_private(
            module=model, optimizer=inner, data_loader=loader, noise_multiplier=MULTIPLIER, max_grad_norm=1.0,
            poisson_sampling=False, **options,
        )  # fmt: skip
    return made
