"""This module holds what launches of noise kernels on one device share. It needs no Triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


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
    """This class launches kernels on one device.

    Args:
        device: The device; a CPU is for Triton's interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

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
