"""Check the settings of a plan: refuse numbers out of range, and settings that exclude each other."""

from __future__ import annotations

import math

from clipgrad import _validate
from clipgrad.clipping import Relation


def refuse_contradictions(
    *,
    num_samples: int,
    expected_batch_size: float,
    max_batch_size: int | None,
    shuffled: bool,
    relation: Relation,
    accountant: str,
    grid: float | None,
) -> None:
    """Raise ``ValueError`` for settings that exclude each other, or that no accountant covers together."""
    if grid is not None and accountant != "rdp_integer":
        raise ValueError(
            f"grid={grid} has discrete Gaussian noise, for which accountant {accountant!r} is not "
            "proven; use accountant='rdp_integer' (docs/exact.md)."
        )
    if grid is not None and max_batch_size is not None:
        raise ValueError(
            f"max_batch_size={max_batch_size} cannot be accounted for with a grid; leave one of them out."
        )
    sampled = not shuffled and expected_batch_size < num_samples
    if grid is not None and sampled and relation is Relation.REPLACE_ONE:
        raise ValueError(
            "relation 'replace_one' under Poisson sampling cannot be accounted for with a grid; use "
            "'add_or_remove_one' or 'replace_special'."
        )
    if not shuffled:
        return
    if max_batch_size is not None:
        raise ValueError(
            f"max_batch_size={max_batch_size} cuts Poisson batches, but shuffled=True has batches of a fixed "
            "size; leave one of them out."
        )
    if expected_batch_size != math.floor(expected_batch_size):
        raise ValueError(
            f"expected_batch_size must be a whole number with shuffled=True, got {expected_batch_size}."
        )
    if relation is Relation.ADD_OR_REMOVE_ONE:
        raise ValueError(
            "shuffled=True excludes relation 'add_or_remove_one': an additional sample moves samples to other batches, "
            "so the batches of neighbouring datasets differ in more than that sample. Use relation 'replace_one' or "
            "'replace_special', or Poisson batches (shuffled=False), which also amplify privacy."
        )


def require_count(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be an integer, at least 1, got {value!r}.")


def steps_of(
    steps: int | None, epochs: float | None, num_samples: int, expected_batch_size: float
) -> int:
    """Return the number of steps, given directly or computed from ``epochs``."""
    if (steps is None) == (epochs is None):
        raise ValueError(
            f"steps and epochs are {steps} and {epochs}; give exactly one of them, the other follows."
        )
    if steps is not None:
        return steps
    samples = _validate.positive("epochs", epochs) * num_samples  # type: ignore[arg-type]
    if math.isinf(samples):
        raise ValueError(f"epochs must be finite, got {epochs}.")
    return max(1, round(samples / _validate.positive("expected_batch_size", expected_batch_size)))
