"""The way to ``dp-accounting``, which is imported when first needed: training itself can do without."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def imported(module: str) -> Any:
    """The module, or an error that names the extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); accounting needs it: "
            "pip install 'clipgrad[accounting]'"
        ) from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """dp-accounting warns of every Renyi order that it leaves out; leaving one out only loosens the bound."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
