"""Test a plan with correlated noise from its numbers to its last step, and its refusals."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import clipgrad
from clipgrad import (
    AdaptiveQuantile,
    BandedFactorisation,
    BufferedToeplitz,
    DiscreteGaussianNoise,
    DPOptimizer,
    PrivacyPlan,
    accounting,
    load_checkpoint,
    poisson_loader,
    save_checkpoint,
    user_loader,
)
from clipgrad.accounting import CyclicPoisson
from clipgrad.errors import PrivacyBudgetError, UnaccountedBatchError
from clipgrad.factorisation.toeplitz import column_norm, prefix_sum_error
from clipgrad.sampling import PrivateLoader
from tests.dp_tools import clipped, mlp, sgd, squared, through_a_file, values
from tests.factorisation.oracle import matrix
from tests.noise_checks import seeded

RUN: dict[str, Any] = {
    "num_samples": 60,
    "expected_batch_size": 6,
    "steps": 14,
    "delta": 1e-3,
    "noise_multiplier": 1.5,
    "accountant": "rdp",
    "mechanism": BandedFactorisation(4),
}


def plan(**changes: Any) -> PrivacyPlan:
    return PrivacyPlan(**{**RUN, **changes})


def dataset() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(60, dtype=torch.float64)[:, None]
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, rows)


def loss(model: nn.Module, x: Tensor, row: Tensor) -> Tensor:
    return squared(model, x)


class Run:
    """This class holds plan, model, loader, optimizer and noise of one training."""

    def __init__(self, a_plan: PrivacyPlan, seed: int = 0, **options: Any) -> None:
        self.plan = a_plan
        self.model = mlp()
        self.loader = poisson_loader(
            dataset(), plan=a_plan, generator=torch.Generator().manual_seed(seed)
        )
        options = {"noise": seeded(seed), **options}
        self.optimizer = DPOptimizer(
            sgd(self.model, lr=0.1), self.model, loss, plan=a_plan, **options
        )
        self.seen: list[list[int]] = []
        self.noise: list[Tensor] = []
        self._batches = iter(self.loader)

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}

    def go(self, steps: int) -> Run:
        for _ in range(steps):
            x, row = next(self._batches)
            self.seen.append(sorted(int(r) for r in row.flatten()))
            norm = self.plan.max_grad_norm
            sums, _ = clipped(self.model, x, max_grad_norm=norm if isinstance(norm, float) else 1.0)
            self.optimizer.backward(x, row)
            self.optimizer.step()
            added = [
                p.grad * self.plan.expected_batch_size - sums[name]
                for name, p in self.model.named_parameters()
            ]
            self.noise.append(torch.cat([part.flatten() for part in added]))
            self.optimizer.zero_grad()
        return self

    def restart(self) -> None:
        self._batches = iter(self.loader)


# ------------------------------------------------------------------------------- numbers


def test_epsilon_is_that_of_its_rounds() -> None:
    a_plan = plan()
    assert a_plan.sampling == CyclicPoisson(0.4, 4)
    run = {"noise_multiplier": 1.5, "delta": 1e-3, "accountant": "rdp"}
    for steps, rounds in ((0, 0), (1, 1), (4, 1), (5, 2), (14, 4)):
        found = accounting.epsilon(sample_rate=0.4, steps=rounds, **run)  # type: ignore[arg-type]
        assert a_plan.epsilon(steps) == pytest.approx(found, rel=1e-12)


def test_expected_error_is_that_of_dense_matrices() -> None:
    for mechanism in (None, BandedFactorisation(4), BandedFactorisation(3, "square_root")):
        column = [1.0] if mechanism is None else mechanism.first_column(14).tolist()
        strategy = matrix(column, 14)
        sums = np.tril(np.ones((14, 14))) @ np.linalg.inv(strategy)
        deviation = 1.5 * np.linalg.norm(strategy, axis=0).max()
        expected = deviation * np.sqrt((sums**2).sum() / 14) / 6
        assert plan(mechanism=mechanism).expected_error() == pytest.approx(expected, rel=1e-9)
    scheduled = plan(mechanism=None, noise_multiplier=lambda t: 1.0 + t)
    variances = np.cumsum([(1.0 + t) ** 2 for t in range(14)])
    assert scheduled.expected_error() == pytest.approx(np.sqrt(variances.mean()) / 6, rel=1e-12)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("epsilon", "kind"),
    [(0.3, "square_root"), pytest.param(8.0, "optimised", marks=pytest.mark.nightly)],
)
def test_auto_has_the_least_error(epsilon: float, kind: str) -> None:
    run: dict[str, Any] = {"num_samples": 1000, "expected_batch_size": 20, "steps": 100}
    run |= {"delta": 1e-5, "accountant": "rdp"}
    found = PrivacyPlan.for_epsilon(epsilon, mechanism=BandedFactorisation("auto", kind), **run)
    assert found.epsilon() <= epsilon
    assert found.mechanism is not None
    assert found.mechanism.coefficients == kind
    for bands in (1, 2, 8, 32):
        mechanism = BandedFactorisation(bands, kind)
        other = PrivacyPlan.for_epsilon(epsilon, mechanism=mechanism, **run)
        assert found.expected_error() <= other.expected_error() * (1 + 1e-3)
        if bands == 1 and epsilon == 8.0:  # independent noise
            assert found.expected_error() < 0.65 * other.expected_error()


def test_a_plan_says_what_it_promises() -> None:
    text = str(plan())
    for part in (
        "cyclic Poisson batches of 6 of 60 samples (each in every 4th step with q = 0.4)",
        "correlated over 4 steps",
        "Epsilon holds for the run as a whole",
        "a checkpoint that is kept secret",
    ):
        assert part in text
    assert "as a whole" not in str(plan(mechanism=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mechanism": BandedFactorisation()},
            r"bands='auto' chooses .* Use PrivacyPlan.for_epsilon",
        ),
        ({"mechanism": BandedFactorisation(11)}, r"bands must be at most .* = 10, got 11"),
        ({"expected_batch_size": 60}, r"bands must be at most .* = 1, got 4"),
        (
            {"mechanism": "banded"},
            "mechanism must be a .*BandedFactorisation or BufferedToeplitz, got 'banded'",
        ),
        (
            {"noise_multiplier": lambda t: 1.0},
            "noise_multiplier must be a number with correlated noise",
        ),
        ({"max_grad_norm": lambda t: 1.0}, "max_grad_norm must be constant"),
        ({"max_grad_norm": AdaptiveQuantile(1.0)}, "max_grad_norm must be constant"),
        ({"max_grad_norm": {"0": 1.0, "": lambda t: 1.0}}, "max_grad_norm must be constant"),
        ({"max_grad_norm": clipgrad.Automatic(lambda t: 1.0)}, "max_grad_norm must be constant"),
        ({"max_grad_norm": clipgrad.PerLayer(lambda t: 1.0)}, "max_grad_norm must be constant"),
        ({"max_batch_size": 20, "accountant": "pld"}, "max_batch_size=20 excludes mechanism="),
        ({"shuffled": True}, "shuffled=True excludes relation 'add_or_remove_one'"),
        (
            {"shuffled": True, "relation": "replace_one", "mechanism": BandedFactorisation(11)},
            r"bands must be at most .* = 10, got 11",
        ),
        ({"declared_sampling": "by hand"}, "declared_sampling='by hand' excludes mechanism="),
        ({"grid": 0.125, "accountant": "rdp_integer"}, "grid=0.125 excludes mechanism="),
    ],
)
def test_what_is_not_proven_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        plan(**changes)


@pytest.mark.parametrize(
    "norm", [0.5, {"0": 1.0, "": 0.5}, clipgrad.PerLayer(1.0), clipgrad.Automatic(1.0)]
)
def test_constant_norms_of_any_kind_are_accepted(norm: Any) -> None:
    run = Run(plan(max_grad_norm=norm))
    run.optimizer.backward(*next(iter(run.loader)))
    run.optimizer.step()


def test_other_noise_than_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="is on a grid, but the plan accounts for continuous"):
        Run(plan(), noise=DiscreteGaussianNoise(2.0**-10))
    optimizer = Run(plan()).optimizer
    with pytest.raises(ValueError, match="noise on a grid"):
        optimizer.noise = DiscreteGaussianNoise(2.0**-10)
    with pytest.raises(ValueError, match="belongs to the plan"):
        optimizer.noise_multiplier = 2.0


# ------------------------------------------------------------------------------- the training


def test_the_noise_of_a_training_is_that_of_its_matrix() -> None:
    """C times the added noise is white and has the promised standard deviation."""
    a_plan = plan(noise_multiplier=2.0, max_grad_norm=0.7)
    run = Run(a_plan).go(14)
    assert a_plan.mechanism is not None
    column = a_plan.mechanism.first_column(14)
    white = matrix(column, 14) @ torch.stack(run.noise).numpy()
    drawn = seeded()
    scale = 2.0 * 0.7 * column_norm(column)
    shapes = [p.shape for p in run.model.parameters()]
    for t in range(14):
        total = torch.zeros(sum(math.prod(shape) for shape in shapes), dtype=torch.float64)
        drawn.add_gaussian_([total], scale)
        assert np.abs(white[t] - total.numpy()).max() < 1e-9
    assert run.optimizer.ledger.epsilon(1e-3) == pytest.approx(a_plan.epsilon(), rel=1e-12)
    run.restart()
    with pytest.raises(PrivacyBudgetError, match="all 14 steps"):
        run.go(1)


@pytest.mark.parametrize(
    "options",
    [{"microbatch_size": 2}, pytest.param({"compile": True}, marks=pytest.mark.nightly)],
)
def test_modes_change_nothing(options: dict[str, Any]) -> None:
    plain, other = Run(plan()).go(6), Run(plan(), **options).go(6)
    assert plain.seen == other.seen
    for one, another in zip(plain.noise, other.noise, strict=True):
        assert (one - another).abs().max() < 1e-9


def test_accumulated_batches_get_one_row() -> None:
    whole, parts = Run(plan()), Run(plan())
    for run, cuts in ((whole, 1), (parts, 3)):
        for x, row in run.loader:
            for some, of in zip(x.tensor_split(cuts), row.tensor_split(cuts), strict=True):
                run.optimizer.backward(some, of)
            run.optimizer.step()
            run.optimizer.zero_grad()
    for one, other in zip(values(whole.model).values(), values(parts.model).values(), strict=True):
        assert (one - other).abs().max() < 1e-9


# ------------------------------------------------------------------------------- batches


def gaps(seen: list[list[int]]) -> list[int]:
    """Return the distances between consecutive steps of each sample."""
    found = []
    for sample in {row for batch in seen for row in batch}:
        steps = [t for t, batch in enumerate(seen) if sample in batch]
        found += [later - step for step, later in itertools.pairwise(steps)]
    return found


def test_samples_keep_their_turn() -> None:
    loader = poisson_loader(dataset(), plan=plan(steps=200))
    seen = [[int(r) for r in row.flatten()] for _, row in loader]
    distances = gaps(seen)
    assert distances
    assert all(distance % 4 == 0 for distance in distances)
    sizes = [len(batch) for batch in seen]
    assert abs(np.mean(sizes) - 6) < 1.5
    # Within its turn a sample takes part with probability 0.4, independently.
    turns = 50
    counts = np.bincount([row for batch in seen for row in batch], minlength=60)
    assert abs(counts.mean() - 0.4 * turns) < 8 * math.sqrt(0.24 * turns / 60)


def test_groups_are_drawn_for_each_sample_on_its_own() -> None:
    from clipgrad.sampling import PoissonSampler

    sizes = []
    for _ in range(300):
        sampler = PoissonSampler(64, expected_batch_size=16, bands=4, steps=4)
        sizes.append([len(batch) for batch in sampler])  # q = 1: whole groups
        assert sampler.sampling == CyclicPoisson(1.0, 4)
    total = np.array(sizes)
    assert (total.sum(1) == 64).all()
    # Binomial(64, 1/4): mean 16, variance 12. A partition into equal parts would have no variance.
    assert abs(total.mean() - 16) < 1e-9
    assert abs(total.var() - 12) < 8 * 12 * math.sqrt(2 / total.size)


def test_ranks_have_groups_of_their_own_samples() -> None:
    seen: list[list[int]] = [[] for _ in range(40)]
    for rank in range(3):
        loader = poisson_loader(dataset(), plan=plan(steps=40), rank=rank, num_replicas=3)
        for t, (_, row) in enumerate(loader):
            mine = [int(r) for r in row.flatten()]
            assert all(r % 3 == rank for r in mine)
            seen[t] += mine
    assert all(distance % 4 == 0 for distance in gaps(seen))
    assert abs(np.mean([len(batch) for batch in seen]) - 6) < 3


def test_users_keep_their_turn() -> None:
    users = [i % 20 for i in range(60)]
    a_plan = plan(num_samples=20, expected_batch_size=3, unit="user", steps=100)
    loader = user_loader(dataset(), users, plan=a_plan)
    seen = []
    for batch in loader:
        x, row, present = batch
        seen.append(sorted({int(r) % 20 for r in row[present].flatten()}))
        assert len(x) == len(seen[-1])
    assert all(distance % 4 == 0 for distance in gaps(seen))


@pytest.mark.parametrize(
    "options", [{"max_batch_size": 9}, {"bands": 0}, {"bands": 2.0}, {"bands": 11}]
)
def test_samplers_that_are_none(options: dict[str, Any]) -> None:
    from clipgrad.sampling import PoissonSampler

    with pytest.raises((ValueError, TypeError)):
        PoissonSampler(60, expected_batch_size=6, **{"bands": 4, **options})


def test_a_batch_that_is_left_out_ends_the_run() -> None:
    run = Run(plan()).go(2)
    next(run._batches)
    with pytest.raises(UnaccountedBatchError, match="batch 2 of the cyclic loader was left out"):
        run.go(1)


def test_a_second_iteration_has_no_turn() -> None:
    run = Run(plan()).go(3)
    run.restart()
    with pytest.raises(
        UnaccountedBatchError, match="step 3: batch 0 of the loader is of another step"
    ):
        run.go(1)


def test_one_optimizer_carries_out_a_plan() -> None:
    run = Run(plan()).go(1)
    for other in (
        copy.deepcopy(run.optimizer),
        DPOptimizer(sgd(run.model), run.model, loss, plan=run.plan),
    ):
        other.backward(*next(run._batches))
        with pytest.raises(PrivacyBudgetError):
            other.step()


def test_a_frozen_parameter_ends_the_run() -> None:
    run = Run(plan()).go(2)
    next(iter(run.model.parameters())).requires_grad_(False)
    run.optimizer.backward(*next(run._batches))
    with pytest.raises(ValueError, match="Do not freeze"):
        run.optimizer.step()
    next(iter(run.model.parameters())).requires_grad_(True)
    run.optimizer.backward(*next(run._batches))
    with pytest.raises(PrivacyBudgetError, match="does not know the noise of the others"):
        run.optimizer.step()


# ------------------------------------------------------------------------------- restarts


@pytest.mark.parametrize("saved_after", [1, 3, 6])
def test_a_restart_is_invisible(saved_after: int, tmp_path: Path) -> None:
    whole = Run(plan()).go(10)
    first = Run(plan()).go(saved_after)
    save_checkpoint(tmp_path / "run.pt", first.parts)
    second = Run(plan(), seed=5)
    assert load_checkpoint(tmp_path / "run.pt", second.parts)
    second.restart()
    second.go(10 - saved_after)
    assert first.seen + second.seen == whole.seen
    for one, other in zip(values(whole.model).values(), values(second.model).values(), strict=True):
        assert torch.equal(one, other)
    assert second.optimizer.ledger.history[0].steps == 10
    assert second.optimizer.epsilon() == whole.optimizer.epsilon()


def test_groups_survive_a_restart_without_a_generator(tmp_path: Path) -> None:
    a_plan = plan(steps=60)
    loader = poisson_loader(dataset(), plan=a_plan)
    seen = []
    for t, (_, row) in enumerate(loader):
        seen.append([int(r) for r in row.flatten()])
        if t == 28:
            saved = through_a_file(loader.state_dict())
            break
    other = poisson_loader(dataset(), plan=a_plan)
    other.load_state_dict(saved)
    seen += [[int(r) for r in row.flatten()] for _, row in other]
    assert len(seen) == 60
    assert all(distance % 4 == 0 for distance in gaps(seen))


def restored(change: Any, tmp_path: Path) -> tuple[Run, dict[str, Any]]:
    first = Run(plan()).go(3)
    state = through_a_file({name: part.state_dict() for name, part in first.parts.items()})
    change(state)
    return Run(plan()), state


def loaded(run: Run, state: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        run.parts[name].load_state_dict(state[name])
    run.restart()


def test_a_lost_state_of_the_noise_ends_the_plan(tmp_path: Path) -> None:
    def forget(state: dict[str, Any]) -> None:
        state["optimizer"]["clipgrad"]["noise"]["past"] = {}

    run, state = restored(forget, tmp_path)
    with pytest.raises(ValueError, match="must hold 3 tensors of past noise"):
        loaded(run, state, ("optimizer",))

    def independent(state: dict[str, Any]) -> None:
        state["optimizer"]["clipgrad"]["noise"] = {"kind": "SystemNoise", "format": 1}

    run, state = restored(independent, tmp_path)
    with pytest.raises(ValueError, match="must come from CorrelatedNoise"):
        loaded(run, state, ("optimizer",))
    # Who carries on regardless gets no further.
    loaded(run, state, ("loader",))
    with pytest.raises(UnaccountedBatchError, match="batch 3 of the loader is of another step"):
        run.go(1)


def test_a_loader_that_begins_anew_is_noticed(tmp_path: Path) -> None:
    run, state = restored(lambda state: None, tmp_path)
    loaded(run, state, ("optimizer",))
    with pytest.raises(UnaccountedBatchError, match="step 3: batch 0 of the loader is of another"):
        run.go(1)


SHUFFLED: dict[str, Any] = {"shuffled": True, "relation": "replace_special"}


def test_shuffled_batches_keep_one_order_over_passes_and_restarts() -> None:
    a_plan = plan(steps=44, expected_batch_size=7, mechanism=BandedFactorisation(8), **SHUFFLED)
    run = {"noise_multiplier": 1.5, "delta": 1e-3, "accountant": "rdp"}
    passes = accounting.epsilon(sampling=accounting.FullBatch(), steps=6, **run)  # type: ignore[arg-type]
    assert a_plan.epsilon() == pytest.approx(passes, rel=1e-12)
    assert "in one order for all passes" in str(a_plan)
    loader, seen = clipgrad.shuffled_loader(dataset(), plan=a_plan), []
    saved: dict[str, Any] = {}
    for t, (_, row) in enumerate(loader):
        seen.append([int(r) for r in row.flatten()])
        if t == 18:
            saved = through_a_file(loader.state_dict())
            break
    other = clipgrad.shuffled_loader(dataset(), plan=a_plan)
    other.load_state_dict(saved)
    seen += [[int(r) for r in row.flatten()] for _, row in other]
    assert [len(batch) for batch in seen] == [7] * 44
    assert set(gaps(seen)) == {8}  # 60 // 7 steps a pass
    assert seen[:8] == seen[8:16] == seen[32:40]
    plain = clipgrad.shuffled_loader(dataset(), plan=plan(mechanism=None, **SHUFFLED))
    with pytest.raises(ValueError, match="has a fixed order, unlike this sampler"):
        plain.load_state_dict(saved)
    with pytest.raises(ValueError, match="lacks a fixed order"):
        other.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="has an order of 59 samples"):
        other.load_state_dict({**saved, "order": saved["order"][1:]})


def test_a_shuffled_training_has_the_noise_of_its_matrix() -> None:
    a_plan = plan(**SHUFFLED, mechanism=BandedFactorisation(8))
    model = mlp()
    optimizer = DPOptimizer(sgd(model, lr=0.1), model, loss, plan=a_plan, noise=seeded())
    for x, row in clipgrad.shuffled_loader(dataset(), plan=a_plan):
        optimizer.backward(x, row)
        optimizer.step()
        optimizer.zero_grad()
    past = optimizer.state_dict()["clipgrad"]["noise"]["past"]
    assert {len(kept) for kept in past.values()} == {7}
    assert optimizer.epsilon() == pytest.approx(a_plan.epsilon(), rel=1e-12)


def test_a_plan_with_buffers() -> None:
    mechanism = BufferedToeplitz(2)
    with pytest.raises(ValueError, match="needs shuffled=True: its matrix has no bands"):
        plan(mechanism=mechanism)
    a_plan = plan(mechanism=mechanism, expected_batch_size=10, steps=13, **SHUFFLED)
    assert (
        a_plan.epsilon()
        == plan(mechanism=None, expected_batch_size=10, steps=13, **SHUFFLED).epsilon()
    )
    strategy = a_plan.strategy
    assert strategy is not None
    assert strategy == mechanism.strategy(13, 6)
    model = mlp()
    optimizer = DPOptimizer(sgd(model, lr=0.1), model, loss, plan=a_plan, noise=seeded())
    added = []
    for x, row in clipgrad.shuffled_loader(dataset(), plan=a_plan):
        sums, _ = clipped(model, x)
        optimizer.backward(x, row)
        optimizer.step()
        noise = [p.grad * 10 - sums[name] for name, p in model.named_parameters()]
        added.append(torch.cat([part.flatten() for part in noise]))
        optimizer.zero_grad()
    white = matrix(strategy.column, 13) @ torch.stack(added).numpy()
    drawn = seeded()
    for t in range(13):
        total = torch.zeros(white.shape[1], dtype=torch.float64)
        drawn.add_gaussian_([total], 1.5 * strategy.scale)
        assert np.abs(white[t] - total.numpy()).max() < 1e-9
    assert "correlated over all steps" in str(a_plan)
    independent = plan(mechanism=None, expected_batch_size=10, steps=13, **SHUFFLED)
    assert a_plan.expected_error() < 0.8 * independent.expected_error()


def test_auto_takes_many_bands_where_they_cost_nothing() -> None:
    run: dict[str, Any] = {"num_samples": 600, "expected_batch_size": 30, "steps": 60}
    run |= {"delta": 1e-4, "accountant": "rdp", **SHUFFLED}
    found = PrivacyPlan.for_epsilon(2.0, mechanism=BandedFactorisation(), **run)
    independent = PrivacyPlan.for_epsilon(2.0, **run)
    assert found.mechanism is not None
    assert found.mechanism.count() >= 12
    assert found.noise_multiplier == independent.noise_multiplier
    assert found.expected_error() < 0.6 * independent.expected_error()


@pytest.mark.parametrize("kind", [{}, SHUFFLED])
def test_turns_that_are_drawn_anew_are_refused_at_the_right_position(kind: dict[str, Any]) -> None:
    """A tool that restores a loader by counting steps gets the right position but other groups."""
    first = plan(mechanism=BandedFactorisation(4), **kind)
    model = mlp()
    make = clipgrad.shuffled_loader if kind else poisson_loader
    optimizer = DPOptimizer(sgd(model), model, loss, plan=first, noise=seeded())
    for step, batch in enumerate(make(dataset(), plan=first)):
        optimizer.backward(*batch)
        optimizer.step()
        if step == 2:
            break
    state = through_a_file(optimizer.state_dict())
    second = plan(mechanism=BandedFactorisation(4), **kind)
    optimizer = DPOptimizer(sgd(model), model, loss, plan=second, noise=seeded())
    optimizer.load_state_dict(state)
    loader = make(dataset(), plan=second)
    loader.load_state_dict({**loader.state_dict(), "done": 3})
    optimizer.backward(*next(iter(loader)))
    with pytest.raises(UnaccountedBatchError, match="has drawn anew which samples take turns"):
        optimizer.step()
    del state["clipgrad"]["account"]["turns"]
    with pytest.raises(ValueError, match="the account must hold"):
        optimizer.load_state_dict(state)


def test_groups_of_other_data_are_refused() -> None:
    loader = poisson_loader(dataset(), plan=plan())
    state = loader.state_dict()
    for groups, message in [
        (state["groups"][:50], r"groups of \(50,\) samples"),
        (state["groups"] + 4, "do not fit 60 samples in 4 groups"),
    ]:
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict({**state, "groups": groups})
    without = {key: value for key, value in state.items() if key != "groups"}
    with pytest.raises(ValueError, match="lacks the groups of cyclic batches"):
        loader.load_state_dict(without)
    plain = poisson_loader(dataset(), plan=plan(mechanism=None))
    with pytest.raises(ValueError, match="has the groups of cyclic batches"):
        plain.load_state_dict(state)


def test_another_plan_continues_the_ledger_with_noise_of_its_own() -> None:
    first = Run(plan()).go(3)
    second = Run(plan().continuing(first.optimizer.ledger)).go(2)
    assert [entry.steps for entry in second.optimizer.ledger.history] == [3, 2]
    one_round = accounting.epsilon(
        noise_multiplier=1.5, sample_rate=0.4, steps=2, delta=1e-3, accountant="rdp"
    )
    assert second.optimizer.epsilon() == pytest.approx(one_round, rel=1e-12)


# ------------------------------------------------------------------------------- secrecy


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_checkpoint_with_noise_is_secret_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, path = Run(plan()).go(2), tmp_path / "run.pt"
    path.write_text("an older file that everybody may read")
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING, logger="clipgrad"):
        save_checkpoint(path, run.parts)
        save_checkpoint(path, run.parts)
    assert mode(path) == 0o600
    (record,) = caplog.records
    assert "is secret, and only its owner may read it" in record.getMessage()
    assert "'optimizer' holds the noise of past steps" in record.getMessage()


def test_other_checkpoints_are_as_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, path = Run(plan(mechanism=None)).go(2), tmp_path / "run.pt"
    assert run.optimizer.secret_state == ""
    plain = tmp_path / "plain"
    plain.write_text("")
    save_checkpoint(path, run.parts)
    assert mode(path) == mode(plain)
    assert not caplog.records


def test_what_is_saved_is_the_noise_that_was_added() -> None:
    """The saved rows are the added noise, which is why the state is secret."""
    run = Run(plan()).go(5)
    past = run.optimizer.state_dict()["clipgrad"]["noise"]["past"]
    names = [name for name, _ in run.model.named_parameters()]
    saved = torch.cat([past[name].flatten(1) for name in names], 1)
    assert (saved - torch.stack(run.noise[-3:])).abs().max() < 1e-9


def test_a_new_plan_is_a_new_run() -> None:
    a_plan = plan()
    Run(a_plan).go(2)
    Run(replace(a_plan)).go(2)
    assert isinstance(poisson_loader(dataset(), plan=a_plan), PrivateLoader)
    assert prefix_sum_error(np.ones(1), 1) == 1.0


def test_who_would_write_the_noise_to_an_open_file_refuses() -> None:
    from clipgrad.integrations._batches import loader_of
    from clipgrad.optimizer.run_state import RunState

    run = Run(plan())
    with pytest.raises(ValueError, match="must stay secret"):
        loader_of(run.plan, dataset(), None, None)
    with pytest.raises(
        ValueError, match=r"holds the noise of past steps.*Use clipgrad\.save_checkpoint"
    ):
        RunState(run.model, run.optimizer)
