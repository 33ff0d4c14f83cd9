"""Noise on a grid: the discrete Gaussian, its exact distribution, its size, and what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
import secrets
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from clipgrad import SeededNoise, SystemNoise
from clipgrad.exact import noise as noise_module
from clipgrad.exact import sampler
from clipgrad.exact.noise import DiscreteGaussianNoise
from clipgrad.exact.sampler import discrete_gaussian
from tests.dp_tools import data, mlp, private, values

GRID = 2.0**-16


class Recorder:
    """Stands in for the sampler: 1, 2, 3, ... steps, and the scales that were asked for."""

    def __init__(self) -> None:
        self.scales: list[int] = []
        self.drawn = 0

    def __call__(self, count: int, sigma: int) -> np.ndarray[Any, Any]:
        self.scales.append(sigma)
        self.drawn += count
        return np.arange(self.drawn - count + 1, self.drawn + 1)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(noise_module, "discrete_gaussian", recorder)
    return recorder


def steps(*shape: int, grid: float = GRID) -> Tensor:
    return torch.randint(-1000, 1000, shape).double() * grid


# ------------------------------------------------------------------------------------ the sampler


def probabilities(scale: float) -> dict[int, float]:
    """Of every integer within 12 scales, at least 12 of them."""
    reach = math.ceil(12 * max(scale, 1.0))
    weights = {z: math.exp(-(z**2) / (2 * scale**2)) for z in range(-reach, reach + 1)}
    total = math.fsum(weights.values())
    return {z: weight / total for z, weight in weights.items()}


def p_value(sample: np.ndarray[Any, Any], expected: dict[int, float], bins: int = 40) -> float:
    """Chi-square, neighbours joined until each bin expects at least ``len(sample) / bins``."""
    edges, joined, mass = [], [], 0.0
    for z, probability in sorted(expected.items()):
        mass += probability
        if mass * bins >= 1 or (mass * len(sample) >= 10 and len(expected) < bins):
            edges.append(z)
            joined.append(mass)
            mass = 0.0
    joined[-1] += mass
    found = np.bincount(np.searchsorted(edges[:-1], sample, side="left"), minlength=len(joined))
    wanted = np.array(joined) * len(sample)
    return float(chi2.sf(((found - wanted) ** 2 / wanted).sum(), len(joined) - 1))


@pytest.mark.parametrize("sigma", [1, 2, 3, 7, 25, 100])
def test_the_distribution(sigma: int) -> None:
    """A right sampler fails once in 1e9 runs; a scale that is off by 3 % never passes."""
    sample = discrete_gaussian(100_000, sigma)
    assert p_value(sample, probabilities(sigma)) > 1e-9
    assert p_value(sample, probabilities(1.03 * sigma)) < 1e-9
    assert p_value(sample, probabilities(sigma / 1.03)) < 1e-9
    assert p_value(np.abs(sample), probabilities(sigma)) < 1e-9


def test_all_of_it_by_the_slow_road(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where 64 bits are too few, Python's integers decide, and the distribution is the same."""
    monkeypatch.setattr(sampler, "_MOST_DISTANCE", 2)
    assert p_value(discrete_gaussian(20_000, 3), probabilities(3)) > 1e-9


