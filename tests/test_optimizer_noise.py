"""The noise that reaches the parameters: its size, its number of draws, its independence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipgrad import DPOptimizer, Relation, SeededNoise
from clipgrad.noise import SystemNoise
from tests.dp_tools import data, mlp, private, squared, values

# 20 000 values: the estimate of a standard deviation is off by 0.5 % (one sigma), so 4 % means 8 sigma.
WIDTH, SLACK = 100, 0.04


class Counting(SystemNoise):
    """System noise that remembers what was asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, float]] = []

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        self.calls.append((len(tensors), sigma))
        super().add_gaussian_(tensors, sigma)


def wide() -> nn.Sequential:
    """Two parameters of 10 000 values each."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
    ).double()


def noise_of_a_step(optimizer: DPOptimizer, *, backward_calls: int = 1) -> list[Tensor]:
    """What a step of SGD with rate one adds to the parameters on batches of no samples."""
    before = values(optimizer.model)
    for _ in range(backward_calls):
        optimizer.backward(torch.zeros(0, WIDTH, dtype=torch.float64))
    optimizer.step()
    optimizer.zero_grad()
    return [before[name] - p.detach() for name, p in optimizer.model.named_parameters()]


def measured(differences: list[Tensor]) -> float:
    return float(torch.cat([d.flatten() for d in differences]).square().mean().sqrt())


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({"max_grad_norm": 1.0}, 1.0),
    "norm": ({"max_grad_norm": 0.3}, 0.3),
    "multiplier": ({"max_grad_norm": 2.0, "noise_multiplier": 1.7}, 3.4),
    "replace one": ({"max_grad_norm": 1.0, "relation": Relation.REPLACE_ONE}, 2.0),
    "special": ({"max_grad_norm": 1.0, "relation": Relation.REPLACE_SPECIAL}, 1.0),
    "groups": ({"max_grad_norm": {"0": 3.0, "1": 4.0}}, 5.0),
    "groups, replace": ({"max_grad_norm": {"0": 0.6, "": 0.8}, "relation": "replace_one"}, 2.0),
}


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("expected_batch_size", [1, 12.5])
def test_standard_deviation(name: str, expected_batch_size: float) -> None:
    options, sigma = CASES[name]
    options = {"noise_multiplier": 1.0, **options}
    generator = torch.Generator().manual_seed(11)
    optimizer = private(
        wide(), noise=SeededNoise(generator), expected_batch_size=expected_batch_size, **options
    )
    assert optimizer.sigma == pytest.approx(sigma)
    assert optimizer.sensitivity == pytest.approx(sigma / options["noise_multiplier"])
    found = noise_of_a_step(optimizer)
    expected = sigma / expected_batch_size
    for difference in found:
        assert difference.mean().abs() < 6 * expected / WIDTH
        assert abs(measured([difference]) / expected - 1) < SLACK
    # What this test would say of noise that is too small or too large.
    assert all(abs(measured(found) / (expected * wrong) - 1) > SLACK for wrong in (2 / 3, 3 / 2))


def test_system_noise_has_the_right_size_too() -> None:
    found = noise_of_a_step(private(wide(), noise_multiplier=2.0, expected_batch_size=4))
    assert abs(measured(found) / 0.5 - 1) < 2 * SLACK


def test_the_shape_is_gaussian() -> None:
    generator = torch.Generator().manual_seed(5)
    found = noise_of_a_step(private(wide(), noise_multiplier=1.0, noise=SeededNoise(generator)))
    noise = torch.cat([difference.flatten() for difference in found])
    for bound in (0.5, 1.0, 2.0, 3.0):
        share = float((noise.abs() < bound).double().mean())
        inside = math.erf(bound / math.sqrt(2))
        assert abs(share - inside) < 6 * math.sqrt(inside * (1 - inside) / noise.numel())


@pytest.mark.parametrize("backward_calls", [1, 4])
@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_one_draw_a_step(backward_calls: int, microbatch_size: int | None) -> None:
    noise = Counting()
    optimizer = private(
        mlp(), noise_multiplier=3.0, noise=noise, max_grad_norm=2.0, microbatch_size=microbatch_size
    )
    for step in range(3):
        for _ in range(backward_calls):
            optimizer.backward(data())
        assert len(noise.calls) == step
        optimizer.step()
        optimizer.zero_grad()
    assert noise.calls == [(4, 6.0)] * 3


def test_several_backward_calls_add_no_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    optimizer = private(wide(), noise_multiplier=1.0, noise=SeededNoise(generator))
    assert abs(measured(noise_of_a_step(optimizer, backward_calls=9)) - 1) < SLACK


def test_without_noise_nothing_is_drawn() -> None:
    noise = Counting()
    optimizer = private(mlp(), noise=noise, max_grad_norm=float("inf"))
    optimizer.backward(data())
    optimizer.step()
    assert noise.calls == [(4, 0.0)]
    assert optimizer.sigma == 0.0


def test_independent_between_parameters_and_steps() -> None:
    optimizer = private(wide(), noise_multiplier=1.0)
    found = [noise for _ in range(3) for noise in noise_of_a_step(optimizer)]
    for one, other in itertools.combinations(found, 2):
        for turned in (other, other.t(), other.flip(0)):
            correlation = float((one * turned).mean())
            assert abs(correlation) < 6 / WIDTH  # of 10 000 products, each of variance one


def test_independent_of_the_gradients() -> None:
    # Noise added to a sum is the sum plus the same noise: nothing of it depends on the data.
    found = []
    for size in (0, 5):
        model = wide()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.eye(WIDTH))
        generator = torch.Generator().manual_seed(8)
        optimizer = private(model, noise_multiplier=1.0, noise=SeededNoise(generator))
        optimizer.backward(torch.ones(size, WIDTH, dtype=torch.float64))
        clean = list(optimizer.clipped_sums.values())
        optimizer.step()
        noisy = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([with_noise - total for with_noise, total in zip(noisy, clean, strict=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_unused_parameters_get_noise_and_frozen_ones_do_not() -> None:
    model = wide()
    model.append(nn.Linear(4, 4).double())
    model.append(nn.Linear(4, 4).double().requires_grad_(False))
    before = values(model)
    optimizer = private(
        model,
        lambda model, x: squared(model[1], squared_through(model[0], x)),
        noise_multiplier=1.0,
    )
    optimizer.backward(torch.ones(2, WIDTH, dtype=torch.float64))
    optimizer.step()
    after = values(model)
    assert not (after["2.weight"] == before["2.weight"]).any()
    assert not (after["2.bias"] == before["2.bias"]).any()
    assert torch.equal(after["3.weight"], before["3.weight"])
    assert model[3].weight.grad is None


def squared_through(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).square()


def test_a_seeded_generator_repeats_and_the_default_does_not() -> None:
    def run(seed: int | None) -> dict[str, Tensor]:
        model = mlp()
        noise = None if seed is None else SeededNoise(torch.Generator().manual_seed(seed))
        optimizer = private(model, noise_multiplier=1.0, noise=noise)
        for step in range(2):
            optimizer.backward(data(seed=step))
            optimizer.step()
        return values(model)

    def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    assert equal(run(1), run(1))
    assert not equal(run(1), run(2))
    torch.manual_seed(0)
    first = run(None)
    torch.manual_seed(0)  # the global generator has no say
    assert not equal(first, run(None))


def test_the_noise_multiplier_may_change_between_steps() -> None:
    generator = torch.Generator().manual_seed(4)
    optimizer = private(wide(), noise_multiplier=1.0, noise=SeededNoise(generator))
    noise_of_a_step(optimizer)
    optimizer.noise_multiplier = 3.0
    assert abs(measured(noise_of_a_step(optimizer)) / 3 - 1) < SLACK


def test_a_noise_that_became_impossible_leaves_the_batch_alone() -> None:
    model = mlp()
    optimizer, before = private(model, noise_multiplier=1.0), values(model)
    optimizer.backward(data())
    optimizer.noise_multiplier = -1.0
    with pytest.raises(ValueError, match="noise_multiplier must be finite and at least 0"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.noise_multiplier = 1.0
    optimizer.step()
