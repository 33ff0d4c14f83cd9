"""Test that empty batches of a loader have the shapes and types of full batches."""

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clipgrad.sampling import EmptyBatchCollate, PoissonSampler, poisson_loader
from tests.sampling.checks import seeded


class Pair(NamedTuple):
    image: Tensor
    label: int


class Encoding(UserDict[str, Any]):
    """This class resembles the batches of a Hugging Face tokenizer."""


SAMPLES = {
    "tuple": (torch.ones(3, 4), 7),
    "named tuple": Pair(torch.ones(3, 4, dtype=torch.float16), 7),
    "dict": {"ids": torch.arange(5), "weight": 0.5, "name": "a"},
    "nested": ({"x": [torch.ones(2), (1, True)]}, Pair(torch.ones(1), 3), [torch.ones(())]),
    "tensor": torch.ones(3),
    "number": 3,
}


class Repeated(Dataset[Any]):
    def __init__(self, sample: Any, size: int = 4) -> None:
        self.sample, self.size = sample, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.sample


def check_empty_like(empty: Any, full: Any) -> None:
    assert type(empty) is type(full)
    if isinstance(full, Tensor):
        assert empty.dtype == full.dtype
        assert empty.shape == (0, *full.shape[1:])
    elif isinstance(full, dict):
        assert list(empty) == list(full)
        for key in full:
            check_empty_like(empty[key], full[key])
    elif full and isinstance(full[0], str):
        assert not empty
    else:
        assert len(empty) == len(full)
        for one, other in zip(empty, full, strict=True):
            check_empty_like(one, other)


# PyTorch forks its workers; newer Pythons warn of that in a process with threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", SAMPLES)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_empty_batches_come_through_a_loader(kind: str, num_workers: int) -> None:
    loader = poisson_loader(
        Repeated(SAMPLES[kind]),
        expected_batch_size=0.7,
        steps=20,
        num_workers=num_workers,
        generator=seeded(1),
    )
    sizes = list(map(len, PoissonSampler(4, sample_rate=0.175, steps=20, generator=seeded(1))))
    assert {0, 1, 2} <= set(sizes)
    batches = list(loader)
    assert len(batches) == len(loader) == 20
    full = next(batch for batch, size in zip(batches, sizes, strict=True) if size == 2)
    for batch, size in zip(batches, sizes, strict=True):
        if size == 0:
            check_empty_like(batch, full)


def test_without_it_an_empty_batch_fails() -> None:
    sampler = PoissonSampler(4, sample_rate=1e-9, steps=1)
    with pytest.raises(IndexError):
        list(DataLoader(Repeated(1), batch_sampler=sampler))


def test_other_collates() -> None:
    def padded(samples: list[Tensor]) -> Encoding:
        ids = torch.nn.utils.rnn.pad_sequence(samples, batch_first=True)
        return Encoding(ids=ids, length=ids.shape[1], side="right", nothing=None)

    collate = EmptyBatchCollate(torch.arange(6), padded)
    empty = collate([])
    assert type(empty) is Encoding
    assert (empty["ids"].shape, empty["ids"].dtype) == ((0, 6), torch.int64)
    assert (empty["length"], empty["side"], empty["nothing"]) == (6, "right", None)
    del empty["ids"]  # and the next one is not the worse for it
    assert collate([])["ids"].shape == (0, 6)
    assert collate([torch.arange(2), torch.arange(3)])["ids"].shape == (2, 3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda samples: {"x": torch.zeros(5, 2)}, r"batch\['x'\] a Tensor that does not grow"),
        (lambda samples: (torch.zeros(()),), r"batch\[0\] a Tensor"),
        (lambda samples: torch.zeros(2, len(samples)), "batch a Tensor"),
        (lambda samples: [len(samples)], r"batch\[0\] a int"),
        (lambda samples: object(), "batch a object"),
        (lambda samples: list(range(3 * len(samples))), "batch a list"),
    ],
)
def test_collates_without_a_known_empty_batch(made: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        EmptyBatchCollate(0, made)


def test_poisson_loader_passes_everything_on() -> None:
    data = TensorDataset(torch.arange(50))
    loader = poisson_loader(data, sample_rate=0.5, steps=3, generator=seeded(4))
    expected = list(PoissonSampler(50, sample_rate=0.5, steps=3, generator=seeded(4)))
    assert [batch[0].tolist() for batch in loader] == expected
    with pytest.raises(TypeError, match="dataset must have a length, got Generator"):
        poisson_loader(seeded(0), sample_rate=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        poisson_loader(Repeated(1, size=0), sample_rate=0.5)
