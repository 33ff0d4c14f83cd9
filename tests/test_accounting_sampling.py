"""What each description of the sampling costs, and what is refused, with the remedy."""

import math
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgrad.accounting import (
    FixedSize,
    FullBatch,
    Ledger,
    Poisson,
    TruncatedPoisson,
    epsilon,
    noise_multiplier,
    steps,
)
from clipgrad.accounting._terms import terms_of
from tests.nightly import every
from tests.test_accounting import gaussian_epsilon

BOTH = pytest.mark.parametrize("accountant", ["pld", "rdp"])


@BOTH
@pytest.mark.parametrize("relation", ["replace_one", "replace_special"])
@pytest.mark.parametrize(
    ("count", "passes"), [(1, 1), (9, 1), (10, 1), (11, 2), (100, 10), (101, 11)]
)
def test_fixed_batches_cost_one_mechanism_a_pass(
    accountant: Any, relation: str, count: int, passes: int
) -> None:
    common: dict[str, Any] = {"delta": 1e-5, "accountant": accountant, "relation": relation}
    ours = epsilon(noise_multiplier=3.0, sampling=FixedSize(100, 10), steps=count, **common)
    full = epsilon(noise_multiplier=3.0, sampling=FullBatch(), steps=passes, **common)
    assert ours == full
    exact = gaussian_epsilon(math.sqrt(passes) / 3.0, 1e-5)
    if accountant == "pld":
        assert ours == pytest.approx(exact, rel=1e-9)
    else:
        assert exact < ours < 1.3 * exact + 0.05


@pytest.mark.parametrize(("n", "batch", "steps_a_pass"), [(105, 10, 10), (19, 10, 1), (10, 10, 1)])
def test_a_pass_has_the_fewest_steps_that_it_may_have(
    n: int, batch: int, steps_a_pass: int
) -> None:
    terms = terms_of([(2.0, FixedSize(n, batch), 60, 0)], relation="replace_one", group_size=1)
    assert terms.precision == 60 / steps_a_pass / 4


RUNS = st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0, 5.0]), st.integers(1, 12)), max_size=6)


@given(n=st.integers(1, 20), batch=st.integers(1, 20), runs=RUNS, drop_last=st.booleans())
@settings(deadline=None, max_examples=300)
def test_fixed_batches_with_changing_noise_cover_every_place(
    n: int, batch: int, runs: list[tuple[float, int]], drop_last: bool
) -> None:
    """Slowly: the worst place of a sample in each pass, whether or not the last batch is dropped."""
    batch = min(batch, n)
    noises = [noise for noise, count in runs for _ in range(count)]
    size = n // batch if drop_last else -(-n // batch)
    passes = [noises[start : start + size] for start in range(0, len(noises), size)]
    worst = sum(min(noises_of_a_pass) ** -2 for noises_of_a_pass in passes)
    history = [(noise, FixedSize(n, batch), count, 0) for noise, count in runs]
    ours = terms_of(history, relation="replace_one", group_size=1).precision
    if n % batch == 0:
        assert ours == pytest.approx(worst, rel=1e-12)
    else:
        assert ours >= worst * (1 - 1e-12)


def test_another_description_begins_a_pass() -> None:
    def precision(*runs: tuple[float, Any, int]) -> float:
        history = [(*run, 0) for run in runs]
        return terms_of(history, relation="replace_one", group_size=1).precision

    a, b = FixedSize(100, 10), FixedSize(100, 20)
    assert precision((1.0, a, 5), (1.0, a, 5)) == 1
    assert precision((1.0, a, 5), (1.0, b, 5)) == 2
    assert precision((1.0, a, 5), (1.0, Poisson(0.1), 1), (1.0, a, 5)) == 2


def test_shuffling_is_not_sold_as_poisson() -> None:
    run: dict[str, Any] = {"noise_multiplier": 1.0, "steps": 100, "delta": 1e-5}
    run["relation"] = "replace_special"
    assert epsilon(sampling=FixedSize(1000, 10), **run) > 4 * epsilon(sample_rate=0.01, **run)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "relation", every(3, ["add_or_remove_one", "replace_one", "replace_special"])
)
def test_truncation_equals_dp_accounting(relation: str) -> None:
    ours = epsilon(
        noise_multiplier=2.0,
        sampling=TruncatedPoisson(0.05, 1000, 60),
        steps=100,
        delta=1e-5,
        relation=relation,
    )
    own = pld.PLDAccountant(dp.NeighboringRelation[relation.upper()])
    noise = 4.0 if relation == "replace_one" else 2.0
    larger = 1001 if relation == "add_or_remove_one" else 1000  # of the two neighbours
    own.compose(dp.TruncatedSubsampledGaussianDpEvent(larger, 0.05, 60, noise), 100)
    assert ours == own.get_epsilon(1e-5)


