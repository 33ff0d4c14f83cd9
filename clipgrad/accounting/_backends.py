"""Create accountants by name."""

from __future__ import annotations

import math

from ._pld import PrivacyLoss
from ._rdp import Renyi
from ._terms import Terms

Backend = PrivacyLoss | Renyi
"""An accountant bounds what was released, and caches what further queries need."""


def backend(accountant: str, *, coarseness: int = 1) -> Backend:
    """Return a new accountant; ``coarseness`` is a power of two and used by ``"pld"`` only."""
    if accountant == "pld":
        return PrivacyLoss(coarseness)
    return Renyi(integer_orders=accountant == "rdp_integer")


def epsilon_of(terms: Terms, delta: float, within: Backend) -> float:
    """Return the epsilon at ``delta``: 0.0 if nothing was released, infinite without noise."""
    if not terms.precision and not terms.sampled:
        return 0.0
    return math.inf if terms.precision == math.inf else within.epsilon(terms, delta)


def delta_of(terms: Terms, epsilon: float, within: Backend) -> float:
    """Return the delta at ``epsilon``: 0.0 if nothing was released, 1.0 without noise."""
    if not terms.precision and not terms.sampled:
        return 0.0
    return 1.0 if terms.precision == math.inf else within.delta(terms, epsilon)
