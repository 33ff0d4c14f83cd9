"""Count the batches of a sampler's iteration, and continue a saved iteration; all samplers share this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch.utils.data import Sampler

T = TypeVar("T", covariant=True)


class Resumable(Sampler[T]):
    """This sampler counts its batches, ``steps`` per iteration, and can continue a saved iteration.

    With ``whole_run`` the state of a finished iteration stays finished when it is loaded, and yields no batch.
    """

    _kind: ClassVar[str]
    """The sampler's name in a saved state; it must not change when a class is renamed."""

    def __init__(self, steps: int, *, whole_run: bool) -> None:
        self._steps, self._whole_run = steps, whole_run
        self._done, self._resume = 0, False

    def __len__(self) -> int:
        """Return the number of batches in one iteration, the same on every rank."""
        return self._steps

    @property
    def turns(self) -> str:
        """Return a hash that fixes which steps may use each sample; empty if every step may use every sample."""
        return ""

    def _to_come(self) -> range:
        """Return the numbers of the remaining batches of an iteration that begins now."""
        first = self._done if self._resume else 0
        self._resume = False
        return range(first, self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Return a state that holds the number of batches of the iteration so far."""
        done = self._done if self._whole_run else self._done % self._steps
        return {"kind": self._kind, "format": 1, "done": done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration.

        Args:
            state: The ``state_dict`` of a sampler with the same ``steps``, or of its loader.

        Raises:
            ValueError: If ``state`` belongs to another kind of sampler or to a longer iteration.
        """
        if (state.get("kind"), state.get("format")) != (self._kind, 1):
            raise ValueError(
                f"state must come from {self._kind}.state_dict(), got kind and format "
                f"{(state.get('kind'), state.get('format'))}."
            )
        if not 0 <= state["done"] < self._steps + self._whole_run:
            raise ValueError(
                f"state is {state['done']} batches into an iteration, but steps is {self._steps}; "
                "construct the sampler with the steps of the saved sampler."
            )
        self._done, self._resume = int(state["done"]), True
