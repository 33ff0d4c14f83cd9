"""This module sets the settings of PyTorch's capture that clipgrad needs, for one call in one thread."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config

# Names of logger methods that only write; transformers adds methods such as ``warning_once``.
_LEVELS = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")


GUARDS_ONLY: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
    error_on_recompile=True,
    # With PyTorch's own limit the error would not say which guard failed.
    recompile_limit=1 << 20,
    accumulated_recompile_limit=1 << 20,
)
"""With these settings PyTorch raises ``RecompileError`` instead of capturing if no graph has valid guards."""


def capture_settings(limit: int) -> contextlib.AbstractContextManager[Any]:
    """Return a context manager with the settings for captures, which are valid in this thread only.

    Args:
        limit: The largest number of graphs of one loss.
    """
    settings: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
        allow_rnn=True,
        error_on_recompile=False,
        # A hook that is added later must fail a guard; by default PyTorch omits these guards.
        skip_nnmodule_hook_guards=False,
        ignore_logging_functions={
            *torch._dynamo.config.ignore_logging_functions,
            *_logging_functions(),
        },
        # Both exceed clipgrad's own limit, whose error names the change; the second counts failed attempts too.
        recompile_limit=limit + 1,
        accumulated_recompile_limit=100 * limit,
        # A float that changes becomes an input of the graph; ``take_numbers`` rewrites how the graph reads it.
        specialize_float=False,
        # If True, PyTorch would run the loss without a capture instead of raising an error.
        suppress_errors=False,
    )
    return settings


@contextlib.contextmanager
def silence_pytorch() -> Iterator[None]:
    """Silence PyTorch's warnings during a capture; failures raise errors.

    torch 2.11 also logs an error when it sorts the settings, because functions have no order.
    """
    log = logging.getLogger("torch._dynamo.metrics_context")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


def _logging_functions() -> Iterator[Callable[..., Any]]:
    for name, function in vars(logging.Logger).items():
        if name.startswith(_LEVELS) and callable(function):
            yield function
    yield from (print, warnings.warn)
