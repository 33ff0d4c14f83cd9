"""Check the samplers' arguments; messages name the argument, its value and the remedy."""

from __future__ import annotations

import numbers
from collections.abc import Sized

from torch.utils.data import DataLoader

from clipgrad.ranks import world


def count(name: str, value: object, *, most: int | None = None) -> int:
    """Return an integer of at least 1, and at most ``most``."""
    number = integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}.")
    return number


def integer(name: str, value: object) -> int:
    """Return an integer; the value may have an integer type of any library, but not bool."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    return int(value)


def within(name: str, value: object, most: int) -> float:
    """Return a real number in ``(0, most]``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r}.")
    number = float(value)
    if not 0.0 < number <= most:
        raise ValueError(f"{name} must be positive and at most {most}, got {value}.")
    return number


def share(size: int, rank: object, num_replicas: object) -> range:
    """Return the part of ``range(size)`` that belongs to a rank: every ``num_replicas``-th, or all without ranks."""
    if rank is None and num_replicas is None:
        rank, num_replicas = world()
    if rank is None or num_replicas is None:
        raise ValueError(
            f"rank and num_replicas are {rank} and {num_replicas}; give both, such as "
            "torch.distributed.get_rank() and get_world_size(), or neither."
        )
    replicas = count("num_replicas", num_replicas)
    number = integer("rank", rank)
    if not 0 <= number < replicas:
        raise ValueError(
            f"rank must be at least 0 and less than num_replicas = {replicas}, got {number}."
        )
    return range(number, size, replicas)


def length(dataset: object) -> int:
    """Return the number of samples of a map-style dataset."""
    if isinstance(dataset, DataLoader):
        raise TypeError(
            "dataset is a DataLoader, whose items are batches. Pass what it loads, loader.dataset, and what matters of "
            "its settings: collate_fn=loader.collate_fn, num_workers. The loader of clipgrad replaces it."
        )
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"dataset must have a length, got {type(dataset).__name__}; use a map-style dataset, "
            "whose samples can be read by index. For a stream, make its batches yourself, and say how in the plan: "
            "PrivacyPlan(declared_sampling='...') (docs/sampling.md)."
        )
    return len(dataset)
