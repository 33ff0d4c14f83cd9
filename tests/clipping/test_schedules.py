"""Norm and noise as functions of the step: the same for a logical batch, saved, restored, compiled once."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from clipgrad import Automatic, DPOptimizer, PerLayer, SeededNoise, SystemNoise, clipped_grad
from tests.compiled.conftest import Graphs
from tests.dp_tools import (
    assert_same,
    clipped,
    data,
    mlp,
    private,
    sgd,
    squared,
    through_a_file,
    values,
)
from tests.small_mlp import assert_same as assert_same_result
from tests.small_mlp import make_batch, make_params
from tests.small_mlp import mlp as mlp_loss


class Recording(SystemNoise):
    """Draws nothing, and remembers the sigma that was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas: list[float] = []

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        self.sigmas.append(sigma)


def halving(step: int) -> float:
    return 2.0 * 0.5**step


def rising(step: int) -> float:
    return 1.0 + step


def step(optimizer: DPOptimizer, *batches: Tensor) -> None:
    for batch in batches:
        optimizer.backward(batch)
    optimizer.step()
    optimizer.zero_grad()


def test_norm_and_noise_of_each_step() -> None:
    model, noise = mlp(), Recording()
    optimizer = private(model, max_grad_norm=halving, noise_multiplier=rising, noise=noise)
    for index in range(4):
        norm = halving(index)
        assert (optimizer.max_grad_norm, optimizer.sensitivity) == (norm, norm)
        assert optimizer.noise_multiplier == optimizer.accounted_noise_multiplier == rising(index)
        assert optimizer.sigma == rising(index) * norm
        sums, norms = clipped(model, data(seed=index), max_grad_norm=norm)
        optimizer.backward(data(seed=index))
        torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=1e-9, atol=1e-12)
        assert optimizer.diagnostics.clipped_fraction == float((norms > norm).double().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert noise.sigmas == [rising(index) * halving(index) for index in range(4)]


def test_a_function_is_asked_once_a_step_whatever_it_answers() -> None:
    """A logical batch has one norm, and the noise fits it, even if the function is no function of the step."""
    answers = iter([3.0, 0.5, 2.0, 7.0])
    noises = iter([1.0, 10.0, 4.0, 0.25])
    model, noise = mlp(), Recording()
    optimizer = private(
        model,
        max_grad_norm=lambda step: next(answers),
        noise_multiplier=lambda step: next(noises),
        noise=noise,
    )
    for norm, multiplier in ((3.0, 1.0), (0.5, 10.0)):
        sums, _ = clipped(model, torch.cat([data(3), data(4, seed=2)]), max_grad_norm=norm)
        for seed, size in ((1, 3), (2, 4)):
            assert optimizer.sensitivity == norm
            optimizer.backward(data(size, seed=seed))
        optimizer.explain(data())
        torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=1e-9, atol=1e-12)
        assert optimizer.accounted_noise_multiplier == multiplier
        optimizer.step()
        optimizer.zero_grad()
        assert noise.sigmas[-1] == norm * multiplier


def test_forgetting_a_batch_is_no_step() -> None:
    optimizer = private(mlp(), max_grad_norm=halving)
    optimizer.backward(data())
    optimizer.zero_grad()
    assert optimizer.max_grad_norm == 2.0
    step(optimizer, data())
    assert optimizer.max_grad_norm == 1.0


def test_noise_set_within_a_logical_batch_leaves_the_norm() -> None:
    answers = iter([3.0, 0.5])
    optimizer = private(mlp(), max_grad_norm=lambda step: next(answers), noise_multiplier=1.0)
    optimizer.backward(data())
    optimizer.noise_multiplier = rising
    assert (optimizer.sensitivity, optimizer.noise_multiplier) == (3.0, 1.0)
    optimizer.noise_multiplier = 5
    assert optimizer.sigma == 15.0
    with pytest.raises(ValueError, match="noise_multiplier must be a number"):
        optimizer.noise_multiplier = "much"  # type: ignore[assignment]


