"""This module says how sums and noise are computed: in floating point here, on a grid in ``clipgrad.exact``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from clipgrad.clipping import (
    Clipping,
    ClippingStrategy,
    Relation,
    make_clipping,
    refuse_tiny_norms,
    sensitivity,
)
from clipgrad.noise import NoiseSource, SystemNoise, gaussian_sigma
from clipgrad.options import Options

SumRows = Callable[[Sequence[Tensor], Tensor | None], tuple[list[Tensor], list[Tensor], Tensor]]
"""A function of gradients ``[B, *shape]`` and padding; returns sums, norms ``[B]`` of each group, dropped samples."""


class Arithmetic(Protocol):
    """This protocol holds all that differs between floating-point sums and sums on a grid.

    Attributes:
        allows_adaptive_norms: Whether the clipping norm may depend on noised counts (``AdaptiveQuantile``).
    """

    allows_adaptive_norms: bool

    def check_batch_size(self, size: int) -> None:
        """Refuse a batch whose sum this arithmetic cannot represent."""
        ...

    def check_noise(self, clipping: Clipping, sizes: Sequence[int], sigma: float) -> None:
        """Refuse noise that this arithmetic cannot add to parameters of these sizes."""
        ...

    def clipping(
        self,
        strategy: ClippingStrategy,
        names: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        dtypes: Sequence[torch.dtype] = (),
    ) -> Clipping:
        """Return the clipping of parameters with these names, sizes and dtypes; None before any parameter is known.

        Raises:
            ValueError: If a norm is out of range.
        """
        ...

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the sum of a parameter of ``dtype``."""
        ...

    def rows_at_once(self, size: int) -> int:
        """Return how many samples of a batch of ``size`` run together."""
        ...

    def samples(self, batch: Sequence[Any]) -> Sequence[Any]:
        """Return the leaves of a microbatch in the memory from which the loss reads them."""
        ...

    def sum_rows(self, clipping: Clipping, sizes: tuple[int, ...]) -> SumRows | None:
        """Return the function that replaces the rules; None if the rules make the sums."""
        ...

    def sensitivity(self, strategy: ClippingStrategy, relation: Relation) -> float:
        """Return the largest L2 change of the sum between neighbouring batches."""
        ...

    def sigma(self, noise_multiplier: float, sensitivity: float) -> float:
        """Return the standard deviation of the noise on the sum."""
        ...

    def noise_source(self, source: NoiseSource | None, expected_batch_size: float) -> NoiseSource:
        """Return the given noise source after a check, or the default source."""
        ...


class FloatingPoint:
    """This arithmetic sums in at least float32, by the rules.

    Args:
        options: The user's options.
    """

    allows_adaptive_norms = True

    def __init__(self, options: Options) -> None:
        self._options = options

    def check_batch_size(self, size: int) -> None:
        """Accept every size."""

    def check_noise(self, clipping: Clipping, sizes: Sequence[int], sigma: float) -> None:
        """Accept all noise."""

    def clipping(
        self,
        strategy: ClippingStrategy,
        names: Sequence[str] | None = None,
        sizes: Sequence[int] | None = None,
        dtypes: Sequence[torch.dtype] = (),
    ) -> Clipping:
        clipping = make_clipping(strategy, names, sizes)
        refuse_tiny_norms(clipping, dtypes)
        return clipping

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        requested = self._options.performance.accumulate_dtype
        return requested or torch.promote_types(dtype, torch.float32)

    def rows_at_once(self, size: int) -> int:
        rows = self._options.microbatch_size
        return rows if isinstance(rows, int) else size

    def samples(self, batch: Sequence[Any]) -> Sequence[Any]:
        return batch

    def sum_rows(self, clipping: Clipping, sizes: tuple[int, ...]) -> None:
        return None

    def sensitivity(self, strategy: ClippingStrategy, relation: Relation) -> float:
        options = self._options
        return sensitivity(
            self.clipping(strategy),
            relation,
            normalize_by=options.normalize_by,
            nan_safe=options.nan_safe,
        )

    def sigma(self, noise_multiplier: float, sensitivity: float) -> float:
        return gaussian_sigma(noise_multiplier=noise_multiplier, sensitivity=sensitivity)

    def noise_source(self, source: NoiseSource | None, expected_batch_size: float) -> NoiseSource:
        if source is None:
            return SystemNoise()
        if getattr(source, "grid", None) is not None:
            raise ValueError(
                f"noise={source!r}: noise on a grid needs sums on it, and these are floating point. Pass it to a new "
                "DPOptimizer as noise=, or give the plan a grid."
            )
        return source
