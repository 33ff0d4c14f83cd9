"""Whether several processes compute the clipped sums of one, with the noise that was asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import clipgrad
from benchmarks.distributed.settings import Setting, batch, built, loss_fn, own, shard, trained
from benchmarks.distributed.steps import freed, private


def compared(setting: Setting, device: torch.device) -> dict[str, Any]:
    """The largest difference from one process with the same microbatches, relative to a parameter's largest element."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone, half = groups[dist.get_rank()], max(1, setting.rows // 2)
    torch.set_float32_matmul_precision("highest")
    expected = sums(setting, device, alone=alone, microbatch=half)
    kinds: dict[str, dict[str, Any]] = {
        "replicated": {"microbatch": half},
        "fsdp2": {"microbatch": half, "sharded": True},
        "fsdp2, compiled": {"microbatch": half, "sharded": True, "compile": True},
        # Products of other sizes add up in another order, which is no fault.
        "one process, one pass": {"alone": alone},
        # The comparison has to see this.
        "one process, a row left out": {"alone": alone, "microbatch": half, "left_out": 1},
    }
    row: dict[str, Any] = {"parameters": len(expected)}
    for kind, options in kinds.items():
        freed()
        found = sums(setting, device, **options)
        row[kind] = max(
            (
                float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30))
                for name, value in expected.items()
            ),
            default=None,
        )
    return row


def noise(setting: Setting, device: torch.device) -> dict[str, Any]:
    """Variance of all ranks' noise, which should be 1, and the correlation of its halves."""
    row: dict[str, Any] = {}
    for kind, sharded in (("replicated", False), ("fsdp2", True)):
        options = {"sharded": sharded, "microbatch": setting.rows}
        freed()
        without = sums(setting, device, **options)
        freed()
        found = sums(setting, device, multiplier=1.0, **options)
        values = [(found[name] - value).flatten() for name, value in without.items()]
        if values:
            drawn = torch.cat(values)
            first, second = drawn[: drawn.numel() // 2 * 2].chunk(2)
            row[kind] = {
                "values": drawn.numel(),
                "variance": float(drawn.square().mean()),
                "correlation": float((first * second).mean()),
            }
    return row


def sums(
    setting: Setting,
    device: torch.device,
    *,
    sharded: bool = False,
    alone: Any = None,
    left_out: int = 0,
    microbatch: int | None = None,
    multiplier: float = 0.0,
    compile: bool = False,
) -> dict[str, Tensor]:
    """Clipped sums of the whole batch in float32, on the first rank: of all ranks, or of a rank alone in its group."""
    model = built(setting, device)
    rows = batch(setting, model, device)
    mine = rows[left_out:] if alone is not None else own(rows)
    if sharded:
        shard(model, half=False)
    optimizer = private(
        model, loss_fn, torch.optim.SGD(trained(model), lr=0.0), 1, noise_multiplier=multiplier,
        performance=clipgrad.Performance(process_group=alone), microbatch_size=microbatch,
        compile=compile,
    )  # fmt: skip
    optimizer.backward(mine)
    optimizer.step()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient: Any = parameter.grad
            whole = gradient.full_tensor() if sharded else gradient
            if dist.get_rank() == 0:
                found[name] = whole.detach().cpu()
    return found