@pytest.mark.nightly
def test_truncation_costs_the_more_the_oftener() -> None:
    run: dict[str, Any] = {"noise_multiplier": 2.0, "steps": 100, "delta": 1e-5}
    values = [
        epsilon(sampling=sampling, **run)
        for sampling in (
            Poisson(0.05),
            TruncatedPoisson(0.05, 1000, 1000),
            TruncatedPoisson(0.05, 1000, 90),
            TruncatedPoisson(0.05, 1000, 60),
            TruncatedPoisson(0.05, 1000, 40),
        )
    ]
    assert values == sorted(values)
    assert values[0] == values[1]
    assert values[2] < 1.001 * values[0]
    assert values[-1] > 1.2 * values[0]


# ------------------------------------------------------------------------------------- groups


@BOTH
@pytest.mark.parametrize(
    "sampling", [FullBatch(), Poisson(1.0), FixedSize(50, 50), FixedSize(500, 50)]
)
@pytest.mark.parametrize("relation", ["replace_one", "replace_special"])
def test_a_group_without_sampling_moves_the_sum_as_often_as_far(
    accountant: Any, sampling: Any, relation: str
) -> None:
    run: dict[str, Any] = {"sampling": sampling, "steps": 3, "delta": 1e-5}
    run |= {"accountant": accountant, "relation": relation}
    group = epsilon(noise_multiplier=9.0, group_size=3, **run)
    assert group == pytest.approx(epsilon(noise_multiplier=3.0, **run), rel=1e-9)
    if accountant == "pld":
        mechanisms = 1 if sampling == FixedSize(500, 50) else 3
        assert group == pytest.approx(gaussian_epsilon(math.sqrt(mechanisms) / 3, 1e-5), rel=1e-9)


@pytest.mark.nightly
def test_a_group_equals_dp_accounting_and_beats_the_lemma() -> None:
    """At most what group privacy says of any mechanism: k epsilon at a delta of (e^(k epsilon) - 1)/(e^epsilon - 1)."""
    run: dict[str, Any] = {"noise_multiplier": 4.0, "sample_rate": 0.1, "steps": 50}
    ours = epsilon(group_size=2, delta=1e-5, **run)
    event = dp.dp_event.MixtureOfGaussiansDpEvent(4.0, [0, 1, 2], [0.81, 0.18, 0.01])
    own = pld.PLDAccountant(value_discretization_interval=4e-4).compose(event, 50)
    assert ours == pytest.approx(own.get_epsilon(1e-5), rel=1e-9)
    ledger = Ledger()
    ledger.record(4.0, Poisson(0.1), 50)
    single = ours / 2
    lemma = ledger.delta(single) * (math.exp(single) + 1)
    assert lemma > 1e-5
    assert ledger.epsilon(1e-5) < ours == ledger.epsilon(1e-5, group_size=2)
    assert ledger.delta(ours, group_size=2) == pytest.approx(1e-5, rel=1e-6)


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "sample_rate and sampling are None and None; give exactly one"),
        ({"sample_rate": 0.1, "sampling": Poisson(0.1)}, "give exactly one"),
        ({"sampling": FixedSize(9, 3)}, "shifts all.*relation='replace_special'"),
        (
            {"sampling": TruncatedPoisson(0.1, 9, 3), "accountant": "rdp"},
            "'rdp' cannot treat TruncatedPoisson.*accountant='pld'",
        ),
        ({"sampling": TruncatedPoisson(0.1, 9, 3), "group_size": 2}, "group_size = 2.*Poisson"),
        ({"sample_rate": 0.1, "group_size": 2, "accountant": "rdp"}, "group_size = 2.*'pld'"),
        (
            {"sample_rate": 0.1, "group_size": 2, "relation": "replace_one"},
            "group_size = 2.*'replace_one'.*'add_or_remove_one'",
        ),
        ({"sample_rate": 0.1, "group_size": 0}, "group_size must be.*at least 1, got 0"),
    ],
)
def test_what_has_no_bound_is_refused(changed: dict[str, Any], message: str) -> None:
    run: dict[str, Any] = {"delta": 1e-5, **changed}
    with pytest.raises(ValueError, match=message):
        epsilon(noise_multiplier=1.0, steps=1, **run)
    with pytest.raises(ValueError, match=message):
        noise_multiplier(target_epsilon=1.0, steps=1, **run)
    with pytest.raises(ValueError, match=message):
        steps(target_epsilon=1.0, noise_multiplier=1.0, **run)