def test_the_widest() -> None:
    """At 2**28 some candidates do not fit 64 bits; the last bits are uniform."""
    sigma, count = 2**28, 40_000
    sample = discrete_gaussian(count, sigma)
    z = sample / sigma
    assert abs(z.mean()) < 6 / math.sqrt(count)
    assert abs(np.square(z).mean() - 1) < 6 * math.sqrt(2 / count)
    for bound in (0.1, 1.0, 2.0, 3.0, 4.0):
        p = math.erf(bound / math.sqrt(2))
        assert abs((abs(z) < bound).mean() - p) < 6 * math.sqrt(p * (1 - p) / count) + 1 / count
    last = np.bincount(sample % 8, minlength=8) / count
    assert abs(last - 1 / 8).max() < 6 * math.sqrt(7 / 64 / count)


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (1, 1), (1, 3), (5, 7), (3, 2**56)])
def test_bernoulli_exp(numerator: int, denominator: int) -> None:
    count, p = 100_000, math.exp(-numerator / denominator)
    many = sampler._bernoulli_exp(np.full(count, numerator), denominator)
    exact = sampler._bernoulli_exp_exact
    few = np.array([exact(Fraction(numerator, denominator)) for _ in range(5000)])
    for found in (many, few):
        assert abs(found.mean() - p) <= 7 * math.sqrt(p * (1 - p) / len(found)) + 1e-12
    above_1 = np.array([exact(Fraction(5, 2)) for _ in range(5000)])
    assert abs(above_1.mean() - math.exp(-2.5)) < 7 * math.sqrt(math.exp(-2.5) / 5000)