def test_schedules_inside_of_strategies() -> None:
    cases: list[tuple[Any, Any, float]] = [
        (PerLayer(halving), PerLayer(1.0), 1.0),
        (PerLayer(Automatic(halving, 0.1), "size"), PerLayer(Automatic(1.0, 0.1), "size"), 1.0),
        ({"0": halving, "": 3.0}, {"0": 1.0, "": 3.0}, math.sqrt(10)),
        (Automatic(rising), Automatic(2.0), 2.0),
    ]
    for strategy, second, sensitivity in cases:
        model, twin = mlp(), mlp()
        optimizer = private(model, max_grad_norm=strategy, noise_multiplier=1.0, noise=Recording())
        optimizer.backward(data()[:0])
        optimizer.step()
        assert optimizer.max_grad_norm == second
        assert optimizer.sensitivity == optimizer.sigma == pytest.approx(sensitivity)
        constant = private(twin, max_grad_norm=second)
        step(constant, data())
        step(optimizer, data())
        assert_same(values(model), values(twin))


def test_a_schedule_that_ends_stops_the_step_after_its_last() -> None:
    norms = [1.0, 2.0]
    optimizer = private(mlp(), max_grad_norm=lambda step: norms[step])
    for _ in norms:
        step(optimizer, data())
    with pytest.raises(IndexError):
        optimizer.backward(data())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": lambda step: -1.0}, "max_grad_norm must be a non-negative number"),
        ({"max_grad_norm": lambda step: "1"}, "max_grad_norm at step 0 must be a number, got '1'"),
        ({"max_grad_norm": lambda step: torch.ones(())}, "max_grad_norm at step 0 must be a number"),
        ({"max_grad_norm": lambda step: math.inf, "noise_multiplier": 1.0}, "sensitivity must be"),
        ({"noise_multiplier": lambda step: -1.0}, "noise_multiplier must be finite and at least 0"),
        ({"noise_multiplier": lambda step: None}, "noise_multiplier at step 0 must be a number"),
    ],
)  # fmt: skip
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private(mlp(), **options)


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_a_norm_that_goes_bad_stops_before_the_batch_is_read(bad: float) -> None:
    model = mlp()
    optimizer = private(model, max_grad_norm=lambda step: 1.0 if step == 0 else bad)
    step(optimizer, data())
    with pytest.raises(ValueError, match="max_grad_norm must be a non-negative number"):
        optimizer.backward(data())
    assert all(p.grad is None for p in model.parameters())


def test_noise_that_goes_bad_stops_the_step() -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=lambda step: 1.0 if step == 0 else math.inf)
    step(optimizer, data())
    before = values(model)
    optimizer.backward(data())
    with pytest.raises(ValueError, match="noise_multiplier must be finite"):
        optimizer.step()
    assert_same(values(model), before)


# ------------------------------------------------------------------ state


def scheduled(model: nn.Module, seed: int = 7) -> DPOptimizer:
    generator = torch.Generator().manual_seed(seed)
    return private(
        model, max_grad_norm=halving, noise_multiplier=rising, noise=SeededNoise(generator),
        expected_batch_size=4,
    )  # fmt: skip


def test_a_restored_run_continues_exactly() -> None:
    twin, model, resumed = mlp(), mlp(), mlp()
    uninterrupted = scheduled(twin)
    for index in range(5):
        step(uninterrupted, data(3, seed=index))
    first = scheduled(model)
    for index in range(2):
        step(first, data(3, seed=index))
    saved = through_a_file([model.state_dict(), first.state_dict()])
    resumed.load_state_dict(saved[0])
    second = scheduled(resumed, seed=99)
    second.backward(data())
    second.load_state_dict(saved[1])
    assert (second.max_grad_norm, second.noise_multiplier) == (halving(2), rising(2))
    for index in range(2, 5):
        step(second, data(3, seed=index))
    assert_same(values(resumed), values(twin))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_goes_its_own_way(how: Any) -> None:
    optimizer = scheduled(mlp())
    step(optimizer, data())
    twin = how(optimizer)
    assert twin.max_grad_norm == halving(1)
    step(twin, data())
    step(twin, data())
    assert (optimizer.max_grad_norm, twin.max_grad_norm) == (halving(1), halving(3))


