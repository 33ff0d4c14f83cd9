"""Copy a batch to the device while the device is still at the step before."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device


class Transfer:
    """This class copies a batch to the device.

    On CUDA an ordinary copy waits until the device has done all that it was asked for. This copy only joins the queue.
    So what the host does for a step goes on while the device is at the step before. ``wait`` has to be called before
    the next batch is read, since a collator may write it to the memory of this one.

    Args:
        batch: A mapping with tensors on the host.
        device: Where the batch is needed.

    Attributes:
        batch: The batch on the device.
    """

    def __init__(self, batch: dict[str, Any], device: torch.device) -> None:
        queued = device.type == "cuda"
        self.batch: dict[str, Any] = send_to_device(batch, device, non_blocking=queued)
        self._copied = torch.cuda.Event() if queued else None
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Return when the batch was read from the host's memory."""
        if self._copied is not None:
            self._copied.synchronize()
