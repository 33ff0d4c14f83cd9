"""How many samples of a batch run together: a fixed number, or as many as fit into memory."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
_log = logging.getLogger("clipgrad")
_SHARE = 0.5  # of the free memory, which other tensors and other processes need too


class FixedRows:
    """A fixed number of samples at a time."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def ran(self, rows: int) -> None:
        """Take note of a microbatch that ran."""

    def ran_out(self, rows: int) -> bool:
        """Return whether to try again with fewer samples after memory ran out."""
        return False

    def report(self) -> None:
        """Log a number of samples that was chosen."""


class GrowingRows(FixedRows):
    """A number of samples that doubles from 1 as long as the peak of memory leaves room for the next number.

    Microbatches of the first batch are its measurement, so nothing runs twice. If memory runs out nevertheless, as it
    can where another process shares the device, the number is halved for good.

    Args:
        budget: Bytes that a microbatch may take.
        peak: Returns the largest number of bytes that were in use at once so far.
    """

    def __init__(self, budget: float, peak: Callable[[], float]) -> None:
        super().__init__(1)
        self._budget, self._peak, self._before = budget, peak, peak()
        self._settled = False
        self._reported = 0

    def ran(self, rows: int) -> None:
        if self._settled or rows < self.rows:  # the last rows of a batch say nothing
            return
        if 2 * (self._peak() - self._before) <= self._budget:
            self.rows *= 2
        else:
            self._settled = True

    def ran_out(self, rows: int) -> bool:
        self._settled = True
        self.rows = max(1, rows // 2)
        return rows > 1

    def report(self) -> None:
        if self.rows != self._reported:
            self._reported = self.rows
            limit = "" if self._settled else "up to "
            _log.info("microbatch_size='auto': %s%d samples at a time.", limit, self.rows)


def growing_rows(device: torch.device) -> GrowingRows:
    """Return the sizes for a device: half of its free memory may be used."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
        return GrowingRows(_SHARE * free, lambda: torch.cuda.max_memory_allocated(device))
    return GrowingRows(_SHARE * _free_memory(), _peak_of_process)


def run_or_shrink(run: Callable[[], T], rows: int, sizes: FixedRows) -> T | None:
    """Run a microbatch of ``rows`` samples.

    Returns:
        Its result, or None if memory ran out and fewer samples may fit.
    """
    try:
        result = run()
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        if not sizes.ran_out(rows):
            _note_out_of_memory(error, rows)
            raise
    else:
        sizes.ran(rows)
        return result
    # Only now is the error gone, whose frames hold the tensors that did not fit.
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _note_out_of_memory(error: Exception, rows: int) -> None:
    """Say in a note what would need less memory, once."""
    if any("clipgrad: memory ran out" in note for note in getattr(error, "__notes__", ())):
        return
    if rows > 1:
        error.add_note(
            f"clipgrad: memory ran out with {rows} samples at a time. Set microbatch_size to {max(1, rows // 2)} or "
            "less, or microbatch_size='auto', which finds the largest number that fits; results do not depend on it."
        )
    else:
        error.add_note(
            "clipgrad: memory ran out with one sample at a time. Set Performance(strategy='ghost'), which keeps no "
            "per-sample gradients, train fewer parameters, or make samples smaller."
        )


def _free_memory() -> float:
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # other systems than Linux
        return 2.0**31


def _peak_of_process() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
