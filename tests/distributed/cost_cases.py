"""What ranks hold and send, counted, beside what ``explain`` says."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from clipgrad.explain import Explanation
from tests.distributed.cases import CASES, private, sgd

WIDTH, LAYERS, ROWS = 160, 4, 4


def sent() -> int:
    """Bytes that the TCP connections of this process have sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 200)[0]
    return total


def explained(
    rank: int, size: int, shard: Callable[[nn.Module], None] | None
) -> tuple[Explanation, int]:
    """What ``explain`` says of a model, and how many bytes one step of two microbatches sends."""
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    model[1].requires_grad_(False)
    if shard is not None:
        shard(model)
    optimizer = private(model, CASES["mlp"], sgd(model), microbatch_size=ROWS // 2)
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
