"""Save and restore RNG state, and detect whether it has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SavedRngState:
    """This class saves the RNG states that a step may change: of the CPU and of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = _states(device)

    def restore(self) -> None:
        cpu, *own = self._states
        torch.set_rng_state(cpu)
        for state in own:
            torch.get_device_module(self._device).set_rng_state(state, self._device)

    def changed(self) -> bool:
        """Return whether a state differs from the saved one, so that random numbers were generated."""
        # A trace of the step must not take this for a value that the loss reads.
        with torch._C.DisableTorchFunction():
            return _bytes(self._states) != _bytes(_states(self._device))

    @contextmanager
    def temporarily_restored(self) -> Iterator[None]:
        """Run the body from the saved state, and then restore the state from before the call."""
        now = SavedRngState(self._device)
        self.restore()
        with now.restored_on_exit():
            yield

    @contextmanager
    def restored_on_exit(self) -> Iterator[None]:
        """Restore the saved state after the body."""
        try:
            yield
        finally:
            self.restore()


def _bytes(states: list[Tensor]) -> list[bytes]:
    return [state.numpy().tobytes() for state in states]


def _states(device: torch.device) -> list[Tensor]:
    """Return the state of the CPU's generator and, for another device, of the device's generator."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states
