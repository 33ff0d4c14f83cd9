"""Run a plan under ``torchrun``; the second rank dies once, after a step and before its checkpoint."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.distributed import checkpoint_cases


def main(folder: str, mark: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()

    def die_once(step: int) -> None:
        if step == 5 and rank == 1 and not Path(mark).exists():
            Path(mark).touch()
            os._exit(1)

    found = checkpoint_cases.run(rank, size, folder, 8, None, 1e-9, die_once)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
