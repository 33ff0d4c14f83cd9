"""Bytes that one rank sends in a step, and its peak memory, for 1 to 8 processes on one machine.

    python -m benchmarks.wire                 # a table as in docs/scaling.md; minutes
    python -m benchmarks.wire --ranks 1 2     # fewer processes

Processes talk over TCP (gloo), and the kernel counts what each socket has sent. The peak is that of the process's
resident memory, set back before the step; freed tensors are given back to the system, so that it holds none. The model
is a stack of linear layers, trained by SGD, so that memory is parameters, gradients and what is on its way.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import socket
import stat
import statistics
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Memory above this size is given back when it is freed. By itself the C library raises the limit as it runs.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
LAYERS, WIDTH, ROWS = 8, 2048, 16
STEPS = 2
SENT = 200  # offset in Linux's tcp_info of the bytes sent; the bytes sent again follow
KINDS = ("DDP", "replicated, clipped", "FSDP2", "FSDP2, clipped")


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def step_of(kind: str) -> Callable[[], None]:
    """A step of one rank."""
    import clipgrad

    net = model()
    x = torch.randn(ROWS, WIDTH)
    if "FSDP2" in kind:
        from torch.distributed.fsdp import fully_shard

        for layer in net:
            fully_shard(layer)
        fully_shard(net)
    if "clipped" not in kind:
        many = dist.get_world_size() > 1
        if kind == "DDP" and many:
            net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        inner = torch.optim.SGD(net.parameters(), lr=0.1)

        def ordinary() -> None:
            loss_fn(net, x).backward()
            inner.step()
            inner.zero_grad()

        return ordinary
    optimizer = clipgrad.DPOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1),
        net,
        loss_fn,
        max_grad_norm=1.0,
        noise_multiplier=1.0,
        expected_batch_size=ROWS * dist.get_world_size(),
    )

    def private() -> None:
        optimizer.backward(x)
        optimizer.step()
        optimizer.zero_grad()

    return private


def sent() -> int:
    """Bytes that the TCP connections of this process have sent, without what a busy machine made them send again."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(f"/proc/self/fd/{name}").st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    first, again = struct.unpack_from("2Q", info, SENT)
                    total += first - again
    return total


def peak_of(step: Callable[[], None]) -> int:
    """Bytes by which resident memory rises at most, over what it is without the model."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step()
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve(rank: int, ranks: int, folder: str, kind: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )

    import clipgrad.distributed.sharded  # noqa: F401

    warm = nn.Linear(2, 2)
    loss_fn(warm, torch.zeros(1, 2)).backward()
    gc.collect()
    before = resident()
    step = step_of(kind)
    for _ in range(STEPS):
        step()
    dist.barrier()
    start = sent()
    peaks = [peak_of(step) - before for _ in range(STEPS)]
    dist.barrier()
    pipe.send({"sent": (sent() - start) / STEPS, "peak": statistics.median(peaks)})
    pipe.recv()  # connections stay until everybody has counted
    dist.destroy_process_group()


def measured(kind: str, ranks: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, ranks, folder, kind, theirs))
            process.start()
            theirs.close()  # so that a process that dies is noticed
            pipes.append(ours)
            processes.append(process)
        found = [pipe.recv() for pipe in pipes]
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
    size = sum(p.numel() for p in model().parameters()) * 4
    return {
        "kind": kind,
        "ranks": ranks,
        "sent / parameters": round(max(row["sent"] for row in found) / size, 3),
        "peak / parameters": round(max(row["peak"] for row in found) / size, 2),
        "parameters MB": round(size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = parser.parse_args()
    os.environ.update(GIVEN_BACK)  # the processes that are started read it
    for ranks in args.ranks:
        for kind in args.kinds:
            print(json.dumps(measured(kind, ranks)), flush=True)


if __name__ == "__main__":
    main()
