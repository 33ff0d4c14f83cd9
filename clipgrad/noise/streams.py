"""Keep the order of CUDA streams for tensors that one step writes and a later step reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clipgrad.kernels.device_calls import refuse_capture


class InOrder:
    """This class makes each use of a tensor wait for the uses before it, also if they were on other streams.

    Without it a step on another stream could read noise that was made ahead before it is written.

    Args:
        tensor: The tensor; nothing is done unless it is on CUDA.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._last: Any = None

    def enter(self) -> None:
        """Begin a use on the current stream.

        Raises:
            RuntimeError: If this stream is captured: each replay would add the same noise, which was made before.
        """
        if self._tensor.device.type != "cuda":
            return
        with torch.cuda.device(self._tensor.device):
            refuse_capture()
            stream = torch.cuda.current_stream()
        if self._last is not None and stream != self._last:
            stream.wait_stream(self._last)
            self._tensor.record_stream(stream)
        self._last = stream
