"""This module holds what launches of noise kernels on one device share. It needs no Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = 2
"""Columns of a table."""
MOST_TABLES = 64
"""Tables on the device; one for a billion parameters takes 0.25 MB."""


def refuse_capture() -> None:
    """Refuse a stream that is captured, because each replay would add the same noise.

    Raises:
        RuntimeError: If a CUDA graph is captured on the current stream.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Noise was requested during the capture of a CUDA graph, and each replay of the graph would add the "
            "same noise again. Add noise outside of the graph."
        )


class DeviceCalls:
    """This class launches kernels on one device, and keeps tables of addresses that the kernels read.

    Args:
        device: The device; a CPU is for Triton's interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tables: dict[tuple[object, ...], Tensor] = {}

    def _table(
        self,
        stream: int,
        addresses: tuple[int, ...],
        sizes: tuple[int, ...],
        chunk: int,
        itemsize: int,
    ) -> Tensor:
        """Return a table on the device that says where the parts of tensors begin.

        Successive steps have the same addresses, or those of one of some 20 recordings; the last tables are kept.

        Args:
            stream: The current stream. Tables are kept for each stream, so that their memory is not reused while a
                kernel reads them.
            addresses: Of the tensors.
            sizes: The number of values of each tensor.
            chunk: The largest number of values of a part.
            itemsize: Bytes of a value.
        """
        where = (stream, addresses, sizes, chunk, itemsize)
        table = self._tables.pop(where, None)
        if table is None:
            table = self._copied(_parts(addresses, sizes, chunk, itemsize))
            if len(self._tables) >= MOST_TABLES:
                del self._tables[next(iter(self._tables))]
        self._tables[where] = table
        return table

    def _copied(self, table: NDArray[np.int64]) -> Tensor:
        """Copy the table to the device from pinned memory, because a copy from pageable memory waits for the device."""
        on_cpu = torch.from_numpy(table)
        if self._device.type != "cuda":
            return on_cpu
        return on_cpu.pin_memory().to(self._device, non_blocking=True)

    def _stream(self) -> int:
        """Return the current stream, and refuse a captured stream, because each replay would add the same noise."""
        if self._device.type != "cuda":
            return 0
        refuse_capture()
        return int(torch.cuda.current_stream().cuda_stream)

    def _on_device(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda" or torch.cuda.current_device() == self._device.index:
            return nullcontext()
        return torch.cuda.device(self._device)


def _parts(
    addresses: tuple[int, ...], sizes: tuple[int, ...], chunk: int, itemsize: int
) -> NDArray[np.int64]:
    """Return a table of all parts of the tensors: the address and the number of values of each."""
    size = np.array(sizes, dtype=np.int64)
    parts = -(-size // chunk)
    within = (np.arange(parts.sum()) - np.repeat(parts.cumsum() - parts, parts)) * chunk
    table = np.empty((len(within), COLUMNS), dtype=np.int64)
    starts = np.array(addresses, dtype=np.uint64).view(np.int64)
    table[:, 0] = np.repeat(starts, parts) + within * itemsize
    table[:, 1] = np.minimum(np.repeat(size, parts) - within, chunk)
    return table.reshape(-1)
