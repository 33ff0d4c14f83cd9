"""The user's Python on one sample after the other, with ordinary autograd: slow, and without anything of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings, clip, joined
from clipgrad.engine.gradients import Transformed
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.rng_state import Draws


def in_a_loop(
    inputs: Inputs, batch: Sequence[Any], is_padding: Tensor | None, settings: Settings
) -> MicrobatchResult | None:
    """Clipped sums of a microbatch, of gradients that ``torch.autograd.grad`` finds sample by sample.

    Args:
        inputs: The arguments of the call.
        batch: Rows of one microbatch.
        is_padding: Boolean ``[B]``, or None.
        settings: Of the batch.

    Returns:
        The result; None where it could not be compared, since the loss draws random numbers or asks for a backward
        pass of another kind (a reentrant checkpoint).
    """
    call = inputs.sample_call()
    size = next(leaf.shape[0] for leaf in batch if isinstance(leaf, Tensor))
    draws = Draws(inputs.params[0].device)
    pieces = []
    with call.context():
        for index in range(size):
            row = slice(index, index + 1)
            sample = [leaf[row].clone() if isinstance(leaf, Tensor) else leaf for leaf in batch]
            if not settings.options.keep_batch_dim:
                sample = [leaf[0] if isinstance(leaf, Tensor) else leaf for leaf in sample]
            try:
                with torch.enable_grad():
                    result = call.fn(*call.arguments(sample))
                    value, aux = result if settings.options.has_aux else (result, ())
                    gradients = torch.autograd.grad(
                        value, call.parameters, allow_unused=True, materialize_grads=True
                    )
            except RuntimeError as error:
                if "use_reentrant" in str(error):
                    return None
                raise
            if draws.since_last_asked():
                return None
            pieces.append(
                clip(
                    Transformed([gradient[None] for gradient in gradients]),
                    inputs.params,
                    value.detach()[None],
                    tree_map(lambda leaf: leaf.detach()[None], aux),
                    None if is_padding is None else is_padding[row],
                    settings,
                )
            )
    return joined(pieces, torch.arange(size))
