"""Test checkpoints in the middle of an iteration: no batch is lost or counted twice, also with workers."""

import pickle
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from clipgrad.sampling import PrivateLoader, poisson_loader, user_loader
from tests.dp_tools import through_a_file
from tests.sampling.checks import seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
STEPS = 9


def loader(num_workers: int, seed: int | None = None, **options: Any) -> PrivateLoader:
    return poisson_loader(
        TensorDataset(torch.arange(60)),
        sample_rate=0.3,
        steps=STEPS,
        num_workers=num_workers,
        generator=None if seed is None else seeded(seed),
        **options,
    )


def users(num_workers: int, seed: int | None = None) -> PrivateLoader:
    return user_loader(
        TensorDataset(torch.arange(60)),
        [i % 20 for i in range(60)],
        sample_rate=0.3,
        samples_per_user=2,
        steps=STEPS,
        num_workers=num_workers,
        generator=None if seed is None else seeded(seed),
    )


def interrupted(made: PrivateLoader, after: int) -> tuple[list[Any], Any]:
    """Return the first batches, and a checkpoint that is saved while the loop holds the last of them."""
    batches = []
    for batch in made:
        batches.append(batch)
        if len(batches) == after:
            break
    return batches, through_a_file(made.state_dict())


@pytest.mark.parametrize("make", [loader, users])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_rest_of_the_iteration_follows(make: Any, num_workers: int) -> None:
    made = make(num_workers)
    _, state = interrupted(made, after=4)
    assert state["done"] == 4
    if num_workers:  # Workers sample batches ahead of the loop.
        assert made.batch_sampler.state_dict()["done"] != 4
    restored = make(num_workers)
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert [len(list(restored)), len(list(restored))] == [STEPS - 4, STEPS]


@pytest.mark.parametrize("make", [loader, users])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_seeded_iteration_continues_exactly(make: Any, num_workers: int) -> None:
    whole = make(0, seed=1)
    expected = [*whole, *whole]
    batches, state = interrupted(make(num_workers, seed=1), after=3)
    restored = make(num_workers, seed=7)
    restored.load_state_dict(state)
    batches += [*restored, *restored]
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def test_one_loader_over_several_iterations() -> None:
    """An iteration may break off, and a state may be loaded into a loader with persistent workers."""
    made = loader(2, persistent_workers=True)
    assert made.state_dict()["done"] == 0
    assert len(list(made)) == STEPS
    assert made.state_dict()["done"] == 0  # the next iteration begins
    _, state = interrupted(made, after=5)
    # An iteration begins at the start unless a state was loaded. Batches sampled ahead are discarded.
    assert [made.state_dict()["done"] for _ in made] == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    made.load_state_dict(state)
    assert made.state_dict()["done"] == 5
    assert [made.state_dict()["done"] for _ in made] == [6, 7, 8, 0]


def test_the_position_moves_with_the_loop_alone() -> None:
    made = loader(0)
    iteration = iter(made)
    assert made.state_dict()["done"] == 0
    next(iteration)
    assert made.state_dict()["done"] == 1
    assert len(made) == len(made.batch_sampler) == STEPS
    assert isinstance(made.dataset, TensorDataset)


def test_the_samplers_state_loads_too() -> None:
    made = loader(0)
    _, state = interrupted(made, after=2)
    assert made.batch_sampler.state_dict() == state
    with pytest.raises(ValueError, match="2 batches into an iteration, but steps is 1"):
        poisson_loader(TensorDataset(torch.arange(3)), sample_rate=0.5, steps=1).load_state_dict(
            state
        )


@pytest.mark.parametrize("make", [loader, users])
def test_what_a_spawned_worker_gets_can_be_pickled(make: Any) -> None:
    inner = make(0)._loader
    dataset, collate = pickle.loads(pickle.dumps((inner.dataset, inner.collate_fn)))
    indices = next(batch for batch in make(0).batch_sampler if batch)
    assert len(collate([dataset[i] for i in indices])[0]) == len(indices)
