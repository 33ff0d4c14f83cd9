"""Steps of training: clipped ones, and ordinary ones of DDP, ZeRO and FSDP2."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import clipgrad
from benchmarks.distributed.settings import (
    Setting,
    batch,
    built,
    in_half,
    loss_fn,
    own,
    shard,
    trained,
)

MULTIPLIER = 1.0
Step = Callable[[], None]
Inner = Callable[[nn.Module, torch.device], torch.optim.Optimizer]


def adamw(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, which each rank runs on all that it holds."""
    return torch.optim.AdamW(trained(model), lr=1e-5, fused=device.type == "cuda")


def zero(model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, whose state is split over the ranks."""
    fused = device.type == "cuda"
    kind = torch.optim.AdamW
    return ZeroRedundancyOptimizer(trained(model), optimizer_class=kind, lr=1e-5, fused=fused)


def private(
    model: nn.Module,
    loss: Callable[..., Tensor],
    inner: torch.optim.Optimizer,
    size: int,
    **options: Any,
) -> clipgrad.DPOptimizer:
    """An optimizer that clips and adds noise."""
    given = {"noise_multiplier": MULTIPLIER, **options}
    return clipgrad.DPOptimizer(
        inner, model, loss, max_grad_norm=1.0, expected_batch_size=size, **given
    )


def ddp(
    setting: Setting, device: torch.device, *, inner: Inner = adamw, compiled: bool = False
) -> Step:
    """An ordinary step of DDP."""
    model = built(setting, device)
    rows = own(batch(setting, model, device))
    ids = [device.index] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    optimizer, loss = inner(model, device), in_half(device)
    if compiled:
        loss = torch.compile(loss)
    return ordinary_step(wrapped, loss, optimizer, rows)


def replicated(
    setting: Setting, device: torch.device, *, inner: Inner = adamw, compile: bool | str = False
) -> Step:
    """A clipped step of a replicated model."""
    model = built(setting, device)
    rows = batch(setting, model, device)
    optimizer = private(
        model, in_half(device), inner(model, device), len(rows), compile=compile, microbatch_size=setting.rows
    )  # fmt: skip
    return private_step(optimizer, own(rows))


def fsdp2(setting: Setting, device: torch.device, *, compiled: bool = False) -> Step:
    """An ordinary step of FSDP2."""
    model = built(setting, device)
    rows = own(batch(setting, model, device))
    shard(model, half=True, compiled=compiled)
    return ordinary_step(model, loss_fn, adamw(model, device), rows)


def sharded(setting: Setting, device: torch.device, *, compile: bool | str = False) -> Step:
    """A clipped step of FSDP2."""
    model = built(setting, device)
    rows = batch(setting, model, device)
    shard(model, half=True)
    optimizer = private(
        model, loss_fn, adamw(model, device), len(rows), compile=compile, microbatch_size=setting.rows
    )  # fmt: skip
    return private_step(optimizer, own(rows))


def ordinary_step(
    model: nn.Module, loss: Callable[..., Tensor], optimizer: torch.optim.Optimizer, rows: Tensor
) -> Step:
    """A step without clipping and noise."""

    def step() -> None:
        loss(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def private_step(optimizer: clipgrad.DPOptimizer, rows: Tensor) -> Step:
    """A step with clipping and noise."""

    def step() -> None:
        optimizer.backward(rows)
        optimizer.step()
        optimizer.zero_grad()

    return step


def freed() -> None:
    """Free what the last step left."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def makers(
    setting: Setting, device: torch.device, compiled: bool
) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Yield the name of each step, and what makes it."""
    if setting.is_replicated:
        yield "DDP", lambda: ddp(setting, device)
        yield "replicated, clipped", lambda: replicated(setting, device)
        yield "DDP, ZeRO", lambda: ddp(setting, device, inner=zero)
        yield "replicated, ZeRO, clipped", lambda: replicated(setting, device, inner=zero)
    yield "FSDP2", lambda: fsdp2(setting, device)
    yield "FSDP2, clipped", lambda: sharded(setting, device)
    if not compiled:
        return
    yield "FSDP2, compiled", lambda: fsdp2(setting, device, compiled=True)
    yield "FSDP2, clipped, compiled", lambda: sharded(setting, device, compile=True)
    yield "FSDP2, clipped, recorded", lambda: sharded(setting, device, compile="reduce-overhead")
    if setting.is_replicated:
        yield "DDP, compiled", lambda: ddp(setting, device, compiled=True)
        yield "replicated, clipped, compiled", lambda: replicated(setting, device, compile=True)
        yield (
            "replicated, clipped, recorded",
            lambda: replicated(setting, device, compile="reduce-overhead"),
        )
