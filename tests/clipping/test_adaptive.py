"""AdaptiveQuantile: the paper's algorithm to the last bit, its noise, its cost, and what it converges to."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad import (
    AdaptiveQuantile,
    Automatic,
    DPOptimizer,
    PerLayer,
    Relation,
    SeededNoise,
    SystemNoise,
)
from clipgrad.engine.reference import Params
from tests.clipping.reference import AdaptiveByHand
from tests.clipping.test_schedules import Recording, step
from tests.dp_tools import assert_same, data, mlp, private, squared, through_a_file, values
from tests.oracle import per_sample_gradients


class Watching(SystemNoise):
    """Draws nothing, and remembers what it was given: how many tensors, their shapes and sums, and sigma."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, float, float]] = []

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        self.calls.append((len(tensors), sigma, float(tensors[-1].sum())))


def adaptive(model: nn.Module, seed: int = 7, **options: Any) -> DPOptimizer:
    defaults: dict[str, Any] = {
        "max_grad_norm": AdaptiveQuantile(2.0, count_stddev=1.5),
        "noise_multiplier": 1.2,
        "expected_batch_size": 6,
    }
    if "noise" not in options:
        options["noise"] = SeededNoise(torch.Generator().manual_seed(seed))
    return private(model, **{**defaults, **options})


def gradients(params: Params, batch: Tensor) -> Params:
    model = mlp()
    model.load_state_dict(params)
    return per_sample_gradients(model, squared, (batch,))


def test_steps_equal_the_paper_exactly() -> None:
    model = mlp()
    options = {"target_quantile": 0.3, "learning_rate": 0.5}
    strategy = AdaptiveQuantile(2.0, count_stddev=1.5, **options)
    optimizer = adaptive(model, max_grad_norm=strategy)
    by_hand = AdaptiveByHand(
        values(model), gradients, torch.Generator().manual_seed(7),
        norm=2.0, quantile=0.3, rate=0.5, stddev=1.5, multiplier=1.2, expected=6,
    )  # fmt: skip
    norms = []
    for index, size in enumerate((5, 8, 1)):
        step(optimizer, data(size, seed=index))
        by_hand.step(data(size, seed=index))
        torch.testing.assert_close(values(model), by_hand.params, rtol=1e-12, atol=1e-12)
        assert optimizer.max_grad_norm == pytest.approx(by_hand.norm, rel=1e-14)
        norms.append(by_hand.norm)
    assert len(set(norms)) == 3


@pytest.mark.parametrize("relation", list(Relation))
def test_noise_on_gradients_and_count(relation: Relation) -> None:
    noise = Watching()
    optimizer = adaptive(mlp(), noise=noise, relation=relation)
    moved = 1.0 if relation is Relation.REPLACE_ONE else 0.5
    z = (1.2**-2 - (moved / 1.5) ** 2) ** -0.5
    for index in range(3):
        sensitivity, norm = optimizer.sensitivity, optimizer.max_grad_norm
        assert sensitivity == (2 * norm if relation is Relation.REPLACE_ONE else norm)  # type: ignore[operator]
        assert optimizer.sigma == pytest.approx(z * sensitivity, rel=1e-14)
        assert optimizer.accounted_noise_multiplier == 1.2
        step(optimizer, data(5, seed=index), data(3, seed=9))
        (count, sigma, _), (one, stddev, _) = noise.calls[-2:]
        assert (count, one, stddev) == (4, 1, 1.5)
        assert sigma == pytest.approx(z * sensitivity, rel=1e-14)
    assert len(noise.calls) == 6


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("multiplier", [0.1, 0.9, 1.4])
@pytest.mark.parametrize("expected", [30, 250.0])
def test_both_queries_cost_one_gaussian_step(
    relation: Relation, multiplier: float, expected: float
) -> None:
    """In units of noise, the two moves of one sample together are 1 / multiplier long."""
    strategy = AdaptiveQuantile(1.0)
    z, stddev = strategy.noise(multiplier, relation, expected)
    assert stddev == expected / 20
    count = 1.0 if relation is Relation.REPLACE_ONE else 0.5
    assert math.hypot(1 / z, count / stddev) == pytest.approx(1 / multiplier, rel=1e-12)
    assert z > multiplier


def observed(optimizer: DPOptimizer, *batch: Tensor, **options: Any) -> float:
    """The count of a step, before noise."""
    noise = Watching()
    optimizer.noise = noise
    optimizer.backward(*batch, **options)
    optimizer.step()
    return noise.calls[-1][2]


