"""A ledger adds up what it is told, like one run if nothing changed; saved and loaded it is the same."""

import copy
import math
from collections.abc import Callable
from typing import Any

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from clipgrad import Relation, accounting
from clipgrad.accounting import (
    Entry,
    FixedSize,
    FullBatch,
    Ledger,
    Poisson,
    TruncatedPoisson,
    epsilon,
)
from clipgrad.accounting._pld import grid_interval
from clipgrad.accounting._terms import terms_of
from tests.dp_tools import through_a_file
from tests.nightly import every, rows

BOTH = pytest.mark.parametrize("accountant", ["pld", "rdp"])


@BOTH
def test_equal_steps_are_a_run(accountant: accounting.Accountant) -> None:
    ledger = Ledger(accountant=accountant)
    for _ in range(30):
        ledger.record(1.0, Poisson(0.01))
    run: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 30}
    assert ledger.epsilon(1e-5) == epsilon(delta=1e-5, accountant=accountant, **run)
    assert ledger.history == (Entry(1.0, Poisson(0.01), 30),)
    assert ledger.delta(ledger.epsilon(1e-5)) == pytest.approx(1e-5, rel=1e-6)


def mixed(ledger: Ledger) -> Ledger:
    ledger.record(1.0, Poisson(0.02), 20)
    ledger.record(1.5, Poisson(0.05), 30)
    ledger.record(1.0, Poisson(0.02), 10)
    ledger.record(8.0, FullBatch(), 2)
    return ledger


@pytest.mark.parametrize(
    ("accountant", "own"), rows(2, [("rdp", rdp.RdpAccountant), ("pld", pld.PLDAccountant)])
)
def test_unlike_steps_equal_dp_accounting(accountant: Any, own: Any) -> None:
    events = [
        dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(noise)), count)
        for noise, q, count in [(1.0, 0.02, 20), (1.5, 0.05, 30), (1.0, 0.02, 10)]
    ]
    events.append(dp.SelfComposedDpEvent(dp.GaussianDpEvent(8.0), 2))
    theirs = own().compose(dp.ComposedDpEvent(events))
    ledger = mixed(Ledger(accountant=accountant))
    assert ledger.epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
    assert ledger.delta(0.5) == pytest.approx(theirs.get_delta(0.5), rel=1e-6)
    assert ledger.steps == 62
    assert [entry.steps for entry in ledger.history] == [20, 30, 10, 2]


@pytest.mark.parametrize("accountant", every(2, ["rdp", "pld"]))
def test_what_is_remembered_changes_nothing(accountant: accounting.Accountant) -> None:
    """Asked at every turn, over changes of the grid, or once at the end."""
    asked, once = Ledger(accountant=accountant), Ledger(accountant=accountant)
    for noise, steps in [(2.0, 3), (1.0, 5), (2.0, 2), (0.4, 2), (2.0, 1)]:
        for ledger in (asked, once):
            ledger.record(noise, Poisson(0.1), steps)
        asked.epsilon(1e-5)
        asked.delta(1.0)
    assert asked.epsilon(1e-5) == pytest.approx(once.epsilon(1e-5), rel=1e-9)
    assert asked.delta(1.0) == pytest.approx(once.delta(1.0), rel=1e-9)


@BOTH
def test_nothing_and_no_noise(accountant: accounting.Accountant) -> None:
    ledger = Ledger(accountant=accountant)
    assert (ledger.epsilon(1e-5), ledger.delta(0.0), ledger.steps) == (0.0, 0.0, 0)
    assert ledger.history == ()
    ledger.record(1.0, Poisson(0.1))
    assert 0 < ledger.epsilon(1e-5) < math.inf
    ledger.record(0.0, Poisson(0.1))
    assert (ledger.epsilon(1e-5), ledger.delta(3.0)) == (math.inf, 1.0)


def test_only_what_happened_since_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[float] = []
    distributions = pld.privacy_loss_distribution
    original = distributions.from_gaussian_mechanism

    def counting(noise: float, **arguments: Any) -> Any:
        built.append(noise)
        return original(noise, **arguments)

    monkeypatch.setattr(distributions, "from_gaussian_mechanism", counting)
    ledger = Ledger()
    for noise in (3.125, 3.25, 3.125):
        for _ in range(3):
            ledger.record(noise, Poisson(0.125))
            ledger.epsilon(1e-5)
            ledger.epsilon(1e-5)
    assert built == [3.125, 3.25]


