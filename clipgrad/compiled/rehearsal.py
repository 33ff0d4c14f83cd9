"""The eager run before a trace, on a copy of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clipgrad.engine.clip_and_sum import Settings
from clipgrad.engine.inputs import Inputs, copied
from clipgrad.engine.microbatch import run
from clipgrad.errors import CompileError


def rehearse(inputs: Inputs, batch: Sequence[Any], padding: Tensor, settings: Settings) -> None:
    """Refuse what the eager step refuses, and let the loss make what it makes at its first call (caches, tables).

    A loss that writes to its batch is refused too. Trace, compiled step and the eager step that it is compared with
    would each write once more, and a graph may write to rows that were added instead of to the caller's.

    Args:
        inputs: The arguments of the call.
        batch: Rows of one microbatch.
        padding: Which of them are none.
        settings: Of the transform.

    Raises:
        CompileError: If the loss writes to its batch, which is left as it was.
    """
    rows = copied(batch)
    versions = [leaf._version if isinstance(leaf, Tensor) else None for leaf in rows]
    run(inputs.loss, inputs.names, inputs.params, rows, padding, settings)
    for index, (leaf, version) in enumerate(zip(rows, versions, strict=True)):
        if isinstance(leaf, Tensor) and leaf._version != version:
            raise CompileError(
                f"the loss writes in place to batch argument {inputs.batch_paths()[index]}, which a compiled step "
                "cannot repeat. Use the out-of-place form, x = x.mul(2.0) instead of x.mul_(2.0), or leave compile "
                "out."
            )
