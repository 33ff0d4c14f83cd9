"""Which values of a forward pass may depend on random numbers, for ``branches="split"``.

Where samples branch apart, their parts run again and draw again. That is harmless as long as what they branch on is the
same in every run. If it depends on what was drawn, a sample would end up with numbers that let it agree with its
neighbours: they would have a part in what it contributes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from clipgrad._functorch import below_vmap, innermost, is_wrapped
from clipgrad.engine.rng_state import Draws, states_of_others


class RandomValues:
    """Follows random numbers from operation to operation, by the memory that they are in.

    What no operation was seen to return (of a scripted function, say) counts as drawn.

    Args:
        device: The parameters'.
        given: Parameters and rows of the batch, as the loss holds them.
    """

    def __init__(self, device: torch.device, given: Iterable[Tensor]) -> None:
        with below_vmap():
            self._draws = Draws(device)
        self._others = states_of_others()
        self._unseen = False
        # As long as a weak reference is held, no other storage lies where that one did.
        self._memory: dict[int, tuple[StorageWeakRef, bool]] = {}
        for tensor in given:
            self._note(tensor, False)

    def before(self) -> None:
        """An operation begins."""
        with below_vmap():
            self._unseen |= self._draws.since_last_asked()

    def after(self, operands: Iterable[Tensor], results: Iterable[Tensor]) -> None:
        """It has ended."""
        with below_vmap():
            drew = self._draws.since_last_asked()
        drawn = drew or any(map(self._is_drawn, operands))
        for result in results:
            self._note(result, drawn or self._is_drawn(result, default=False))

    def decides(self, question: Tensor) -> bool:
        """Whether the answer to a question about a value may depend on random numbers."""
        return self._unseen or states_of_others() != self._others or self._is_drawn(question)

    def _is_drawn(self, tensor: Tensor, *, default: bool = True) -> bool:
        with below_vmap():
            known = self._memory.get(innermost(tensor).untyped_storage()._cdata)
        if known is not None:
            return known[1]
        return default and is_wrapped(tensor)

    def _note(self, tensor: Tensor, drawn: bool) -> None:
        with below_vmap():
            storage = innermost(tensor).untyped_storage()
            self._memory[storage._cdata] = StorageWeakRef(storage), drawn


__all__ = ["RandomValues"]
