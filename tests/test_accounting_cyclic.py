"""Cyclic Poisson sampling: the events of dp-accounting, and jax_privacy's figures for them."""

from __future__ import annotations

import math
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp

from clipgrad import accounting
from clipgrad.accounting import CyclicPoisson, Ledger, Poisson
from tests.dp_tools import through_a_file
from tests.nightly import some

DELTA = 1e-6
# jax_privacy 2.0.0, accounting.analysis.DpsgdTrainingAccountant with cycle_length, of 1000 steps on batches of 400 of
# 100 000 samples, and of 2000 on 500 of 50 000. By privacy loss distributions, and by Renyi divergences.
JAX_PRIVACY = [
    (1000, 100_000, 400, 1.5, 8, 1.3416715086794289, 1.4942545085707137),
    (1000, 100_000, 400, 1.0, 20, 4.877672538040905, 5.533797692816957),
]
# The same release, matrix_factorization.toeplitz: the noise for an epsilon, by Renyi divergences.
JAX_CALIBRATED = [
    (1000, 100_000, 400, 1.0, 8, 1.9511960170739335),
    (1000, 100_000, 400, 4.0, 20, 1.1797238738549973),
    (2000, 50_000, 500, 8.0, 16, 1.514907886829531),
]


def cyclic(num_samples: int, batch: int, bands: int) -> CyclicPoisson:
    return CyclicPoisson(batch * bands / num_samples, bands)


@pytest.mark.parametrize(("steps", "n", "batch", "noise", "bands", "by_pld", "by_rdp"), JAX_PRIVACY)
def test_equals_jax_privacy(
    steps: int, n: int, batch: int, noise: float, bands: int, by_pld: float, by_rdp: float
) -> None:
    run: dict[str, Any] = {"noise_multiplier": noise, "steps": steps, "delta": DELTA}
    run["sampling"] = cyclic(n, batch, bands)
    assert accounting.epsilon(**run) == pytest.approx(by_pld, rel=1e-6)
    # Their accountant asks other orders than dp-accounting's default ones.
    assert accounting.epsilon(accountant="rdp", **run) == pytest.approx(by_rdp, rel=2e-3)


@pytest.mark.parametrize(("steps", "n", "batch", "target", "bands", "noise"), JAX_CALIBRATED)
def test_the_noise_that_jax_privacy_calibrates(
    steps: int, n: int, batch: int, target: float, bands: int, noise: float
) -> None:
    run: dict[str, Any] = {"sampling": cyclic(n, batch, bands), "steps": steps, "delta": DELTA}
    # Their search ends within 1e-6 of the least noise.
    least, most = (
        accounting.epsilon(noise_multiplier=noise + error, accountant="rdp", **run)
        for error in (1.2e-6, -1.2e-6)
    )
    assert least <= target <= most


@pytest.mark.parametrize(
    ("run", "relation"),
    some(
        3,
        [(9, 3, 0.05), (10, 16, 0.4), (7, 3, 0.2)],
        ["replace_one", "replace_special", "add_or_remove_one"],
    ),
)
def test_is_the_event_of_dp_accounting(run: tuple[int, int, float], relation: str) -> None:
    steps, bands, rate = run
    noise = 1.1
    clip_norms = 2 if relation == "replace_one" else 1
    event = dp.SelfComposedDpEvent(
        dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(clip_norms * noise)),
        math.ceil(steps / bands),
    )
    expected = pld.PLDAccountant(dp.NeighboringRelation[relation.upper()]).compose(event)
    run: dict[str, Any] = {"sampling": CyclicPoisson(rate, bands), "steps": steps, "delta": 1e-5}
    run |= {"noise_multiplier": noise, "relation": relation}
    assert accounting.epsilon(**run) == expected.get_epsilon(1e-5)
    if relation != "replace_one":
        renyi = rdp.RdpAccountant().compose(event).get_epsilon(1e-5)
        assert accounting.epsilon(accountant="rdp", **run) == pytest.approx(renyi, rel=1e-12)