def test_a_ledger_refuses_groups_too() -> None:
    ledger = Ledger(accountant="rdp", relation="replace_special")
    ledger.record(5.0, FixedSize(100, 10), 3)
    assert ledger.epsilon(1e-5, group_size=2) > ledger.epsilon(1e-5)
    ledger.record(5.0, Poisson(0.1))
    with pytest.raises(ValueError, match=r"group_size = 2.*accountant='pld'"):
        ledger.epsilon(1e-5, group_size=2)
    with pytest.raises(ValueError, match="group_size must be"):
        ledger.delta(1.0, group_size=1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("description", "arguments", "message"),
    [
        (Poisson, (0.0,), "sample_rate must be positive.*got 0.0"),
        (Poisson, (1.5,), "sample_rate.*at most 1, got 1.5"),
        (Poisson, (math.nan,), "sample_rate.*got nan"),
        (TruncatedPoisson, (0.0, 10, 5), "sample_rate must be positive"),
        (TruncatedPoisson, (0.1, 0, 5), "num_samples must be.*at least 1, got 0"),
        (TruncatedPoisson, (0.1, 10, 0), "max_batch_size must be.*at least 1, got 0"),
        (TruncatedPoisson, (0.1, 10, 2.5), "max_batch_size must be an integer.*got 2.5"),
        (FixedSize, (10, 0), "batch_size must be.*at least 1, got 0"),
        (FixedSize, (True, 1), "num_samples.*got True"),
        (
            FixedSize,
            (10, 11),
            r"batch_size must be at most num_samples, got 11 > 10.*FullBatch\(\)",
        ),
    ],
)
def test_descriptions_are_checked(description: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        description(*arguments)


# ---------------------------------------------------------------------- planning with the others


@BOTH
@pytest.mark.parametrize("target", [1.5, 4.0])
def test_steps_are_the_most_that_fit(accountant: Any, target: float) -> None:
    run: dict[str, Any] = {"noise_multiplier": 3.0, "sample_rate": 0.05, "delta": 1e-5}
    run["accountant"] = accountant
    most = steps(target_epsilon=target, **run)
    assert most > 5
    assert epsilon(steps=most, **run) <= target < epsilon(steps=most + 1, **run)


@BOTH
def test_steps_of_passes(accountant: Any) -> None:
    run: dict[str, Any] = {"noise_multiplier": 4.0, "sampling": FixedSize(1000, 7), "delta": 1e-5}
    run |= {"accountant": accountant, "relation": "replace_one"}
    most = steps(target_epsilon=3.0, **run)
    assert most % 142 == 0
    assert epsilon(steps=most, **run) <= 3.0 < epsilon(steps=most + 1, **run)


@BOTH
def test_steps_at_the_ends(accountant: Any) -> None:
    run: dict[str, Any] = {"sample_rate": 0.5, "delta": 1e-5, "accountant": accountant}
    assert steps(target_epsilon=1.0, noise_multiplier=0.0, **run) == 0
    assert steps(target_epsilon=1.0, noise_multiplier=0.3, **run) == 0
    with pytest.raises(ValueError, match="target_epsilon must be finite, got inf"):
        steps(target_epsilon=math.inf, noise_multiplier=1.0, **run)
    with pytest.raises(ValueError, match="target_epsilon must be positive"):
        steps(target_epsilon=0.0, noise_multiplier=1.0, **run)


def test_more_steps_than_are_looked_for() -> None:
    run: dict[str, Any] = {"sample_rate": 1e-6, "delta": 1e-5, "accountant": "rdp"}
    assert steps(target_epsilon=10.0, noise_multiplier=1e4, **run) == 2**40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "group_size"),
    [
        (FixedSize(100, 7), 1),
        (FullBatch(), 4),
        pytest.param(TruncatedPoisson(0.1, 100, 20), 1, marks=pytest.mark.nightly),
        pytest.param(Poisson(0.1), 2, marks=pytest.mark.nightly),
    ],
)
def test_noise_for_any_sampling(sampling: Any, group_size: int) -> None:
    run: dict[str, Any] = {"sampling": sampling, "steps": 1000, "delta": 1e-5}
    run |= {"relation": "replace_special", "group_size": group_size}
    noise = noise_multiplier(target_epsilon=2.0, **run)
    assert epsilon(noise_multiplier=noise, **run) <= 2.0
    assert epsilon(noise_multiplier=noise * (1 - 1.1e-4), **run) > 2.0
