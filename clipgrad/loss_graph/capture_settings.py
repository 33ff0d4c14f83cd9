"""The settings of PyTorch's capture that clipgrad needs, for the time of one call and one thread."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo.config

# Methods of loggers that only write; transformers adds some of its own, like ``warning_once``.
_LEVELS = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")


GUARDS_ONLY: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
    error_on_recompile=True,
    # Else PyTorch refuses at its own limit, before it says which guard failed.
    recompile_limit=1 << 20,
    accumulated_recompile_limit=1 << 20,
)
"""PyTorch raises ``RecompileError`` where no graph serves, instead of capturing."""


def capture_settings(limit: int) -> contextlib.AbstractContextManager[Any]:
    """PyTorch's settings for captures; they hold in this thread only, and the process's own come back.

    Args:
        limit: How many graphs of one loss PyTorch keeps.
    """
    settings: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(
        allow_rnn=True,
        error_on_recompile=False,
        # A hook that is added later must be seen; PyTorch leaves these guards out by default.
        skip_nnmodule_hook_guards=False,
        ignore_logging_functions={
            *torch._dynamo.config.ignore_logging_functions,
            *_logging_functions(),
        },
        # Both are beyond our own limit, whose error names what changes; the second counts attempts as well.
        recompile_limit=limit + 1,
        accumulated_recompile_limit=100 * limit,
        # A number that changes becomes an input; what PyTorch writes for it, ``take_numbers`` rewrites.
        specialize_float=False,
        # Errors are ours to explain; under this setting PyTorch would run the loss uncaptured.
        suppress_errors=False,
    )
    return settings


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence PyTorch's warnings about what it captures; an error says what matters.

    torch 2.11 also logs an error of its own when it writes down the settings, since functions have no order.
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
