"""This module runs the user's Python on one sample after the other, with ordinary autograd alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings, clip, joined
from clipgrad.engine.gradients import Gradients
from clipgrad.engine.inputs import Inputs, SampleCall
from clipgrad.engine.microbatch import value_and_aux
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.engine.tape import Tape


class _MeaninglessError(Exception):
    """This error says that gradients found sample by sample would mean nothing."""


def run_sample_loop(
    inputs: Inputs, batch: Sequence[Any], is_padding: Tensor | None, settings: Settings
) -> MicrobatchResult | None:
    """Compute clipped sums of a microbatch from gradients that ``torch.autograd.grad`` finds sample by sample.

    Args:
        inputs: The arguments of the call.
        batch: Rows of one microbatch.
        is_padding: Boolean ``[B]``, or None.
        settings: The resolved options.

    Returns:
        The result. None if it would mean nothing: the loss generates random numbers, or contains a reentrant
        checkpoint, which ``torch.autograd.grad`` refuses.
    """
    call = inputs.sample_call()
    size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
    before = SavedRngState(inputs.params[0].device)

    def piece(index: int) -> MicrobatchResult:
        row = slice(index, index + 1)
        rows = [leaf[row].clone() if isinstance(leaf, Tensor) else leaf for leaf in batch]
        try:
            value, aux, gradients = _one_sample(call, rows, settings)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                raise _MeaninglessError from None
            raise
        if before.changed():
            raise _MeaninglessError
        tape = Tape(inputs.names, inputs.params, 1)
        for entry, gradient in zip(tape.tracked, gradients, strict=True):
            entry.kept = gradient[None]
        padding = None if is_padding is None else is_padding[row]
        return clip(Gradients(tape), value, aux, padding, settings)

    try:
        with torch.no_grad():
            return joined(map(piece, range(size)))
    except _MeaninglessError:
        return None


def _one_sample(
    call: SampleCall, rows: list[Any], settings: Settings
) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    """Return loss and auxiliary output with a batch axis of one, and the gradient of each parameter."""
    if not settings.options.keep_batch_dim:
        rows = [leaf[0] if isinstance(leaf, Tensor) else leaf for leaf in rows]
    with call.context(), torch.enable_grad():
        result = call.fn(*call.arguments(rows))
        value, aux = value_and_aux(result, settings.options.has_aux)
        gradients = torch.autograd.grad(
            value, call.parameters, allow_unused=True, materialize_grads=True
        )
    return value.detach()[None], tree_map(lambda leaf: leaf.detach()[None], aux), gradients