def fresh() -> DPOptimizer:
    return adaptive(mlp(), noise=Watching())


def test_what_is_counted() -> None:
    batch = data(7)
    norms = private_norms(batch)
    within = int((norms <= 2.0).sum())
    assert 0 < within < 7
    assert observed(fresh(), batch) == within - 3.5
    assert observed(fresh(), batch[:0]) == 0
    bad = batch.clone()
    small = int(norms.argmin())
    bad[small] = math.nan  # counts as not within
    assert observed(fresh(), bad) == within - 1 - 3.5
    bad[small] = 1e300
    assert observed(fresh(), bad) == within - 1 - 3.5
    mask = torch.arange(7) == small  # is no sample, whatever it holds
    for filled in (batch, bad):
        assert observed(fresh(), filled, is_padding=mask) == within - 1 - 3.0


def private_norms(batch: Tensor) -> Tensor:
    optimizer = private(mlp())
    optimizer.backward(batch)
    norms = optimizer.diagnostics.grad_norms
    assert isinstance(norms, Tensor)
    return norms


def test_one_sample_moves_the_count_by_no_more_than_was_accounted() -> None:
    kinds = [data(1), data(1) * 1e6, data(1) * 0, data(1) * math.nan, data(1) * math.inf]
    others = data(4)
    without = observed(fresh(), others)
    counts = [observed(fresh(), torch.cat([others, kind])) for kind in kinds]
    mask = torch.arange(5) == 4
    null = observed(fresh(), torch.cat([others, kinds[0]]), is_padding=mask)
    assert {abs(count - without) for count in counts} == {0.5}
    assert null == without
    assert max(abs(one - other) for one in counts for other in counts) == 1.0


def test_several_backward_calls_are_counted_once_and_forgotten_with_their_batch() -> None:
    noise = Watching()
    optimizer = adaptive(mlp(), noise=noise)
    optimizer.backward(data(7))
    optimizer.zero_grad()
    optimizer.backward(data(3))
    optimizer.zero_grad()
    for part in data(7).split([2, 0, 5]):
        optimizer.backward(part)
    optimizer.step()
    assert noise.calls[-1][2] == observed(fresh(), data(7))


def test_only_the_noisy_count_moves_the_norm() -> None:
    """The source hides the count entirely: whatever the data, the norm is what the noise says."""

    class Hiding(SystemNoise):
        def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
            for tensor in tensors:
                tensor.fill_(1.0)

    found = set()
    for batch in (data(7), data(7) * 1e-9, data(2) * math.nan, data(5)[:0]):
        optimizer = adaptive(mlp(), noise=Hiding())
        step(optimizer, batch)
        found.add(optimizer.max_grad_norm)
    assert found == {2.0 * math.exp(-0.2 * (1 / 6))}


def test_the_default_noise_reaches_the_count() -> None:
    norms = set()
    for _ in range(2):
        model = mlp()
        strategy = AdaptiveQuantile(2.0, count_stddev=1.5)
        optimizer = private(
            model, max_grad_norm=strategy, noise_multiplier=1.2, expected_batch_size=6
        )
        step(optimizer, data())
        norms.add(optimizer.max_grad_norm)
    assert len(norms) == 2


class Shift(nn.Module):
    """A loss whose gradient is the sample, so that gradient norms have the samples' distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.w).sum()


@pytest.mark.parametrize(("quantile", "start"), [(0.5, 100.0), (0.9, 0.01), (0.2, 3.0)])
def test_converges_to_the_quantile(quantile: float, start: float) -> None:
    """Norms of two standard normals follow Rayleigh's distribution, whose quantiles are known."""
    model = Shift()
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model, lambda m, x: m(x),
        max_grad_norm=AdaptiveQuantile(start, target_quantile=quantile), noise_multiplier=1.0,
        expected_batch_size=200, noise=SeededNoise(torch.Generator().manual_seed(3)),
    )  # fmt: skip
    draws = torch.Generator().manual_seed(4)
    norms = []
    for _ in range(160):
        step(optimizer, torch.randn(200, 2, generator=draws, dtype=torch.float64))
        norms.append(optimizer.max_grad_norm)
    late = torch.tensor(norms[100:], dtype=torch.float64).log().mean().exp()
    expected = math.sqrt(-2 * math.log(1 - quantile))
    assert float(late) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("rule", ["clip", "normalise"])
