"""What ranks hold and send, counted, beside what ``explain`` says."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.wire import sent
from clipgrad.explain import Explanation
from tests.distributed.cases import CASES, private, sgd

WIDTH, LAYERS, ROWS = 160, 4, 4


def explained(
    rank: int, size: int, shard: Callable[[nn.Module], None] | None, compile: bool
) -> tuple[Explanation, int]:
    """What ``explain`` says of a model, and how many bytes one step of two microbatches sends."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    model[1].requires_grad_(False)
    if shard is not None:
        shard(model)
    optimizer = private(model, CASES["mlp"], sgd(model), microbatch_size=ROWS // 2, compile=compile)
    batch = torch.randn(ROWS, WIDTH)
    explanation = optimizer.explain(batch)
    for _ in range(2):
        dist.barrier()
        before = sent()
        optimizer.backward(batch)
        optimizer.step()
        dist.barrier()
        found = sent() - before
    return explanation, found
