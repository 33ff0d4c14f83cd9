"""Test batches of at most a given size, and batches that are padded to this size."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clipgrad import DPOptimizer
from clipgrad.sampling import PaddedBatch, PoissonSampler, poisson_loader
from tests.sampling.checks import p_value, poisson, seeded, subsets


def truncated(size: int, q: float, most: int) -> dict[frozenset[int], float]:
    """Return probabilities by definition: a Poisson sample, or a uniformly random subset of a larger sample."""
    exact = {}
    for chosen in subsets(size):
        k = len(chosen)
        if k < most:
            exact[chosen] = float(poisson(chosen, size, q))
        elif k == most:
            above = sum(
                math.comb(size, n) * float(poisson(range(n), size, q))
                for n in range(most, size + 1)
            )
            exact[chosen] = above / math.comb(size, most)
    assert abs(sum(exact.values()) - 1) < 1e-12
    return exact


@pytest.mark.parametrize(("q", "most"), [(0.4, 1), (0.5, 2), (0.6, 3)])
def test_a_batch_that_is_too_large_becomes_a_random_subset(q: float, most: int) -> None:
    sampler = PoissonSampler(
        4, sample_rate=q, max_batch_size=most, steps=4_000, generator=seeded(4)
    )
    batches = list(sampler)
    assert p_value(batches, truncated(4, q, most)) > 1e-3
    assert all(batch == sorted(batch) for batch in batches)
    plain = PoissonSampler(4, sample_rate=q, steps=4_000, generator=seeded(4))
    assert p_value((batch[:most] for batch in plain), truncated(4, q, most)) < 1e-6


def test_the_rates_are_those_before_truncation() -> None:
    sampler = PoissonSampler(100, expected_batch_size=20, max_batch_size=10)
    assert (sampler.sample_rate, sampler.expected_batch_size, len(sampler)) == (0.2, 20, 5)
    assert sampler.max_batch_size == 10
    assert max(map(len, PoissonSampler(100, sample_rate=0.5, max_batch_size=10, steps=30))) == 10
    assert PoissonSampler(100, sample_rate=0.2).max_batch_size is None


def test_a_limit_that_is_never_reached_changes_nothing() -> None:
    plain = PoissonSampler(50, sample_rate=0.3, steps=30, generator=seeded(1))
    limited = PoissonSampler(50, sample_rate=0.3, max_batch_size=50, steps=30, generator=seeded(1))
    assert list(plain) == list(limited)


# --------------------------------------------------------------------------------------- padding


def padded(rate: float, steps: int = 30, **options: Any) -> list[PaddedBatch]:
    data = TensorDataset(torch.arange(40.0)[:, None], torch.arange(40))
    return list(
        poisson_loader(data, sample_rate=rate, max_batch_size=8, pad=True, steps=steps, **options)
    )


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_padded_batches_have_one_size(num_workers: int) -> None:
    batches = padded(0.05, generator=seeded(2), num_workers=num_workers)
    sampler = PoissonSampler(40, sample_rate=0.05, max_batch_size=8, steps=30, generator=seeded(2))
    drawn = list(sampler)
    assert {0, 1} <= set(map(len, drawn))
    for ((x, y), is_padding), indices in zip(batches, drawn, strict=True):
        assert x.shape == (8, 1)
        assert y.shape == (8,)
        assert is_padding.dtype is torch.bool
        assert is_padding.tolist() == [False] * len(indices) + [True] * (8 - len(indices))
        assert y[~is_padding].tolist() == indices
        assert set(y[is_padding].tolist()) <= set(indices or [0])
        assert torch.equal(x[:, 0], y.double())


def test_truncated_batches_have_no_padding() -> None:
    for (_, y), is_padding in padded(0.9):
        assert not is_padding.any()
        assert len(set(y.tolist())) == 8


def test_padding_contributes_nothing() -> None:
    """A padded batch gives the sums of the batch without padding, and all padding is zero."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1).double()

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x.double())[:, 0] - y).square().mean()

    def sums(batch: Any, is_padding: Tensor | None) -> Tensor:
        optimizer = DPOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model,
            loss_fn,
            max_grad_norm=1.0,
            noise_multiplier=1.0,
            expected_batch_size=2,
        )
        optimizer.backward(*batch, is_padding=is_padding)
        total = torch.cat([total.flatten() for total in optimizer.clipped_sums.values()])
        optimizer.step()  # with an empty batch too
        optimizer.zero_grad()
        return total

    empty = 0
    for batch, is_padding in padded(0.05, generator=seeded(2)):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        with_padding = sums(batch, is_padding)
        model.load_state_dict(state)
        bare = sums([leaf[~is_padding] for leaf in batch], None)
        assert torch.allclose(with_padding, bare, rtol=1e-12, atol=0)
        if is_padding.all():
            empty += 1
            assert not with_padding.any()
        else:
            assert with_padding.any()
    assert empty > 0


def test_padding_needs_a_size() -> None:
    data = TensorDataset(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"pad = True needs.*max_batch_size is None"):
        poisson_loader(data, sample_rate=0.5, pad=True)