# ----------------------------------------------------------------------------------- monotone

NOISE = st.sampled_from([0.8, 1.0, 3.0, 50.0])
RATE = st.sampled_from([1e-6, 1e-3, 0.3, 1.0])
ENTRIES = st.lists(st.tuples(NOISE, RATE, st.integers(1, 30)), min_size=1, max_size=5)


def assert_never_falls(ledger: Ledger, entries: list[tuple[float, float, int]]) -> None:
    before = (0.0, 0.0)
    for noise, rate, steps in entries:
        ledger.record(noise, Poisson(rate), steps)
        now = (ledger.epsilon(1e-6), ledger.delta(0.1))
        assert now[0] >= before[0]
        assert now[1] >= before[1]
        before = now


@given(entries=ENTRIES)
@settings(deadline=None, max_examples=40)
def test_more_steps_never_cost_less_by_rdp(entries: list[tuple[float, float, int]]) -> None:
    assert_never_falls(Ledger(accountant="rdp"), entries)


@pytest.mark.nightly
@given(entries=ENTRIES)
@settings(deadline=None, max_examples=5)
def test_more_steps_never_cost_less_by_pld(entries: list[tuple[float, float, int]]) -> None:
    assert_never_falls(Ledger(), entries)


def test_a_bound_that_wobbles_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([1.0, 1.0 - 1e-12, 1.5])
    monkeypatch.setattr("clipgrad.accounting._ledger.epsilon_of", lambda *_: next(values))
    ledger, answers = Ledger(), []
    for _ in range(3):
        ledger.record(1.0, Poisson(0.1))
        answers.append(ledger.epsilon(1e-5))
    assert answers == [1.0, 1.0, 1.5]


@pytest.mark.nightly
def test_a_coarser_grid_bounds_a_finer_one() -> None:
    """Over the change of the grid, without what the ledger does about wobbling."""
    run: dict[str, Any] = {"noise_multiplier": 1.0, "sample_rate": 0.2, "delta": 1e-6}
    grids, values = [], []
    for steps in (1454, 1455):
        terms = terms_of([(1.0, Poisson(0.2), steps, 0)], relation="replace_special", group_size=1)
        grids.append(grid_interval(terms))
        values.append(epsilon(steps=steps, **run))
    assert grids[1] == 2 * grids[0]
    assert values[0] < values[1] < 1.01 * values[0]


# -------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("relation", ["replace_special", Relation.REPLACE_SPECIAL])
def test_state_survives_saving(relation: Any) -> None:
    ledger = mixed(Ledger(relation=relation))
    ledger.record(3.0, FixedSize(100, 8), 5)
    ledger.record(3.0, TruncatedPoisson(0.1, 100, 30), 2)
    ledger.record(0.0, FullBatch())
    ledger.record(1.0, Poisson(0.1), run="abc", declared="each row by a coin")
    loaded = Ledger(relation="replace_special")
    loaded.epsilon(1e-5)
    loaded.load_state_dict(through_a_file(ledger.state_dict()))
    assert loaded.history == ledger.history
    assert loaded.steps == ledger.steps
    assert loaded.state_dict() == ledger.state_dict()
    assert loaded.epsilon(1e-5) == ledger.epsilon(1e-5) == math.inf


def test_loading_answers_anew() -> None:
    ledger, later = mixed(Ledger(accountant="rdp")), mixed(Ledger(accountant="rdp"))
    before = ledger.epsilon(1e-5)
    later.record(1.0, Poisson(0.1), 3)
    ledger.load_state_dict(later.state_dict())
    assert ledger.epsilon(1e-5) == later.epsilon(1e-5) > before
    assert ledger.steps == later.steps


def shorter(ledger: Ledger) -> None:
    """Nothing is recorded."""


def fewer_at_the_end(ledger: Ledger) -> None:
    for entry in mixed(Ledger()).history[:-1]:
        ledger.record(entry.noise_multiplier, entry.sampling, entry.steps)


def others_in_front(ledger: Ledger) -> None:
    ledger.record(50.0, Poisson(1e-6), 1000)
    mixed(ledger)


def less_in_the_last(ledger: Ledger) -> None:
    *rest, last = mixed(Ledger()).history
    for entry in rest:
        ledger.record(entry.noise_multiplier, entry.sampling, entry.steps)
    ledger.record(9 * last.noise_multiplier, last.sampling, 1000 * last.steps)


