"""This module explains in one sentence why a loss could not be captured: PyTorch's reason and the user's line."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from clipgrad.errors import CompileError

_PACKAGES = sysconfig.get_path("purelib")
_NOT_THE_USERS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    sysconfig.get_path("stdlib"),
    "<",
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_EXPLANATION = re.compile(r"^\s*Explanation: (.*)$", re.MULTILINE)


class CannotCapture(CompileError):
    """This error is raised if PyTorch cannot capture the loss; it has the reason and the user's line.

    The capture computes and changes nothing, so the caller may run the loss in another way.

    Args:
        reason: A clause about the loss, without ``where``: "it uses ...".
        where: File and line, if they are known.
    """

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(f"the loss cannot be captured as one graph: {_with_place(reason, where)}.")
        self.where = where


def capture_error(error: BaseException) -> CannotCapture:
    """Return the error for an exception of PyTorch's capture.

    Args:
        error: An exception of any class.
    """
    error = getattr(error, "inner_exception", error)  # PyTorch wraps exceptions of its backend
    if isinstance(error, CannotCapture):
        return error
    text = str(error)
    stack = getattr(error, "real_stack", None)
    where = line_of(stack) if stack else None
    return CannotCapture(_reason(error, text), where or _last(_frames(text)))


def line_of(stack: Iterable[traceback.FrameSummary]) -> str | None:
    """Return the innermost line of a stack outside PyTorch."""
    return _last((frame.filename, frame.lineno or 0) for frame in stack)


def line_in(text: str | None) -> str | None:
    """Return the innermost line outside PyTorch of a stack as text, as a node of a graph holds it."""
    return _last(_frames(text or ""))


def _reason(error: BaseException, text: str) -> str:
    first = text.strip().partition("\n")[0].strip().rstrip(".") or type(error).__name__
    explanation = _EXPLANATION.search(text)
    if explanation:
        first = f"{first} ({explanation.group(1).strip().rstrip('.')})"
    return first if len(first) <= 400 else first[:397] + "..."


def _frames(text: str) -> Iterator[tuple[str, int]]:
    for frame in _FRAME.finditer(text):
        yield frame["file"], int(frame["line"])


def _last(frames: Iterable[tuple[str, int]]) -> str | None:
    every = list(frames)
    outside = [frame for frame in every if _is_the_users(frame[0])]
    chosen = outside or every
    return "{}:{}".format(*chosen[-1]) if chosen else None


def _is_the_users(file: str) -> bool:
    """Return whether a file is outside PyTorch, clipgrad and the standard library, which may contain site-packages."""
    for prefix in _NOT_THE_USERS:
        if file.startswith(prefix) and not (
            file.startswith(_PACKAGES) and _PACKAGES.startswith(prefix)
        ):
            return False
    return True


def _with_place(reason: str, where: str | None) -> str:
    return f"{reason}, at {where}" if where else reason
