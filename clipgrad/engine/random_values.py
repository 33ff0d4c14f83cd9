"""Record which values of a forward pass may depend on random numbers, for ``branches="split"``.

Where samples take different branches, their parts run again, with new random numbers. That is harmless if the branch
condition has the same value in every run. If the condition depends on random numbers, a sample ends up with numbers
for which it agrees with its neighbours. Then other samples influence the sample's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from clipgrad._functorch import below_vmap, is_wrapped, unwrap_all
from clipgrad.engine.rng_state import RngChanges, python_rng_states


class RandomValues:
    """This class follows random numbers from operation to operation, by the memory in which they are stored.

    A per-sample tensor that no intercepted operation returned (but a scripted function, say) counts as random.

    Args:
        device: The parameters' device.
        given: Parameters and rows of the batch, as the loss holds them.
    """

    def __init__(self, device: torch.device, given: Iterable[Tensor]) -> None:
        with below_vmap():
            self._draws = RngChanges(device)
        self._others = python_rng_states()
        self._unseen = False
        # While a weak reference to a storage exists, no other storage gets the same address.
        self._memory: dict[int, tuple[StorageWeakRef, bool]] = {}
        for tensor in given:
            self._note(tensor, False)

    def before(self) -> None:
        """Note random numbers that were generated outside of intercepted operations; call before each operation."""
        with below_vmap():
            self._unseen |= self._draws.since_last_call()

    def after(self, operands: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """Record whether the results of an operation depend on random numbers; call after each operation."""
        with below_vmap():
            drew = self._draws.since_last_call()
        drawn = drew or any(map(self._is_drawn, operands))
        for result in results:
            self._note(result, drawn or self._is_drawn(result, default=False))

    def decides(self, question: Tensor) -> bool:
        """Return whether the value of a tensor may depend on random numbers."""
        return self._unseen or python_rng_states() != self._others or self._is_drawn(question)

    def _is_drawn(self, tensor: Tensor, *, default: bool = True) -> bool:
        with below_vmap():
            known = self._memory.get(unwrap_all(tensor).untyped_storage()._cdata)
        if known is not None:
            return known[1]
        return default and is_wrapped(tensor)

    def _note(self, tensor: Tensor, drawn: bool) -> None:
        with below_vmap():
            storage = unwrap_all(tensor).untyped_storage()
            self._memory[storage._cdata] = StorageWeakRef(storage), drawn


__all__ = ["RandomValues"]
