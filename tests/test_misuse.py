"""What a plan would tell, and what would hold, if a loop fed it with what it does not account for.

``docs/guarantees.md`` shows the table, and ``tests/test_receipts.py`` that each row is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from dp_accounting.pld import privacy_loss_distribution as distributions

from clipgrad import PrivacyPlan
from clipgrad.accounting import FixedSize, FullBatch, Poisson, Sampling, epsilon

PLAN = PrivacyPlan(
    num_samples=10_000, expected_batch_size=100, steps=400, delta=1e-5, noise_multiplier=1.0
)
RATE, STEPS = PLAN.sample_rate, PLAN.steps


def holds(sampling: Sampling, *, noise: float = 1.0, steps: int = STEPS) -> float:
    replaced = isinstance(sampling, FixedSize)
    return epsilon(
        noise_multiplier=noise,
        sampling=sampling,
        steps=steps,
        delta=PLAN.delta,
        relation="replace_special" if replaced else "add_or_remove_one",
    )


def two_batches_added_up() -> float:
    """A sample is in none, one or both of two batches, and moves their sum by as many clipping norms."""
    chances = [(1 - RATE) ** 2, 2 * RATE * (1 - RATE), RATE**2]
    one = distributions.from_mixture_gaussian_mechanism(
        1.0, [0, 1, 2], chances, value_discretization_interval=1e-3
    )
    return float(one.self_compose(STEPS // 2).get_epsilon_for_delta(PLAN.delta))


# Name -> after how many steps an epsilon would be told, and the epsilon that would hold.
ROWS: dict[str, tuple[int, Callable[[], float]]] = {
    "two batches of the loader in one step": (STEPS // 2, two_batches_added_up),
    "one batch in two steps": (
        STEPS,
        lambda: holds(Poisson(RATE), noise=math.sqrt(0.5), steps=STEPS // 2),
    ),
    "two optimizers on each batch": (STEPS, lambda: holds(Poisson(RATE), noise=math.sqrt(0.5))),
    "an ordinary shuffled loader": (STEPS, lambda: holds(FixedSize(10_000, 100))),
    "batches of all rows": (STEPS, lambda: holds(FullBatch())),
    "1000 rows where 100 are expected": (STEPS, lambda: holds(Poisson(10 * RATE))),
    "a ledger that is set back after half of the steps": (STEPS // 2, PLAN.epsilon),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_page_shows_what_is_computed(name: str) -> None:
    steps, held = ROWS[name]
    told, true = PLAN.epsilon(steps), held()
    assert told < true
    page = (Path(__file__).parents[1] / "docs/guarantees.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {re.escape(name)} \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert row is not None, f"| {name} | {told:.2f} | {true:.2f} |"
    assert [float(number) for number in row.groups()] == pytest.approx([told, true], abs=0.006)
