"""Import ``dp-accounting`` when it is first needed, since training itself works without it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def load_module(module: str) -> Any:
    """Import a module, or raise an error that names the extra to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); accounting needs it: "
            "pip install 'clipgrad[accounting]'"
        ) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence dp-accounting's warnings of Renyi orders that it omits; an omitted order only loosens the bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
