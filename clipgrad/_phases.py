"""Marks around the phases of a clipped step, for whoever wants to time them; free as long as nobody does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Protocol, get_args

Phase = Literal[
    "forward",
    "backward",
    "per-sample gradients",
    "norms",
    "contraction",
    "bookkeeping",
    "noise",
    "optimizer",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


class Listener(Protocol):
    """What is told where phases begin and end. Phases nest; an exception ends them like anything else."""

    def begin(self, phase: Phase) -> None:
        """The phase begins, inside the one that is open."""
        ...

    def end(self) -> None:
        """The innermost open phase ends."""
        ...


# Not thread-local: on CUDA a backward pass, and with it our hooks, runs on a thread of autograd's own while the
# caller's thread waits for it.
_listener: Listener | None = None


class phase:
    """Mark the body of a ``with`` statement as a phase of the step.

    A class, not a generator: it costs half a microsecond while nobody listens, and Dynamo can trace it.

    Args:
        name: The phase.

    Examples:
        >>> with phase("norms"):
        ...     total = 1 + 1
    """

    __slots__ = ("_listener", "_name")

    def __init__(self, name: Phase) -> None:
        self._name = name
        # Who was told of the beginning is told of the end, whoever listens by then.
        self._listener = _listener

    def __enter__(self) -> None:
        if self._listener is not None:
            self._listener.begin(self._name)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._listener is not None:
            self._listener.end()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell ``listener`` of the phases of every clipped step that the process runs meanwhile, on any thread.

    Args:
        listener: Told of each phase's beginning and end.

    Raises:
        RuntimeError: If somebody listens already.
    """
    global _listener
    if _listener is not None:
        raise RuntimeError(
            "a clipped step is being profiled already, in this thread or another; profile one at a time."
        )
    _listener = listener
    try:
        yield
    finally:
        _listener = None
