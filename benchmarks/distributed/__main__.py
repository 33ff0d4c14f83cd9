"""What clipping costs on several processes, and whether they compute what one computes.

    torchrun --nproc-per-node=2 -m benchmarks.distributed gpt2 llama-lora             # two GPUs, NCCL
    torchrun --nproc-per-node=8 -m benchmarks.distributed gpt2 llama-1b llama-8b-lora --opacus
    torchrun --nproc-per-node=2 -m benchmarks.distributed gpt2-tiny llama-lora-tiny   # without GPUs: gloo, a try
    torchrun --nproc-per-node=2 -m benchmarks.distributed --backend gloo gpt2         # two processes on one GPU

The first rank prints one JSON object a line. ``sums`` compares the clipped sums of all ranks in float32 with those of
one process on the whole batch. ``noise`` compares the noise of all ranks with what was asked for. The other rows
compare steps with clipping and noise with ordinary steps of DDP and FSDP2. Models have random weights. One process
alone gives the figures from which the efficiency of scaling is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.device import most_taken, taken, wait
from benchmarks.distributed import opacus_steps, steps
from benchmarks.distributed.settings import SETTINGS, Setting
from benchmarks.distributed.sums import compared, noise

WARM = 16  # The sixteenth step of a compiled model is compared with an eager one, and the next such is the 32nd.


def measured(
    make: Callable[[], steps.Step], setting: Setting, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Median time, tokens a second, and the most memory that a rank took."""
    steps.freed()
    others, started = taken(device.type), time.perf_counter()
    step = make()
    for _ in range(WARM):
        step()
    wait(device.type)
    warm = time.perf_counter() - started
    times = []
    for _ in range(rounds):
        dist.barrier()
        wait(device.type)
        start = time.perf_counter()
        step()
        wait(device.type)
        times.append(time.perf_counter() - start)
    memory = float(most_taken(step, device.type) - others)
    worst = torch.tensor([statistics.median(times), memory], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    seconds, memory = worst.tolist()
    return {
        "ms": round(1e3 * seconds, 2),
        "tokens/s of a rank": round(setting.rows * setting.length / seconds),
        "GiB of a rank": round(memory / 2**30, 2),
        "warm-up s": round(warm, 1),
    }


def told(row: dict[str, Any]) -> None:
    """Print a row, once."""
    if dist.get_rank() == 0:
        print(json.dumps(row), flush=True)


def attempt(kind: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
    """Print a row, or the error in its place; the other rows still come."""
    try:
        found = work()
    except Exception as error:
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    told({**kind, **found})


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--only", choices=("sums", "noise", "speed"))
    parser.add_argument("--kinds", nargs="+", help="of steps, by their names; all by default")
    parser.add_argument("--opacus", action="store_true", help="measure Opacus as well")
    parser.add_argument(
        "--backend", choices=("nccl", "gloo"), help="gloo lets several processes share a GPU"
    )
    return parser.parse_args()


def run(name: str, args: argparse.Namespace, device: torch.device) -> None:
    """Print the rows of one setting."""
    setting = SETTINGS[name]
    head = {"setting": name, "ranks": dist.get_world_size(), "torch": torch.__version__}
    for kind, work in {"sums": compared, "noise": noise}.items():
        if args.only in (None, kind) and setting.is_replicated:
            attempt({**head, "kind": kind}, partial(work, setting, device))
    if args.only not in (None, "speed"):
        return
    torch.set_float32_matmul_precision("high")
    makers = [*steps.makers(setting, device, not args.no_compile)]
    if args.opacus:
        makers += opacus_steps.makers(setting, device)
    for kind, make in makers:
        if kind in (args.kinds or [kind]):
            attempt({**head, "kind": kind}, partial(measured, make, setting, device, args.rounds))


def main() -> None:
    args = arguments()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = args.backend or ("nccl" if cuda else "gloo")
    dist.init_process_group(backend, timeout=timedelta(seconds=120))
    for name in args.settings:
        run(name, args, device)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
