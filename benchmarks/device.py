"""The device of a benchmark: waiting for it, and the memory that PyTorch takes from it."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def wait(device: str) -> None:
    """Wait until the device has done its work."""
    if device != "cpu":
        torch.cuda.synchronize()


def taken(device: str) -> int:
    """Return the bytes that PyTorch has taken from the device and cannot give back.

    The peak of allocated memory would leave out what a recorded graph uses while it is replayed.
    """
    if device == "cpu":
        return 0
    gc.collect()
    wait(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def most_taken(step: Callable[[], None], device: str) -> int:
    """Run a step, and return the most bytes that PyTorch had taken from the device meanwhile."""
    before = taken(device)
    if device == "cpu":
        step()
        return before
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return torch.cuda.max_memory_reserved()


def fits(step: Callable[[], None], steps: int, device: str, limit: float) -> bool:
    """Return whether steps fit if PyTorch may take so many bytes from the device."""
    if device == "cpu":
        return True
    taken(device)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        for _ in range(steps):
            step()
        wait(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return True
