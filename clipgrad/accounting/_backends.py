"""The accountants by name."""

from __future__ import annotations

import math
from typing import Protocol

from ._pld import PrivacyLoss
from ._rdp import Renyi
from ._terms import Terms


class Backend(Protocol):
    """Bounds for what was released; remembers what helps with the next question."""

    def epsilon(self, terms: Terms, delta: float) -> float:
        """The epsilon at `delta`."""

    def delta(self, terms: Terms, epsilon: float) -> float:
        """The delta at `epsilon`."""


def backend(accountant: str, *, coarseness: int = 1) -> Backend:
    """A fresh one; ``coarseness`` is a power of two, for ``"pld"`` only."""
    if accountant == "pld":
        return PrivacyLoss(coarseness)
    return Renyi(integer_orders=accountant == "rdp_integer")


def epsilon_of(terms: Terms, delta: float, within: Backend) -> float:
    """The epsilon at `delta`; 0.0 for nothing, infinite without noise."""
    if not terms.precision and not terms.sampled:
        return 0.0
    return math.inf if terms.precision == math.inf else within.epsilon(terms, delta)


def delta_of(terms: Terms, epsilon: float, within: Backend) -> float:
    """The delta at `epsilon`; 0.0 for nothing, 1.0 without noise."""
    if not terms.precision and not terms.sampled:
        return 0.0
    return 1.0 if terms.precision == math.inf else within.delta(terms, epsilon)
