"""Test users as the unit: which users and samples are in a batch, and how far one user moves the sum."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from clipgrad import DPOptimizer
from clipgrad.sampling import UserSampler, user_loader
from tests.sampling.checks import check_poisson, membership, p_value, poisson, seeded, subsets

IDS = [0, 1, 0, 2, 0, 1, 3, 0, 3, 0]  # users with 5, 2, 1 and 2 samples
OF_USER = {u: [i for i, other in enumerate(IDS) if other == u] for u in range(4)}


def users_of(batch: list[list[int]]) -> list[int]:
    for samples in batch:
        assert len({IDS[i] for i in samples}) == 1  # and none is without samples
    return [IDS[samples[0]] for samples in batch]


def test_users_are_a_poisson_sample_with_all_that_is_theirs() -> None:
    sampler = UserSampler(IDS, sample_rate=0.4, steps=5_000, generator=seeded(1))
    batches = list(sampler)
    exact = {chosen: float(poisson(chosen, 4, 0.4)) for chosen in subsets(4)}
    assert p_value(map(users_of, batches), exact) > 1e-3
    for samples in itertools.chain(*batches):
        assert samples == OF_USER[IDS[samples[0]]]


def test_private_users_are_a_poisson_sample() -> None:
    sampler = UserSampler([i // 3 for i in range(60)], sample_rate=0.3, steps=6000)
    drawn = [[samples[0] // 3 for samples in batch] for batch in sampler]
    check_poisson(membership(drawn, 20), 0.3)


def test_a_bounded_number_is_chosen_uniformly_and_anew() -> None:
    sampler = UserSampler(
        IDS, sample_rate=0.9, samples_per_user=3, steps=5_000, generator=seeded(2)
    )
    assert sampler.width == 3
    of_first = [samples for batch in sampler for samples in batch if IDS[samples[0]] == 0]
    triples = {frozenset(t): 0.1 for t in itertools.combinations(OF_USER[0], 3)}
    assert p_value(of_first, triples) > 1e-3
    assert p_value([samples[:2] for samples in of_first], triples) == 0
    others = [samples for batch in sampler for samples in batch if IDS[samples[0]] != 0]
    assert all(samples == OF_USER[IDS[samples[0]]] for samples in others)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor(IDS),
        np.array(IDS),
        [f"user {i}" for i in IDS],
        np.array([f"user {i}" for i in IDS]),
        [("a", i) for i in IDS],
    ],
    ids=["tensor", "array", "strings", "array of strings", "tuples"],
)
def test_ids_of_any_kind(ids: Any) -> None:
    sampler = UserSampler(ids, sample_rate=1.0, steps=1)
    assert list(sampler) == [list(OF_USER.values())]


def test_lengths_and_rates() -> None:
    sampler = UserSampler(IDS, expected_users=1)
    assert (len(sampler), sampler.sample_rate, sampler.expected_batch_size) == (4, 0.25, 1)
    assert (sampler.num_users, sampler.width, sampler.num_samples) == (4, 5, 10)
    limited = UserSampler(IDS, sample_rate=0.9, max_users=2, samples_per_user=9, steps=50)
    assert (limited.max_batch_size, limited.width) == (2, 5)
    assert max(map(len, limited)) == 2


@pytest.mark.parametrize(
    ("ids", "arguments", "error", "message"),
    [
        ([], {"sample_rate": 0.5}, ValueError, "user_ids is empty"),
        (
            [1, None],
            {"sample_rate": 0.5},
            ValueError,
            r"user_ids\[1\] is None.*sample 1 belongs to no user",
        ),
        (
            [math.nan, 1],
            {"sample_rate": 0.5},
            ValueError,
            r"user_ids\[0\] is nan.*sample 0 belongs to no user",
        ),
        ([[1], [2]], {"sample_rate": 0.5}, TypeError, r"user_ids\[0\] is a list.*hashable"),
        (IDS, {}, ValueError, "expected_users and sample_rate are None and None"),
        (IDS, {"expected_users": 5}, ValueError, "expected_users must be.*at most 4, got 5"),
        (IDS, {"sample_rate": 2}, ValueError, "sample_rate.*got 2"),
        (IDS, {"sample_rate": 0.5, "samples_per_user": 0}, ValueError, "samples_per_user.*got 0"),
        (IDS, {"sample_rate": 0.5, "max_users": 0}, ValueError, "max_users.*got 0"),
        (IDS, {"sample_rate": 0.5, "generator": 1}, TypeError, "generator must be.*got 1"),
    ],
)
def test_arguments(ids: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UserSampler(ids, **arguments)


# ---------------------------------------------------------------------------------------- loader


class Dicts(Dataset[Any]):
    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> Any:
        return {"x": torch.full((2, 3), float(index)), "y": index}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("width", [None, 1, 3])
def test_batches_by_user(num_workers: int, width: int | None) -> None:
    options: Any = {"samples_per_user": width, "sample_rate": 0.4, "steps": 30}
    drawn = list(UserSampler(IDS, **options, generator=seeded(3)))
    loader = user_loader(Dicts(), IDS, **options, generator=seeded(3), num_workers=num_workers)
    k = width or 5
    assert {0, 1, 2} <= set(map(len, drawn))
    for (batch, present), wanted in zip(loader, drawn, strict=True):
        assert batch["x"].shape == (len(wanted), k, 2, 3)
        assert batch["y"].shape == present.shape == (len(wanted), k)
        assert present.dtype is torch.bool
        assert (batch["x"][..., 0, 0] == batch["y"]).all()
        for y, there, samples in zip(batch["y"], present, wanted, strict=True):
            assert y[there].tolist() == samples
            assert set(y[~there].tolist()) <= set(samples)


def test_padded_users() -> None:
    data = TensorDataset(torch.arange(10), torch.arange(10))
    loader = user_loader(data, IDS, sample_rate=0.3, max_users=2, pad=True, steps=40)
    seen = set()
    for batch, is_padding in loader:
        x, y, present = batch
        assert x.shape == y.shape == present.shape == (2, 5)
        assert present.any(1).all()
        seen.add(int(is_padding.sum()))
    assert seen == {0, 1, 2}


def test_loader_arguments() -> None:
    data = TensorDataset(torch.arange(10))
    with pytest.raises(ValueError, match="user_ids has 9 entries, but the dataset has 10"):
        user_loader(data, IDS[:9], sample_rate=0.5)
    with pytest.raises(ValueError, match="max_users is None; give max_users"):
        user_loader(data, IDS, sample_rate=0.5, pad=True)
    with pytest.raises(TypeError, match="dataset must have a length"):
        user_loader(seeded(), IDS, sample_rate=0.5)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------- the whole path


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def loss_fn(model: nn.Module, x: Tensor, y: Tensor, present: Tensor) -> Tensor:
    assert x.dim() == 2  # one user's, without a batch axis
    losses = (model(x) - y).square().mean(-1)
    return losses.where(present, 0).sum() / present.sum()


def clipped_sum(model: nn.Module, batch: Any, is_padding: Tensor | None = None) -> Tensor:
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        loss_fn,
        max_grad_norm=0.7,
        noise_multiplier=1.0,
        expected_batch_size=2,
        keep_batch_dim=False,
    )
    assert optimizer.sensitivity == 0.7
    optimizer.backward(*batch, is_padding=is_padding)
    total = torch.cat([total.flatten() for total in optimizer.clipped_sums.values()])
    optimizer.zero_grad()
    return total


def by_hand(model: nn.Module, x: Tensor, y: Tensor, users: list[list[int]]) -> list[Tensor]:
    """Return the clipped sum by hand, in which the gradient of each user's mean loss is clipped as a whole."""
    clipped = []
    for samples in users:
        loss = (model(x[samples]) - y[samples]).square().mean(-1).mean()
        gradient = torch.cat(
            [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
        )
        clipped.append(gradient * min(1.0, 0.7 / float(gradient.norm())))
    return clipped


def some_data() -> TensorDataset:
    generator = seeded(5)
    x = torch.randn(10, 3, dtype=torch.float64, generator=generator)
    x[::2] *= 30  # some users are clipped, others are not
    return TensorDataset(x, torch.randn(10, 1, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("options", [{}, {"samples_per_user": 2}])
@pytest.mark.parametrize("pad", [False, True])
def test_the_sum_is_that_of_users_clipped_by_hand(options: Any, pad: bool) -> None:
    model, data = make_model(), some_data()
    x, y = data.tensors
    settings = {**options, "sample_rate": 0.4, "max_users": 3, "steps": 12}
    drawn = list(UserSampler(IDS, **settings, generator=seeded(6)))
    loader = user_loader(data, IDS, **settings, pad=pad, generator=seeded(6))
    norms = []
    for batch, users in zip(loader, drawn, strict=True):
        total = clipped_sum(model, *batch) if pad else clipped_sum(model, batch)
        parts = by_hand(model, x, y, users)
        norms += [float(part.norm()) for part in parts]
        wanted = sum(parts, torch.zeros_like(total))
        assert torch.allclose(total, wanted, rtol=1e-9, atol=1e-12)
    assert min(norms) < 0.69 < max(norms) <= 0.7 * (1 + 1e-12)


@pytest.mark.parametrize("user", range(4))
def test_a_whole_user_moves_the_sum_by_at_most_the_clipping_norm(user: int) -> None:
    model, data = make_model(), some_data()
    x, y = data.tensors
    y[OF_USER[user]] += 1e3  # all its gradients are large, in nearly the same direction
    kept = [i for i, other in enumerate(IDS) if other != user]
    without = TensorDataset(x[kept], y[kept])
    full = next(iter(user_loader(data, IDS, sample_rate=1.0, steps=1)))
    less = next(iter(user_loader(without, [IDS[i] for i in kept], sample_rate=1.0, steps=1)))
    assert (len(full[0]), len(less[0])) == (4, 3)
    moved = (clipped_sum(model, full) - clipped_sum(model, less)).norm()
    assert 0.1 < moved <= 0.7 * (1 + 1e-9)
    # Clipped per sample, as without users, a user moves it by more: for each sample once.
    if len(OF_USER[user]) > 1:
        by_sample = by_hand(model, x, y, [[i] for i in OF_USER[user]])
        assert sum(by_sample, torch.zeros_like(by_sample[0])).norm() > 0.7


def test_what_fills_up_a_users_places_is_left_out() -> None:
    model, data = make_model(), some_data()
    x, y, present = next(iter(user_loader(data, IDS, sample_rate=1.0, steps=1)))
    assert not present.all()
    before = clipped_sum(model, (x, y, present))
    x[~present] = 100.0
    assert torch.equal(clipped_sum(model, (x, y, present)), before)
    y[present] += 1
    assert not torch.equal(clipped_sum(model, (x, y, present)), before)