def test_resumed_equals_uninterrupted(rule: str) -> None:
    quantile = AdaptiveQuantile(2.0, count_stddev=1.5)
    strategy = quantile if rule == "clip" else Automatic(quantile)
    twin, model, resumed = mlp(), mlp(), mlp()
    uninterrupted = adaptive(twin, max_grad_norm=strategy)
    for index in range(4):
        step(uninterrupted, data(5, seed=index))
    first = adaptive(model, max_grad_norm=strategy)
    for index in range(2):
        step(first, data(5, seed=index))
    saved = through_a_file([model.state_dict(), first.state_dict()])
    resumed.load_state_dict(saved[0])
    second = adaptive(resumed, seed=99, max_grad_norm=strategy)
    second.backward(data())
    second.load_state_dict(saved[1])
    assert second.max_grad_norm == first.max_grad_norm
    for index in range(2, 4):
        step(second, data(5, seed=index))
    assert_same(values(resumed), values(twin))
    assert second.max_grad_norm == uninterrupted.max_grad_norm


@pytest.mark.parametrize("norm", [None, 0.0, -1.0, math.nan, math.inf, 1, "1"])
def test_states_that_are_none(norm: Any) -> None:
    optimizer = adaptive(mlp())
    state = optimizer.state_dict()
    state["clipgrad"]["progress"] = {"step": 3, "norm": norm}
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(state)
    assert optimizer.max_grad_norm == 2.0


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_adapts_on_its_own(how: Any) -> None:
    optimizer = adaptive(mlp())
    step(optimizer, data())
    before = optimizer.max_grad_norm
    twin = how(optimizer)
    assert twin.max_grad_norm == before
    step(twin, data())
    assert twin.max_grad_norm != before == optimizer.max_grad_norm


def test_without_noise_the_count_gets_none() -> None:
    noise = Recording()
    optimizer = adaptive(mlp(), noise=noise, noise_multiplier=0.0, expected_batch_size=5)
    norms = private_norms(data())
    step(optimizer, data())
    assert noise.sigmas == [0.0, 0.0]
    share = float((norms <= 2.0).double().mean())
    assert optimizer.max_grad_norm == pytest.approx(2.0 * math.exp(-0.2 * (share - 0.5)))


def test_compiled_once_while_the_norm_adapts(graphs: Any) -> None:
    found = []
    for compile in (False, True):
        model = mlp()
        optimizer = adaptive(model, compile=compile, microbatch_size=4)
        for index in range(6):
            step(optimizer, data(5, seed=index))
        found.append((values(model), optimizer.max_grad_norm))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-12)
    assert found[0][1] == found[1][1]
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": PerLayer(AdaptiveQuantile(1.0))}, "for each group is not supported"),
        ({"max_grad_norm": {"0": AdaptiveQuantile(1.0), "": 1.0}}, "for each group is not"),
        ({"max_grad_norm": AdaptiveQuantile(1.0)}, "count_stddev=0.3 reveals more.*above 0.6"),
        ({"noise_multiplier": 3.0}, "count_stddev=1.5 reveals more.*count_stddev above 1.5"),
        ({"relation": "replace_one", "noise_multiplier": 1.5}, "count_stddev above 1.5"),
        ({"noise_multiplier": -1.0}, "noise_multiplier must be finite and at least 0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier must be finite and at least 0"),
    ],
)  # fmt: skip
def test_noise_that_does_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adaptive(mlp(), **options)


def test_a_schedule_of_noise_that_leaves_no_room_for_the_count() -> None:
    model = mlp()
    optimizer = adaptive(model, noise_multiplier=lambda step: 1.0 + 3 * step)
    step(optimizer, data())
    before = values(model)
    optimizer.backward(data())
    with pytest.raises(ValueError, match="reveals more than"):
        optimizer.step()
    assert_same(values(model), before)


def test_a_norm_that_runs_away_is_refused() -> None:
    strategy = AdaptiveQuantile(1e-3, learning_rate=1e9, count_stddev=1.5)
    optimizer = adaptive(mlp(), max_grad_norm=strategy, noise=Recording())
    step(optimizer, data())  # all are clipped, and the exponent is as large as it can be
    assert optimizer.max_grad_norm == 1e-3 * math.exp(700)
    step(optimizer, data())  # none is
    with pytest.raises(ValueError, match=r"AdaptiveQuantile has moved the norm to 0\.0 at step 2"):
        optimizer.backward(data())
