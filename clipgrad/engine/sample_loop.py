"""This module runs the user's Python on one sample after the other, with ordinary autograd alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings, accumulate, clip
from clipgrad.engine.gradients import Gradients
from clipgrad.engine.inputs import Inputs, SampleCall
from clipgrad.engine.microbatch import value_and_aux
from clipgrad.engine.rng_state import SavedRngState
from clipgrad.engine.tape import Tape


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
    pieces = []
    sums: list[Tensor] | None = None
    for index in range(size):
        row = slice(index, index + 1)
        rows = [leaf[row].clone() if isinstance(leaf, Tensor) else leaf for leaf in batch]
        try:
            value, aux, gradients = _one_sample(call, rows, settings)
        except RuntimeError as error:
            if "use_reentrant" in str(error):
                return None
            raise
        if before.changed():
            return None
        tape = Tape(inputs.names, inputs.params, 1)
        for entry, gradient in zip(tape.tracked, gradients, strict=True):
            entry.kept = gradient[None]
        padding = None if is_padding is None else is_padding[row]
        with torch.no_grad():
            piece = clip(Gradients(tape), value, aux, padding, settings)
            sums = accumulate(sums, piece)
        pieces.append(piece)
    assert sums is not None
    return MicrobatchResult(
        sums,
        torch.cat([piece.values for piece in pieces]),
        [torch.cat(norms) for norms in zip(*(piece.norms for piece in pieces), strict=True)],
        tree_map(lambda *leaves: torch.cat(leaves), *(piece.aux for piece in pieces)),
        torch.cat([piece.nonfinite for piece in pieces]),
    )


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