def test_one_band_is_poisson_sampling() -> None:
    run: dict[str, Any] = {"noise_multiplier": 1.0, "steps": 40, "delta": 1e-5}
    assert accounting.epsilon(sampling=CyclicPoisson(0.1, 1), **run) == accounting.epsilon(
        sampling=Poisson(0.1), **run
    )


def test_whole_groups_are_not_amplified() -> None:
    run: dict[str, Any] = {"noise_multiplier": 2.0, "delta": 1e-5}
    found = accounting.epsilon(sampling=CyclicPoisson(1.0, 4), steps=10, **run)
    assert found == accounting.epsilon(sampling=accounting.FullBatch(), steps=3, **run)


def test_stopping_early_costs_the_rounds_that_were_begun() -> None:
    ledger = Ledger(accountant="rdp")
    costs = []
    for _ in range(7):
        ledger.record(1.0, CyclicPoisson(0.3, 3), run="a")
        costs.append(ledger.epsilon(1e-5))
    assert costs[0] == costs[1] == costs[2] < costs[3] == costs[4] == costs[5] < costs[6]
    assert ledger.history[0].steps == 7


def counted(ledger: Ledger) -> float:
    return ledger.epsilon(1e-5)


def by_rounds(rounds: int) -> float:
    ledger = Ledger(accountant="rdp")
    ledger.record(1.0, Poisson(0.3), rounds)
    return counted(ledger)


def test_two_runs_do_not_share_a_round() -> None:
    ledger = Ledger(accountant="rdp")
    for run in ("a", "b", "a"):
        ledger.record(1.0, CyclicPoisson(0.3, 4), 2, run=run)
    assert counted(ledger) == pytest.approx(by_rounds(3), rel=1e-12)


def test_a_run_of_a_plan_goes_on_after_a_restart_and_others_begin_anew() -> None:
    for run, rounds in (("a", 1), ("", 2)):
        ledger = Ledger(accountant="rdp")
        ledger.record(1.0, CyclicPoisson(0.3, 4), 2, run=run)
        again = Ledger(accountant="rdp")
        again.load_state_dict(through_a_file(ledger.state_dict()))
        again.begin()
        again.record(1.0, CyclicPoisson(0.3, 4), 2, run=run)
        assert counted(again) == pytest.approx(by_rounds(rounds), rel=1e-12)


def test_the_least_noise_of_a_round_counts() -> None:
    ledger, least = Ledger(accountant="rdp"), Ledger(accountant="rdp")
    for noise in (2.0, 1.0, 3.0):
        ledger.record(noise, CyclicPoisson(0.3, 4), run="a")
    least.record(1.0, Poisson(0.3))
    assert counted(ledger) == counted(least)


@pytest.mark.nightly
def test_calibration_meets_its_target() -> None:
    run: dict[str, Any] = {"sampling": CyclicPoisson(0.08, 8), "steps": 500, "delta": DELTA}
    for relation in ("add_or_remove_one", "replace_one"):
        noise = accounting.noise_multiplier(target_epsilon=2.0, relation=relation, **run)
        assert accounting.epsilon(noise_multiplier=noise, relation=relation, **run) <= 2.0
        assert accounting.epsilon(noise_multiplier=0.999 * noise, relation=relation, **run) > 2.0
    most = accounting.steps(
        target_epsilon=2.0, noise_multiplier=noise, sampling=run["sampling"], delta=DELTA
    )
    assert most % 8 == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CyclicPoisson(1.5, 2), "sample_rate must be positive and at most 1, got 1.5"),
        (lambda: CyclicPoisson(0.5, 0), "bands must be an integer, at least 1, got 0"),
        (lambda: CyclicPoisson(0.5, 2.0), "bands must be an integer"),  # type: ignore[arg-type]
    ],
)
def test_numbers_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_unproven_combinations_are_refused() -> None:
    run: dict[str, Any] = {"noise_multiplier": 1.0, "steps": 5, "delta": 1e-5}
    run["sampling"] = CyclicPoisson(0.5, 2)
    with pytest.raises(ValueError, match=r"group_size = 2 is not supported for CyclicPoisson"):
        accounting.epsilon(group_size=2, **run)
    with pytest.raises(ValueError, match="use accountant='pld'"):
        accounting.epsilon(accountant="rdp", relation="replace_one", **run)
