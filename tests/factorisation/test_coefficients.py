"""Compare coefficients of banded Toeplitz matrices with dense matrices in float64."""

from __future__ import annotations

import sys
from math import comb
from typing import Any

import numpy as np
import pytest

from clipgrad.factorisation import BandedFactorisation, BufferedToeplitz
from clipgrad.factorisation.buffered import _inverse_of
from clipgrad.factorisation.optimise import _found, _log_error, is_stable, optimised
from clipgrad.factorisation.toeplitz import (
    column_norm,
    inverse,
    prefix_sum_error,
    prefix_sum_norm,
    square_root,
)
from tests.factorisation.oracle import matrix

COLUMNS = [[1.0], [1.0, 0.5], [1.0, 0.9, 0.3], [1.0, -0.4, 0.2, 0.1], square_root(6).tolist()]


def test_the_square_root_is_one() -> None:
    root = matrix(square_root(30), 30)
    assert np.abs(root @ root - np.tril(np.ones((30, 30)))).max() < 1e-12
    exact = [comb(2 * i, i) / 4**i for i in range(30)]
    assert np.abs(square_root(30) - exact).max() < 1e-15


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("size", [1, 2, 3, 17])
def test_inverse_and_error_are_those_of_the_dense_matrix(column: list[float], size: int) -> None:
    cut = np.array(column[:size])
    strategy = matrix(cut, size)
    inverted = np.linalg.inv(strategy)
    assert np.abs(inverse(cut, size) - inverted[:, 0]).max() < 1e-12
    sums = np.tril(np.ones((size, size))) @ inverted
    norms = np.linalg.norm(strategy, axis=0)
    assert column_norm(cut) == pytest.approx(norms.max(), rel=1e-12)
    expected = norms.max() * np.linalg.norm(sums) / np.sqrt(size)
    assert prefix_sum_error(cut, size) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("bands", "steps"), [(2, 20), (4, 33), (16, 300), (5, 5)])
def test_the_search_ends_where_nothing_near_is_better(bands: int, steps: int) -> None:
    found = optimised(bands, steps)
    best = prefix_sum_error(found, steps)
    assert found[0] == 1.0
    assert is_stable(found)
    assert best < prefix_sum_error(square_root(bands), steps)
    generator = np.random.default_rng(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            other = found.copy()
            other[1:] += size * generator.standard_normal(bands - 1)
            assert prefix_sum_error(other, steps) > best * (1 - 1e-6)


@pytest.mark.parametrize("bands", [48, 64, 96])
def test_the_search_may_try_what_is_unstable(bands: int) -> None:
    """The search must not warn of an overflow, since warnings are errors in tests."""
    found = optimised(bands, 1000)
    assert prefix_sum_error(found, 1000) < prefix_sum_error(square_root(bands), 1000)
    value, slope = _log_error(np.full(3, 5.0), 2000)
    assert value > 1e90
    assert not slope.any()


def test_one_band_is_independent_noise() -> None:
    for kind in ("square_root", "optimised"):
        assert BandedFactorisation(1, kind).first_column(100).tolist() == [1.0]


def test_no_more_bands_than_steps() -> None:
    assert len(BandedFactorisation(9, "square_root").first_column(4)) == 4
    assert len(BandedFactorisation(9, "optimised").first_column(4)) == 4


def test_roots_tell_whether_rounding_errors_grow() -> None:
    assert is_stable(np.array([1.0, 0.9]))
    assert not is_stable(np.array([1.0, 1.1]))
    for column in ([1.0, 0.9], [1.0, 1.1], [1.0, -0.4, 0.2, 0.1], [1.0, 0.5, 2.0]):
        decays = np.abs(inverse(np.array(column), 400)[-5:]).max() < 1e-3
        assert is_stable(np.array(column)) == decays


@pytest.mark.parametrize("bands", [0, -1, 2.0, True, "all", None])
def test_bands_that_are_none(bands: Any) -> None:
    with pytest.raises(ValueError, match="bands must be an integer, at least 1, or 'auto'"):
        BandedFactorisation(bands)


def test_other_arguments_that_are_none() -> None:
    with pytest.raises(ValueError, match="coefficients must be one of"):
        BandedFactorisation(2, "best")
    with pytest.raises(ValueError, match=r"Use PrivacyPlan\.for_epsilon"):
        BandedFactorisation().count()


@pytest.mark.parametrize(("steps", "separation"), [(40, 10), (60, 7), (30, 30), (5, 1)])
def test_buffers_find_a_good_matrix(steps: int, separation: int) -> None:
    found = BufferedToeplitz(2).strategy(steps, separation)
    column = np.array(found.column)
    assert len(column) == steps
    assert (column > 0).all()
    assert (np.diff(column) <= 0).all()
    error = found.scale * prefix_sum_norm(column, steps)
    assert error <= prefix_sum_error(np.ones(1), steps) * (1 + 1e-3)  # independent noise
    if separation >= 10:
        assert error < 1.2 * prefix_sum_error(optimised(min(10, separation), steps), steps)
    one = BufferedToeplitz(1).strategy(steps, separation)
    assert error <= 1.001 * one.scale * prefix_sum_norm(np.array(one.column), steps)
    weights, decays = map(np.array, (found.weights, found.decays))
    product, total = _inverse_of(weights, decays)
    # product / total is the inverse of C, as a power series.
    assert (
        np.abs(np.convolve(total, inverse(column, steps))[:steps][: len(product)] - product).max()
        < 1e-12
    )


@pytest.mark.parametrize("buffers", [0, 5, 2.0, True, None])
def test_buffers_that_are_none(buffers: Any) -> None:
    with pytest.raises(ValueError, match="buffers must be an integer from 1 to 4"):
        BufferedToeplitz(buffers)


def test_without_scipy_the_closed_form_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _found.cache_clear()
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="coefficients='square_root'"):
        optimised(3, 10)
    assert BandedFactorisation(3, "square_root").first_column(10)[1] == 0.5
