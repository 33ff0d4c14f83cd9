"""One plan makes loader, optimizer and accountant, and none of them can leave it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import (
    DiscreteGaussianNoise,
    DPOptimizer,
    PrivacyPlan,
    Relation,
    accounting,
)
from clipgrad.accounting import FixedSize, FullBatch, Ledger, Poisson, TruncatedPoisson
from clipgrad.errors import PrivacyBudgetError
from tests.dp_tools import mlp, sgd, squared, through_a_file, values
from tests.nightly import chosen

RUN: dict[str, Any] = {
    "num_samples": 64,
    "expected_batch_size": 8,
    "steps": 5,
    "delta": 1e-3,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
}


def plan(**changes: Any) -> PrivacyPlan:
    return PrivacyPlan(**{**RUN, **changes})


def declared(**changes: Any) -> PrivacyPlan:
    """A plan whose batches the tests make up."""
    return plan(**{"declared_sampling": "by a coin for each row", **changes})


def dataset(size: int = 64) -> torch.utils.data.TensorDataset:
    return torch.utils.data.TensorDataset(torch.randn(size, 4, dtype=torch.float64))


def optimizer_of(a_plan: PrivacyPlan, **options: Any) -> DPOptimizer:
    model = mlp()
    return DPOptimizer(sgd(model, lr=0.1), model, squared, plan=a_plan, **options)


def take(optimizer: DPOptimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.backward(torch.randn(3, 4, dtype=torch.float64))
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_epsilon_is_that_of_the_run(accountant: str) -> None:
    run = {"sample_rate": 8 / 64, "steps": 5, "delta": 1e-3, "noise_multiplier": 1.0}
    run["accountant"] = accountant  # type: ignore[assignment]
    a_plan = plan(accountant=accountant)
    assert a_plan.epsilon() == accounting.epsilon(**run)  # type: ignore[arg-type]
    assert a_plan.epsilon(3) == accounting.epsilon(**{**run, "steps": 3})  # type: ignore[arg-type]
    assert a_plan.epsilon(0) == 0.0
    assert plan(noise_multiplier=0.0).epsilon() == float("inf")


@pytest.mark.parametrize("accountant", chosen(["pld", "rdp"], {"rdp"}))
def test_the_least_noise_for_an_epsilon(accountant: str) -> None:
    wanted = {name: RUN[name] for name in ("num_samples", "expected_batch_size", "steps", "delta")}
    found = PrivacyPlan.for_epsilon(1.5, **wanted, accountant=accountant)  # type: ignore[arg-type]
    assert found.epsilon() <= 1.5
    assert found.with_noise(0.999 * found.noise_at(0)).epsilon() > 1.5


def test_an_epsilon_that_promises_nothing_is_no_plan() -> None:
    wanted = {name: RUN[name] for name in ("num_samples", "expected_batch_size", "steps", "delta")}
    with pytest.raises(ValueError, match=r"must be finite, got inf.*noise_multiplier=0\.0"):
        PrivacyPlan.for_epsilon(float("inf"), **wanted)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target_epsilon must be at least 0, got -1\.0\."):
        PrivacyPlan.for_epsilon(-1.0, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({}, Poisson(0.125)),
        ({"expected_batch_size": 64}, FullBatch()),
        ({"max_batch_size": 16, "accountant": "pld"}, TruncatedPoisson(0.125, 64, 16)),
        ({"shuffled": True, "relation": "replace_one"}, FixedSize(64, 8)),
    ],
)
def test_how_batches_come_about(changes: dict[str, Any], sampling: object) -> None:
    assert plan(**changes).sampling == sampling


def test_noise_of_a_schedule_is_added_up_step_by_step() -> None:
    scheduled = plan(noise_multiplier=lambda step: 1.0 + step)
    by_hand = Ledger(accountant="rdp")
    for step in range(5):
        by_hand.record(1.0 + step, Poisson(0.125))
    assert scheduled.epsilon() == by_hand.epsilon(1e-3)
    assert scheduled.epsilon() < plan().epsilon()


def test_a_plan_says_what_it_promises() -> None:
    text = str(plan(max_batch_size=32, accountant="pld", steps=1))
    for part in ("epsilon = ", "delta = 0.001", "1 step on", "at most 32", "of 64 samples", "pld"):
        assert part in text
    assert "5 steps on" in str(plan(accountant="rdp"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "num_samples must be an integer, at least 1, got 0"),
        ({"steps": 2.5}, "steps must be an integer, at least 1, got 2.5"),
        ({"steps": True}, "steps must be an integer"),
        ({"expected_batch_size": 65}, "at most num_samples = 64, got 65"),
        ({"expected_batch_size": 0}, "expected_batch_size must be a positive"),
        ({"delta": 0.0}, "delta must lie between 0 and 1"),
        ({"delta": 1}, "delta must lie between 0 and 1"),
        ({"noise_multiplier": "1"}, "noise_multiplier must be a number"),
        ({"relation": "other"}, "relation must be one of"),
        ({"accountant": "gdp"}, "accountant must be one of"),
        ({"shuffled": True}, "an additional sample moves samples to other batches"),
        (
            {"shuffled": True, "relation": "replace_one", "max_batch_size": 9},
            "max_batch_size=9 cuts Poisson batches",
        ),
        (
            {"shuffled": True, "relation": "replace_one", "expected_batch_size": 7.5},
            "must be a whole number",
        ),
    ],
)
def test_plans_that_are_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        plan(**changes)


# ------------------------------------------------------------------------------- the optimizer


def test_the_optimizer_is_built_from_the_plan() -> None:
    a_plan = plan(max_grad_norm=2.0, relation="replace_one", noise_multiplier=1.5, accountant="pld")
    optimizer = optimizer_of(a_plan)
    assert optimizer.max_grad_norm == 2.0
    assert optimizer.expected_batch_size == 8
    assert optimizer.relation is Relation.REPLACE_ONE
    assert optimizer.sigma == 1.5 * 2 * 2.0


@pytest.mark.parametrize(
    "given",
    [
        {"max_grad_norm": 1.0},
        {"noise_multiplier": 1.0},
        {"expected_batch_size": 8},
    ],
)
def test_nothing_is_said_twice(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"the plan sets {next(iter(given))} already"):
        optimizer_of(plan(), **given)


def test_what_is_missing_without_a_plan() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="needs noise_multiplier, expected_batch_size"):
        DPOptimizer(sgd(model), model, squared, max_grad_norm=1.0)


def test_epsilon_so_far() -> None:
    optimizer = optimizer_of(declared())
    seen = [optimizer.epsilon()]
    for _ in range(5):
        take(optimizer, 1)
        seen.append(optimizer.epsilon())
    assert seen == sorted(seen)
    assert seen[0] == 0.0
    assert seen[2] == plan().epsilon(2)
    assert seen[-1] == plan().epsilon()
    assert optimizer.epsilon(1e-5) > optimizer.epsilon()
    (entry,) = optimizer.ledger.history
    assert entry.declared == "by a coin for each row"
    assert dataclasses.replace(entry, run="", declared="") == plan().ledger().history[0]


def test_no_step_beyond_the_plan() -> None:
    optimizer = optimizer_of(declared(steps=2))
    take(optimizer, 2)
    optimizer.backward(torch.randn(3, 4, dtype=torch.float64))
    before = values(optimizer.model)
    with pytest.raises(PrivacyBudgetError, match="all 2 steps of the plan were taken"):
        optimizer.step()
    assert all(torch.equal(before[name], now) for name, now in values(optimizer.model).items())
    assert optimizer.ledger.steps == 2


def test_a_step_without_a_batch_costs_nothing() -> None:
    optimizer = optimizer_of(plan())
    with pytest.raises(clipgrad.errors.UnclippedGradientError):
        optimizer.step()
    assert optimizer.ledger.steps == 0


def test_noise_that_was_drawn_counts_even_if_the_step_fails() -> None:
    optimizer = optimizer_of(declared())
    optimizer.backward(torch.randn(3, 4, dtype=torch.float64))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = optimizer.inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    handle.remove()
    assert optimizer.ledger.steps == 1


def test_the_plans_noise_cannot_be_changed() -> None:
    optimizer = optimizer_of(plan())
    with pytest.raises(ValueError, match="noise_multiplier belongs to the plan"):
        optimizer.noise_multiplier = 0.5


def test_a_scheduled_and_an_adaptive_run_tell_the_ledger_the_truth() -> None:
    scheduled = declared(
        noise_multiplier=lambda step: 2.0 if step < 2 else 1.0,
        max_grad_norm=clipgrad.AdaptiveQuantile(1.0, count_stddev=10.0),
    )
    optimizer = optimizer_of(scheduled)
    take(optimizer, 5)
    assert [(e.noise_multiplier, e.steps) for e in optimizer.ledger.history] == [(2.0, 2), (1.0, 3)]
    assert optimizer.epsilon() == scheduled.epsilon()


def test_a_further_plan_continues_the_count() -> None:
    first = optimizer_of(declared(steps=2))
    take(first, 2)
    second = optimizer_of(
        declared(steps=3, expected_batch_size=16).continuing(first.ledger),
    )
    take(second, 3)
    assert [(e.sampling, e.steps) for e in second.ledger.history] == [
        (Poisson(0.125), 2),
        (Poisson(0.25), 3),
    ]
    with pytest.raises(ValueError, match="their epsilons do not add up"):
        optimizer_of(
            declared(relation="replace_special").continuing(first.ledger),
        )


def test_without_a_plan_there_is_no_ledger() -> None:
    model = mlp()
    optimizer = DPOptimizer(
        sgd(model), model, squared, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=1
    )
    for ask in (lambda: optimizer.ledger, optimizer.epsilon):
        with pytest.raises(RuntimeError, match="built without a plan"):
            ask()


def test_a_plan_of_the_exact_mode() -> None:
    exact = declared(grid=2.0**-10, accountant="rdp_integer")
    optimizer = optimizer_of(exact)
    assert isinstance(optimizer.noise, clipgrad.DiscreteGaussianNoise)
    take(optimizer, 2)
    assert optimizer.epsilon() == exact.epsilon(2) >= plan(accountant="rdp").epsilon(2)
    for accountant in ("pld", "rdp"):
        with pytest.raises(ValueError, match="not proven; use accountant='rdp_integer'"):
            plan(grid=2.0**-10, accountant=accountant)
    with pytest.raises(
        ValueError, match="is on a grid, but the plan accounts for continuous noise"
    ):
        optimizer_of(plan(), noise=DiscreteGaussianNoise(2.0**-10))


def test_what_the_noise_stands_on_cannot_be_changed() -> None:
    optimizer = optimizer_of(plan(grid=2.0**-10, accountant="rdp_integer"))
    with pytest.raises(AttributeError):
        optimizer.relation = Relation.REPLACE_SPECIAL  # type: ignore[misc]
    with pytest.raises(ValueError, match="needs noise on the same grid"):
        optimizer.noise = clipgrad.SystemNoise()
    with pytest.raises(ValueError, match="noise must be a NoiseSource"):
        optimizer_of(plan()).noise = 0  # type: ignore[assignment]
    optimizer.noise = clipgrad.DiscreteGaussianNoise(2.0**-10)


def test_the_wrapped_optimizer_does_not_step_without_noise() -> None:
    optimizer = optimizer_of(declared())
    for one in (optimizer, copy.deepcopy(optimizer)):
        one.backward(torch.randn(3, 4, dtype=torch.float64))
        before = values(one.model)
        with pytest.raises(
            clipgrad.errors.UnclippedGradientError,
            match="before noise was added to the clipped sums",
        ):
            one.inner.step()
        assert all(torch.equal(before[name], now) for name, now in values(one.model).items())
        one.step()
        one.zero_grad()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation": "replace_one", "accountant": "rdp"}, "cannot treat relation 'replace_one'"),
        ({"max_batch_size": 40, "accountant": "rdp"}, "cannot treat TruncatedPoisson"),
        (
            {"max_batch_size": 40, "accountant": "rdp_integer", "grid": 2.0**-9},
            "max_batch_size=40 cannot be accounted for with a grid",
        ),
        (
            {"relation": "replace_one", "accountant": "rdp_integer", "grid": 2.0**-9},
            "'replace_one' under Poisson sampling cannot be accounted for with a grid",
        ),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite and at least 0, got -1"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier must be finite"),
    ],
)
def test_what_cannot_be_accounted_for_is_refused_at_once(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_the_promise_is_rounded_up() -> None:
    tiny = plan(noise_multiplier=300.0, delta=1e-9)
    said = float(str(tiny).split("epsilon = ")[1].split(",")[0])
    assert 0 < tiny.epsilon() <= said < 1.02 * tiny.epsilon()
    assert "batches of all 64 samples" in str(plan(expected_batch_size=64))
    assert "discrete Gaussian" in str(plan(grid=2.0**-9, accountant="rdp_integer"))


# ------------------------------------------------------------------------------- its state


def test_the_count_survives_a_checkpoint() -> None:
    optimizer = optimizer_of(declared(steps=3))
    take(optimizer, 2)
    other = optimizer_of(declared(steps=3))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.epsilon() == optimizer.epsilon() > 0
    take(other, 1)
    with pytest.raises(PrivacyBudgetError):
        take(other, 1)
    assert optimizer.ledger.steps == 2


def test_a_state_without_an_account_is_refused() -> None:
    optimizer = optimizer_of(declared())
    take(optimizer, 1)
    before = optimizer.ledger.steps
    for state in (optimizer.inner.state_dict(), {**optimizer.state_dict(), "clipgrad": {}}):
        with pytest.raises(ValueError, match="no account of what was released"):
            optimizer.load_state_dict(state)
    assert optimizer.ledger.steps == before


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda own: own["account"].pop("run"), "must hold 'run' and 'ledger'"),
        (lambda own: own["account"].update(run=3), "must hold 'run' and 'ledger'"),
        (
            lambda own: own["account"].update(run="other"),
            "taken 4 steps, but the ledger holds 0|another run",
        ),
        (lambda own: own["account"]["ledger"]["history"].clear(), "forgets some|holds 0 of this"),
        (lambda own: own["account"]["ledger"]["history"][0].__setitem__(3, 1), "forgets|holds 1"),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
def test_an_edited_account_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, fresh: bool
) -> None:
    optimizer = optimizer_of(declared())
    take(optimizer, 4)
    state = through_a_file(optimizer.state_dict())
    edit(state["clipgrad"])
    other = optimizer_of(declared()) if fresh else optimizer
    before = other.ledger.history
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert other.ledger.history == before


def test_the_steps_of_a_run_are_those_in_its_ledger() -> None:
    """No number of its own says how many steps were taken, so none can be set back."""
    optimizer = optimizer_of(declared())
    take(optimizer, 4)
    other = optimizer_of(declared())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    take(other, 1)
    with pytest.raises(PrivacyBudgetError, match="all 5 steps"):
        take(other, 1)
    with pytest.raises(ValueError, match="forgets some of the 4"):
        optimizer.ledger.load_state_dict(Ledger(accountant="rdp").state_dict())
    assert optimizer.ledger.steps == 4


def test_a_ledger_that_is_shared_stays_shared() -> None:
    ledger = Ledger(accountant="rdp")
    a, b = (
        optimizer_of(
            declared().continuing(ledger),
        )
        for _ in range(2)
    )
    for optimizer in (a, b):
        take(optimizer, 1)
    for optimizer in (a, b):
        optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
        take(optimizer, 1)
    assert a.ledger is b.ledger is ledger
    assert ledger.steps == 4


def test_what_was_released_stays_released() -> None:
    optimizer = optimizer_of(declared())
    take(optimizer, 1)
    early = through_a_file(optimizer.state_dict())
    take(optimizer, 2)
    with pytest.raises(ValueError, match="holds 1 released steps and forgets some of the 3"):
        optimizer.load_state_dict(early)
    assert optimizer.ledger.steps == 3


def test_shuffled_passes_do_not_continue_after_a_restart() -> None:
    """Eight batches a pass; the second half is shuffled anew, so that a sample may be in both."""
    shuffled = declared(shuffled=True, relation="replace_special", steps=8)
    whole, first = (optimizer_of(dataclasses.replace(shuffled)) for _ in range(2))
    take(whole, 8)
    assert whole.epsilon() == shuffled.epsilon()
    take(first, 4)
    resumed = optimizer_of(dataclasses.replace(shuffled))
    resumed.load_state_dict(through_a_file(first.state_dict()))
    take(resumed, 4)
    two_passes = Ledger(relation="replace_special", accountant="rdp")
    two_passes.record(1.0, FullBatch(), 2)
    assert resumed.epsilon() == pytest.approx(two_passes.epsilon(1e-3))
    further = optimizer_of(
        shuffled.continuing(whole.ledger),
    )
    take(further, 1)
    assert further.epsilon() == pytest.approx(two_passes.epsilon(1e-3))
    again = Ledger(relation="replace_special", accountant="rdp")
    again.load_state_dict(through_a_file(resumed.ledger.state_dict()))
    assert again.epsilon(1e-3) == resumed.epsilon()


def test_a_ledger_of_another_accountant_is_refused() -> None:
    with pytest.raises(ValueError, match="their epsilons do not add up"):
        optimizer_of(
            plan(grid=2.0**-10, accountant="rdp_integer").continuing(Ledger()),
        )
    with pytest.raises(ValueError, match=r"ledger must be a .*Ledger, got dict"):
        optimizer_of(
            plan().continuing({}),
        )


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_spends_the_same_budget(how: Callable[[DPOptimizer], DPOptimizer]) -> None:
    optimizer = optimizer_of(declared(steps=3))
    take(optimizer, 1)
    other = how(optimizer)
    take(other, 2)
    assert optimizer.ledger is other.ledger
    assert (optimizer.ledger.steps, optimizer.epsilon()) == (3, other.epsilon())
    with pytest.raises(PrivacyBudgetError):
        take(optimizer, 1)


def test_a_pickled_optimizer_goes_on_with_what_was_released() -> None:
    optimizer = optimizer_of(declared(steps=3))
    take(optimizer, 2)
    account = pickle.loads(pickle.dumps(optimizer._account))
    assert account.steps_done == 2
    assert account.ledger.history == optimizer.ledger.history


# ------------------------------------------------------------------------------- the loader


def test_one_iteration_of_the_loader_is_the_run() -> None:
    a_plan = plan()
    loader = clipgrad.poisson_loader(dataset(), plan=a_plan)
    optimizer = optimizer_of(a_plan)
    for (x,) in loader:
        optimizer.backward(x)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.ledger.steps == a_plan.steps == len(loader)
    assert loader.batch_sampler.sampling == a_plan.sampling


def test_a_truncated_plan_cuts_and_pads() -> None:
    a_plan = plan(max_batch_size=9, accountant="pld")
    loader = clipgrad.poisson_loader(dataset(), plan=a_plan, pad=True)
    optimizer = optimizer_of(a_plan)
    for padded in loader:
        batch, is_padding = padded
        assert len(batch[0]) == len(is_padding) == 9
        optimizer.backward(padded)
        assert optimizer.diagnostics.batch_size == int((~is_padding).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert loader.batch_sampler.sampling == a_plan.sampling


@pytest.mark.parametrize("workers", [0, 1])
def test_a_finished_run_that_is_started_again_has_nothing_to_do(workers: int) -> None:
    a_plan = plan(steps=3)
    loader = clipgrad.poisson_loader(dataset(), plan=a_plan, num_workers=workers)
    assert len(list(loader)) == 3
    again = clipgrad.poisson_loader(dataset(), plan=a_plan, num_workers=workers)
    again.load_state_dict(through_a_file(loader.state_dict()))
    assert list(again) == []


def test_users_of_a_plan() -> None:
    a_plan = plan(num_samples=4, expected_batch_size=2, unit="user")
    loader = clipgrad.user_loader(dataset(6), [0, 0, 1, 2, 3, 3], plan=a_plan)
    assert len(list(loader)) == 5
    assert loader.batch_sampler.sample_rate == 0.5
    assert "adding or removing one user: 5 steps on Poisson batches of 2 of 4 users" in str(a_plan)
    assert "sample" not in str(a_plan)


def test_loaders_that_do_not_fit_the_plan() -> None:
    with pytest.raises(ValueError, match=r"plan is for 64 samples, but there are 63"):
        clipgrad.poisson_loader(dataset(63), plan=plan())
    with pytest.raises(ValueError, match="leave out the other arguments"):
        clipgrad.poisson_loader(dataset(), plan=plan(), steps=3)
    with pytest.raises(ValueError, match="for 64 users, but there are 2"):
        clipgrad.user_loader(dataset(3), [0, 0, 1], plan=plan(unit="user"))
    with pytest.raises(ValueError, match=r"protects one sample.*samples users.*unit='user'"):
        clipgrad.user_loader(dataset(64), range(64), plan=plan())
    with pytest.raises(ValueError, match=r"protects one user.*samples samples.*user_loader"):
        clipgrad.poisson_loader(dataset(64), plan=plan(unit="user"))
    shuffled = plan(shuffled=True, relation="replace_one")
    with pytest.raises(ValueError, match="shuffled_loader"):
        clipgrad.poisson_loader(dataset(), plan=shuffled)
    with pytest.raises(ValueError, match="poisson_loader"):
        clipgrad.shuffled_loader(dataset(), plan=plan())
    with pytest.raises(ValueError, match="plan has declared_sampling"):
        clipgrad.poisson_loader(dataset(), plan=declared())


def test_a_delta_that_one_sample_could_use_up_warns() -> None:
    with pytest.warns(
        UserWarning, match=r"delta = 0\.0156\d* is not below 1 / num_samples = 0\.0156"
    ):
        plan(delta=1 / 64)
    with pytest.warns(UserWarning, match="publishes a user"):
        plan(delta=0.5, unit="user").with_noise(2.0)


def test_epochs_in_place_of_steps() -> None:
    wanted = {"num_samples": 64, "expected_batch_size": 8, "delta": 1e-3, "accountant": "rdp"}
    found = PrivacyPlan.for_epsilon(2.0, epochs=2.5, **wanted)  # type: ignore[arg-type]
    assert found == PrivacyPlan.for_epsilon(2.0, steps=20, **wanted)  # type: ignore[arg-type]
    full = {**wanted, "expected_batch_size": 64}
    assert PrivacyPlan.for_epsilon(2.0, epochs=0.01, **full).steps == 1  # type: ignore[arg-type]
    for given in ({}, {"steps": 3, "epochs": 1}):
        with pytest.raises(ValueError, match="give exactly one of them"):
            PrivacyPlan.for_epsilon(2.0, **wanted, **given)  # type: ignore[arg-type]
    for epochs in (0, -1.0, float("inf"), "2"):
        with pytest.raises((ValueError, TypeError), match="epochs must be"):
            PrivacyPlan.for_epsilon(2.0, epochs=epochs, **wanted)  # type: ignore[arg-type]


def test_a_declaration_is_part_of_the_sentence_and_the_ledger() -> None:
    a_plan = declared()
    assert str(a_plan).endswith("Declared, not checked: by a coin for each row.")
    assert a_plan.ledger().history[0].declared == "by a coin for each row"
    with pytest.raises(ValueError, match="declared_sampling must be a text"):
        plan(declared_sampling=" ")


def test_the_loop_of_the_readme_is_short() -> None:
    """Nothing but the plan connects the parts."""

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    model = nn.Linear(4, 1).double()
    a_plan = PrivacyPlan.for_epsilon(
        2.0, num_samples=64, expected_batch_size=8, steps=3, delta=1e-3, accountant="rdp"
    )
    optimizer = DPOptimizer(sgd(model), model, loss_fn, plan=a_plan)
    for (x,) in clipgrad.poisson_loader(dataset(), plan=a_plan):
        optimizer.backward(x)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.epsilon() <= 2.0
