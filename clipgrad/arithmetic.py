"""The arithmetic of clipped sums and noise: floating point here, integers on a grid in ``clipgrad.exact``."""

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
"""From gradients ``[B, *shape]`` and padding to sums, norms ``[B]`` of each group, and dropped samples ``[B]``."""


class Arithmetic(Protocol):
    """What differs between floating-point sums and sums on a grid.

    Attributes:
        adapts: Whether the clipping norm may depend on noised counts (``AdaptiveQuantile``).
    """

    adapts: bool

    def check(self, strategy: ClippingStrategy) -> Clipping:
        """Refuse a clipping norm out of range; the clipping without its parameters."""
        ...

    def check_batch_size(self, size: int) -> None:
        """Refuse a batch whose sum this arithmetic cannot hold."""
        ...

    def check_noise(self, clipping: Clipping, sizes: Sequence[int], sigma: float) -> None:
        """Refuse noise, or parameters of these sizes, that do not fit."""
        ...

    def clipping(
        self,
        strategy: ClippingStrategy,
        names: Sequence[str],
        sizes: Sequence[int],
        dtypes: Sequence[torch.dtype],
    ) -> Clipping:
        """The clipping of parameters with these names, sizes and dtypes."""
        ...

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the sum for a parameter of ``dtype``."""
        ...

    def rows_at_once(self, size: int) -> int:
        """How many samples of a batch of ``size`` pass together."""
        ...

    def samples(self, batch: Sequence[Any]) -> Sequence[Any]:
        """The leaves of a microbatch, in the memory in which they are computed."""
        ...

    def sum_rows(self, clipping: Clipping, sizes: tuple[int, ...]) -> SumRows | None:
        """Clips and sums per-sample gradients; None if rules may do it without them."""
        ...

    def sensitivity(self, strategy: ClippingStrategy, relation: Relation) -> float:
        """The largest L2 change of the sum between neighbouring batches."""
        ...

    def sigma(self, noise_multiplier: float, sensitivity: float) -> float:
        """The standard deviation of the noise on the sum."""
        ...

    def noise_source(self, source: NoiseSource | None, expected_batch_size: float) -> NoiseSource:
        """The source that was asked for, or the default."""
        ...


class FloatingPoint:
    """Sums in at least float32, made by the rules.

    Args:
        options: Of the user.
    """

    adapts = True

    def __init__(self, options: Options) -> None:
        self._options = options

    def check(self, strategy: ClippingStrategy) -> Clipping:
        return make_clipping(strategy, rescale=self._options.rescale_to_unit_norm)

    def check_batch_size(self, size: int) -> None:
        """Any size fits."""

    def check_noise(self, clipping: Clipping, sizes: Sequence[int], sigma: float) -> None:
        """Any noise fits."""

    def clipping(
        self,
        strategy: ClippingStrategy,
        names: Sequence[str],
        sizes: Sequence[int],
        dtypes: Sequence[torch.dtype],
    ) -> Clipping:
        rescale = self._options.rescale_to_unit_norm
        clipping = make_clipping(strategy, names, sizes, rescale=rescale)
        refuse_tiny_norms(clipping, dtypes)
        return clipping

    def sum_dtype(self, dtype: torch.dtype) -> torch.dtype:
        asked = self._options.performance.accumulate_dtype
        return asked or torch.promote_types(dtype, torch.float32)

    def rows_at_once(self, size: int) -> int:
        return self._options.microbatch_size or size

    def samples(self, batch: Sequence[Any]) -> Sequence[Any]:
        return batch

    def sum_rows(self, clipping: Clipping, sizes: tuple[int, ...]) -> None:
        return None

    def sensitivity(self, strategy: ClippingStrategy, relation: Relation) -> float:
        options = self._options
        return sensitivity(
            self.check(strategy),
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