def test_states_that_know_no_step_leave_it() -> None:
    model = mlp()
    optimizer = scheduled(model)
    step(optimizer, data())
    optimizer.load_state_dict(sgd(model).state_dict())
    assert optimizer.max_grad_norm == halving(1)
    older = optimizer.state_dict()
    del older["clipgrad"]["progress"]
    optimizer.load_state_dict(older)
    assert optimizer.max_grad_norm == halving(1)


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({"step": -1, "norm": None}, "step must be an integer, at least 0, got -1"),
        ({"step": True, "norm": None}, "step must be an integer"),
        ({"step": 1.0, "norm": None}, "step must be an integer"),
        ({"step": 1}, "must hold 'step' and 'norm'"),
        ({"step": 1, "norm": None, "more": 1}, "must hold 'step' and 'norm'"),
        (None, "must hold 'step' and 'norm'"),
        ({"step": 1, "norm": 1.0}, "AdaptiveQuantile continues from a run with AdaptiveQuantile"),
    ],
)
def test_states_that_are_none_change_nothing(progress: Any, message: str) -> None:
    model = mlp()
    optimizer = scheduled(model)
    step(optimizer, data())
    state = optimizer.state_dict()
    state["clipgrad"]["progress"] = progress
    state["param_groups"] = [{**state["param_groups"][0], "lr": 123.0}]
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.max_grad_norm == halving(1)


# ------------------------------------------------------------------ compiled


def test_twenty_norms_share_a_graph(graphs: Graphs) -> None:
    found = []
    for compile in (False, True):
        model = mlp()
        optimizer = private(
            model, max_grad_norm=lambda step: 0.1 + 0.1 * step, microbatch_size=5, compile=compile
        )
        for index in range(20):
            step(optimizer, data(5, seed=index))
        found.append(values(model))
    assert len(graphs) == 1
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.nightly
def test_norms_of_groups_share_a_graph_and_other_structure_does_not(graphs: Graphs) -> None:
    params, batch = make_params(), make_batch()
    compiled = clipped_grad(mlp_loss, max_grad_norm={"in": 0.1, "": 0.2}, compile=True)
    cases: list[tuple[Any, int]] = [
        ({"in": 0.1, "": 0.2}, 1),
        ({"in": 0.4, "": 0.3}, 1),
        ({"in": Automatic(0.4), "": 0.3}, 2),
        ({"in": Automatic(0.1), "": 0.1}, 2),
        ({"in": 0.4, "": math.inf}, 3),
        ({"in": 0.2, "": 0.1}, 3),
    ]
    for strategy, count in cases:
        compiled = compiled.with_max_grad_norm(strategy)
        eager = clipped_grad(mlp_loss, max_grad_norm=strategy)
        assert_same_result(compiled(params, *batch), eager(params, *batch))
        assert len(graphs) == count


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_really_compiled_once_for_twenty_norms() -> None:
    model = mlp()
    optimizer = private(
        model, max_grad_norm=lambda step: 0.1 + 0.1 * step, microbatch_size=5, compile=True
    )
    compiled: dict[str, int] = {}
    for index in range(20):
        sums, _ = clipped(model, data(5, seed=index), max_grad_norm=0.1 + 0.1 * index)
        optimizer.backward(data(5, seed=index))
        torch.testing.assert_close(optimizer.clipped_sums, sums, rtol=1e-9, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        compiled = compiled or dict(counters["stats"])
    assert dict(counters["stats"]) == compiled


def test_loss_sees_no_norm() -> None:
    """The state of a run is no part of what a graph depends on, however the loss names its own things."""
    model = mlp()
    optimizer = private(model, squared, max_grad_norm=halving)
    assert not {"noise_multiplier", "norm", "max_grad_norm"} & vars(optimizer).keys()
