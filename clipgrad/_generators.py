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


class Draws:
    """Whether random numbers were drawn since: by PyTorch's generators, Python's or NumPy's, all of them global.

    Args:
        device: Whose generator is watched beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._states()

    def happened(self) -> bool:
        """Whether any generator is in another state than at first."""
        tensors, others = self._states()
        return others != self._before[1] or not all(map(torch.equal, tensors, self._before[0]))

    def _states(self) -> tuple[list[Tensor], Any]:
        tensors = [torch.get_rng_state()]
        if self._device.type != "cpu":
            tensors.append(torch.get_device_module(self._device).get_rng_state(self._device))
        kind, words, *rest = np.random.get_state()  # noqa: NPY002 - the user's
        return tensors, (random.getstate(), kind, np.asarray(words).tobytes(), rest)
