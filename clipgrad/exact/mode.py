"""This module holds ``GridArithmetic``: all that exact mode does differently from floating point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clipgrad.clipping import (
    Clipping,
    ClippingStrategy,
    Relation,
    make_clipping,
    refuse_tiny_norms,
)
from clipgrad.exact.grid import Grid, check_grid, exact_sensitivity, exact_sigma
from clipgrad.exact.noise import DiscreteGaussianNoise, whole_steps
from clipgrad.noise import NoiseSource
from clipgrad.options import Options

_MOST_SAMPLES = 2**26


class GridArithmetic:
    """This arithmetic makes sums that are integer multiples of ``grid``; see ``clipgrad.arithmetic.Arithmetic``."""

    allows_adaptive_norms = False

    def __init__(self, grid: float, options: Options) -> None:
        self.grid = grid
        _check_options(options)

    def check_batch_size(self, size: int) -> None:
        _check_samples(size, "batch size")

    def check_noise(self, clipping: Clipping, sizes: Sequence[int], sigma: float) -> None:
        Grid(self.grid, clipping, tuple(sizes))
        if sigma > 0:
            whole_steps(sigma, self.grid)

    def clipping(
        self,
        strategy: ClippingStrategy,
        names: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        dtypes: Sequence[torch.dtype] = (),
    ) -> Clipping:
        clipping = make_clipping(strategy, names, sizes)
        check_grid(self.grid, clipping, strategy)
        refuse_tiny_norms(clipping, dtypes)
        return clipping

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64

    def rows_at_once(self, size: int) -> int:
        return 1

    def samples(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Return copies of one sample's leaves, contiguous and aligned like every other sample's.

        Matrix products round differently for other batch sizes, and some for other alignments. So each sample runs
        alone and in new memory, and its gradient does not depend on the other samples of the batch.
        """
        return [
            leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf
            for leaf in batch
        ]

    def sum_rows(self, clipping: Clipping, sizes: tuple[int, ...]) -> Any:
        return Grid(self.grid, clipping, sizes).clip

    def sensitivity(self, strategy: ClippingStrategy, relation: Relation) -> float:
        return exact_sensitivity(self.clipping(strategy), relation)

    def sigma(self, noise_multiplier: float, sensitivity: float) -> float:
        return exact_sigma(noise_multiplier, sensitivity)

    def noise_source(self, source: NoiseSource | None, expected_batch_size: float) -> NoiseSource:
        """Return the noise source for sums on the grid; noise of another grid, or of none, would leave the grid."""
        _check_samples(2 * expected_batch_size, "twice the expected_batch_size")
        if source is None:
            return DiscreteGaussianNoise(self.grid)
        if isinstance(source, DiscreteGaussianNoise) and source.grid == self.grid:
            return source
        raise ValueError(
            f"grid={self.grid} needs noise on the same grid, got noise={source!r}; leave it out, or pass "
            f"DiscreteGaussianNoise({self.grid})."
        )


def _check_samples(count: float, what: str) -> None:
    """Refuse a logical batch whose sums could exceed the range of exact integers."""
    if count > _MOST_SAMPLES:
        raise ValueError(
            f"{what}={count} is more than the 2**26 samples whose sum on a grid is certain to be exact."
        )


def _check_options(options: Options) -> None:
    """Refuse options that prevent exact sums."""
    dtype = options.performance.accumulate_dtype
    refused = (
        (options.normalize_by != 1.0, f"normalize_by={options.normalize_by}", "divide after the noise was added"),
        (dtype not in (None, torch.float64), f"accumulate_dtype={dtype}", "leave it out: sums on a grid are float64"),
        (not options.nan_safe, "nan_safe=False", "leave it out: a grid has no place for NaN"),
        (bool(options.compile), f"compile={options.compile!r}", "leave it out: each sample is computed alone"),
    )  # fmt: skip
    for given, option, remedy in refused:
        if given:
            raise ValueError(f"grid cannot be combined with {option}; {remedy}.")
