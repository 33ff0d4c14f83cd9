"""Mark the phases of a clipped step so that a profiler can time them; without a listener the cost is negligible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

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


Listener = Callable[[Phase | None], None]
"""It is called with each phase that begins, and with None when the innermost phase ends, by an exception too."""

# Not thread-local: on CUDA, autograd runs the backward pass and clipgrad's hooks on its own thread while the caller's
# thread waits.
_listener: Listener | None = None


class phase:
    """Mark the body of a ``with`` statement as a phase of the step.

    It is a class and not a generator, so that it costs half a microsecond without a listener, and Dynamo can trace it.

    Examples:
        >>> with phase("norms"):
        ...     total = 1 + 1
    """

    __slots__ = ("_listener", "_name")

    def __init__(self, name: Phase) -> None:
        self._name = name
        # The listener that hears of the beginning hears of the end, even if the global listener changes in between.
        self._listener = _listener

    def __enter__(self) -> None:
        if self._listener is not None:
            self._listener(self._name)

    def __exit__(self, *_: object) -> None:
        if self._listener is not None:
            self._listener(None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Report phases of all clipped steps in this process, on any thread, to ``listener`` while the body runs.

    Raises:
        RuntimeError: If another listener is active.
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
