"""The state of random number generators, to be given back as it was, or to see whether somebody drew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Generators:
    """The state of the random number generators that a step may draw from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._states = _states(device)

    def restore(self) -> None:
        cpu, *own = self._states
        torch.set_rng_state(cpu)
        for state in own:
            torch.get_device_module(self._device).set_rng_state(state, self._device)

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


class Draws:
    """Whether PyTorch's generators, which are global, were drawn from.

    Args:
        device: Whose generator is watched beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = _states(device)

    def since_last_asked(self) -> bool:
        """Whether any is in another state than when this was asked last, or at first."""
        before, self._last = self._last, _states(self._device)
        return not all(map(torch.equal, before, self._last))


def _states(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator and, if that is another device, of the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


def states_of_others() -> Any:
    """The states of Python's and NumPy's global generators, to be compared."""
    kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the user's
    return random.getstate(), kind, np.asarray(words).tobytes(), rest
