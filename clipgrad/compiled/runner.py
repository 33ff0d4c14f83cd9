"""``MicrobatchRunner``: the microbatches of one call, each on a graph, checked when the graph is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from clipgrad.compiled.check import compare, tolerance
from clipgrad.compiled.shape import fitted_batch, fitted_mask
from clipgrad.compiled.signature import refuse_modes, signature
from clipgrad.compiled.step import Compiler, Entry
from clipgrad.engine.clip_and_sum import MicrobatchResult, Settings
from clipgrad.engine.foreign_code import refuse_saved_tensors_hooks
from clipgrad.engine.inputs import Inputs
from clipgrad.engine.microbatch import run
from clipgrad.engine.rng_state import Generators


class MicrobatchRunner:
    """Runs the microbatches of one call; looks at signature and state once.

    Between them runs no code of the user's, unless a microbatch runs eagerly: then all is looked at again.
    """

    def __init__(self, compiler: Compiler, inputs: Inputs, settings: Settings, size: int) -> None:
        refuse_modes()
        refuse_saved_tensors_hooks()
        self._compiler, self._inputs, self._settings, self._size = compiler, inputs, settings, size
        self._device = inputs.params[0].device
        self._bounds = compiler.bounds_on(self._device, settings.clipping.norms)
        self._entry: Entry | None = None

    def __call__(self, rows: slice, mask: Tensor | None) -> MicrobatchResult:
        """Norms and clipped sums of one microbatch.

        Args:
            rows: Which samples.
            mask: Boolean, of these samples: those that are padding. None if none is.

        Raises:
            CompileError: If the step cannot be compiled, or was compiled for too many signatures.
            CompileMismatchError: If the compiled step does not compute what the eager one does.
        """
        settings, size = self._settings, self._size
        batch = self._inputs.rows(rows)
        count = rows.stop - rows.start
        padded = fitted_batch(batch, size)
        padding = fitted_mask(mask, count, size, self._device)
        given = self._given(padded, padding)
        # On a GPU the questions whether the graph serves are answered while it is running.
        ahead = None if self._entry is not None else self._compiler.ahead(given)
        entry = self._entry = self._entry or self._look(padded, padding, given)
        flat = entry.arguments(given)
        started = ahead is entry
        generators = None if started or entry.trusted(flat) else Generators(self._device)
        piece = entry.call(flat, started=started)
        dropping = entry.graph.asks and (
            settings.options.nan_safe or mask is not None or count < size
        )
        if (dropping or generators is not None) and not bool(piece.all_finite):
            # Rare: a sample has to be taken out of the factors themselves, which this graph does not do; and a batch
            # with one proves little.
            return self._eagerly(batch, mask)
        if generators is not None:
            with generators.replayed():
                eager = self._eagerly(padded, padding)
            slack = tolerance(entry.graph.module, self._device)
            compare(piece, eager, self._inputs.names, settings.clipping, slack)
            entry.checked = True
        return _first(piece, count)

    def _given(self, batch: Sequence[Any], padding: Tensor) -> list[Tensor]:
        tensors = [leaf for leaf in batch if isinstance(leaf, Tensor)]
        return [*self._inputs.params, *tensors, *self._inputs.others, padding, self._bounds]

    def _look(self, batch: Sequence[Any], padding: Tensor, given: Sequence[Tensor]) -> Entry:
        inputs, settings, compiler = self._inputs, self._settings, self._compiler
        now = signature(inputs, self._size, settings.clipping)
        return compiler.find(now) or compiler.make(
            inputs, batch, padding, self._bounds, settings, now, given
        )

    def _eagerly(self, batch: Sequence[Any], mask: Tensor | None) -> MicrobatchResult:
        self._entry = None
        inputs = self._inputs
        return run(inputs.loss, inputs.names, inputs.params, batch, mask, self._settings)


def _first(piece: MicrobatchResult, count: int) -> MicrobatchResult:
    """The piece without the rows that were added."""
    if piece.values.shape[0] == count:
        return piece
    return MicrobatchResult(
        piece.sums,
        piece.values[:count],
        [norms[:count] for norms in piece.norms],
        tree_map(lambda leaf: leaf[:count], piece.aux),
        piece.nonfinite[:count],
        piece.all_finite,
        piece.aliases_graph,
    )
