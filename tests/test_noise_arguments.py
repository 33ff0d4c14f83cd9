"""What is refused before any noise is added, and how tensors are cut up for the threads."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise, gaussian_sigma
from clipgrad.noise.pieces import contiguous_targets, pieces
from tests.noise_checks import draw, seeded


@pytest.fixture(params=[SystemNoise, seeded], ids=["system", "seeded"])
def source(request: pytest.FixtureRequest) -> NoiseSource:
    made: NoiseSource = request.param()
    return made


def test_sigma_zero_draws_nothing() -> None:
    source, total = seeded(3), torch.ones(50)
    source.add_gaussian_([total], 0.0)
    assert torch.equal(total, torch.ones(50))
    assert torch.equal(draw(source, 50), draw(seeded(3), 50))
    SystemNoise().add_gaussian_([total], 0)
    assert torch.equal(total, torch.ones(50))


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf, -math.inf])
def test_impossible_sigma(source: NoiseSource, sigma: float) -> None:
    with pytest.raises(ValueError, match=f"sigma must be finite and at least 0, got {sigma}"):
        source.add_gaussian_([torch.zeros(3)], sigma)


@pytest.mark.parametrize("sigma", [True, "1", None, torch.tensor(1.0)])
def test_sigma_of_a_wrong_type(source: NoiseSource, sigma: Any) -> None:
    with pytest.raises(TypeError, match="sigma must be a real number"):
        source.add_gaussian_([torch.zeros(3)], sigma)


@pytest.mark.parametrize(
    ("bad", "sigma", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), 1.0, "tensors.1. must be dense and float64"),
        (torch.zeros(3, dtype=torch.complex64), 1.0, "torch.complex64"),
        (torch.zeros(3).to_sparse(), 1.0, r"torch.sparse_coo.*to_dense"),
        (torch.zeros(3, device="meta"), 1.0, "meta"),
        (None, 1.0, "must be a tensor, got None"),
        (torch.zeros(3, dtype=torch.float16), 1e-6, "sigma = 1e-06 cannot be represented"),
        (torch.zeros(3), 1e-40, "vanish"),
        (torch.zeros(3), 1e39, "overflow"),
        (torch.zeros(1).expand(3), 1.0, "several values share one memory location"),
    ],
)
def test_no_tensor_gets_noise_if_one_cannot(
    source: NoiseSource, bad: Any, sigma: float, message: str
) -> None:
    good = torch.zeros(3, dtype=torch.float64)
    with pytest.raises((TypeError, ValueError), match=message):
        source.add_gaussian_([good, bad], sigma)
    assert (good == 0).all()


def test_twice_the_same_tensor(source: NoiseSource) -> None:
    total = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"tensors.1.*twice"):
        source.add_gaussian_([total, total.view(-1)], 1.0)
    with pytest.raises(TypeError, match=r"pass \[tensor\]"):
        source.add_gaussian_(total, 1.0)  # type: ignore[arg-type]
    source.add_gaussian_([torch.zeros(0), torch.zeros(0)], 1.0)


@pytest.mark.parametrize("draws", [0, -1])
def test_too_few_draws(draws: int) -> None:
    with pytest.raises(ValueError, match=f"draws must be at least 1, got {draws}"):
        SystemNoise(draws=draws)


@pytest.mark.parametrize("draws", [1.0, "2", True, None])
def test_draws_of_a_wrong_type(draws: Any) -> None:
    with pytest.raises(TypeError, match="draws must be an integer"):
        SystemNoise(draws=draws)


def test_seeded_noise_wants_a_generator() -> None:
    with pytest.raises(TypeError, match=r"a torch.Generator, got 17"):
        SeededNoise(17)  # type: ignore[arg-type]


def test_gaussian_sigma() -> None:
    assert gaussian_sigma(noise_multiplier=0.7, sensitivity=3) == 0.7 * 3
    for sensitivity in (0.0, 1.0, math.inf, math.nan):
        assert gaussian_sigma(noise_multiplier=0, sensitivity=sensitivity) == 0.0


@pytest.mark.parametrize(
    ("multiplier", "sensitivity", "message"),
    [
        (1.0, math.inf, "sensitivity must be positive and finite.*got inf.*max_grad_norm"),
        (1.0, math.nan, "got nan"),
        (1.0, 0.0, "got 0.0"),
        (1.0, -2.0, "got -2.0"),
        (1e-200, 1e-200, "sigma = 0.0"),
        (1e200, 1e200, "sigma = inf"),
        (-1.0, 1.0, "noise_multiplier must be finite and at least 0, got -1.0"),
        (math.nan, 1.0, "noise_multiplier.*got nan"),
        (math.inf, 1.0, "noise_multiplier.*got inf"),
    ],
)
def test_gaussian_sigma_refuses(multiplier: float, sensitivity: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_sigma(noise_multiplier=multiplier, sensitivity=sensitivity)


# ------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 20))
def test_pieces_hold_every_value_once(sizes: list[int], limit: int) -> None:
    flats = [torch.zeros(size, 1) for size in sizes]
    cut = list(pieces(flats, limit))
    for piece in cut:
        for part in piece:
            part += 1
    assert all((flat == 1).all() for flat in flats)
    assert [sum(p.numel() for p in piece) for piece in cut[:-1]] == [limit] * (len(cut) - 1)


@given(st.permutations([0, 1, 2, 3]), st.booleans())
def test_targets_are_the_tensors_memory(order: list[int], gaps: bool) -> None:
    tensor = torch.zeros(2, 1, 3, 4).permute(order)[..., :: 2 if gaps else 1]
    (target,), additions = contiguous_targets([tensor])
    assert target.is_contiguous()
    target += 1
    for gappy, addition in additions:
        gappy += addition
    assert (tensor == 1).all()
    assert target.numel() == tensor.numel()
