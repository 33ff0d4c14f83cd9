"""The state of PyTorch's random number generators, to be given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Generators:
    """The state of the random number generators that a step may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._own = None if device.type == "cpu" else self._module.get_rng_state(device)

    @property
    def _module(self):  # type: ignore[no-untyped-def]
        return torch.get_device_module(self._device)

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        if self._own is not None:
            self._module.set_rng_state(self._own, self._device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run the body from this state, and leave the generators as they are now."""
        now = Generators(self._device)
        self.restore()
        with now.kept():
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Give the generators back as they are in this state, whatever the body draws."""
        try:
            yield
        finally:
            self.restore()