@pytest.mark.parametrize("bound", [2, 3, 7, 2**56 + 1])
def test_uniform_integers(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sampler._uniform_below(bound, 20_000)
    assert 0 <= found.min() <= found.max() < bound
    parts = np.bincount(found * 2 // bound if bound > 8 else found)
    assert abs(parts / 20_000 - 1 / len(parts)).max() < 7 * math.sqrt(0.25 / 20_000)
    # A word beyond the last whole multiple of the bound is drawn again.
    words = iter([2**62 - 1, 2**62 - 2**62 % bound, 5])
    monkeypatch.setattr(sampler, "_words", lambda n: np.array([next(words)]))
    if 2**62 % bound:
        assert sampler._uniform_below(bound, 1).tolist() == [5 % bound]


def test_bits_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    system = secrets.token_bytes

    def token_bytes(size: int) -> bytes:
        asked.append(size)
        return system(size)

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    torch.manual_seed(0)
    np.random.default_rng(0)
    first = discrete_gaussian(1000, 1000)
    torch.manual_seed(0)
    assert (first != discrete_gaussian(1000, 1000)).mean() > 0.99
    assert sum(asked) > 2 * 1000 * 8 * 3


@pytest.mark.parametrize("sigma", [0, -1, 2**28 + 1])
def test_a_sigma_out_of_range(sigma: int) -> None:
    with pytest.raises(ValueError, match="sigma must be from 1 to"):
        discrete_gaussian(3, sigma)


def test_independent_between_values_calls_and_copies() -> None:
    source = DiscreteGaussianNoise(GRID)
    rows = torch.zeros(4, 5000, dtype=torch.float64)
    copies = [source, source, copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    for row, one in zip(rows, copies, strict=True):
        one.add_gaussian_([row[:2500], row[2500:]], GRID * 100)
    parts = rows.view(8, 2500)
    correlation = torch.corrcoef(parts) - torch.eye(8, dtype=torch.float64)
    assert correlation.abs().max() < 8 / math.sqrt(2500)


# ------------------------------------------------------------------------------------ the source


def test_integers_are_added_wherever_the_values_lie(recorder: Recorder) -> None:
    memory = steps(6, 5)
    tensors = [steps(3, 2).T, memory[:, ::2], steps(), steps(0)]
    before = [tensor.clone() for tensor in tensors]
    rest = memory[:, 1::2].clone()
    DiscreteGaussianNoise(GRID).add_gaussian_(tensors, 1.0)
    added = [(t - b).flatten() for t, b in zip(tensors, before, strict=True)]
    assert torch.equal(torch.cat(added), torch.arange(1, 26).double() * GRID)
    assert torch.equal(memory[:, 1::2], rest)


def test_an_exact_sum_beyond_float32(recorder: Recorder) -> None:
    total = torch.tensor([2.0**52 - 1, -(2.0**52)], dtype=torch.float64) * GRID
    DiscreteGaussianNoise(GRID).add_gaussian_([total], 1.0)
    assert (total / GRID).tolist() == [2.0**52, -(2.0**52) + 2]


@pytest.mark.parametrize("multiplier", [0.1, 1.3, 2.7182818])
@pytest.mark.parametrize("norm", [0.1, 1 / 3, {"0": 0.3, "2": 0.7}])
def test_the_scale_is_never_too_small(recorder: Recorder, multiplier: float, norm: Any) -> None:
    optimizer = private(
        mlp(), max_grad_norm=norm, noise_multiplier=multiplier, noise=DiscreteGaussianNoise(GRID)
    )
    optimizer.backward(data())
    optimizer.step()
    norms = norm.values() if isinstance(norm, dict) else [norm]
    least = Fraction(multiplier) ** 2 * sum(Fraction(c) ** 2 for c in norms) / Fraction(GRID) ** 2
    (scale,) = set(recorder.scales)
    assert Fraction(scale - 1) ** 2 < least <= Fraction(scale) ** 2


def test_zero_draws_nothing(recorder: Recorder) -> None:
    total = steps(5)
    before = total.clone()
    DiscreteGaussianNoise(GRID).add_gaussian_([total], 0.0)
    DiscreteGaussianNoise(GRID).add_gaussian_([], 1.0)
    assert torch.equal(total, before)
    assert recorder.drawn == 0


@pytest.mark.parametrize(
    ("bad", "sigma", "error", "message"),
    [
        (torch.full((2,), GRID * 1.5).double(), 1.0, ValueError, "no multiple of grid"),
        (torch.full((2,), math.nan).double(), 1.0, ValueError, "no multiple of grid"),
        (torch.full((2,), 2.0**53 * GRID).double(), 1.0, ValueError, "more than 2..52"),
        (torch.zeros(2), 1.0, TypeError, "must be float64, got torch.float32"),
        (
            torch.zeros(2).double(),
            2.0**13,
            ValueError,
            "between 100 and 2..28 steps. A grid near 0.03125",
        ),
        (torch.zeros(2).double(), 2.0**-10, ValueError, "is 64 steps .* near 3.7"),
        (torch.zeros(2).double(), -1.0, ValueError, "sigma must be finite"),
        (
            torch.zeros(1).double().expand(2),
            1.0,
            ValueError,
            "several values share one memory location",
        ),
    ],
)
def test_no_tensor_gets_noise_if_one_cannot(
    recorder: Recorder, bad: Tensor, sigma: float, error: type[Exception], message: str
) -> None:
    good = steps(3)
    before = good.clone()
    with pytest.raises(error, match=message):
        DiscreteGaussianNoise(GRID).add_gaussian_([good, bad], sigma)
    assert torch.equal(good, before)


@pytest.mark.parametrize("grid", [0.1, 0.0, -0.5, math.inf, math.nan])
def test_a_grid_that_is_none(recorder: Recorder, grid: float) -> None:
    with pytest.raises(ValueError, match="grid must be a power of two"):
        DiscreteGaussianNoise(grid)


def test_state(recorder: Recorder) -> None:
    source = DiscreteGaussianNoise(GRID)
    source.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match="DiscreteGaussianNoise"):
        source.load_state_dict(SystemNoise().state_dict())


# ------------------------------------------------------------------------------------ the optimizer


def test_a_step_divides_after_the_noise(recorder: Recorder) -> None:
    model = mlp(dtype=torch.float32)
    optimizer = private(
        model, noise_multiplier=1.0, expected_batch_size=3, noise=DiscreteGaussianNoise(GRID)
    )
    x = data(dtype=torch.float32)
    before = values(model)
    optimizer.backward(x[:2])
    optimizer.backward(x[2:])
    sums = list(optimizer.clipped_sums.values())
    optimizer.step()
    start = 1
    for (name, parameter), total in zip(model.named_parameters(), sums, strict=True):
        assert total is not None
        size = total.numel()
        integers = total / GRID
        assert torch.equal(integers, integers.round())
        noise = torch.arange(start, start + size).double().view(total.shape)
        expected = ((integers + noise) * GRID / 3).float()
        assert torch.equal(parameter.grad, expected)
        assert torch.equal(parameter.detach(), before[name] - expected)
        start += size


def test_accumulation_and_microbatches_change_no_bit(recorder: Recorder) -> None:
    found = []
    for splits, microbatch_size in (((8,), None), ((3, 0, 5), 2), ((1,) * 8, 1)):
        recorder.drawn = 0
        model = mlp(dtype=torch.float32)
        optimizer = private(
            model,
            noise_multiplier=1.0,
            noise=DiscreteGaussianNoise(GRID),
            microbatch_size=microbatch_size,
        )
        for part in data(8, dtype=torch.float32).split(splits):
            optimizer.backward(part)
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_other_noise_is_refused(recorder: Recorder) -> None:
    source = DiscreteGaussianNoise(GRID)
    optimizer = private(mlp(), noise_multiplier=1.0, noise=source)
    assert optimizer.noise is source
    plain = private(mlp(), noise_multiplier=1.0)
    with pytest.raises(ValueError, match="noise on a grid needs sums on it"):
        plain.noise = source
    for other in (
        SystemNoise(),
        DiscreteGaussianNoise(GRID / 2),
        SeededNoise(torch.Generator()),
    ):
        with pytest.raises(ValueError, match="needs noise on the same grid"):
            optimizer.noise = other


def test_refused_before_the_first_step(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match=r"too coarse.*44 elements"):
        private(mlp(), noise_multiplier=1.0, noise=DiscreteGaussianNoise(0.5))
    with pytest.raises(ValueError, match=r"sigma=0.001 is 66 steps"):
        private(mlp(), noise_multiplier=0.001, noise=DiscreteGaussianNoise(GRID))
    private(mlp(), noise_multiplier=0.0, noise=DiscreteGaussianNoise(GRID))
    with pytest.raises(ValueError, match="expected_batch_size"):
        private(
            mlp(),
            noise_multiplier=1.0,
            noise=DiscreteGaussianNoise(GRID),
            expected_batch_size=2**26,
        )


def test_a_schedule_restores(recorder: Recorder) -> None:
    model = mlp()
    optimizer = private(model, noise_multiplier=1.0, noise=DiscreteGaussianNoise(GRID))
    optimizer.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy(optimizer)
    assert copied.noise.grid == GRID  # type: ignore[attr-defined]


def test_the_size_of_the_noise() -> None:
    model = nn.Linear(100, 100, bias=False)
    optimizer = private(
        model,
        noise_multiplier=1.5,
        max_grad_norm=2.0,
        expected_batch_size=4,
        noise=DiscreteGaussianNoise(2.0**-14),
    )
    before = model.weight.detach().clone()
    optimizer.backward(torch.zeros(0, 100))
    optimizer.step()
    noise = (before - model.weight.detach()).double()
    assert abs(noise.std() / (1.5 * 2.0 / 4) - 1) < 0.06


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    model, x = mlp(dtype=torch.float32).cuda(), data(9, dtype=torch.float32).cuda()
    found = []
    for order in (torch.arange(9), torch.arange(8, -1, -1)):
        optimizer = private(model, noise_multiplier=1.0, noise=DiscreteGaussianNoise(GRID))
        optimizer.zero_grad()  # of the one before
        optimizer.backward(x[order])
        found.append(torch.cat([s.flatten() for s in optimizer._pending._sums or []]))
    optimizer.step()
    assert torch.equal(found[0], found[1])
    integers = found[0].cpu() / GRID
    assert torch.equal(integers, integers.round())
    assert 0 < sum(int(n) ** 2 for n in integers.tolist()) <= 81 * 2**32