@pytest.mark.parametrize(
    "make", [shorter, fewer_at_the_end, others_in_front, less_in_the_last], ids=lambda m: m.__name__
)
def test_what_was_recorded_stays_recorded(make: Callable[[Ledger], None]) -> None:
    ledger, other = mixed(Ledger()), Ledger()
    make(other)
    before = ledger.history
    with pytest.raises(ValueError, match=r"forgets some of the \d+ of this ledger"):
        ledger.load_state_dict(through_a_file(other.state_dict()))
    assert ledger.history == before


def good() -> dict[str, Any]:
    return mixed(Ledger(accountant="rdp")).state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "PoissonSampler"},
        {"format": 1},
        {"relation": "replace_special"},
        {"accountant": "pld"},
        {"history": None},
        {"more": 1},
        {"history": [[1.0, "Poisson", [0.1]]]},
        {"history": [[1.0, "Ledger", [], 1]]},
        {"history": [[1.0, "Poisson", [], 1]]},
        {"history": [[1.0, "Poisson", [2.0], 1]]},
        {"history": [[1.0, "Poisson", [math.nan], 1]]},
        {"history": [[1.0, "Poisson", ["0.1"], 1]]},
        {"history": [[1.0, "Poisson", [0.1], 0]]},
        {"history": [[1.0, "Poisson", [0.1], True]]},
        {"history": [[1.0, "Poisson", [0.1], 1.5]]},
        {"history": [[-1.0, "Poisson", [0.1], 1]]},
        {"history": [[1.0, "FixedSize", [100, 10], 1]]},  # not under this relation
        {"history": [[1.0, ["Poisson"], [0.1], 1]]},
    ],
)
def test_other_states_are_refused_whole(change: dict[str, Any]) -> None:
    ledger = mixed(Ledger(accountant="rdp"))
    ledger.record(2.0, FullBatch())
    before = ledger.state_dict()
    with pytest.raises((ValueError, TypeError), match=r"state|must be|FixedSize"):
        ledger.load_state_dict({**good(), **change})
    assert ledger.state_dict() == before


@pytest.mark.parametrize("missing", list(good()))
def test_incomplete_states_are_refused(missing: str) -> None:
    state = good()
    del state[missing]
    with pytest.raises(ValueError, match="state must be the state_dict"):
        Ledger(accountant="rdp").load_state_dict(state)


def test_copies_go_their_own_way() -> None:
    ledger = mixed(Ledger(accountant="rdp"))
    before = ledger.epsilon(1e-5)
    for copied in (copy.deepcopy(ledger), copy.copy(ledger)):
        copied.record(0.5, Poisson(0.5), 10)
        assert copied.epsilon(1e-5) > ledger.epsilon(1e-5) == before
        assert ledger.steps == 62


# ---------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0, Poisson(0.1)), ValueError, "noise_multiplier must be.*got -1.0"),
        ((math.nan, Poisson(0.1)), ValueError, "noise_multiplier must be.*got nan"),
        (("1", Poisson(0.1)), TypeError, "noise_multiplier must be a real number"),
        ((1.0, 0.1), TypeError, r"sampling must be a Poisson.*got 0.1.*Poisson\(256"),
        ((1.0, Poisson(0.1), 0), ValueError, "steps must be an integer, at least 1, got 0"),
        ((1.0, Poisson(0.1), True), ValueError, "steps.*got True"),
        ((1.0, FixedSize(9, 3)), ValueError, "add_or_remove_one.*replace_special"),
    ],
)
def test_a_wrong_record_leaves_no_trace(
    arguments: Any, error: type[Exception], message: str
) -> None:
    ledger = Ledger()
    with pytest.raises(error, match=message):
        ledger.record(*arguments)
    assert (ledger.history, ledger.steps) == ((), 0)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_delta_must_be_a_probability(delta: float) -> None:
    with pytest.raises(ValueError, match=f"delta must.*got {delta}"):
        Ledger().epsilon(delta)


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_epsilon_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match=f"epsilon must be at least 0.*got {value}"):
        Ledger().delta(value)


def test_names_are_checked() -> None:
    with pytest.raises(
        ValueError, match="accountant must be one of 'pld', 'rdp', 'rdp_integer', got 'prv'"
    ):
        Ledger(accountant="prv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"relation must be one of.*got 'zero_out'"):
        Ledger(relation="zero_out")
    ledger = Ledger(relation=Relation.REPLACE_ONE)
    assert (ledger.relation, ledger.accountant) == ("replace_one", "pld")
