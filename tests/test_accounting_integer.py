"""Renyi accounting at whole orders: what is proven for discrete Gaussian noise."""

from __future__ import annotations

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant

from clipgrad import accounting
from clipgrad.accounting import FullBatch, Ledger, Poisson, TruncatedPoisson

RUN = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 1000, "delta": 1e-5}


def by_dp_accounting(noise: float, rate: float, steps: int, delta: float) -> float:
    default = RdpAccountant().orders
    whole = RdpAccountant([int(order) for order in default if order == int(order)])
    step = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    whole.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(whole.get_epsilon(delta))


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.0, 0.01, 1000), (4.0, 0.3, 50), (0.6, 0.001, 10)]
)
def test_equal_to_dp_accounting_at_those_orders(noise: float, rate: float, steps: int) -> None:
    found = accounting.epsilon(
        noise_multiplier=noise, sample_rate=rate, steps=steps, delta=1e-5, accountant="rdp_integer"
    )
    assert found == pytest.approx(by_dp_accounting(noise, rate, steps, 1e-5), rel=1e-12)


def test_never_below_all_orders() -> None:
    for noise in (0.5, 0.7, 1.0, 3.0, 10.0):
        run = {**RUN, "noise_multiplier": noise}
        few = accounting.epsilon(**run, accountant="rdp_integer")  # type: ignore[arg-type]
        assert few >= accounting.epsilon(**run, accountant="rdp")  # type: ignore[arg-type]


def test_noise_for_a_target_and_a_ledger() -> None:
    run = {"sample_rate": 0.01, "steps": 100, "delta": 1e-5, "accountant": "rdp_integer"}
    noise = accounting.noise_multiplier(target_epsilon=1.0, **run)  # type: ignore[arg-type]
    ledger = Ledger(accountant="rdp_integer")
    ledger.record(noise, Poisson(0.01), 100)
    assert 0.99 < ledger.epsilon(1e-5) <= 1.0
    assert 0 < ledger.delta(1.0) <= 1e-5 * (1 + 1e-9)
    ledger.record(2.0, FullBatch())
    assert ledger.epsilon(1e-5) > 1.0


def test_what_it_cannot_treat() -> None:
    with pytest.raises(ValueError, match="'rdp_integer' cannot treat TruncatedPoisson"):
        Ledger(accountant="rdp_integer").record(1.0, TruncatedPoisson(0.1, 100, 20))
    with pytest.raises(ValueError, match="'rdp_integer' cannot treat relation 'replace_one'"):
        accounting.epsilon(**RUN, accountant="rdp_integer", relation="replace_one")  # type: ignore[arg-type]
