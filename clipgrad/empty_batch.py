"""This module computes what a process contributes when it has no samples: padding, zero sums and metrics of no samples.

A Poisson batch may be empty, and a sharded model's microbatches need all processes, also those without samples.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.engine.batch_loss import LossHistory
from clipgrad.engine.clip_and_sum import Settings
from clipgrad.engine.inputs import Inputs, Loss
from clipgrad.engine.microbatch import forward
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.errors import NotPerSampleError
from clipgrad.result import Outcome

_log = logging.getLogger("clipgrad")


def one_row_of_zeros(inputs: Inputs) -> Inputs:
    """Return inputs whose batch is one sample of zeros."""
    zeros = [
        leaf.new_zeros((1, *leaf.shape[1:])) if isinstance(leaf, Tensor) else leaf
        for leaf in inputs.batch
    ]
    return replace(inputs, batch=zeros, batch_size=1)


def one_row_of_padding(inputs: Inputs) -> Tensor:
    """Return the padding mask of ``one_row_of_zeros``, so that the row contributes exactly nothing."""
    return torch.ones(1, dtype=torch.bool, device=inputs.params[0].device)


def zero_sums(inputs: Inputs, settings: Settings) -> Iterator[Tensor]:
    """Yield the clipped sum of no samples for each parameter."""
    pairs = zip(inputs.params, settings.dtypes, strict=True)
    return (torch.zeros_like(p, dtype=dtype) for p, dtype in pairs)


def outcome_of_no_samples(
    inputs: Inputs, settings: Settings, groups: Sequence[str] | None
) -> Outcome:
    """Return losses, norms and flags of a batch without samples."""
    none = torch.zeros(0, dtype=settings.dtypes[0], device=inputs.params[0].device)
    norms = [none for _ in settings.clipping.groups]
    return Outcome(none, norms, settings.clipping.norms, groups, none.bool(), None, 0)


def without_samples(aux: Any) -> Any:
    """Return auxiliary output of the same structure, for a batch without samples."""
    return tree_map(lambda leaf: leaf[:0].clone(), aux)


def aux_of_no_samples(history: LossHistory, inputs: Inputs, settings: Settings) -> Any:
    """Return the auxiliary output of no samples, whose structure the loss shows on a row of zeros.

    A loss may refuse zeros, and an empty batch must still be a step. ``DPOptimizer`` then assumes that there are no
    metrics, as most losses have none, and logs the reason. ``clipped_grad(has_aux=True)`` cannot assume that.

    Returns:
        The auxiliary output, or None if the loss refuses zeros and may have no auxiliary output.

    Raises:
        NotPerSampleError: If the loss has no gradient for single samples, whatever their values.
        ValueError: If the loss refuses zeros but is known to have auxiliary output.
    """
    row = one_row_of_zeros(inputs)

    def aux_of_row(loss: Loss) -> Any:
        tape, _, aux = forward(loss, inputs.names, inputs.params, row.batch, settings, inputs.whole)
        tape.release()
        return aux

    try:
        with torch.enable_grad(), SavedRngState(inputs.params[0].device).restored_on_exit():
            return without_samples(history.of(row).run(aux_of_row))
    except (NotPerSampleError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        if settings.options.has_aux:
            raise ValueError(
                f"the batch is empty, and the loss raised {found} on a row of zeros, which shows the shapes of its "
                "auxiliary output. Let the loss accept zeros, or call this with a batch that has samples first."
            ) from error
        _log.warning(
            "The batch is empty, and the loss raised %s on a row of zeros, which shows the structure of its metrics. "
            "So backward returns the loss alone; let the loss accept zeros if it returns metrics.",
            found,
        )
        return None
