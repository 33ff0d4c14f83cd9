"""The traceback of a refused loss shows the user's own lines; those of clipgrad and PyTorch say nothing about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import torch

from clipgrad.errors import NotPerSampleError

_OURS = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))
_LIBRARY = f"{Path(os.__file__).parent}{os.sep}"  # installed packages may be inside


class UsersLines:
    """A context in which a refusal of the loss keeps only the user's lines in its traceback.

    If the error itself has none, they are those of the error that caused it. Causes are not shown, but stay in
    ``__context__``. With ``CLIPGRAD_FULL_TRACEBACK=1`` in the environment nothing is left out.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: object, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, NotPerSampleError) and not os.environ.get("CLIPGRAD_FULL_TRACEBACK"):
            _shorten(error)


def _shorten(error: BaseException) -> None:
    found = (_users(seen.__traceback__) for seen in _with_causes(error))
    frames: list[TracebackType] = next(filter(None, found), [])
    joined: TracebackType | None = None
    for frame in reversed(frames):
        joined = TracebackType(joined, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    error.__context__ = error.__cause__ or error.__context__
    error.__cause__, error.__suppress_context__ = None, True
    error.__traceback__ = joined


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _users(traceback: TracebackType | None) -> list[TracebackType]:
    frames = []
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        library = file.startswith(_LIBRARY) and "-packages" not in file
        if not library and not file.startswith(_OURS):
            frames.append(traceback)
        traceback = traceback.tb_next
    return frames
