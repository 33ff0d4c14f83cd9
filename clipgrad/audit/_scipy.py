"""Import the libraries that only an audit's mathematics needs, when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def special() -> Any:
    """Return the module ``scipy.special``, which has incomplete beta functions."""
    return _imported("scipy.special")


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon at ``delta`` of a ``mu``-GDP run: Balle and Wang 2018, computed by dp-accounting."""
    if mu == 0.0:
        return 0.0
    return float(_imported("dp_accounting").get_epsilon_gaussian(1.0 / mu, delta))


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} could not be imported ({error}); audits need it: "
            "pip install 'clipgrad[accounting]'"
        ) from error
