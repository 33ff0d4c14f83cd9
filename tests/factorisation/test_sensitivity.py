"""Compare sensitivities with every set of steps that may use one sample, on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from clipgrad.factorisation.buffered import BufferedToeplitz
from clipgrad.factorisation.optimise import optimised
from clipgrad.factorisation.sensitivity import separated
from clipgrad.factorisation.toeplitz import column_norm, square_root
from tests.factorisation.oracle import cyclic_sets, matrix, most, separated_sets

STEPS = 9
COLUMNS = {
    "one": np.ones(1),
    "root 2": square_root(2),
    "root 4": square_root(4),
    "root": square_root(STEPS),
    "optimised": optimised(3, STEPS),
    "signs": np.array([1.0, -0.7, 0.4]),
    "rising": np.array([1.0, 0.2, 0.9]),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("separation", range(1, STEPS + 1))
def test_separated_steps(name: str, separation: int) -> None:
    column = COLUMNS[name]
    worst = most(matrix(column, STEPS), separated_sets(STEPS, separation))
    unproven = (column < 0).any() or (np.diff(column) > 0).any()
    if unproven and separation < len(column):
        with pytest.raises(ValueError, match=f"Use at most {separation} bands"):
            separated(column, steps=STEPS, separation=separation)
        return
    found = separated(column, steps=STEPS, separation=separation)
    assert found >= worst - 1e-12
    # Whole columns are counted where they have no row in common, but the run's end may cut the last one.
    cut = separation >= len(column) and (STEPS - 1) % separation < len(column) - 1
    assert cut or found == pytest.approx(worst, rel=1e-12)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_group_takes_part_in_blocks_that_share_no_row(name: str) -> None:
    column = COLUMNS[name]
    strategy = matrix(column, STEPS)
    gram = strategy.T @ strategy
    for chosen in cyclic_sets(STEPS, len(column)):
        assert all(gram[i, j] == 0.0 for i, j in itertools.combinations(chosen, 2))
    # Each block is one Gaussian mechanism of at most this sensitivity, and there are ceil(steps / bands) of them.
    assert np.linalg.norm(strategy, axis=0).max() == pytest.approx(column_norm(column), rel=1e-12)
    rounds = -(-STEPS // len(column))
    assert max(map(len, cyclic_sets(STEPS, len(column)))) == rounds
    worst = most(strategy, cyclic_sets(STEPS, len(column)))
    assert worst <= column_norm(column) * np.sqrt(rounds) + 1e-12


def test_a_turn_too_early_costs_more() -> None:
    """A sampler that uses a sample again too early exceeds the sensitivity."""
    column = square_root(4)
    strategy = matrix(column, STEPS)
    allowed = most(strategy, cyclic_sets(STEPS, 4))
    assert most(strategy, separated_sets(STEPS, 3)) > 1.15 * allowed


def test_random_rows_never_reach_beyond() -> None:
    generator = np.random.default_rng(0)
    for name, separation in [("root 4", 4), ("root 4", 2), ("root", 3), ("signs", 3)]:
        column = COLUMNS[name]
        bound = separated(column, steps=STEPS, separation=separation)
        strategy = matrix(column, STEPS)
        sets = list(separated_sets(STEPS, separation))
        for _ in range(300):
            rows = np.zeros((STEPS, 2))
            chosen = list(sets[generator.integers(len(sets))])
            drawn = generator.standard_normal((len(chosen), 2))
            rows[chosen] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
            assert np.linalg.norm(strategy @ rows) <= bound + 1e-12


@pytest.mark.parametrize(("steps", "separation"), [(9, 3), (9, 4), (8, 2), (9, 1), (9, 9)])
def test_passes_of_a_matrix_without_bands_cost_what_is_counted(steps: int, separation: int) -> None:
    """A run that ends at any step costs at most one mechanism of the noise's scale for each begun pass."""
    found = BufferedToeplitz(2).strategy(steps, separation)
    strategy = matrix(found.column, steps)
    quotients = []
    for end in range(1, steps + 1):
        passes = -(-end // separation)
        worst = most(strategy[:end, :end], separated_sets(end, separation))
        quotients.append(worst / np.sqrt(passes))
    assert max(quotients) <= found.scale + 1e-12
    assert max(quotients) == pytest.approx(found.scale, rel=1e-9)
    # Where columns overlap, the norm of one column is too small.
    overlap = separation < steps and found.column[separation] > 0.05
    assert not overlap or found.scale > column_norm(np.array(found.column)) * 1.001
