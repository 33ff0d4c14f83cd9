"""This module holds the user's options for clipped sums, and checks each option once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from clipgrad import _validate

RANDOMNESS = ("different", "same", "error")
STRATEGIES = ("auto", "kept", "ghost")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class Performance:
    """These options change time, memory and rounding of a step, and nothing else.

    Args:
        strategy: ``"auto"`` chooses for each parameter how its norm is computed. ``"kept"`` and ``"ghost"``
            force one strategy where it exists; ``explain`` shows the choice.
        memory_budget: Bytes that kept per-sample gradients may take beyond the activations that they replace.
        randomness: ``"different"`` samples a dropout mask for each sample, ``"same"`` one for the microbatch.
            ``"error"`` refuses a loss that uses random numbers.
        accumulate_dtype: Dtype of the clipped sums. The default is the parameter's dtype, at least float32.
        process_group: The processes that train together, a group of ``torch.distributed``. By default they are all
            processes, if ``init_process_group`` was called. See ``docs/scaling.md``.

    Raises:
        ValueError: If a value is out of range.

    Examples:
        >>> Performance(strategy="ghost").strategy
        'ghost'
    """

    strategy: str = "auto"
    memory_budget: float | None = None
    randomness: str = "different"
    accumulate_dtype: torch.dtype | None = None
    process_group: Any = None

    def __post_init__(self) -> None:
        _validate.one_of("strategy", self.strategy, STRATEGIES)
        budget = self.memory_budget
        if budget is not None and not _validate.number("memory_budget", budget) >= 0:
            raise ValueError(
                f"memory_budget must be a non-negative number of bytes, got {budget!r}."
            )
        _validate.one_of("randomness", self.randomness, RANDOMNESS)
        _validate.accumulate_dtype(self.accumulate_dtype)


@dataclass(frozen=True, kw_only=True)
class Options:
    """This class holds all options of a computation but loss and clipping norm; see ``clipped_grad``.

    Raises:
        ValueError: If a value is out of range, or two options exclude each other.
    """

    # None: whether the loss returns (loss, aux) is found from what it returns.
    has_aux: bool | None = False
    keep_batch_dim: bool = True
    normalize_by: float = 1.0
    pre_clipping_transform: Callable[[Any], Any] | None = None
    microbatch_size: int | str | None = None
    nan_safe: bool = True
    compile: bool | str = False
    grid: float | None = None
    performance: Performance = field(default_factory=Performance)

    def __post_init__(self) -> None:
        for name in ("keep_batch_dim", "nan_safe"):
            _validate.flag(name, getattr(self, name))
        if self.has_aux is not None:
            _validate.flag("has_aux", self.has_aux)
        _validate.positive("normalize_by", self.normalize_by)
        _validate.microbatch_size(self.microbatch_size)
        if self.microbatch_size == "auto" and self.compile is not False:
            raise ValueError(
                "microbatch_size='auto' cannot be combined with compile: a graph is compiled for one size. Run a few "
                "eager steps with 'auto', and set the number that the logger 'clipgrad' reports."
            )
        if not isinstance(self.performance, Performance):
            raise TypeError(
                f"performance must be a clipgrad.Performance, got {self.performance!r}; "
                "clipgrad.Performance(strategy='ghost'), for example."
            )
        if not isinstance(self.compile, bool):
            _validate.one_of("compile", self.compile, COMPILE_MODES)

    @property
    def compile_mode(self) -> str | None:
        """Return the mode of ``torch.compile``; None without compilation."""
        if self.compile is False:
            return None
        return "default" if self.compile is True else str(self.compile)
