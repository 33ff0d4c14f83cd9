"""Account by Renyi divergences, which add up over steps, at about 150 orders."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ._dp import load_module, without_warnings
from ._terms import Mechanism, Terms


class Renyi:
    """This accountant serves growing histories: it caches the sum over all mechanisms but the last."""

    def __init__(self, *, integer_orders: bool = False) -> None:
        orders = _orders()
        self._chosen = orders == orders.round() if integer_orders else orders > 0
        self._finished: tuple[tuple[Mechanism, int], ...] = ()
        self._sum: Any = 0.0

    def epsilon(self, terms: Terms, delta: float) -> float:
        """Return the epsilon at ``delta``."""
        rdp = load_module("dp_accounting.rdp.rdp_privacy_accountant")
        bound, _ = rdp.compute_epsilon(*self._curve(terms), delta)
        return float(bound)

    def delta(self, terms: Terms, epsilon: float) -> float:
        """Return the delta at ``epsilon``."""
        rdp = load_module("dp_accounting.rdp.rdp_privacy_accountant")
        bound, _ = rdp.compute_delta(*self._curve(terms), epsilon)
        return float(bound)

    def _curve(self, terms: Terms) -> tuple[Any, Any]:
        return _orders()[self._chosen], self._divergences(terms)[self._chosen]

    def _divergences(self, terms: Terms) -> Any:
        # Mironov, "Renyi Differential Privacy", 2017, corollary 3.
        gaussian = terms.precision / 2 * _orders()
        if not terms.sampled:
            return gaussian
        *finished, (last, count) = terms.sampled
        known = len(self._finished)
        if tuple(finished[:known]) != self._finished:
            known, self._sum = 0, 0.0
        for mechanism, times in finished[known:]:
            self._sum = self._sum + times * _of_one_step(mechanism)
        self._finished = tuple(finished)
        return self._sum + count * _of_one_step(last) + gaussian


@lru_cache(maxsize=64)
def _of_one_step(mechanism: Mechanism) -> Any:
    """Return the Renyi divergence of one step at each order; a multiple of it serves any number of steps."""
    dp = load_module("dp_accounting")
    accountant = load_module("dp_accounting.rdp").RdpAccountant()
    with without_warnings():
        accountant.compose(
            dp.PoissonSampledDpEvent(mechanism.rate, dp.GaussianDpEvent(mechanism.noise))
        )
    return accountant.rdp


@lru_cache(maxsize=1)
def _orders() -> Any:
    return load_module("numpy").asarray(load_module("dp_accounting.rdp").RdpAccountant().orders)
