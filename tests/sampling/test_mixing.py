"""Loaders refuse collate functions that put several samples into one row, and accept all others."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from clipgrad import PrivacyPlan, poisson_loader, shuffled_loader, user_loader
from tests.nightly import chosen

COUNT = 9
Collate = Callable[[list[Any]], Any]
MIXING: dict[str, Collate] = {}
HARMLESS: dict[str, Collate] = {}


def mixing(collate: Collate) -> Collate:
    MIXING[collate.__name__] = collate
    return collate


def harmless(collate: Collate) -> Collate:
    HARMLESS[collate.__name__] = collate
    return collate


@mixing
def mixup_by_roll(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    part = 0.1 + 0.8 * float(torch.rand(()))
    return part * x + (1 - part) * x.roll(1, 0), y


@mixing
def mixup_by_permutation(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    part = random.uniform(0.1, 0.9)
    return part * x + (1 - part) * x[torch.randperm(len(x))], y


@mixing
def mixup_of_labels(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    hot = torch.nn.functional.one_hot(y, COUNT).double()
    return x, 0.7 * hot + 0.3 * hot.flip(0)


@mixing
def cutmix(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    x[:, 2:] = x.flip(0)[:, 2:]
    return x, y


@mixing
def standardised(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return (x - x.mean(0)) / (1 + x.std(0)), y


@mixing
def weights_of_classes(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x, y, 1.0 / y.bincount()[y]


@mixing
def in_a_dictionary(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"inner": {"x": x.cumsum(0)}, "y": y}


@harmless
def masked(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x * (torch.rand_like(x) > 0.5), y


@harmless
def sorted_by_label(rows: list[Any]) -> Any:
    return default_collate(sorted(rows, key=lambda row: -row[1]))


@harmless
def padded_to_the_longest(rows: list[Any]) -> Any:
    texts = [x[: 1 + int(y) % 4] for x, y in rows]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), torch.stack(
        [y for _, y in rows]
    )


@harmless
def numbered(rows: list[Any]) -> Any:
    return (*default_collate(rows), torch.arange(len(rows)))


@harmless
def two_views(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return torch.stack([x, x.flip(1)], 1), y


@harmless
def sometimes_with_lengths(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return (x, y) if len(set(y.tolist())) > 1 else (x, y, torch.ones(len(y)))


@harmless
def complex_(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"z": torch.fft.fft(x), "y": y}


@harmless
def seldom_flipped(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return torch.where(torch.rand(len(x), 1) < 0.02, x.flip(1), x), y


@harmless
def mean_over_the_row(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x - x.mean(1, keepdim=True), y


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(COUNT, 4, generator=generator).double(), torch.arange(COUNT))


def plan_of(**options: Any) -> PrivacyPlan:
    return PrivacyPlan(
        num_samples=COUNT, expected_batch_size=3, steps=2, delta=1e-2, noise_multiplier=1.0, accountant="rdp", **options
    )  # fmt: skip


LOADERS: dict[str, Callable[[Collate], Any]] = {
    "poisson": lambda collate: poisson_loader(data(), plan=plan_of(), collate_fn=collate),
    "poisson without plan": lambda c: poisson_loader(data(), sample_rate=0.5, collate_fn=c),
    "padded": lambda collate: poisson_loader(
        data(), sample_rate=0.5, max_batch_size=4, pad=True, collate_fn=collate
    ),
    "shuffled": lambda collate: shuffled_loader(
        data(), plan=plan_of(shuffled=True, relation="replace_one"), collate_fn=collate
    ),
    "users": lambda collate: user_loader(
        data(), [0, 1, 1, 2, 3, 4, 5, 6, 6], sample_rate=0.5, collate_fn=collate
    ),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", chosen(MIXING, {"mixup_by_permutation", "standardised"}))
def test_mixed_rows_are_refused(name: str, loader: str) -> None:
    with pytest.raises(ValueError, match=f"collate_fn={name} mixes samples"):
        LOADERS[loader](MIXING[name])


@pytest.mark.parametrize("name", HARMLESS)
def test_rows_of_one_sample_are_accepted(name: str) -> None:
    for loader in LOADERS.values():
        with suppress(TypeError):  # a batch without an empty version is refused by its own message
            loader(HARMLESS[name])


def test_the_check_leaves_no_trace() -> None:
    numpy = np.random.mtrand._rand  # the generator behind the functions of np.random
    torch.manual_seed(0)
    random.seed(0)
    numpy.seed(0)
    before = torch.get_rng_state(), random.getstate(), numpy.get_state()[2]

    def draws(rows: list[Any]) -> Any:
        x, y = default_collate(rows)
        if len(rows) == 3:  # the check, and not the inference of an empty batch
            x = x + torch.rand(1) + random.random() + numpy.rand()
        return x, y

    poisson_loader(data(), sample_rate=0.5, collate_fn=draws)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert numpy.get_state()[2] == before[2]


def test_a_mixing_object_is_named_by_its_class() -> None:
    class MixUp:
        def __call__(self, rows: list[Any]) -> Any:
            return mixup_by_roll(rows)

    with pytest.raises(ValueError, match="collate_fn=MixUp mixes"):
        poisson_loader(data(), sample_rate=0.5, collate_fn=MixUp())


def test_rows_without_batches_of_three_are_left_to_the_loader() -> None:
    """Samples whose rows cannot be stacked fail when a batch is made, as they do without the check."""

    class Ragged(Dataset[Tensor]):
        def __len__(self) -> int:
            return COUNT

        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(index + 1)

    poisson_loader(Ragged(), sample_rate=0.5)
