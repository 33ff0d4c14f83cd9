"""This file holds what samplers share: the number of batches of an iteration, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch.utils.data import Sampler

T = TypeVar("T", covariant=True)


class Resumable(Sampler[T]):
    """This sampler counts its batches, ``steps`` per iteration, and can continue a saved iteration.

    With ``whole_run`` the state of a finished iteration is restored as finished, and yields no batch.
    """

    _kind: ClassVar[str]
    """The name in the state, which a subclass keeps."""

    def __init__(self, steps: int, *, whole_run: bool) -> None:
        self._steps, self._whole_run = steps, whole_run
        self._done, self._resume = 0, False

    def __len__(self) -> int:
        """Return the number of batches in one iteration, the same on every rank."""
        return self._steps

    @property
    def turns(self) -> str:
        """Return a name of which sample has its turn when; empty if samples take no turns."""
        return ""

    def _to_come(self) -> range:
        """Return the numbers of the batches of an iteration that begins now."""
        first = self._done if self._resume else 0
        self._resume = False
        return range(first, self._steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches of the iteration so far."""
        done = self._done if self._whole_run else self._done % self._steps
        return {"kind": self._kind, "format": 1, "done": done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved iteration.

        Args:
            state: The ``state_dict`` of a sampler with the same ``steps``, or of its loader.

        Raises:
            ValueError: If ``state`` is not such a sampler's.
        """
        if (state.get("kind"), state.get("format")) != (self._kind, 1):
            raise ValueError(
                f"state must come from {self._kind}.state_dict(), got kind and format "
                f"{(state.get('kind'), state.get('format'))}."
            )
        if not 0 <= state["done"] < self._steps + self._whole_run:
            raise ValueError(
                f"state is {state['done']} batches into an iteration, but steps is {self._steps}; "
                "construct the sampler with the steps it was saved with."
            )
        self._done, self._resume = int(state["done"]), True
